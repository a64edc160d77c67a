"""Idefics3 and SmolVLM: SigLIP-type tower over split images, pixel shuffle into the connector, Llama decoder.

The processor splits a large image into tiles and adds the whole image, shrunk, as the last one. In the prompt each tile
has a block of image tokens of its own, with text between the blocks that names the tile's row and column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from budgets.registry import FAMILIES
from visor.families.merging import TileMergingAdapter

if TYPE_CHECKING:
    from PIL.Image import Image


@FAMILIES.register("idefics3")
class Idefics3Adapter(TileMergingAdapter):
    """`Idefics3ForConditionalGeneration`."""

    image_fields: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_attention_mask", "image_sizes")
    tile_axis: ClassVar[int] = 1

    @property
    def tower(self) -> nn.Module:
        return self.inner.vision_model

    @property
    def projector(self) -> nn.Module:
        """Pixel shuffle and one matrix."""
        return self.inner.connector

    @property
    def merge(self) -> int:
        return self.model.config.scale_factor

    def tiles(self, pixel_inputs: Mapping[str, Tensor]) -> Tensor:
        return pixel_inputs["pixel_values"][0]

    def count_tiles(self, processor: Any, image: Image) -> int:
        return processor.image_processor([[image]], return_tensors="pt")["pixel_values"].shape[1]

    def feature_arguments(self, pixel_inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: pixel_inputs[name] for name in ("pixel_values", "pixel_attention_mask") if name in pixel_inputs}


@FAMILIES.register("smolvlm")
class SmolVLMAdapter(Idefics3Adapter):
    """`SmolVLMForConditionalGeneration`: Idefics3 with a smaller tower, and video as images."""
