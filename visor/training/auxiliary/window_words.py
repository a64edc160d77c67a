"""Window words: which words stand in which part of an averaged window, so that the tower keeps the parts apart.

A mean of neighbouring tokens says which characters stand there, but not in which order, unless the tower encodes the
same character differently on the left and on the right. From answers alone it takes thousands of steps to find that
out. An auxiliary loss for VISOR-TR and M3 on scenes with ground truth, not part of the model, and off unless a recipe
gives facts a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visor.training.auxiliary.visual_facts import Features
from visor.training.auxiliary.word_heads import PARTS, WordHead
from visor.training.rows import Row


class WindowWordHead(WordHead):
    """Predicts words from averaged tokens as they enter the decoder, by the part of the window where they stand.

    Args:
        width: of the decoder.
        vocabulary: number of words to tell apart.
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__(width, PARTS, vocabulary)

    def loss_sum(self, rows: Sequence[Row], features: Sequence[Features]) -> tuple[Tensor | None, list[bool]]:
        """Cross-entropy summed over words, and which of them are right.

        Args:
            rows: of an averaged batch.
            features: of their images, averaged.

        Returns:
            (None, []) where no row has window words.
        """
        words = [
            (b, place - row.first_visual, part, word)
            for b, row in enumerate(rows)
            for place, part, word in row.window_words
        ]
        if not words:
            return None, []
        device = features[0][0].device
        part_N, word_N = torch.tensor([one[2:] for one in words], device=device).unbind(1)
        return self.read([torch.stack([features[b][0][place] for b, place, _, _ in words])], part_N, word_N)
