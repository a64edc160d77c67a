"""What the vision tower yields for an image, and what a method may see of it.

Hooks read the queries and keys that a tower block computes anyway; scores are made from q.k^T in chunks of rows, so
nothing changes in the tower's own attention kernel and no full attention matrix is ever stored.

Shapes: B samples, N visual tokens, D feature width, T tiles, P tower tokens of a tile (CLS included), H heads,
d head width, R rows of a chunk, E any width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from budgets.registry import METHODS
from budgets.schedule import Reduction
from visor.families.base import FamilyAdapter
from visor.stopwatch import scoring

TAPS = ("salience", "keys", "first_salience", "last_salience", "last_keys", "places")
"""What `encode_images` can read of the tower beside its features.

"salience" [B, N]: softmax attention in block -2, mean over heads, that the CLS row pays each patch; in a tower without
CLS (SigLIP) the attention a patch receives, averaged over all rows. "keys" [B, N, d]: keys of that block, mean over
heads. "first_salience" [B, N]: as "salience", of block 0. "last_salience" [B, N], "last_keys" [B, N, w]: of the last
block, its heads taken for one over the full width. "places" [B, N, 3]: where a token looks: (0, y, x) in the tile that
shows the whole image, its sides 1 long; (1, y, x) in the grid of the tiles that show parts of it, a tile's side 1 long;
-1 at tokens that stand for no patch."""

BLOCK_OF_TAP = {"salience": -2, "keys": -2, "first_salience": 0, "last_salience": -1, "last_keys": -1}
"""Scores come from the block before the last (VisionZip and its kin); features from the projector's own layer."""

ROWS_PER_CHUNK = 256


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
        levels: what DeepStack adds behind the first decoder layers, [B, N, d] each (`visor.deepstack`).
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


def tower_blocks(tower: nn.Module) -> nn.ModuleList:
    """The transformer blocks of a tower, each with a `self_attn` of `q_proj` and `k_proj`."""
    for module in tower.modules():
        if isinstance(module, nn.ModuleList) and len(module) and hasattr(module[0], "self_attn"):
            return module
    raise ValueError(f"{type(tower).__name__} has no blocks with a self_attn; its attention cannot be read")


def tower_has_cls(tower: nn.Module) -> bool:
    """True if the tower puts a CLS token before the patches."""
    return any(name.endswith("class_embedding") for name, _ in tower.named_parameters())


