"""LLaVA-NeXT (LLaVA-1.6): CLIP tower over tiles (anyres), two-layer projector, Llama or Mistral decoder."""

from __future__ import annotations

from typing import Any

from budgets.registry import FAMILIES
from visor.families.anyres import AnyresAdapter


@FAMILIES.register("llava_next")
class LlavaNextAdapter(AnyresAdapter):
    """`LlavaNextForConditionalGeneration`: every image of a prompt is tiled."""

    @property
    def pack_options(self) -> dict[str, Any]:
        return {"vision_feature_select_strategy": self.model.config.vision_feature_select_strategy}
