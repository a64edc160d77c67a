"""InternVL in its Hugging Face form: InternViT tower over tiles, pixel shuffle, two-layer projector, Qwen2 or Llama.

The tiles of an image come row by row and a thumbnail of the whole last; the prompt holds one block of image tokens an
image. An image that fits one tile has no thumbnail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from budgets.registry import FAMILIES
from visor.compat import image_output
from visor.families.merging import TileMergingAdapter


@FAMILIES.register("internvl")
class InternVLAdapter(TileMergingAdapter):
    """`InternVLForConditionalGeneration`."""

    image_fields: ClassVar[tuple[str, ...]] = ("pixel_values",)

    @property
    def merge(self) -> int:
        return round(1 / self.model.config.downsample_ratio)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.tower.encoder.layer

    @property
    def cuts_cls(self) -> bool:
        return self.model.config.vision_feature_select_strategy == "default"

    def projections(self, block: nn.Module) -> dict[str, nn.Module]:
        """Behind the norms of queries and keys, which are the identity where the tower has none."""
        return {"q": block.attention.q_norm, "k": block.attention.k_norm}

    def split_images(self, inputs: Mapping[str, Tensor], num_images: int) -> list[dict[str, Tensor]]:
        """The processor puts the tiles of all images into one stack, and does not say whose they are."""
        if num_images > 1 and len(inputs["pixel_values"]) != num_images:
            raise ValueError(
                f"{num_images} images in a prompt, some of several tiles: the processor does not tell whose tile is "
                "whose. Load the processor with crop_to_patches=False, or give one image a prompt"
            )
        if num_images == 1:
            return [dict(inputs)]
        return [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(num_images)]

    def feature_arguments(self, pixel_inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"pixel_values": pixel_inputs["pixel_values"]}

    def image_outputs(self, features: Sequence[Tensor], levels: Sequence[Sequence[Tensor]] = ()) -> dict[str, Any]:
        """This family wants one tensor: [1, all visual tokens, d]."""
        return {"image": image_output(torch.cat(list(features))[None])}
