"""Position ids, one number a token or three (M-RoPE), and what becomes of them when tokens are dropped.

A method keeps position ids or renumbers what is left. Renumbering means one thing in both cases: a value that no token
has any more closes up, and all values above it fall by one, on every axis alike. With one number a token that is
contiguous numbering. Under M-RoPE it closes a row or column (strictly: a coordinate) of the image that lost all its
tokens, the axes of an image stay aligned, the tokens that stay keep their order on each axis, and the text behind the
image falls by what has closed. If nothing is dropped, nothing moves.

Shapes: B batch, N live tokens, A position axes (3 under M-RoPE: time, height, width).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def split_position_ids(position_ids: Tensor, rotary_emb: nn.Module) -> tuple[Tensor, Tensor | None]:
    """What RoPE takes, [B or 1, N] or [B, N, A], and the running number of each token [B or 1, N] where it is given.

    Args:
        position_ids: as transformers passes them: [B or 1, N]; under M-RoPE also [3, B, N], or [4, B, N] with the
            running numbers first, or [1, B, N] in a later turn, where all axes agree.

    Raises:
        ValueError: another shape, or three axes for a decoder that has one.
    """
    if position_ids.ndim == 2:
        return position_ids, position_ids
    if position_ids.ndim != 3 or position_ids.shape[0] not in (1, 3, 4) or not hasattr(rotary_emb, "mrope_section"):
        accepted = "[batch, length]" + (", [1, 3 or 4, batch, length]" if hasattr(rotary_emb, "mrope_section") else "")
        raise ValueError(f"schedules need position ids {accepted}, got shape {tuple(position_ids.shape)}")
    if position_ids.shape[0] == 1:
        return position_ids[0], None
    running = position_ids[0] if position_ids.shape[0] == 4 else None
    return position_ids[-3:].movedim(0, -1), running


def rotary(rotary_emb: nn.Module, hidden_BND: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B or 1, N, d] of positions [B or 1, N] or [B, N, A]."""
    if positions.ndim == 3:
        positions = positions.movedim(-1, 0)
    elif hasattr(rotary_emb, "mrope_section"):  # transformers before 5.20 does not repeat one number for all axes
        positions = positions[None].expand(3, -1, -1)
    return rotary_emb(hidden_BND, positions)


def lowered(positions: Tensor, shift_B1: Tensor) -> Tensor:
    """Position ids of later tokens as a renumbered layer counts them: `shift_B1` lower, on all axes."""
    return positions - (shift_B1 if positions.ndim == 2 else shift_B1[..., None])


def close_gaps(
    positions: Tensor, live_BN: Tensor, stay_BN: Tensor, former: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Positions once the values that only dropped tokens had are gone; and how far later tokens fall, [B, 1].

    Nothing here waits for the device or has a size that depends on data.

    Args:
        positions: [B or 1, N] or [B or 1, N, A].
        live_BN: real tokens so far.
        stay_BN: those of them that stay.
        former: the positions of the tokens so far, where a merge has just moved some.
    """
    # All rows at once and without a size that depends on data: tokens outside a mask get a value above all others, so
    # that sorting puts them last, where no search finds them.
    positions = positions.expand(live_BN.shape[0], *positions.shape[1:])
    never = torch.iinfo(positions.dtype).max

    def values_of(of: Tensor, mask_BN: Tensor) -> Tensor:
        mask = mask_BN if positions.ndim == 2 else mask_BN[..., None]
        return of.masked_fill(~mask, never).flatten(1).sort(dim=1).values

    before_BM = values_of(positions if former is None else former, live_BN)
    after_BM = values_of(positions, stay_BN)
    candidate_BM = torch.searchsorted(after_BM, before_BM).clamp(max=after_BM.shape[1] - 1)
    # A value is freed once, at its first appearance: two tokens may share it (the height of a row of patches).
    first_BM = F.pad(before_BM[:, 1:] != before_BM[:, :-1], (1, 0), value=True)
    freed_BM = first_BM & (before_BM != never) & (after_BM.gather(1, candidate_BM) != before_BM)
    num_freed_BM = F.pad(freed_BM.long().cumsum(1), (1, 0))  # how many freed values stand before each place
    flat_BM = positions.flatten(1).contiguous()
    shift_BM = num_freed_BM.gather(1, torch.searchsorted(before_BM, flat_BM))
    return (flat_BM - shift_BM).view_as(positions), num_freed_BM[:, -1:]
