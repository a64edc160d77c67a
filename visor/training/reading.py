"""Words read off hidden states: what the training aids `refined`, `asked` and `written` have in common.

Shapes: N facts, D width, S slots (kinds of facts), W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WordReader(nn.Module):
    """A linear reading of normed hidden states, one word of the vocabulary for each slot.

    Args:
        width: of the hidden states.
        num_slots: kinds of facts.
        vocabulary: number of words to tell apart.
    """

    def __init__(self, width: int, num_slots: int, vocabulary: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.norm = nn.RMSNorm(width)
        self.classifier = nn.Linear(width, num_slots * vocabulary)
        nn.init.normal_(self.classifier.weight, std=width**-0.5)

    def read(self, readings: Sequence[Tensor], slot_N: Tensor, word_N: Tensor) -> tuple[Tensor, list[bool]]:
        """Cross-entropy summed over facts, its mean over the readings, and which facts are right at the last one.

        Args:
            readings: hidden states [N, D], one for each fact, each time it is read.
        """
        index_N, total, right = torch.arange(len(slot_N), device=slot_N.device), 0.0, []
        with torch.autocast(slot_N.device.type, enabled=False):
            for hidden_ND in readings:
                logits_NSW = self.classifier(self.norm(hidden_ND.float())).unflatten(-1, (self.num_slots, -1))
                logits_NW = logits_NSW[index_N, slot_N]
                total = total + F.cross_entropy(logits_NW, word_N, reduction="sum")
                right = (logits_NW.detach().argmax(-1) == word_N).tolist()
        return total / len(readings), right
