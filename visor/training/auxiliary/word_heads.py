"""Linear heads that predict words from hidden states: what the auxiliary losses of facts and words have in common.

Shapes: N facts, D width, S slots (kinds of facts), W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visor.worlds.world import SLOTS

PARTS = 4  # of an averaged window: its halves by rows, and each by columns
NUM_SLOTS = len(SLOTS) * (1 + PARTS)


def slot_in(part: int, slot: int) -> int:
    """The slot for a fact that holds in one part of a window; smaller ones are for what holds in all of it."""
    return len(SLOTS) * (1 + part) + slot


class WordHead(nn.Module):
    """A linear classifier of normed hidden states, one word of the vocabulary for each slot.

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
        """Cross-entropy summed over facts, its mean over the layers, and which facts are right behind the last one.

        Args:
            readings: for each layer, the hidden states [N, D] that should tell the facts.
            slot_N, word_N: kind and token id of each fact.
        """
        total, right_N = 0.0, torch.empty(0, dtype=torch.bool)
        # Slot by slot: the words of all slots for every fact would be many times the work.
        order_N, (slots, counts) = slot_N.argsort(), slot_N.unique(return_counts=True)
        # One unbind: the backward of an index fills a gradient as large as all slots.
        by_slot = lambda x: x.unflatten(0, (self.num_slots, -1)).unbind()
        weights, biases = by_slot(self.classifier.weight), by_slot(self.classifier.bias)
        with torch.autocast(slot_N.device.type, enabled=False):
            for hidden_ND in readings:
                groups = self.norm(hidden_ND.float())[order_N].split(counts.tolist())
                logits_NW = torch.cat(
                    [F.linear(x, weights[s], biases[s]) for x, s in zip(groups, slots.tolist(), strict=True)]
                )
                total = total + F.cross_entropy(logits_NW, word_N[order_N], reduction="sum")
                right_N = (logits_NW.detach().argmax(-1) == word_N[order_N])[order_N.argsort()]
        return total / len(readings), right_N.tolist()
