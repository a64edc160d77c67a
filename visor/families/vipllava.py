"""ViP-LLaVA: CLIP tower read at several depths, a norm and two matrices, Llama decoder; a fixed number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from budgets.registry import FAMILIES
from visor.engine.compat import image_output
from visor.families.base import FamilyAdapter


@FAMILIES.register("vipllava")
class VipLlavaAdapter(FamilyAdapter):
    """`VipLlavaForConditionalGeneration`: its config has no select strategy, the first token is always cut."""

    @property
    def cuts_first_token(self) -> bool:
        return True

    def image_outputs(self, features: Sequence[Tensor], levels: Sequence[Sequence[Tensor]] = ()) -> dict[str, Any]:
        """This family wants one tensor: [1, all visual tokens, d]."""
        return {"image": image_output(torch.cat(list(features))[None])}
