"""Training VISOR, and its rival M3, on any base: recipes, data, the one training loop, search, labels, router.

The command is `python -m visor.training.run`. Imported by `visor.embedded` and by scripts; imports `visor.model` and
what lies below it. It knows no tokenizer's vocabulary: whoever has scenes with ground truth hands in an object that
puts it into token ids (`visor.training.auxiliary.scene_targets`).
"""

from visor._lazy import handed_on

__all__ = ["Recipe", "load", "run_stage"]
__getattr__ = handed_on(__name__, {"Recipe": "recipe", "load": "recipe", "run_stage": "runner"})
