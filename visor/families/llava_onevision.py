"""LLaVA-OneVision: SigLIP tower over tiles (anyres), two-layer projector, Qwen2 decoder.

An image gives its base crop, then the unpadded rows of the tiled image, each row closed by the learned
`image_newline`; the number of visual tokens depends on the image's size.
"""

from __future__ import annotations

from typing import ClassVar

from budgets.registry import FAMILIES
from visor.families.base import FamilyAdapter


@FAMILIES.register("llava_onevision")
class LlavaOnevisionAdapter(FamilyAdapter):
    """`LlavaOnevisionForConditionalGeneration`, images and video frames alike."""

    raw_image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    image_token_fields: ClassVar[tuple[str, ...]] = ("image_token_id", "video_token_id")
