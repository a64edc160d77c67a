"""LLaVA-OneVision: SigLIP tower over tiles (anyres), two-layer projector, Qwen2 decoder; long images are shrunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from budgets.registry import FAMILIES
from visor.families.anyres import AnyresAdapter


@FAMILIES.register("llava_onevision")
class LlavaOnevisionAdapter(AnyresAdapter):
    """`LlavaOnevisionForConditionalGeneration`, images and video frames alike.

    The model gives tiles to the only image of a prompt; of several images each is its base crop.
    """

    raw_image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    image_token_fields: ClassVar[tuple[str, ...]] = ("image_token_id", "video_token_id")
    sample_fields: ClassVar[tuple[str, ...]] = ("batch_num_images",)

    @property
    def pack_options(self) -> dict[str, Any]:
        return {"vision_aspect_ratio": self.model.config.vision_aspect_ratio}

    def tiles(self, pixel_inputs: Mapping[str, Tensor]) -> Tensor:
        """Base crop and tiles of the only image of a prompt, the base crop of one of several."""
        num_images = pixel_inputs.get("batch_num_images")
        if num_images is not None and int(num_images.max()) > 1:
            return pixel_inputs["pixel_values"].flatten(0, -4)[:1]
        return super().tiles(pixel_inputs)