@contextmanager
def reading_block(block: nn.Module, names: str = "qk") -> Iterator[dict[str, Tensor]]:
    """Within it, a forward of `block` leaves its projections [T, P, H d] in the dict, by name: "q", "k", "v"."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name in names:
        projection = getattr(block.self_attn, f"{name}_proj")
        handles.append(projection.register_forward_hook(lambda _m, _a, out, name=name: seen.__setitem__(name, out)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def attention_from_cls(q_THPd: Tensor, k_THPd: Tensor) -> Tensor:
    """Softmax attention of the first row, mean over heads: [T, P - 1] over the patches."""
    logits_TH1P = q_THPd[:, :, :1].float() @ k_THPd.float().transpose(2, 3) * q_THPd.shape[-1] ** -0.5
    return logits_TH1P.softmax(-1).mean(1)[:, 0, 1:]


def attention_received(q_THPd: Tensor, k_THPd: Tensor) -> Tensor:
    """Softmax attention that each token receives, mean over heads and over all query rows: [T, P]. fp32."""
    tiles, _, num_tokens, width = q_THPd.shape
    k_THdP = k_THPd.float().transpose(2, 3)
    received_TP = torch.zeros((tiles, num_tokens), device=q_THPd.device)
    for rows_THRd in q_THPd.split(ROWS_PER_CHUNK, dim=2):
        received_TP += (rows_THRd.float() @ k_THdP * width**-0.5).softmax(-1).sum(2).mean(1)
    return received_TP / num_tokens


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
    cuts_cls = config.vision_feature_select_strategy == "default"
    layers = config.vision_feature_layer
    tiles_T3HW = resized(tiles_T3HW, config.vision_config.patch_size, image_scale)
    # A plain call where nothing is resized: the features must be the model's own to the bit.
    resizing = {} if image_scale == 1.0 else {"interpolate_pos_encoding": True}
    blocks = tower_blocks(tower)
    with ExitStack() as stack:
        wanted = {BLOCK_OF_TAP[tap] for tap in taps if tap in BLOCK_OF_TAP}
        seen = {index: stack.enter_context(reading_block(blocks[index])) for index in sorted(wanted)}
        hidden = tower(tiles_T3HW, output_hidden_states=layers, return_dict=True, **resizing).hidden_states
    chosen_TPD = hidden[layers] if isinstance(layers, int) else torch.cat([hidden[layer] for layer in layers], dim=-1)
    features_TND = chosen_TPD[:, 1:] if cuts_cls else chosen_TPD
    cls_T1D = chosen_TPD[:, :1] if has_cls and cuts_cls else None
    if not seen:
        return features_TND, cls_T1D, {}
    num_heads = config.vision_config.num_attention_heads
    # Not cut: the CLS is one of the N visual tokens (select strategy "full" over CLIP); it scores what it pays.
    return features_TND, cls_T1D, read_taps(taps, seen, num_heads, has_cls and cuts_cls, int(cuts_cls))


def check_taps(taps: Collection[str]) -> None:
    """Refuse taps that do not exist."""
    unknown = sorted(set(taps) - set(TAPS))
    if unknown:
        raise ValueError(f"unknown taps {unknown}; the taps that exist: {', '.join(TAPS)}")


def read_taps(
    taps: Collection[str], seen: Mapping[int, Mapping[str, Tensor]], num_heads: int, from_cls: bool, first: int
) -> dict[str, Tensor]:
    """The taps of the tower's blocks.

    Args:
        seen: by block, the queries "q" and keys "k" [T, P, width] that it computed.
        from_cls: True to score by the row of the first token (CLS), False by all rows.
        first: place of the first patch among the P tokens.
    """
    values: dict[str, Tensor] = {}
    with scoring("tower"):
        for tap in sorted(set(taps) & set(BLOCK_OF_TAP)):
            # PruMerge's last block is read as one head over the full width.
            heads = 1 if tap.startswith("last_") else num_heads
            block = seen[BLOCK_OF_TAP[tap]]
            k_THPd = split_heads(block["k"], heads)
            if tap.endswith("keys"):
                values[tap] = k_THPd.mean(1)[:, first:]
            elif from_cls:
                values[tap] = attention_from_cls(split_heads(block["q"], heads), k_THPd)
            else:
                values[tap] = attention_received(split_heads(block["q"], heads), k_THPd)[:, first:]
    return values


def split_heads(x_TPw: Tensor, num_heads: int) -> Tensor:
    """[T, P, H d] to [T, H, P, d]."""
    return x_TPw.unflatten(-1, (num_heads, -1)).transpose(1, 2)


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
    if adapter.merges_patches:
        rows = {keys[i]: encode_merged(adapter, pixel_inputs[i], keys[i], taps, image_scale, inside) for i in distinct}
        return [rows[key] for key in keys]
    tiles = [adapter.tiles(pixel_inputs[index]) for index in distinct]
    if inside is not None:
        reduced = encode_inside(adapter, tiles, [keys[index] for index in distinct], inside)
        return [reduced[key] for key in keys]
    features_TND, cls_T1D, tap_values = run_tower(adapter, torch.cat(tiles), taps, image_scale)
    counts = [len(image) for image in tiles]
    by_key: dict[str, VisionFeatures] = {}
    if adapter.packs_tiles:
        projected_TND = adapter.projector(features_TND)
        split_taps = {name: value.split(counts) for name, value in tap_values.items()}
        for place, (index, features) in enumerate(zip(distinct, projected_TND.split(counts), strict=True)):
            inputs = pixel_inputs[index]
            tile_taps = {name: value[place] for name, value in split_taps.items()}
            if "places" in taps:
                tile_taps["places"] = tile_places(features, *adapter.tile_layout(inputs))
            by_key[keys[index]] = VisionFeatures(
                adapter.pack(features, inputs)[None],
                stage="projected",
                taps={name: packed_tap(adapter, value, inputs)[None] for name, value in tile_taps.items()},
                sample_keys=(keys[index],),
            )
        return [by_key[key] for key in keys]
    grid = tuple(side // adapter.model.config.vision_config.patch_size for side in tiles[0].shape[-2:])
    grid = tuple(max(1, round(side * image_scale)) for side in grid)
    if "places" in taps:
        tap_values["places"] = whole_image_places(features_TND, grid)
    for place, index in enumerate(distinct):
        row = slice(place, place + 1)
        by_key[keys[index]] = VisionFeatures(
            # A slice would keep the whole batch alive in the cache of whoever holds one row.
            features_TND[row].clone(),
            taps={name: value[row].clone() for name, value in tap_values.items()},
            grid=grid if grid[0] * grid[1] == features_TND.shape[1] else None,
            sample_keys=(keys[index],),
            cls_B1D=None if cls_T1D is None else cls_T1D[row].clone(),
            image_scale=image_scale,
        )
    return [by_key[key] for key in keys]


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


def packed_tap(adapter: FamilyAdapter, tap_TNx: Tensor, pixel_inputs: Mapping[str, Tensor]) -> Tensor:
    """A tap in the order of the packed tokens. A line's end has no patch: it scores below all, and its key is zero."""
    if tap_TNx.dim() == 2:
        return adapter.pack(tap_TNx[..., None], pixel_inputs, separator=-1.0)[:, 0]
    is_places = tap_TNx.shape[-1] == 3
    return adapter.pack(tap_TNx, pixel_inputs, separator=-1.0 if is_places else 0.0)


