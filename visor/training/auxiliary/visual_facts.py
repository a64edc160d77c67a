"""Facts that visual tokens should hold before text reads them: what tower and SELF layers are for, taught directly.

A visual token should know what stands elsewhere and belongs to it: the key of a value, its row, the other end of a line
(`Label.facts`). A CROSS layer then reads it in one look. Asked are the tokens as they enter the decoder, as far as the
tower can know, and after every SELF layer. From answers alone a small model takes thousands of steps to find this out;
the base model learned it the same way (`visor.training.auxiliary.fact_targets`). A training aid of the built-in
worlds, not part of the model, and off unless a recipe gives it a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from visor.training.auxiliary.word_readers import NUM_SLOTS, WordReader
from visor.training.encoding import Row

Features = tuple[Tensor, ...]
"""Projected features [N, D] of one image, and what DeepStack adds to them, a tensor a level."""


class RefinedFacts(WordReader):
    """Reads facts off the visual tokens as they enter, and behind layers that rework them.

    Args:
        decoder: whose layers are watched.
        layers: behind which facts are read.
        vocabulary: number of words to tell apart.
    """

    def __init__(self, decoder: nn.Module, layers: Sequence[int], vocabulary: int) -> None:
        super().__init__(decoder.config.hidden_size, NUM_SLOTS, vocabulary)
        self._watched = list(layers)
        self._seen: dict[int, Tensor] = {}
        for layer in self._watched:
            decoder.layers[layer].register_forward_hook(lambda _, __, output, at=layer: self._see(at, output))

    def _see(self, layer: int, output: Tensor | tuple) -> None:
        if self.training:
            self._seen[layer] = output[0] if isinstance(output, tuple) else output

    def loss_sum(
        self, rows: Sequence[Row], features: Sequence[Features], refined: Iterable[int]
    ) -> tuple[Tensor | None, list[bool]]:
        """Cross-entropy summed over facts, its mean over the readings, and which facts are right at the last one.

        Args:
            rows: of the batch that has just run.
            features: of their images, as the decoder got them.
            refined: SELF layers that ran; at the others the visual tokens stood still.

        Returns:
            (None, []) where no row has facts.
        """
        seen, self._seen = self._seen, {}
        facts = [(b, *fact) for b, row in enumerate(rows) for fact in row.facts]
        if not facts:
            return None, []
        device = features[0][0].device
        row_N, place_N, slot_N, word_N = torch.tensor(facts, device=device).unbind(1)
        first = [len(row.prefix) - row.num_visual for row in rows]  # the image tokens end the prefix
        readings = [torch.stack([features[b][0][place - first[b]] for b, place, _, _ in facts])]
        readings += [seen[layer][row_N, place_N] for layer in self._watched if layer in set(refined)]
        return self.read(readings, slot_N, word_N)
