"""Averaged token grids in training: what VISOR-TR and M3 put before the decoder, for a whole batch.

The prompt shrinks with the grid, without a gap. The targets of the auxiliary losses move from patches to the windows
that hold them; where two patches of one window hold different facts of a kind, each becomes a fact of the part of the
window that it holds in.

Shapes: B rows, N visual tokens of an image, D width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isqrt

import torch.nn.functional as F
from torch import Tensor

from visor.training.auxiliary.visual_facts import Features
from visor.training.auxiliary.word_heads import slot_in
from visor.training.batch import Batch
from visor.training.rows import AttentionTarget, Row


def averaged(
    batch: Batch, features: Sequence[Features], shape_of: Callable[[int], tuple[int, int]], pad_id: int
) -> tuple[Batch, list[Features]]:
    """The batch and its features with every token grid averaged; see `averaged_rows`."""
    rows, shrunk = averaged_rows(batch.rows, features, shape_of)
    return Batch.of(rows, pad_id, with_pixels=False).to(batch.input_ids_BS.device), shrunk


def averaged_rows(
    rows: Sequence[Row], features: Sequence[Features], shape_of: Callable[[int], tuple[int, int]]
) -> tuple[list[Row], list[Features]]:
    """Rows and their features with every token grid averaged.

    Args:
        shape_of: rows and columns that are left of a square grid, from its side.

    Raises:
        ValueError: the tokens of an image form no square grid, or a smaller one.
    """
    shapes = [shape_of(isqrt(row.num_visual)) for row in rows]
    shrunk = [tuple(averaged_grid(level, shape) for level in one) for one, shape in zip(features, shapes, strict=True)]
    return [_averaged_row(row, shape) for row, shape in zip(rows, shapes, strict=True)], shrunk


def averaged_grid(features_ND: Tensor, shape: tuple[int, int]) -> Tensor:
    """The square token grid of one image, averaged to (rows, columns), as `visor.reduction.pooling` does.

    Raises:
        ValueError: the tokens form no square grid, or a smaller one.
    """
    full = isqrt(len(features_ND))
    if full * full != len(features_ND) or not all(1 <= side <= full for side in shape):
        raise ValueError(f"cannot average {len(features_ND)} visual tokens to a grid of {shape[0]} x {shape[1]}")
    if shape == (full, full):
        return features_ND
    grid_1DRC = features_ND.T.reshape(1, -1, full, full)
    return F.adaptive_avg_pool2d(grid_1DRC.float(), shape).flatten(2)[0].T.to(features_ND.dtype)


def _averaged_row(row: Row, shape: tuple[int, int]) -> Row:
    (rows, columns), full, first = shape, isqrt(row.num_visual), row.first_visual
    window = lambda patch: patch // full * rows // full * columns + patch % full * columns // full
    # Which half of its window a patch is in, by rows and by columns: 0 to 3, as in reading order.
    part_of = lambda patch: 2 * (2 * (patch // full) * rows // full % 2) + 2 * (patch % full) * columns // full % 2
    words = {(first + window(place - first), part_of(place - first), word) for place, word in row.patch_words}
    facts: dict[tuple[int, int], dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for place, slot, word in row.visual_facts:
        facts[first + window(place - first), slot][part_of(place - first)].add(word)
    attention = [
        AttentionTarget(one.place, tuple(sorted({*map(window, one.patches)})), one.is_answer)
        for one in row.attention_targets
    ]
    return replace(
        row,
        prefix=row.prefix[: first + rows * columns],
        num_visual=rows * columns,
        visual_facts=tuple(
            sorted(fact for (place, slot), by_part in facts.items() for fact in _window_facts(place, slot, by_part))
        ),
        attention_targets=tuple(attention),
        patch_words=(),
        window_words=tuple(sorted(words)),
    )


def _window_facts(place: int, slot: int, words_by_part: Mapping[int, set[int]]) -> list[tuple[int, int, int]]:
    """The facts of a window in a slot: one word, or where its patches disagree, one for each part that agrees."""
    words = set().union(*words_by_part.values())
    if len(words) == 1:
        return [(place, slot, *words)]
    return [(place, slot_in(part, slot), *words) for part, words in words_by_part.items() if len(words) == 1]
