"""Facts half-way through a decoder: what a token should know there of things elsewhere in the image.

A visual token: the key of a value, the row of a character, the other end of a line (`SceneTargets.facts`). A word of a
question: what the image says of the thing that it names (`SceneTargets.named`). An auxiliary loss for the dense base
model, not part of the model: gathering facts is learned from every character and every question; from answers alone,
charts and connections stayed at chance for 2,000 steps, and questions for a colour learned to name any colour of the
image.

Shapes: B scenes, M visual tokens, T text tokens, S = M + T, D width, N facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visor.training.auxiliary.scene_targets import SceneTargets
from visor.training.auxiliary.word_heads import WordHead


@dataclass
class FactTargets:
    """N facts of a batch: which scene, place in the sequence, slot, and the word's token id; each [N].

    The first `num_visual` of them are asked at visual tokens, the others at words of questions.
    """

    scene_N: Tensor
    place_N: Tensor
    slot_N: Tensor
    word_N: Tensor
    num_visual: int

    @classmethod
    def of(cls, targets: Sequence[SceneTargets], patch_BM: Tensor, ids_BT: Tensor) -> FactTargets:
        """All facts of the scenes, whose M visual tokens are the patches `patch_BM` and stand before the text."""
        num_slots, rows = patch_BM.shape[1], []
        for b, (one, patches) in enumerate(zip(targets, patch_BM.tolist(), strict=True)):
            place_of = {patch: place for place, patch in enumerate(patches)}
            rows += [(b, place_of[patch], slot, word) for patch, slot, word in one.facts]
        num_visual = len(rows)
        for b, (one, ids) in enumerate(zip(targets, ids_BT.tolist(), strict=True)):
            for t, token in enumerate(ids):
                if token in one.named:
                    rows += [(b, num_slots + t, slot, word) for slot, word in one.named[token].facts]
        device = ids_BT.device
        return cls(*torch.tensor(rows, dtype=torch.long, device=device).reshape(-1, 4).unbind(1), num_visual)

    def __len__(self) -> int:
        return len(self.place_N)


class LayerFactHead(WordHead):
    """Predicts facts from the hidden states behind one layer of a decoder.

    Args:
        decoder: whose layer is watched.
        depth: behind how many layers.
        num_slots: kinds of facts.
        vocabulary: number of words to tell apart.
    """

    def __init__(self, decoder: nn.Module, depth: int, num_slots: int, vocabulary: int) -> None:
        super().__init__(decoder.config.hidden_size, num_slots, vocabulary)
        self._seen: list[Tensor] = []
        decoder.layers[depth - 1].register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        self._seen = [output[0] if isinstance(output, tuple) else output]

    def loss_sum(self, targets: FactTargets) -> tuple[Tensor, list[bool]]:
        """Cross-entropy summed over the facts after the decoder's last forward, and which of them are right."""
        hidden_BSD = self._seen.pop()
        if not len(targets):
            return hidden_BSD.sum() * 0.0, []
        return self.read([hidden_BSD[targets.scene_N, targets.place_N]], targets.slot_N, targets.word_N)
