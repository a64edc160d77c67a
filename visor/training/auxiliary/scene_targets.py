"""What a scene with known ground truth says in token ids: the contract between training and whoever knows the scene.

Training knows rows, tokens and patches. It knows neither the vocabulary of a tokenizer nor what is drawn in an image,
so it asks an object that its caller hands in (`TargetsOf`). For the built-in worlds that is
`visor.embedded.scene_tokens.SceneTokens`; for other data with ground truth it is yours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from visor.training.rows import AttentionTarget, Row


@dataclass(frozen=True)
class NamedThing:
    """What the image says of a thing that a word names.

    Args:
        facts: (slot, token id) of what holds for it, such as its colour.
        patches: where it stands; none if it has no place.
    """

    facts: tuple[tuple[int, int], ...]
    patches: tuple[int, ...]


@dataclass(frozen=True)
class SceneTargets:
    """The ground truth of one scene, in token ids and patches. Patches are numbered row by row.

    Args:
        words: (patch, token id) of the words that stand in patches.
        facts: (patch, slot, token id) of what holds for the thing in a patch but is written elsewhere.
        named: by the token id of a word that a question may name a thing with.
        answers: for each question of the scene, the patch of each character of its answer, if it is written there.
    """

    words: tuple[tuple[int, int], ...]
    facts: tuple[tuple[int, int, int], ...]
    named: Mapping[int, NamedThing]
    answers: tuple[tuple[int, ...], ...]


class TargetsOf(Protocol):
    """Knows scenes and a tokenizer."""

    def __call__(self, scene: Any, side: int) -> SceneTargets:
        """The targets of a scene on a grid of `side` x `side` visual tokens.

        Raises:
            BadRow: the tokenizer has no one token for a word of the scene.
        """


def with_targets(row: Row, targets: SceneTargets) -> Row:
    """The row of a scene with what the auxiliary losses ask of its tokens.

    The scene's questions are the row's segments, in order; a row may have fewer.
    """
    first_visual, first = row.first_visual, row.first_visual  # text before the image counts too
    question_facts, attention = [], []
    for segment, answer in zip(row.segments, targets.answers, strict=False):
        for place, token in enumerate(segment.ids[: segment.prompt_end + 1]):
            if (thing := targets.named.get(token)) is None:
                continue
            question_facts += [(first + place, *fact) for fact in thing.facts]
            if thing.patches:
                attention.append(AttentionTarget(first + place, thing.patches, False))
        # The token before a character says it: the first one is said by the prompt's last token.
        attention += [AttentionTarget(first + segment.prompt_end + k, (patch,), True) for k, patch in enumerate(answer)]
        first += len(segment.ids)
    return replace(
        row,
        visual_facts=tuple((first_visual + patch, slot, word) for patch, slot, word in targets.facts),
        question_facts=tuple(question_facts),
        attention_targets=tuple(attention),
        patch_words=tuple((first_visual + patch, word) for patch, word in targets.words),
    )
