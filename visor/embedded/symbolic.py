"""Perfect vision: a scene as its labels. Each labelled patch becomes one token, the sum of its words' embeddings.

A decoder learns to look things up on these short sequences several times faster than on images; the tower is then
taught to produce the same embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from visor.worlds.world import IMAGE_SIZE, Label, Scene


class PatchWords:
    """Which vocabulary words stand in which patch of a scene."""

    def __init__(self, tokenizer, grid: int) -> None:
        self.vocabulary, self.grid, self.patch = tokenizer.get_vocab(), grid, IMAGE_SIZE / grid

    def of(self, scene: Scene) -> dict[int, set[int]]:
        """Patch index (row-major) to the token ids of the words whose centre it holds."""
        patches: dict[int, set[int]] = {}
        for label in scene.labels:
            patches.setdefault(self.patch_of(label), set()).update(self.vocabulary[word] for word in label.words)
        return patches

    def patch_of(self, label: Label) -> int:
        """Index of the patch that holds a label's centre."""
        return self.patch_at(label.x, label.y)

    def patch_at(self, x: float, y: float) -> int:
        """Index of the patch that holds a pixel."""
        column, row = (min(self.grid - 1, max(0, int(v / self.patch))) for v in (x, y))
        return row * self.grid + column

    def multi_hot(self, scenes: Sequence[Scene], vocabulary: int) -> torch.Tensor:
        """[B, V, vocabulary] float: 1 where a word stands in a patch."""
        target = torch.zeros(len(scenes), self.grid**2, vocabulary)
        for b, scene in enumerate(scenes):
            for patch, ids in self.of(scene).items():
                target[b, patch, list(ids)] = 1.0
        return target


class PatchEmbeddings(nn.Module):
    """Embedding of a patch: its words (the decoder's own embeddings), its row and its column."""

    def __init__(self, grid: int, width: int) -> None:
        super().__init__()
        self.grid = grid
        self.row, self.column = nn.Embedding(grid, width), nn.Embedding(grid, width)
        nn.init.normal_(self.row.weight, std=0.35)
        nn.init.normal_(self.column.weight, std=0.35)

    def forward(self, words_BVW: torch.Tensor, table_WD: torch.Tensor, patch_BV: torch.Tensor) -> torch.Tensor:
        """[B, V, D] from multi-hot words [B, V, W], embedding table [W, D] and patch indices [B, V]."""
        return words_BVW @ table_WD + self.row(patch_BV // self.grid) + self.column(patch_BV % self.grid)


def present_patches(
    words_BVW: torch.Tensor, keep_empty: float, drawn_BV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches to show: those with words and a share `keep_empty` of the others, left-aligned.

    Args:
        drawn_BV: uniform numbers that decide which empty patches are shown.

    Returns:
        (patch_BM indices, valid_BM), M the most patches that any scene shows.
    """
    show_BV = words_BVW.any(-1) | (drawn_BV < keep_empty)
    num = max(1, int(show_BV.sum(1).max()))
    num = min(show_BV.shape[1], num + -num % 8)  # few distinct lengths: kernels and allocators stay warm
    patch_BM = (~show_BV).to(torch.int8).argsort(dim=1, stable=True)[:, :num]
    return patch_BM, show_BV.gather(1, patch_BM)
