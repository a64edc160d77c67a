"""What a scene of the built-in worlds says in token ids: what training asks of whoever knows the vocabulary.

Implements `visor.training.auxiliary.scene_targets.TargetsOf`.
"""

from __future__ import annotations

from typing import Any

from visor.embedded.symbolic import PatchWords
from visor.embedded.vocabulary import SPACE
from visor.training.auxiliary.scene_targets import NamedThing, SceneTargets
from visor.training.data import BadRow
from visor.worlds.world import SLOTS, Scene


class SceneTokens:
    """Scenes to targets, through a tokenizer that has one token for each word of the worlds."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self._patches = tokenizer, {}

    def __call__(self, scene: Scene, side: int) -> SceneTargets:
        """The targets of a scene on a grid of `side` x `side` visual tokens.

        Raises:
            BadRow: the tokenizer has no one token for a word of the scene.
        """
        if side not in self._patches:
            self._patches[side] = PatchWords(self.tokenizer, side)
        patches: PatchWords = self._patches[side]
        vocabulary, patches_of = patches.vocabulary, {}
        for label in scene.labels:
            for word in label.words:
                patches_of.setdefault(word, set()).add(patches.patch_of(label))
        # A question may name a thing with or without a space before its name: two tokens for one word.
        named = [(word, piece, facts) for word, facts in scene.known for piece in (word, SPACE + word)]
        named = [(word, vocabulary[piece], facts) for word, piece, facts in named if piece in vocabulary]
        stated = [facts for _, _, facts in named] + [label.facts for label in scene.labels]
        words = {*patches_of, *(word for facts in stated for _, word in facts)}
        if unknown := sorted(words - vocabulary.keys()):
            raise BadRow(f"the tokenizer has no one token for the facts {unknown}; set fact_supervision_weight to 0")
        in_tokens = lambda facts: tuple((SLOTS.index(slot), vocabulary[word]) for slot, word in facts)
        return SceneTargets(
            words=tuple((patch, vocabulary[word]) for patch, word in _pairs(patches_of)),
            facts=tuple((patches.patch_of(one), *fact) for one in scene.labels for fact in in_tokens(one.facts)),
            named={
                token: NamedThing(in_tokens(facts), tuple(sorted(patches_of.get(word, ()))))
                for word, token, facts in named
            },
            answers=tuple(tuple(patches.patch_at(x, y) for x, y in question.where) for question in scene.questions),
        )


def _pairs(patches_of: dict[str, set[int]]) -> list[tuple[int, str]]:
    """(patch, word) of each word in each of its patches, in the order of the patches."""
    return sorted((patch, word) for word, patches in patches_of.items() for patch in patches)
