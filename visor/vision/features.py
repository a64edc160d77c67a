"""What the vision tower yields for an image, by the way its family takes: whole, in packed tiles, or merged.

What else a method may see of the tower is `visor.vision.taps`.

Shapes: B samples, N visual tokens, T of them after reduction (in `ReducedFeatures`) or tiles, P tower tokens of a tile
(CLS included), M patches that the tower began with, D feature width, E any width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from budgets.registry import METHODS
from budgets.schedule import Reduction
from visor.engine.compat import feature_layers
from visor.families.base import FamilyAdapter
from visor.vision.taps import (
    BLOCK_OF_TAP,
    check_taps,
    packed_tap,
    read_taps,
    recorded_projections,
    tile_places,
    tower_blocks,
    tower_has_cls,
    whole_image_places,
)


@dataclass(frozen=True)
class VisionFeatures:
    """Tower output of samples that have the same number N of visual tokens.

    Args:
        features_BND: features at `stage`.
        stage: "tower" before the projector; "projected" where the family packs tiles after it (then all methods act
            on projected features).
        taps: by name (`TAPS`), each [B, N] or [B, N, E].
        grid: rows and columns of the tokens, or None if they form no plain grid.
        sample_keys: one a sample, a hash of its pixels: what a random choice may depend on.
        cls_B1D: the CLS feature, where the tower has one that is not among the N.
        image_scale: side of the encoded image relative to the one given.
        inside: the reduction that happened inside the tower: the N features are what it left. None if none did.
        inside_kept_BM: of the M patches that the tower began with, which stand for themselves; None if none went.
        text: by sample the embeddings [num_text, d] of the prompt's text, for the methods that read it.
        levels: what DeepStack adds behind the first decoder layers, [B, N, d] each (`visor.engine.deepstack`).
    """

    features_BND: Tensor
    stage: Literal["tower", "projected"] = "tower"
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    grid: tuple[int, int] | None = None
    sample_keys: tuple[str, ...] = ()
    cls_B1D: Tensor | None = None
    image_scale: float = 1.0
    inside: Reduction | None = None
    inside_kept_BM: Tensor | None = None
    text: tuple[Tensor, ...] = ()
    levels: tuple[Tensor, ...] = ()

    def tap(self, name: str) -> Tensor:
        """The tap `name`.

        Raises:
            ValueError: the features were encoded without it.
        """
        if name not in self.taps:
            raise ValueError(
                f"these vision features were encoded without the tap {name!r} (they have {sorted(self.taps)}); "
                f"encode with taps={{{name!r}}}, or the union of the taps of all methods that share the features"
            )
        return self.taps[name]

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.features_BND.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory that the tensors take, for a cache with a bound."""
        optional = [each for each in (self.cls_B1D, self.inside_kept_BM) if each is not None]
        tensors = [self.features_BND, *self.taps.values(), *optional, *self.levels]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: torch.device | str) -> VisionFeatures:
        """The same on another device."""
        return replace(
            self,
            features_BND=self.features_BND.to(device),
            taps={name: tap.to(device) for name, tap in self.taps.items()},
            cls_B1D=None if self.cls_B1D is None else self.cls_B1D.to(device),
            inside_kept_BM=None if self.inside_kept_BM is None else self.inside_kept_BM.to(device),
            text=tuple(each.to(device) for each in self.text),
            levels=tuple(level.to(device) for level in self.levels),
        )

    @staticmethod
    def stack(rows: Sequence[VisionFeatures]) -> VisionFeatures:
        """One batch of several; all must agree in N, stage, grid and scale. Taps that not all of them have go."""
        first = rows[0]
        form = lambda row: (row.num_tokens, row.stage, row.grid, row.inside)
        assert all(form(row) == form(first) for row in rows)
        shared = set(first.taps).intersection(*(row.taps for row in rows))
        return replace(
            first,
            features_BND=torch.cat([row.features_BND for row in rows]),
            taps={name: torch.cat([row.taps[name] for row in rows]) for name in sorted(shared)},
            sample_keys=tuple(key for row in rows for key in row.sample_keys),
            cls_B1D=None if first.cls_B1D is None else torch.cat([row.cls_B1D for row in rows]),
            inside_kept_BM=None if first.inside is None else torch.cat([row.inside_kept_BM for row in rows]),
            text=tuple(text for row in rows for text in row.text),
            levels=tuple(torch.cat(levels) for levels in zip(*(row.levels for row in rows), strict=True)),
        )


