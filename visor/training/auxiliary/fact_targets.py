"""Facts: what a token should know, half-way through the decoder, of things elsewhere in the image.

A visual token: the key of a value, the row of a character, the other end of a line (`Label.facts`). A word of a
question: what the image says of the thing that it names (`Scene.known`). A training aid, not part of the model:
gathering facts is learned from every character and every question; from answers alone, charts and connections stayed at
chance for 2,000 steps, and questions for a colour learned to name any colour of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from visor.embedded.packed_text import PackedText
from visor.embedded.symbolic import PatchWords
from visor.embedded.vocabulary import SPACE
from visor.worlds.world import SLOTS, Scene


@dataclass
class FactTargets:
    """N facts of a batch: which scene, place in the sequence, slot, and the word's token id; each [N].

    The first `num_visual` of them are asked at visual tokens, the others at words of questions.
    """

    scene_N: torch.Tensor
    place_N: torch.Tensor
    slot_N: torch.Tensor
    word_N: torch.Tensor
    num_visual: int

    @classmethod
    def of(cls, scenes: Sequence[Scene], words: PatchWords, patch_BM: torch.Tensor, text: PackedText) -> FactTargets:
        """All facts of the scenes, whose M visual tokens are the patches `patch_BM` and stand before the text."""
        vocabulary, num_slots = words.vocabulary, patch_BM.shape[1]
        rows = []
        for b, (scene, patches) in enumerate(zip(scenes, patch_BM.tolist(), strict=True)):
            place_of = {patch: place for place, patch in enumerate(patches)}
            for label in scene.labels:
                place = place_of[words.patch_of(label)] if label.facts else 0
                rows += [(b, place, SLOTS.index(slot), vocabulary[word]) for slot, word in label.facts]
        num_visual = len(rows)
        for b, (scene, ids) in enumerate(zip(scenes, text.ids_BT.tolist(), strict=True)):
            known = {}
            for word, facts in scene.known:
                for piece in (word, SPACE + word):
                    known[vocabulary.get(piece, -1)] = facts
            for t, token in enumerate(ids):
                for slot, word in known.get(token, ()):
                    rows.append((b, num_slots + t, SLOTS.index(slot), vocabulary[word]))
        return cls(*torch.tensor(rows, dtype=torch.long).reshape(-1, 4).unbind(1), num_visual)


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

    def loss(self, targets: FactTargets) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of the facts after the decoder's last forward, and the share that is right in each slot."""
        hidden_BSD = self._seen.pop()
        if not len(targets.place_N):
            return hidden_BSD.sum() * 0.0, {}
        logits_N = self.classifier(self.norm(hidden_BSD[targets.scene_N, targets.place_N].float()))
        index_N = torch.arange(len(targets.place_N))
        logits_NW = logits_N.unflatten(-1, (len(SLOTS), -1))[index_N, targets.slot_N].float()
        right_N = (logits_NW.detach().argmax(-1) == targets.word_N).float()
        right = {}
        for name, chosen_N in (("seen", index_N < targets.num_visual), ("asked", index_N >= targets.num_visual)):
            for slot in targets.slot_N[chosen_N].unique():
                right[f"{name}/{SLOTS[slot]}"] = right_N[chosen_N & (targets.slot_N == slot)].mean().item()
        return F.cross_entropy(logits_NW, targets.word_N), right
