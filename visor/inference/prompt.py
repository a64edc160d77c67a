"""What travels between prepared samples and the model: prompts and answers. Data and pure functions.

Shapes: B samples, P padded prompt length, N visual tokens before reduction, T after it, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from budgets.schedule import Schedule


@dataclass(frozen=True)
class Generation:
    """An answer. `kept` tells of each of the N visual tokens whether it stood for itself in the last layer; None if
    tokens were averaged, or there was no image. `confidence` is the probability of the first token. `error` says why
    there is no answer, where the others of its batch have one."""

    text: str
    token_ids: tuple[int, ...]
    kept: list[bool] | None
    confidence: float | None = field(default=None, compare=False)  # answers are compared by what they say
    error: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A left-padded batch with its visual features in place, all of one schedule structure.

    Args:
        features: one [T, D] tensor for each sample that has images.
        kept: for each sample which of the N tokens the encoder side kept, [N]; None if averaged or without an image.
        levels: for each of the features its DeepStack levels, [T, D] each; empty without DeepStack.
        grid_positions: M-RoPE's position ids [4, B, P], the running numbers first; None where transformers' own
            numbering holds.
    """

    input_ids_BP: Tensor
    attention_mask_BP: Tensor
    features: tuple[Tensor, ...]
    schedules: tuple[Schedule, ...]
    kept: tuple[Tensor | None, ...]
    levels: tuple[tuple[Tensor, ...], ...] = ()
    grid_positions: Tensor | None = None

    @property
    def positions_BP(self) -> Tensor:
        """Position ids: real tokens count from 0. Under M-RoPE [4, B, P]."""
        if self.grid_positions is not None:
            return self.grid_positions
        return sequential_positions(self.attention_mask_BP)


def sequential_positions(attention_mask_BP: Tensor) -> Tensor:
    """Real tokens of each row counted from 0."""
    return (attention_mask_BP.cumsum(1) - 1).clamp(min=0)


def kept_over_image(prompt: Prompt, alive: Sequence[Tensor] | None) -> list[list[bool] | None]:
    """For each sample, over its N visual tokens, which stand for themselves in the last layer.

    Args:
        alive: for each sample which of the tokens that entered the decoder are alive at its end; None means all.
    """
    kept_rows: list[list[bool] | None] = []
    for index, (kept_N, schedule) in enumerate(zip(prompt.kept, prompt.schedules, strict=True)):
        if alive is not None and schedule.encoder is not None:
            kept_N = None  # the encoder side may have reordered its tokens: which patch is alive is not known
        elif alive is not None and kept_N is not None:
            kept_N = alive[index]
        kept_rows.append(None if kept_N is None else kept_N.tolist())
    return kept_rows


@dataclass(frozen=True)
class ReducedPrompt:
    """A prompt with fewer image tokens.

    Args:
        sources: for each token of it the token of the full prompt that it stands for.
        order: in which order the features stand in it; None if in theirs.
    """

    sources: list[int]
    order: list[int] | None = None


def reduce_prompt(
    input_ids: Sequence[int],
    image_ids: set[int],
    images: Sequence[tuple[int, int, Sequence[int] | None]],
    in_place: bool = False,
) -> ReducedPrompt:
    """The prompt for images of which fewer tokens are left.

    Where an image has one block of image tokens, what is left of it fills the front of the block. Where its tiles have
    blocks of their own with text between them, every token stays in the block of the token in whose place it stands.

    Args:
        images: in the order of the prompt, for each: visual tokens before reduction, after it, and for each that is
            left in whose place among those of its image it stands, or None if that is not known.
        in_place: each token must stand for the one in whose place it is, also in a single block (M-RoPE).

    Raises:
        ValueError: places are needed and not known, or the images do not fit the prompt.
    """
    slots = [index for index, token in enumerate(input_ids) if token in image_ids]
    if len(slots) != sum(before for before, _, _ in images):
        raise ValueError(
            f"the prompt holds {len(slots)} image tokens, its images have {sum(before for before, _, _ in images)}"
        )
    sources, order, copied, start = [], [], 0, 0
    for before, left, places in images:
        own = slots[start : start + before]
        one_block = own[-1] - own[0] + 1 == before
        if places is None and left == before:
            places = range(before)
        if places is None and (in_place or not one_block):
            reason = "position ids are places in the image" if one_block else "the image has several blocks of tokens"
            raise ValueError(
                f"this method does not say in whose place its tokens stand, but in this prompt {reason}; use a method "
                "that selects tokens"
            )
        sources += range(copied, own[0])
        first_feature = len(order)
        if one_block:
            sources += own[:left] if not in_place else [own[place] for place in places]
            order += range(first_feature, first_feature + left)
        else:
            by_place = sorted(range(left), key=lambda i: places[i])
            chosen = {own[places[i]] for i in by_place}
            sources += [i for i in range(own[0], own[-1] + 1) if i not in set(own) or i in chosen]
            order += [first_feature + i for i in by_place]
        copied, start = own[-1] + 1, start + before
    sources += range(copied, len(input_ids))
    return ReducedPrompt(sources, None if order == list(range(len(order))) else order)
