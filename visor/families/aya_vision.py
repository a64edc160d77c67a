"""Aya Vision: SigLIP tower over tiles, pixel shuffle into a gated projector, Cohere 2 decoder with sliding windows.

The tiles of an image come row by row and a thumbnail of the whole last; in the prompt each has a block of image tokens
of its own, behind text that numbers the tile. Three of four decoder layers see a window only, which counts cached
tokens: reductions happen before the decoder, in-decoder ones are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from budgets.registry import FAMILIES
from visor.engine.compat import image_output
from visor.families.merging import TileMergingAdapter
from visor.vision.taps import tower_blocks

if TYPE_CHECKING:
    from PIL.Image import Image


@FAMILIES.register("aya_vision")
class AyaVisionAdapter(TileMergingAdapter):
    """`AyaVisionForConditionalGeneration`."""

    image_fields: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        return tower_blocks(self.tower)

    @property
    def merge(self) -> int:
        return self.model.config.downsample_factor

    def count_tiles(self, processor: Any, image: Image) -> int:
        return int(processor.image_processor([image], return_tensors="pt", crop_to_patches=True)["num_patches"][0])

    def feature_arguments(self, pixel_inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"pixel_values": pixel_inputs["pixel_values"]}

    def image_outputs(self, features: Sequence[Tensor], levels: Sequence[Sequence[Tensor]] = ()) -> dict[str, Any]:
        """This family wants one tensor: [1, all visual tokens, d]."""
        return {"image": image_output(torch.cat(list(features))[None])}
