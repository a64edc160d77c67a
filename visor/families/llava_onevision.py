"""LLaVA-OneVision: SigLIP tower over tiles (anyres), two-layer projector, Qwen2 decoder.

An image gives its base crop, then the unpadded rows of the tiled image, each row closed by the learned
`image_newline`; the number of visual tokens depends on the image's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import (
    get_anyres_image_grid_shape,
    image_size_to_num_patches,
)

from budgets.registry import FAMILIES
from visor.families.base import FamilyAdapter


@FAMILIES.register("llava_onevision")
class LlavaOnevisionAdapter(FamilyAdapter):
    """`LlavaOnevisionForConditionalGeneration`, images and video frames alike."""

    raw_image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    image_token_fields: ClassVar[tuple[str, ...]] = ("image_token_id", "video_token_id")
    packs_tiles: ClassVar[bool] = True

    def tiles(self, pixel_inputs: Mapping[str, Tensor]) -> Tensor:
        """Base crop and tiles of one image; those that the processor added to fill its batch are cut off."""
        pixels = pixel_inputs["pixel_values"]
        config = self.model.config
        num_tiles = image_size_to_num_patches(
            image_size=pixel_inputs["image_sizes"][0],
            grid_pinpoints=config.image_grid_pinpoints,
            patch_size=config.vision_config.image_size,
        )
        return pixels[0, :num_tiles]

    def tile_layout(self, pixel_inputs: Mapping[str, Tensor]) -> tuple[int, tuple[int, int]]:
        """The base crop comes first."""
        config = self.model.config
        size, side = pixel_inputs["image_sizes"][0], config.vision_config.image_size
        return 0, tuple(get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side))

    def pack(self, tiles_TNE: Tensor, pixel_inputs: Mapping[str, Tensor], separator: float | None = None) -> Tensor:
        """Tiles unpadded into rows, each closed by the learned newline (or by `separator`)."""
        newline_E = self.inner.image_newline
        if separator is not None:
            newline_E = tiles_TNE.new_full((tiles_TNE.shape[-1],), separator)
        packed, _ = self.inner.pack_image_features(
            [tiles_TNE],
            pixel_inputs["image_sizes"],
            image_newline=newline_E,
            vision_aspect_ratio=self.model.config.vision_aspect_ratio,
        )
        return packed[0]
