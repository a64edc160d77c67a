"""Inference: from a checkpoint on disk and a question about an image to an answer, under any schedule.

`LoadedModel.load(name)` is where others begin: prepare, encode, then generate, or prefill and decode apart. Training,
analysis, the harness and the commands may import it; it knows everything below, the model included.
"""

from visor._lazy import handed_on

__all__ = ["Generation", "LoadedModel"]
__getattr__ = handed_on(__name__, {"Generation": "prompt", "LoadedModel": "loaded_model"})