@dataclass(frozen=True)
class ReducedFeatures:
    """What an encoder-side method leaves.

    Args:
        features_BTD: the tokens that are left.
        kept_BN: which of the N tokens stand for themselves; None if every token lives on in a mean.
        places_BT: for each token that is left the one of the N in whose place it stands, all different; None if that
            is not known. It gives a token its position ids where these are places in the image (M-RoPE), its DeepStack
            levels, and its block of the prompt where an image has several.
        levels: the DeepStack levels of the tokens that are left, [B, T, d] each; set by whoever ran the method.
    """

    features_BTD: Tensor
    kept_BN: Tensor | None
    places_BT: Tensor | None = None
    levels: tuple[Tensor, ...] = ()

    def with_levels(self, vision: VisionFeatures) -> ReducedFeatures:
        """With the levels of the features that were reduced.

        Raises:
            ValueError: it is not known where the tokens stand.
        """
        if not vision.levels:
            return self
        if self.places_BT is None:
            raise ValueError(
                "this method does not say in whose place its tokens stand, so their DeepStack levels are not known; "
                "use a method that selects tokens"
            )
        index_BT1 = self.places_BT[..., None]
        levels = tuple(level.gather(1, index_BT1.expand(-1, -1, level.shape[-1])) for level in vision.levels)
        return replace(self, levels=levels)

    def row(self, index: int) -> ReducedFeatures:
        """One sample of the batch, B = 1."""
        of = lambda x: None if x is None else x[index : index + 1]
        levels = tuple(of(level) for level in self.levels)
        return ReducedFeatures(of(self.features_BTD), of(self.kept_BN), of(self.places_BT), levels)


