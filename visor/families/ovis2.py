"""Ovis2: AIMv2 tower over tiles; a patch becomes a distribution over visual words, and that a mean of their embeddings.

The whole image comes first, then its tiles row by row. In the prompt every tile has a block of image tokens of its own,
with indicator tokens between the blocks that end a column or a row; these are text to us, and take their embeddings
from the table of visual words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from budgets.registry import FAMILIES
from visor.engine.compat import indicated_output
from visor.families.merging import TileMergingAdapter

if TYPE_CHECKING:
    from PIL.Image import Image


@FAMILIES.register("ovis2")
class Ovis2Adapter(TileMergingAdapter):
    """`Ovis2ForConditionalGeneration`. The processor tells the rows and columns of tiles ("grids")."""

    image_fields: ClassVar[tuple[str, ...]] = ("pixel_values", "grids")
    sample_fields: ClassVar[tuple[str, ...]] = ()

    @property
    def projector(self) -> nn.Module:
        """From distributions over visual words [..., words] to decoder width."""
        return self.inner.visual_embeddings_table

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.tower.transformer.encoder.layers

    @property
    def merge(self) -> int:
        return self.model.config.vision_config.hidden_stride

    def projections(self, block: nn.Module) -> dict[str, nn.Module]:
        return {"q": block.attention.q_proj, "k": block.attention.k_proj}

    def describe_images(self, processor: Any, images: Sequence[Image]) -> dict[str, Tensor]:
        return {}

    def count_tiles(self, processor: Any, image: Image) -> int:
        return self._num_tiles(processor.image_processor([image], return_tensors="pt")["grids"][0])

    def split_images(self, inputs: Mapping[str, Tensor], num_images: int) -> list[dict[str, Tensor]]:
        tiles = inputs["pixel_values"].split([self._num_tiles(grid) for grid in inputs["grids"]])
        return [
            {"pixel_values": own, "grids": grid[None]} for own, grid in zip(tiles, inputs["grids"], strict=True)
        ]

    def tile_layout(self, pixel_inputs: Mapping[str, Tensor]) -> tuple[int, tuple[int, int]]:
        """The whole image comes first."""
        rows, columns = pixel_inputs["grids"][0].tolist()
        return 0, (rows, columns) if rows * columns > 1 else (0, 0)

    def feature_arguments(self, pixel_inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        return {"pixel_values": pixel_inputs["pixel_values"]}

    def image_outputs(self, features: Sequence[Tensor], levels: Sequence[Sequence[Tensor]] = ()) -> dict[str, Any]:
        """One tensor [1, all visual tokens, d], and the embeddings of the indicators."""
        table, num = self.inner.visual_embeddings_table, self.tower.num_visual_indicator_tokens
        ids = torch.arange(table.num_embeddings - num, table.num_embeddings, device=table.weight.device)
        return {"image": indicated_output(torch.cat(list(features))[None], table(ids))}

    @staticmethod
    def _num_tiles(grid: Tensor) -> int:
        parts = int(grid.prod())
        return parts + 1 if parts > 1 else 1
