"""Tiny VISOR models, awake: cross-attention blocks and router with weights that show."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import make_model, wake_cross_blocks

from visor.model.conversion import convert
from visor.model.modeling import VisorForConditionalGeneration

VISOR_FAMILIES = ("llava", "llava_onevision", "qwen2_5_vl")
CROSS_LAYERS, SLOTS = [0, 3], [1, 2, 4]
CONFIGURATIONS = [[], [4], [1, 4], [1, 2, 4]]


def make_visor(
    family: str, attention: str = "sdpa", awake: bool = True, **fields: Any
) -> VisorForConditionalGeneration:
    """Six layers: CROSS 0 and 3, slots 1, 2 and 4; configurations part at layer 1."""
    fields = {"configurations": CONFIGURATIONS, "router": {"hidden_size": 8}, **fields}
    model = convert(make_model(family, attention), CROSS_LAYERS, SLOTS, **fields)
    if awake:
        wake_cross_blocks(model)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for weight in model.router.parameters() if fields["router"] else ():
                weight.add_(torch.randn(weight.shape, generator=generator))
    return model
