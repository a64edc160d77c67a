"""Idefics3 and SmolVLM: SigLIP-type tower over split images, pixel shuffle into the connector, Llama decoder.

The processor splits a large image into tiles and adds the whole image, shrunk, as the last one. In the prompt each tile
has a block of image tokens of its own, with text between the blocks that names the tile's row and column.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from budgets.registry import FAMILIES
from visor.families.merging import TileMergingAdapter


@FAMILIES.register("idefics3")
class Idefics3Adapter(TileMergingAdapter):
    """`Idefics3ForConditionalGeneration`."""

    image_fields: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_attention_mask")

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

    def split_images(self, inputs: Mapping[str, Tensor], num_images: int) -> list[dict[str, Tensor]]:
        """The processor puts the tiles of all images of a sample into one row, and does not say whose they are."""
        if num_images > 1 and inputs["pixel_values"].shape[1] != num_images:
            raise ValueError(
                f"{num_images} images in a prompt, some split into tiles: the processor does not tell whose tile is "
                "whose. Load the processor with do_image_splitting=False, or give one image a prompt"
            )
        if num_images == 1:
            return [dict(inputs)]
        return [{name: value[:, i : i + 1] for name, value in inputs.items()} for i in range(num_images)]

    def feature_arguments(self, pixel_inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: pixel_inputs[name] for name in self.image_fields if name in pixel_inputs}


@FAMILIES.register("smolvlm")
class SmolVLMAdapter(Idefics3Adapter):
    """`SmolVLMForConditionalGeneration`: Idefics3 with a smaller tower, and video as images."""
