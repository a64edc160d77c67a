"""LLaVA-1.5: CLIP or SigLIP tower, two-layer projector, Llama or Qwen2 decoder; a fixed number of tokens an image."""

from __future__ import annotations

from budgets.registry import FAMILIES
from visor.families.base import FamilyAdapter


@FAMILIES.register("llava")
class LlavaAdapter(FamilyAdapter):
    """`LlavaForConditionalGeneration`: every image gives the same number of visual tokens, in one block."""
