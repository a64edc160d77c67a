"""Facts: what a visual token should know, half-way through the decoder, of things elsewhere in the image.

The key of a value, the row of a character, the other end of a line (`Label.facts`). A training aid, not part of the
model: asked at the visual tokens themselves, gathering such facts is learned from every character of every scene; from
answers alone, charts and connections stayed at chance for 2,000 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from visor.synthetic.world import SLOTS, Scene
from visor.training.symbolic import PatchWords


@dataclass
class FactTargets:
    """N facts of a batch: which scene, patch and slot, and the word's token id; each [N]."""

    scene_N: torch.Tensor
    patch_N: torch.Tensor
    slot_N: torch.Tensor
    word_N: torch.Tensor

    @classmethod
    def of(cls, scenes: Sequence[Scene], words: PatchWords) -> FactTargets:
        """All facts of the scenes."""
        rows = [
            (b, words.patch_of(label), SLOTS.index(slot), words.vocabulary[word])
            for b, scene in enumerate(scenes)
            for label in scene.labels
            for slot, word in label.facts
        ]
        return cls(*torch.tensor(rows, dtype=torch.long).reshape(-1, 4).unbind(1))


class FactReader(nn.Module):
    """Reads facts off the decoder's hidden states after layer `depth`."""

    def __init__(self, decoder: nn.Module, depth: int, width: int, vocabulary: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.classifier = nn.Linear(width, len(SLOTS) * vocabulary)
        nn.init.normal_(self.classifier.weight, std=width**-0.5)
        self._seen: list[torch.Tensor] = []
        decoder.layers[depth - 1].register_forward_hook(self._see)

    def _see(self, module: nn.Module, inputs: tuple, output) -> None:
        self._seen = [output[0] if isinstance(output, tuple) else output]

    def loss(self, targets: FactTargets, patch_BM: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of the facts after the decoder's last forward, and the share that is right in each slot.

        Args:
            patch_BM: which patch each of the M visual tokens of that forward was.
        """
        hidden_BSD = self._seen.pop()
        if not len(targets.patch_N):
            return hidden_BSD.sum() * 0.0, {}
        index_BM = torch.arange(patch_BM.shape[1]).expand_as(patch_BM)
        place_BV = torch.zeros(len(patch_BM), int(patch_BM.max()) + 1, dtype=torch.long).scatter(1, patch_BM, index_BM)
        place_N = place_BV[targets.scene_N, targets.patch_N]
        logits_N = self.classifier(self.norm(hidden_BSD[targets.scene_N, place_N].float()))
        logits_NW = logits_N.unflatten(-1, (len(SLOTS), -1))[torch.arange(len(place_N)), targets.slot_N].float()
        right_N = (logits_NW.detach().argmax(-1) == targets.word_N).float()
        right = {f"facts/{SLOTS[s]}": right_N[targets.slot_N == s].mean().item() for s in targets.slot_N.unique()}
        return F.cross_entropy(logits_NW, targets.word_N), right
