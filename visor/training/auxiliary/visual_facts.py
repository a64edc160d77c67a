"""Visual facts: what visual tokens should hold before text reads them, the work of tower and SELF layers.

A visual token should know what stands elsewhere and belongs to it: the key of a value, its row, the other end of a line
(`SceneTargets.facts`). A CROSS layer then reads it in one step. Supervised are the tokens as they enter the decoder, as
far as the tower can know, and behind every SELF layer. From answers alone a small model takes thousands of steps to
find this out; the base model learned it the same way (`visor.training.auxiliary.fact_targets`). An auxiliary loss for
scenes with ground truth, not part of the model, and off unless a recipe gives it a weight.

Shapes: B rows, N visual tokens of an image (facts in subscripts of heads), D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from visor.training.auxiliary.word_heads import NUM_SLOTS, WordHead
from visor.training.rows import Row

Features = tuple[Tensor, ...]
"""Projected features [N, D] of one image, and what DeepStack adds to them, a tensor a level."""


class VisualFactHead(WordHead):
    """Predicts facts from the visual tokens as they enter the decoder, and behind layers that update them.

    Args:
        decoder: whose layers are watched.
        layers: behind which facts are predicted.
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
        self, rows: Sequence[Row], features: Sequence[Features], self_layers: Iterable[int]
    ) -> tuple[Tensor | None, list[bool]]:
        """Cross-entropy summed over facts, its mean over the layers, and which facts are right behind the last one.

        Args:
            rows: of the batch that has just run.
            features: of their images, as the decoder got them.
            self_layers: that ran; in the others the visual tokens stay as they are.

        Returns:
            (None, []) where no row has facts.
        """
        seen, self._seen = self._seen, {}
        facts = [(b, *fact) for b, row in enumerate(rows) for fact in row.visual_facts]
        if not facts:
            return None, []
        device = features[0][0].device
        row_N, place_N, slot_N, word_N = torch.tensor(facts, device=device).unbind(1)
        first = [row.first_visual for row in rows]
        readings = [torch.stack([features[b][0][place - first[b]] for b, place, _, _ in facts])]
        readings += [seen[layer][row_N, place_N] for layer in self._watched if layer in set(self_layers)]
        return self.read(readings, slot_N, word_N)
