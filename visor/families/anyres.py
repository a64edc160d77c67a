"""What LLaVA-NeXT and LLaVA-OneVision share: an image as a base crop and a grid of tiles (anyres), packed into rows.

An image gives its base crop, then the rows of the tiled image without the padding that made it fit, each row closed by
the learned `image_newline`. So the number of visual tokens depends on the image's size. Both families' modules bring
the same two functions for that arithmetic; the subclass names the module.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import ModuleType
from typing import Any, ClassVar

from torch import Tensor

from visor.families.base import FamilyAdapter


class AnyresAdapter(FamilyAdapter, ABC):
    """`...ForConditionalGeneration` whose inner model has `image_newline` and `pack_image_features`."""

    image_fields: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")
    packs_tiles: ClassVar[bool] = True

    @property
    def family_module(self) -> ModuleType:
        """The module of transformers that defines the model and its arithmetic of sizes."""
        return sys.modules[type(self.inner).__module__]

    @property
    @abstractmethod
    def pack_options(self) -> dict[str, Any]:
        """What this family's `pack_image_features` wants beside the features."""

    def tiles(self, pixel_inputs: Mapping[str, Tensor]) -> Tensor:
        """Base crop and tiles of one image; those that the processor added to fill its batch are cut off."""
        config = self.model.config
        num_tiles = self.family_module.image_size_to_num_patches(
            image_size=pixel_inputs["image_sizes"][0],
            grid_pinpoints=config.image_grid_pinpoints,
            patch_size=config.vision_config.image_size,
        )
        return pixel_inputs["pixel_values"][0, :num_tiles]

    def tile_layout(self, pixel_inputs: Mapping[str, Tensor]) -> tuple[int, tuple[int, int]]:
        """The base crop comes first."""
        config = self.model.config
        size, side = pixel_inputs["image_sizes"][0], config.vision_config.image_size
        return 0, tuple(self.family_module.get_anyres_image_grid_shape(size, config.image_grid_pinpoints, side))

    def pack(self, tiles_TNE: Tensor, pixel_inputs: Mapping[str, Tensor], separator: float | None = None) -> Tensor:
        """Tiles unpadded into rows, each closed by the learned newline (or by `separator`)."""
        newline_E = self.inner.image_newline
        if separator is not None:
            newline_E = tiles_TNE.new_full((tiles_TNE.shape[-1],), separator)
        packed, _ = self.inner.pack_image_features(
            [tiles_TNE], pixel_inputs["image_sizes"], image_newline=newline_E, **self.pack_options
        )
        return packed[0]
