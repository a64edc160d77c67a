"""Question facts: what a word of a question should know of the image while text reads it, in the CROSS layers.

A word that names a thing, as the letter of a bar, should know what the image says of that thing: its colour, its value.
From answers alone, lookups without SELF layers stay at the guess for thousands of steps; supervised on the way, where
they have to form, they come in hundreds. The base model learned it the same way
(`visor.training.auxiliary.fact_targets`). An auxiliary loss for scenes with ground truth, not part of the model, and
off unless a recipe gives facts a weight.

Shapes: B rows, T text tokens, D width, N facts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visor.training.auxiliary.word_heads import WordHead
from visor.training.rows import Row
from visor.worlds.world import SLOTS


class QuestionFactHead(WordHead):
    """Predicts facts from the text behind every CROSS layer but the first and the last.

    At the first one a word knows only itself; behind the last one only the answer counts.

    Args:
        decoder: whose layers are watched.
        cross_layers: of the VISOR model.
        vocabulary: number of words to tell apart.
    """

    def __init__(self, decoder: nn.Module, cross_layers: Sequence[int], vocabulary: int) -> None:
        super().__init__(decoder.config.hidden_size, len(SLOTS), vocabulary)
        self._seen: dict[int, Tensor] = {}
        for layer in sorted(cross_layers)[1:-1]:
            decoder.layers[layer].register_forward_hook(lambda _, __, output, at=layer: self._see(at, output))

    def _see(self, layer: int, output: Tensor | tuple) -> None:
        if self.training:
            self._seen[layer] = output[0] if isinstance(output, tuple) else output

    def loss_sum(self, rows: Sequence[Row], self_layers: Sequence[int]) -> tuple[Tensor | None, list[bool]]:
        """Cross-entropy summed over facts, its mean over the layers, and which facts are right behind the last one.

        Args:
            rows: of the batch that has just run.
            self_layers: layers that ran as SELF, not as CROSS.

        Returns:
            (None, []) where no row's questions name a thing, or no watched layer ran.
        """
        seen, self._seen = self._seen, {}
        readings = [hidden_BTD for layer, hidden_BTD in sorted(seen.items()) if layer not in self_layers]
        # The text stream is padded on the left: places count from its end.
        facts = [(b, place - row.num_text, *fact) for b, row in enumerate(rows) for place, *fact in row.question_facts]
        if not facts or not readings:
            return None, []
        row_N, from_end_N, slot_N, word_N = torch.tensor(facts, device=readings[0].device).unbind(1)
        return self.read([hidden_BTD[row_N, from_end_N] for hidden_BTD in readings], slot_N, word_N)
