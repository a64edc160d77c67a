"""Gemma 3: SigLIP tower, windows of patches averaged down to 256 tokens, one matrix; most decoder layers see a window.

An image is one block of a fixed number of tokens, which see each other in both directions (`token_type_ids` say where
they stand). The decoder's window counts cached tokens, so no schedule may change what its layers hold: reductions
happen before the decoder, in a shorter prompt; in-decoder ones are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from budgets.registry import FAMILIES
from visor.engine.compat import image_output
from visor.families.merging import TileMergingAdapter
from visor.vision.taps import tower_blocks

if TYPE_CHECKING:
    from PIL.Image import Image


@FAMILIES.register("gemma3")
class Gemma3Adapter(TileMergingAdapter):
    """`Gemma3ForConditionalGeneration`, without pan and scan: it makes several images of one."""

    @property
    def blocks(self) -> Sequence[torch.nn.Module]:
        return tower_blocks(self.tower)

    @property
    def merge(self) -> int:
        return self.projector.kernel_size

    def count_tiles(self, processor: Any, image: Image) -> int:
        return 1

    def describe_images(self, processor: Any, images: Sequence[Image]) -> dict[str, Tensor]:
        return {}

    def split_images(self, inputs: Mapping[str, Tensor], num_images: int) -> list[dict[str, Tensor]]:
        """
        Raises:
            ValueError: pan and scan has made more tiles than there are images.
        """
        if len(inputs["pixel_values"]) != num_images:
            raise ValueError(
                f"{len(inputs['pixel_values'])} tiles of {num_images} images: pan and scan shows an image several "
                "times; turn it off (do_pan_and_scan=False)"
            )
        return super().split_images(inputs, num_images)

    def feature_arguments(self, pixel_inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"pixel_values": pixel_inputs["pixel_values"]}

    def prompt_arguments(self, input_ids_BP: Tensor) -> dict[str, Any]:
        """Which tokens see each other in both directions."""
        return {"token_type_ids": (input_ids_BP == self.model.config.image_token_id).long()}

    def image_outputs(self, features: Sequence[Tensor], levels: Sequence[Sequence[Tensor]] = ()) -> dict[str, Any]:
        """This family wants one tensor: [1, all visual tokens, d]."""
        return {"image": image_output(torch.cat(list(features))[None])}
