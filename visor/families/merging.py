"""Families whose projector merges neighbouring patches into one visual token: pixel shuffle or Qwen-VL's merger.

A tower token is no visual token there, so all encoder-side methods act on projected features, and what they read of
the tower's patches (attention, keys) is the mean over the patches that a visual token is made of. The features come
from the family's own `get_image_features`, so they are the model's to the bit.

Shapes: T tiles, P tower tokens of a tile (CLS included), N visual tokens of an image, n those of a tile, D decoder
width, E any width, H heads, d head width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from visor.families.base import FamilyAdapter

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class EncodedImage:
    """One image behind the projector.

    Args:
        features_ND: what the prompt takes.
        levels: what DeepStack adds behind the first layers, [N, D] each; empty without DeepStack.
        taps: by name, [N] or [N, E].
        grid: rows and columns of the visual tokens; None for several tiles.
    """

    features_ND: Tensor
    levels: tuple[Tensor, ...]
    taps: dict[str, Tensor]
    grid: tuple[int, int] | None


class MergingAdapter(FamilyAdapter, ABC):
    """Adds to the adapter how an image is encoded and read."""

    merges_patches: ClassVar[bool] = True
    packs_tiles: ClassVar[bool] = True

    @property
    @abstractmethod
    def merge(self) -> int:
        """Patches along the side of a visual token."""

    @abstractmethod
    def encode_image(self, pixel_inputs: Mapping[str, Tensor], taps: Collection[str]) -> EncodedImage:
        """One image through tower and projector."""


class TileMergingAdapter(MergingAdapter):
    """Towers over fixed tiles with separate query and key projections; pixel shuffle before the projector.

    Class attributes:
        tile_axis: axis of `pixel_values` that counts tiles.
    """

    sample_fields: ClassVar[tuple[str, ...]] = ("num_tiles",)
    tile_axis: ClassVar[int] = 0

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The tower's blocks."""
        return self.tower.encoder.layers

    @property
    def cuts_cls(self) -> bool:
        """True if the tower has a CLS, which is cut off before the projector."""
        return False

    def projections(self, block: nn.Module) -> dict[str, nn.Module]:
        """The modules of a block whose outputs [T, P, H d] are its queries "q" and keys "k"."""
        return {"q": block.self_attn.q_proj, "k": block.self_attn.k_proj}

    @abstractmethod
    def count_tiles(self, processor: Any, image: Image) -> int:
        """How many tiles the processor makes of an image."""

    def describe_images(self, processor: Any, images: Sequence[Image]) -> dict[str, Tensor]:
        """The processor puts the tiles of all images of a prompt into one row and does not say whose they are."""
        sizes = torch.tensor([[image.height, image.width] for image in images])
        if len(images) == 1:
            return {"image_sizes": sizes}
        counts = torch.tensor([self.count_tiles(processor, image) for image in images])
        return {"image_sizes": sizes, "num_tiles": counts}

    def split_images(self, inputs: Mapping[str, Tensor], num_images: int) -> list[dict[str, Tensor]]:
        total = inputs["pixel_values"].shape[self.tile_axis]
        counts = inputs["num_tiles"].tolist() if "num_tiles" in inputs else [total // num_images] * num_images
        if len(counts) != num_images or sum(counts) != total:
            raise ValueError(
                f"{total} tiles of {num_images} images: num_tiles must say how many each has, got {counts}"
            )
        pieces = {
            name: value.split(1 if name == "image_sizes" else counts, 0 if name == "image_sizes" else self.tile_axis)
            for name, value in inputs.items()
            if name != "num_tiles"
        }
        return [{name: piece[i] for name, piece in pieces.items()} for i in range(num_images)]

    @abstractmethod
    def feature_arguments(self, pixel_inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of `get_image_features` for one image."""

    def tile_layout(self, pixel_inputs: Mapping[str, Tensor]) -> tuple[int, tuple[int, int]]:
        """The whole image comes last; of the others the number is known, and rows and columns follow from its shape.

        Raises:
            ValueError: several tiles and no "image_sizes" [1, 2] (height, width) beside them.
        """
        num_parts = len(self.tiles(pixel_inputs)) - 1
        if num_parts == 0:
            return 0, (0, 0)
        if "image_sizes" not in pixel_inputs:
            raise ValueError("where the tiles look follows from the image's size; give image_sizes=[[height, width]]")
        height, width = pixel_inputs["image_sizes"][0].tolist()
        shapes = [(rows, num_parts // rows) for rows in range(1, num_parts + 1) if num_parts % rows == 0]
        return -1, min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1] * width / height)))

    def encode_image(self, pixel_inputs: Mapping[str, Tensor], taps: Collection[str]) -> EncodedImage:
        # Not at the top: vision.py knows adapters.
        from visor.vision.taps import BLOCK_OF_TAP, read_taps, tile_places, whole_image_places

        wanted = sorted({BLOCK_OF_TAP[tap] for tap in taps if tap in BLOCK_OF_TAP})
        with recorded_outputs({index: self.projections(self.blocks[index]) for index in wanted}) as seen:
            output = self.inner.get_image_features(**self.feature_arguments(pixel_inputs), return_dict=True)
        features = output.pooler_output
        features_ND = features.flatten(0, 1) if isinstance(features, Tensor) else torch.cat(list(features))
        num_tiles = len(self.tiles(pixel_inputs))
        features_TnD = features_ND.unflatten(0, (num_tiles, -1))
        values: dict[str, Tensor] = {}
        if seen:
            num_heads = self.model.config.vision_config.num_attention_heads
            read = read_taps(taps, seen, num_heads, self.cuts_cls, int(self.cuts_cls))
            values = {name: self.merged(value).flatten(0, 1) for name, value in read.items()}
        side = math.isqrt(features_TnD.shape[1])
        if "places" in taps:
            overview, parts = self.tile_layout(pixel_inputs)
            if parts == (0, 0):
                places_TN3 = whole_image_places(features_TnD, (side, side))
            else:
                places_TN3 = tile_places(features_TnD, overview, parts)
            values["places"] = places_TN3.flatten(0, 1)
        return EncodedImage(features_ND, (), values, (side, side) if num_tiles == 1 else None)

    def merged(self, value_TPx: Tensor) -> Tensor:
        """Patches' values [T, P] or [T, P, E] as means over the patches of a visual token: [T, n] or [T, n, E]."""
        side, merge = math.isqrt(value_TPx.shape[1]), self.merge
        cells = value_TPx.unflatten(1, (side // merge, merge, side // merge, merge))
        return cells.mean((2, 4)).flatten(1, 2)


def patch_tap(tap: str, q_SHd: Tensor, k_SHd: Tensor, rotate: Callable[[Tensor, Tensor], Any]) -> Tensor:
    """A tap over the S patches of an image, of a block with RoPE: [S] or [S, E].

    Args:
        rotate: the block's RoPE on queries and keys.
    """
    from visor.vision.taps import attention_received

    if tap.endswith("keys"):  # before RoPE: what a patch is, not where
        return k_SHd.flatten(1) if tap.startswith("last_") else k_SHd.mean(1)
    q_SHd, k_SHd = rotate(q_SHd, k_SHd)
    if tap.startswith("last_"):  # one head over the full width
        q_SHd, k_SHd = q_SHd.flatten(1)[:, None], k_SHd.flatten(1)[:, None]
    return attention_received(q_SHd.transpose(0, 1)[None], k_SHd.transpose(0, 1)[None])[0]


@contextmanager
def noting_angles(attentions: Mapping[int, nn.Module]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Within it, forwards leave the cos and sin that each attention was given in the dict, by block."""
    angles: dict[int, tuple[Tensor, Tensor]] = {}
    handles = [
        attention.register_forward_pre_hook(
            lambda _m, _a, kwargs, i=index: angles.__setitem__(i, kwargs["position_embeddings"]), with_kwargs=True
        )
        for index, attention in attentions.items()
    ]
    try:
        yield angles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_outputs(modules: Mapping[int, Mapping[str, nn.Module]]):
    """Within it, forwards leave the outputs of the given modules in the dict, by block and name."""
    seen: dict[int, dict[str, Tensor]] = {index: {} for index in modules}
    handles = [
        module.register_forward_hook(lambda _m, _a, out, i=index, n=name: seen[i].__setitem__(n, out))
        for index, named in modules.items()
        for name, module in named.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