def resized(tiles_T3HW: Tensor, patch_size: int, image_scale: float) -> Tensor:
    """The tiles at `image_scale`, their sides rounded to whole patches. Antialiased, or fine print would alias."""
    if image_scale == 1.0:
        return tiles_T3HW
    size = [max(1, round(side // patch_size * image_scale)) * patch_size for side in tiles_T3HW.shape[-2:]]
    resize = nn.functional.interpolate
    return resize(tiles_T3HW.float(), size=size, mode="bicubic", antialias=True).to(tiles_T3HW.dtype)


def run_tower(
    adapter: FamilyAdapter, tiles_T3HW: Tensor, taps: Collection[str], image_scale: float = 1.0
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    """One pass of the tower.

    Returns:
        Features [T, N, D] as the projector takes them; the CLS features [T, 1, D] if there is a CLS that the projector
        does not see; the taps, by name.
    """
    check_taps(taps)
    tower, config = adapter.tower, adapter.model.config
    has_cls = tower_has_cls(tower)
    cuts_cls = adapter.cuts_first_token
    layers = feature_layers(config)
    tiles_T3HW = resized(tiles_T3HW, config.vision_config.patch_size, image_scale)
    # A plain call where nothing is resized: the features must be the model's own to the bit.
    resizing = {} if image_scale == 1.0 else {"interpolate_pos_encoding": True}
    blocks = tower_blocks(tower)
    with ExitStack() as stack:
        wanted = {BLOCK_OF_TAP[tap] for tap in taps if tap in BLOCK_OF_TAP}
        seen = {index: stack.enter_context(recorded_projections(blocks[index])) for index in sorted(wanted)}
        hidden = tower(tiles_T3HW, output_hidden_states=layers, return_dict=True, **resizing).hidden_states
    chosen_TPD = hidden[layers] if isinstance(layers, int) else torch.cat([hidden[layer] for layer in layers], dim=-1)
    features_TND = chosen_TPD[:, 1:] if cuts_cls else chosen_TPD
    cls_T1D = chosen_TPD[:, :1] if has_cls and cuts_cls else None
    if not seen:
        return features_TND, cls_T1D, {}
    num_heads = config.vision_config.num_attention_heads
    # Not cut: the CLS is one of the N visual tokens (select strategy "full" over CLIP); it scores what it pays.
    return features_TND, cls_T1D, read_taps(taps, seen, num_heads, has_cls and cuts_cls, int(cuts_cls))


def encode_images(
    adapter: FamilyAdapter,
    pixel_inputs: Sequence[Mapping[str, Tensor]],
    keys: Sequence[str],
    taps: Collection[str] = (),
    image_scale: float = 1.0,
    inside: Reduction | None = None,
) -> list[VisionFeatures]:
    """The tower over several images at once, one `VisionFeatures` of B = 1 for each.

    Args:
        pixel_inputs: for each image what the processor made of it, on the model's device.
        keys: for each image the hash of its pixels; equal ones are encoded once.
        taps: names from `TAPS`.
        image_scale: side of the image given to the tower relative to the original.
        inside: a reduction to make inside the tower, instead of taps.

    Raises:
        ValueError: unknown taps, or tiles that shall be scaled or reduced one by one and then packed.
    """
    check_taps(taps)
    if image_scale != 1.0 and adapter.packs_tiles and not adapter.merges_patches:
        raise ValueError(f"{type(adapter).__name__}: an image of several tiles cannot be down-sampled inside them")
    first_with = {key: index for index, key in reversed(list(enumerate(keys)))}
    distinct = sorted(first_with.values())
    own_pixels, own_keys = [pixel_inputs[index] for index in distinct], [keys[index] for index in distinct]
    if adapter.merges_patches:
        pairs = zip(own_pixels, own_keys, strict=True)
        rows = [encode_merged(adapter, inputs, key, taps, image_scale, inside) for inputs, key in pairs]
    elif inside is not None:
        rows = encode_inside(adapter, [adapter.tiles(inputs) for inputs in own_pixels], own_keys, inside)
    elif adapter.packs_tiles:
        rows = encode_packed(adapter, own_pixels, own_keys, taps)
    else:
        rows = encode_whole(adapter, own_pixels, own_keys, taps, image_scale)
    by_key = dict(zip(own_keys, rows, strict=True))
    return [by_key[key] for key in keys]


def encode_packed(
    adapter: FamilyAdapter, pixel_inputs: Sequence[Mapping[str, Tensor]], keys: Sequence[str], taps: Collection[str]
) -> list[VisionFeatures]:
    """Images of several tiles, all tiles in one pass; an image's are packed into one sequence after the projector."""
    tiles = [adapter.tiles(inputs) for inputs in pixel_inputs]
    counts = [len(image) for image in tiles]
    features_TND, _, tap_values = run_tower(adapter, torch.cat(tiles), taps)
    by_image = adapter.projector(features_TND).split(counts)
    split_taps = {name: value.split(counts) for name, value in tap_values.items()}
    rows = []
    for place, (inputs, key, features) in enumerate(zip(pixel_inputs, keys, by_image, strict=True)):
        tile_taps = {name: value[place] for name, value in split_taps.items()}
        if "places" in taps:
            tile_taps["places"] = tile_places(features, *adapter.tile_layout(inputs))
        rows.append(
            VisionFeatures(
                adapter.pack(features, inputs)[None],
                stage="projected",
                taps={name: packed_tap(adapter, value, inputs)[None] for name, value in tile_taps.items()},
                sample_keys=(key,),
            )
        )
    return rows


def encode_whole(
    adapter: FamilyAdapter,
    pixel_inputs: Sequence[Mapping[str, Tensor]],
    keys: Sequence[str],
    taps: Collection[str],
    image_scale: float,
) -> list[VisionFeatures]:
    """Images of one tile each, all in one pass; their features are those before the projector."""
    tiles = torch.cat([adapter.tiles(inputs) for inputs in pixel_inputs])
    features_TND, cls_T1D, tap_values = run_tower(adapter, tiles, taps, image_scale)
    patch_size = adapter.model.config.vision_config.patch_size
    grid = tuple(max(1, round(side // patch_size * image_scale)) for side in tiles.shape[-2:])
    if "places" in taps:
        tap_values["places"] = whole_image_places(features_TND, grid)
    rows = []
    for place, key in enumerate(keys):
        row = slice(place, place + 1)
        rows.append(
            VisionFeatures(
                # A slice would keep the whole batch alive in the cache of whoever holds one row.
                features_TND[row].clone(),
                taps={name: value[row].clone() for name, value in tap_values.items()},
                grid=grid if grid[0] * grid[1] == features_TND.shape[1] else None,
                sample_keys=(key,),
                cls_B1D=None if cls_T1D is None else cls_T1D[row].clone(),
                image_scale=image_scale,
            )
        )
    return rows


def encode_merged(
    adapter: FamilyAdapter,
    pixel_inputs: Mapping[str, Tensor],
    key: str,
    taps: Collection[str],
    image_scale: float,
    inside: Reduction | None,
) -> VisionFeatures:
    """One image of a family whose projector merges patches (`visor.families.merging`).

    Raises:
        ValueError: the image shall be scaled, or tokens shall go inside the tower: its patches are no visual tokens.
    """
    if image_scale != 1.0 or inside is not None:
        what = f"a smaller image ({image_scale=})" if inside is None else METHODS.get(inside.method).title
        raise ValueError(
            f"{type(adapter).__name__} merges patches into visual tokens behind a tower of its own making: {what} is "
            "not supported there; use a method that acts on projected features"
        )
    image = adapter.encode_image(pixel_inputs, taps)
    return VisionFeatures(
        image.features_ND[None],
        stage="projected",
        taps={name: value[None] for name, value in image.taps.items()},
        grid=image.grid,
        sample_keys=(key,),
        levels=tuple(level[None] for level in image.levels),
    )


def encode_inside(
    adapter: FamilyAdapter, tiles: Sequence[Tensor], keys: Sequence[str], inside: Reduction
) -> list[VisionFeatures]:
    """What a method that acts inside the tower leaves of each image, all images in one pass.

    Raises:
        ValueError: images of several tiles: packing needs the grid that the method dissolves.
    """
    from visor.vision.tower import TowerWalk

    method = METHODS.get(inside.method)(**dict(inside.params))
    if adapter.packs_tiles:
        raise ValueError(
            f"{method.title} acts inside the tower and dissolves the grid of a tile, but {type(adapter).__name__} "
            "packs an image's tiles by that grid (it crops padding and ends lines): use a method that acts after the "
            "tower"
        )
    walk = TowerWalk(adapter)
    hidden_TPD, kept_TM = method.reduce_in_tower(walk, torch.cat(list(tiles)), inside.keep)
    features_TKD = walk.features(hidden_TPD)
    if features_TKD.shape[1] != inside.keep:
        raise ValueError(f"{method.title} left {features_TKD.shape[1]} visual tokens, its schedule says {inside.keep}")
    return [
        VisionFeatures(
            features_TKD[row : row + 1].clone(), sample_keys=(key,), inside=inside,
            inside_kept_BM=kept_TM[row : row + 1].clone(),
        )
        for row, key in enumerate(keys)
    ]  # fmt: skip


def project(adapter: FamilyAdapter, vision_BTD: Tensor, stage: str) -> Tensor:
    """Features at `stage` to the decoder's width."""
    return vision_BTD if stage == "projected" else adapter.projector(vision_BTD)
