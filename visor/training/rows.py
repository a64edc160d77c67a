"""A training row: the token ids of one example, and what auxiliary losses ask of its tokens.

A row has one shared prefix up to the image, and behind it a segment of text for each conversation about that image.
Everything here is plain numbers, so a row passes between the processes of a data loader as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100
"""The label of a token that no loss is taken of; what `cross_entropy` ignores by default."""


@dataclass(frozen=True)
class Segment:
    """The text of one conversation behind the image.

    Args:
        ids: token ids.
        labels: for each token the next one, where that is part of an answer, else -100.
        hints: True where the label is a hint (see `visor.training.encoding.Encoder`).
        prompt_end: index of the last token before the first answer.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    hints: tuple[bool, ...]
    prompt_end: int


@dataclass(frozen=True)
class AttentionTarget:
    """Where a text token should attend while text reads the image.

    Args:
        place: index among the row's text tokens.
        patches: visual tokens that hold what it looks for.
        is_answer: it is about to say what stands there; else it names it.
    """

    place: int
    patches: tuple[int, ...]
    is_answer: bool


@dataclass(frozen=True)
class Row:
    """One example, ready for a batch.

    Args:
        key: names it in the list of skipped rows.
        prefix: token ids up to the last image token, which all segments share.
        num_visual: image tokens among them. They end the prefix.
        segments: one for each conversation.
        pixel_inputs: what the processor made of the image.
        kinds: for each segment what it is about.
        visual_facts: (index in the prefix, slot, token id) of what visual tokens should know
            (`visor.training.auxiliary.visual_facts`).
        question_facts: (index among the text tokens, slot, token id) of what words of prompts should know
            (`visor.training.auxiliary.question_facts`).
        attention_targets: where text tokens should attend (`visor.training.auxiliary.attention_supervision`).
        patch_words: (index in the prefix, token id) of words that stand in patches.
        window_words: (index in the prefix, part, token id) of words that stand in parts of averaged windows
            (`visor.training.auxiliary.window_words`).
    """

    key: str
    prefix: tuple[int, ...]
    num_visual: int
    segments: tuple[Segment, ...]
    pixel_inputs: Mapping[str, Tensor] = field(repr=False)
    kinds: tuple[str, ...] = ()
    visual_facts: tuple[tuple[int, int, int], ...] = ()
    question_facts: tuple[tuple[int, int, int], ...] = ()
    attention_targets: tuple[AttentionTarget, ...] = ()
    patch_words: tuple[tuple[int, int], ...] = ()
    window_words: tuple[tuple[int, int, int], ...] = ()

    @property
    def num_text(self) -> int:
        """Text tokens, packed."""
        return len(self.prefix) - self.num_visual + sum(len(segment.ids) for segment in self.segments)

    @property
    def first_visual(self) -> int:
        """Index of the first image token in the prefix."""
        return len(self.prefix) - self.num_visual
