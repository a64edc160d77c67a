"""What a method may see of the vision tower beside its features.

Hooks read the queries and keys that a tower block computes anyway; scores are made from q.k^T in chunks of rows, so
nothing changes in the tower's own attention kernel and no full attention matrix is ever stored.

Shapes: B samples, N visual tokens, T tiles, P tower tokens of a tile (CLS included), H heads, d head width, R rows of a
chunk, E any width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from visor.engine.stopwatch import scoring
from visor.families.base import FamilyAdapter

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


def check_taps(taps: Collection[str]) -> None:
    """Refuse taps that do not exist."""
    unknown = sorted(set(taps) - set(TAPS))
    if unknown:
        raise ValueError(f"unknown taps {unknown}; the taps that exist: {', '.join(TAPS)}")


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
def recorded_projections(block: nn.Module, names: str = "qk") -> Iterator[dict[str, Tensor]]:
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
