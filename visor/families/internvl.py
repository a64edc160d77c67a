"""InternVL in its Hugging Face form: InternViT tower over tiles, pixel shuffle, two-layer projector, Qwen2 or Llama.

The tiles of an image come row by row and a thumbnail of the whole last; the prompt holds one block of image tokens an
image. An image that fits one tile has no thumbnail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from budgets.registry import FAMILIES
from visor.engine.compat import image_output
from visor.families.merging import TileMergingAdapter

if TYPE_CHECKING:
    from PIL.Image import Image


@FAMILIES.register("internvl")
class InternVLAdapter(TileMergingAdapter):
    """`InternVLForConditionalGeneration`."""

    image_fields: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")

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

    def count_tiles(self, processor: Any, image: Image) -> int:
        return int(processor.image_processor([image], return_tensors="pt", crop_to_patches=True)["num_patches"][0])

    def feature_arguments(self, pixel_inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"pixel_values": pixel_inputs["pixel_values"]}

    def image_outputs(self, features: Sequence[Tensor], levels: Sequence[Sequence[Tensor]] = ()) -> dict[str, Any]:
        """This family wants one tensor: [1, all visual tokens, d]."""
        return {"image": image_output(torch.cat(list(features))[None])}
