"""From a trained vision-language model to a VISOR model of the same weights, with new cross-attention blocks.

The blocks' output projections start at zero, so that a converted model computes what the base would compute if the
layers that do not run on visual tokens saw none; with every layer SELF it is the base, to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from visor.families.base import adapter_for
from visor.model.configuration import VisorConfig
from visor.model.modeling import VisorForConditionalGeneration
from visor.reduction.visor import default_layers


def convert(
    base_model: nn.Module,
    cross_layers: Sequence[int] | None = None,
    self_layers: Sequence[int] | None = None,
    **fields: Any,
) -> VisorForConditionalGeneration:
    """A VISOR model around a base, which it takes over (no copy is made).

    Args:
        base_model: a `...ForConditionalGeneration` model of a supported family.
        cross_layers, self_layers: by default L/3 of each, evenly spaced.
        fields: other fields of `VisorConfig`.

    Raises:
        ValueError: the family is not supported, the model is a VISOR model already, or a layer does not fit.
    """
    if getattr(base_model.config, "model_type", None) == VisorConfig.model_type:
        raise ValueError("this is a VISOR model already; convert its base (`model.base`), or train it as it is")
    num_layers = len(adapter_for(base_model).decoder.layers)
    self_slots, cross_slots = default_layers(num_layers)
    config = VisorConfig(
        base_config=copy.deepcopy(base_model.config),
        cross_layers=cross_slots if cross_layers is None else cross_layers,
        self_layers=self_slots if self_layers is None else self_layers,
        **fields,
    )
    return VisorForConditionalGeneration.from_base(base_model, config)
