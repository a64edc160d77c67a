"""Take the image away from one layer: text attends to text there, and the visual tokens pass unchanged.

What an answer loses by it says whether that layer's look at the image mattered; on easy tasks most do not.
"""

from __future__ import annotations

from budgets.schedule import LayerMode, LayerOp, Schedule


def without_image_in(layer: int, num_layers: int, num_visual: int) -> Schedule:
    """The dense schedule with one TEXT layer.

    Raises:
        ValueError: there is no such layer.
    """
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer {layer} does not exist; the decoder has layers 0 to {num_layers - 1}")
    ops = [LayerOp()] * num_layers
    ops[layer] = LayerOp(LayerMode.TEXT)
    return Schedule(tuple(ops), num_visual)
