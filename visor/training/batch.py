"""Rows to tensors: sequences padded on the right, several segments behind one image, and who may look at whom.

A segment sees the shared prefix (and so the image) and itself, at the positions that it would have alone. Training then
costs one pass over the image for all its questions, and matches inference exactly.

Shapes: B rows, S sequence (prefix with image tokens, then all segments), P processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visor.training.rows import IGNORED, Row

PADDING, SHARED = -1, 0


@dataclass
class Batch:
    """Rows ready for a model.

    Args:
        input_ids_BS: prefix with one image token for each visual token, then the segments; padded on the right.
        segment_BS: 0 the shared prefix, 1, 2, ... the segments, -1 padding.
        position_BS: position ids; every segment continues the prefix.
        labels_BS: the next token where it belongs to an answer, else -100. Already shifted.
        hint_BS: True where the label is a hint, which is no part of an answer.
        prompt_end_BQ: index in S of the last prompt token of each segment's first turn, -1 where a row has fewer.
        pixel_inputs: what the rows' images are, concatenated.
        rows: where all this comes from.
    """

    input_ids_BS: Tensor
    segment_BS: Tensor
    position_BS: Tensor
    labels_BS: Tensor
    hint_BS: Tensor
    prompt_end_BQ: Tensor
    pixel_inputs: dict[str, Tensor]
    rows: tuple[Row, ...] = field(repr=False)

    @classmethod
    def of(cls, rows: Sequence[Row], pad_id: int, multiple: int = 8, with_pixels: bool = True) -> Batch:
        """Pad rows to one length.

        Args:
            multiple: lengths are rounded up to it: few distinct shapes keep kernels and allocators warm.
            with_pixels: False where the features of the images are known already.
        """
        lines = []
        for row in rows:
            ids, segments = list(row.prefix), [SHARED] * len(row.prefix)
            positions = list(range(len(row.prefix)))
            labels, hints, ends = [IGNORED] * len(ids), [False] * len(ids), []
            for number, segment in enumerate(row.segments, 1):
                ends.append(len(ids) + segment.prompt_end)
                ids += segment.ids
                segments += [number] * len(segment.ids)
                positions += range(len(row.prefix), len(row.prefix) + len(segment.ids))
                labels += segment.labels
                hints += segment.hints
            lines.append((ids, segments, positions, labels, hints, ends))
        length = max(len(line[0]) for line in lines)
        length += -length % multiple
        fills = (pad_id, PADDING, 0, IGNORED, False)
        padded = [
            torch.tensor([line[k] + [fill] * (length - len(line[k])) for line in lines]) for k, fill in enumerate(fills)
        ]
        most = max(len(line[5]) for line in lines)
        ends_BQ = torch.tensor([line[5] + [-1] * (most - len(line[5])) for line in lines])
        pixels = collate_pixels([row.pixel_inputs for row in rows]) if with_pixels else {}
        return cls(*padded, ends_BQ, pixels, tuple(rows))

    @property
    def num_answer_tokens(self) -> int:
        """Tokens that a loss is taken of, hints apart."""
        return int(((self.labels_BS != IGNORED) & ~self.hint_BS).sum())

    @property
    def num_hints(self) -> int:
        """Hints that a loss is taken of."""
        return int(self.hint_BS.sum())

    def without(self, bad: Sequence[int], pad_id: int) -> Batch | None:
        """The batch without some of its rows; None if nothing is left."""
        rows = [row for index, row in enumerate(self.rows) if index not in set(bad)]
        return Batch.of(rows, pad_id) if rows else None

    def to(self, device: Any) -> Batch:
        """The same on another device."""
        move = lambda x: x.to(device, non_blocking=True)
        names = ("input_ids_BS", "segment_BS", "position_BS", "labels_BS", "hint_BS", "prompt_end_BQ")
        return Batch(
            **{name: move(getattr(self, name)) for name in names},
            pixel_inputs={name: move(value) for name, value in self.pixel_inputs.items()},
            rows=self.rows,
        )


def collate_pixels(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pixels of several images as the family's forward takes them: concatenated, tiles padded to the most."""
    collated = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name == "pixel_values" and values[0].ndim == 5:  # [1, tiles, 3, H, W]
            most = max(value.shape[1] for value in values)
            values = [torch.nn.functional.pad(v, (0,) * 7 + (most - v.shape[1],)) for v in values]
        collated[name] = torch.cat(values)
    return collated