def grid_places(rows: int, columns: int, device: torch.device) -> Tensor:
    """Centres (y, x) of the cells of a grid whose sides are 1 long: [rows * columns, 2]."""
    y = (torch.arange(rows, device=device) + 0.5) / rows
    x = (torch.arange(columns, device=device) + 0.5) / columns
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)


def whole_image_places(features_TND: Tensor, grid: tuple[int, int]) -> Tensor:
    """The tap "places" [T, N, 3] of tiles that each show a whole image. A CLS among the N lies nowhere: -1."""
    places_N2 = grid_places(*grid, features_TND.device)
    places_N3 = torch.nn.functional.pad(places_N2, (1, 0))
    num_prefix = features_TND.shape[1] - len(places_N3)
    places_N3 = torch.nn.functional.pad(places_N3, (0, 0, num_prefix, 0), value=-1.0)
    return places_N3.expand(len(features_TND), -1, -1)


def tile_places(features_TNE: Tensor, overview: int, parts: tuple[int, int]) -> Tensor:
    """The tap "places" [T, N, 3] of the tiles of one image, before packing.

    Args:
        overview: index of the tile that shows the whole image.
        parts: rows and columns of the other tiles.
    """
    num_tiles, num_tokens = features_TNE.shape[:2]
    side = round(num_tokens**0.5)
    if side * side != num_tokens:
        raise ValueError(f"a tile of {num_tokens} tokens is no square grid; where its tokens look is not known")
    places_N2 = grid_places(side, side, features_TNE.device)
    places_TN3 = places_N2.new_zeros(num_tiles, num_tokens, 3)
    others = [tile for tile in range(num_tiles) if tile != overview % num_tiles]
    places_TN3[..., 1:] = places_N2
    for place, tile in enumerate(others):
        places_TN3[tile, :, 0] = 1
        places_TN3[tile, :, 1] += place // parts[1]
        places_TN3[tile, :, 2] += place % parts[1]
    return places_TN3


def encode_inside(
    adapter: FamilyAdapter, tiles: Sequence[Tensor], keys: Sequence[str], inside: Reduction
) -> dict[str, VisionFeatures]:
    """By key, what a method that acts inside the tower leaves of each image, all images in one pass.

    Raises:
        ValueError: images of several tiles: packing needs the grid that the method dissolves.
    """
    from visor.tower import TowerWalk

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
    return {
        key: VisionFeatures(
            features_TKD[row : row + 1].clone(), sample_keys=(key,), inside=inside,
            inside_kept_BM=kept_TM[row : row + 1].clone(),
        )
        for row, key in enumerate(keys)
    }  # fmt: skip


def project(adapter: FamilyAdapter, vision_BTD: Tensor, stage: str) -> Tensor:
    """Features at `stage` to the decoder's width."""
    return vision_BTD if stage == "projected" else adapter.projector(vision_BTD)
