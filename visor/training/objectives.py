"""What the stages minimise: VISOR under one configuration a step, or M3's mean over nested scales."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import numpy as np
from torch import Tensor

from visor.reduction.pooling_by import PoolingBy
from visor.training.averaging import averaged, averaged_rows
from visor.training.batch import Batch
from visor.training.forward import Answers, Features, PackedModel, answers_of


@dataclass
class Pass:
    """One forward pass of a step: what ran, for the log, what came out, and which facts were right, by reader."""

    name: str
    answers: Answers
    facts: dict[str, list[bool]] = field(default_factory=dict)


class Objective(ABC):
    """What is minimised: one or several passes over a batch, which count equally."""

    @abstractmethod
    def passes(self, packed: PackedModel, batch: Batch, features: Sequence[Features], step: int) -> Iterable[Pass]:
        """The passes of a step, each ready for its backward before the next one runs."""

    @abstractmethod
    def num_passes(self, step: int) -> int:
        """How many they are."""


def check_sides(name: str, sides: Sequence[int]) -> tuple[int, ...]:
    """Sides of token grids.

    Raises:
        ValueError: not a list of different positive integers.
    """
    good = [side for side in sides if isinstance(side, int) and not isinstance(side, bool) and side >= 1]
    if len(good) != len(sides) or len(set(good)) != len(good):
        raise ValueError(f"{name} must list different sides of token grids, such as [12, 6, 3], got {list(sides)}")
    return tuple(sides)


Found = tuple[Tensor | None, list[bool]]
"""A side loss with what was right; None where there was nothing to ask."""


@dataclass(frozen=True, kw_only=True)
class _Averaging(Objective):
    """An objective on averaged grids, with the side loss of the words in their windows
    (`visor.training.auxiliary.window_words`).

    Args:
        seed: of all draws.
        facts_weight: of a word in a window (`written`), or a fact that a visual token should hold
            (`visor.training.auxiliary.visual_facts`), beside an answer token.
        written_share: share of the steps that ask for nothing but these words. Such a step runs no decoder.
    """

    seed: int = 0
    pad_id: int = 0
    hint_weight: float = 0.0
    facts_weight: float = 0.0
    written_share: float = 0.0

    def is_on_words_alone(self, step: int) -> bool:
        """Whether a step asks for words in windows alone; equal on all processes."""
        return np.random.default_rng([self.seed, step, 17]).random() < self.written_share

    def written(
        self,
        packed: PackedModel,
        batch: Batch,
        features: Sequence[Features],
        shapes: Sequence[Callable[[int], tuple[int, int]]],
    ) -> Found:
        """The mean over some grids, whichever the step runs on: it costs little, and the tower has much to learn."""
        if packed.written is None:
            return None, []
        grids = [averaged_rows(batch.rows, features, shape_of) for shape_of in shapes]
        found = [packed.written.loss_sum(*grid) for grid in grids]
        losses = [loss / len(found) for loss, _ in found if loss is not None]
        return (sum(losses) if losses else None), [ok for _, right in found for ok in right]

    def with_aids(self, name: str, answers: Answers, aids: Sequence[tuple[str, float, Found]]) -> Pass:
        """A pass with its side losses, each with its name and weight."""
        facts = {}
        for aid, weight, (loss, right) in aids:
            if loss is not None:
                answers.loss_sum, facts[aid] = answers.loss_sum + weight * loss, right
        return Pass(name, answers, facts)

    def words_alone(self, found: Found, batch: Batch, features: Sequence[Features]) -> Pass:
        """A pass that asks no question."""
        nothing = [[] for _ in batch.rows]
        answers = Answers(0.0 * features[0][0].sum(), nothing, nothing)
        return self.with_aids("words", answers, [("written", self.facts_weight, found)])


@dataclass(frozen=True)
class VisorObjective(_Averaging):
    """One configuration a step, drawn from a list; now and then on an averaged token grid (VISOR-TR).

    Args:
        configurations: SELF subsets to draw from. With one, nothing is random.
        weights: how often each of them is drawn, beside the others; the last one holds for all that follow. Empty is
            equally often.
        factors: of pooling to draw from (`visor.reduction.pooling_by`), beside the full token grid.
        pooled_share: share of the steps that run on one of the `factors`.
        factor_weights: how often each of the `factors` is drawn, as `weights` says it of the configurations.
        facts_weight: of a fact that a refined visual token should hold, beside an answer token
            (`visor.training.auxiliary.visual_facts`), or a word of a question (`asked`), and of a word in an averaged
            window (`written`).
        looks_weight: of a look that text should take (`visor.training.auxiliary.attention_supervision`).
    """

    configurations: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...] = ()
    factors: tuple[int, ...] = ()
    pooled_share: float = 0.0
    factor_weights: tuple[float, ...] = ()
    looks_weight: float = 0.0

    def __post_init__(self) -> None:
        _shares("configuration_weights", self.weights, len(self.configurations), "configurations")
        _shares("pooling.weights", self.factor_weights, len(self.factors), "factors")

    def num_passes(self, step: int) -> int:
        return 1

    def draw(self, step: int) -> tuple[tuple[int, ...], int | None]:
        """The configuration and the factor of a step (None is the full grid); equal on all processes."""
        rng = np.random.default_rng([self.seed, step, 11])
        chosen = _drawn(rng, self.configurations, self.weights)
        reduce = bool(self.factors) and rng.random() < self.pooled_share
        return chosen, _drawn(rng, self.factors, self.factor_weights) if reduce else None

    def passes(self, packed: PackedModel, batch: Batch, features: Sequence[Features], step: int) -> Iterable[Pass]:
        subset, factor = self.draw(step)
        name = f"{len(subset)} SELF" + (f" pooled {factor}x" if factor else "")
        written = self.written(packed, batch, features, [_shape_by(each) for each in self.factors])
        if self.is_on_words_alone(step):
            yield self.words_alone(written, batch, features)
            return
        aids = [("written", self.facts_weight, written)]
        if factor is not None:
            batch, features = averaged(batch, features, _shape_by(factor), self.pad_id)
        answers = answers_of(packed.logits(batch, features, subset), batch, self.hint_weight)
        if packed.facts is not None:
            aids.append(("facts", self.facts_weight, packed.facts.loss_sum(batch.rows, features, subset)))
            aids.append(("asked", self.facts_weight, packed.asked.loss_sum(batch.rows, subset)))
        if packed.looks is not None:
            aids.append(("looks", self.looks_weight, packed.looks.loss_sum(batch.rows)))
        yield self.with_aids(name, answers, aids)


def _shares(name: str, weights: Sequence[float], number: int, of: str) -> list[float]:
    """What `weights` give each of `number` things; the last weight holds for all that follow, none is equally often."""
    held = [*weights, *weights[-1:] * (number - len(weights))][:number] if weights else [1.0] * number
    if any(not weight >= 0 for weight in weights) or (weights and not sum(held)):
        raise ValueError(f"{name} must not be negative, nor all zero, got {list(weights)} for {number} {of}")
    return [weight / sum(held) for weight in held]


def _drawn(rng: np.random.Generator, things: Sequence[Any], weights: Sequence[float]) -> Any:
    """One of them. Without weights by `integers`, as runs drew that are to be resumed."""
    if not weights:
        return things[int(rng.integers(len(things)))]
    return things[int(rng.choice(len(things), p=_shares("weights", weights, len(things), "things")))]


def _square(side: int) -> Callable[[int], tuple[int, int]]:
    return lambda _: (side, side)


def _shape_by(factor: int) -> Callable[[int], tuple[int, int]]:
    return lambda side: PoolingBy(factor).shape(side, side)


@dataclass(frozen=True)
class NestedPooling(_Averaging):
    """M3 (Cai et al., Matryoshka Multimodal Models, arXiv 2405.17430): the mean loss over nested scales.

    Every scale averages the same tokens; all of them are run at every step, or `at_once` of them, drawn at random.

    Args:
        sides: of the token grids, the scales.
        at_once: scales a step; None is all, as in the paper.
    """

    sides: tuple[int, ...]
    at_once: int | None = None

    def __post_init__(self) -> None:
        if self.at_once is not None and not 1 <= self.at_once <= len(self.sides):
            raise ValueError(f"at_once must be 1 to {len(self.sides)} (the scales), got {self.at_once!r}")

    def draw(self, step: int) -> list[int]:
        """The scales of a step."""
        if self.at_once is None:
            return list(self.sides)
        order = np.random.default_rng([self.seed, step, 13]).permutation(len(self.sides))
        return [self.sides[int(i)] for i in order[: self.at_once]]

    def num_passes(self, step: int) -> int:
        return 1 if self.is_on_words_alone(step) else len(self.draw(step))

    def passes(self, packed: PackedModel, batch: Batch, features: Sequence[Features], step: int) -> Iterable[Pass]:
        full = min(isqrt(row.num_visual) for row in batch.rows)
        finest = [_square(side) for side in sorted(self.sides) if side < full][-1:]  # that averages anything
        if self.is_on_words_alone(step):
            yield self.words_alone(self.written(packed, batch, features, finest), batch, features)
            return
        for side in self.draw(step):
            written = self.written(packed, batch, features, finest)
            smaller, some = averaged(batch, features, _square(side), self.pad_id)
            answers = answers_of(packed.logits(smaller, some, None), smaller, self.hint_weight)
            aids = [("written", self.facts_weight, written)]
            if packed.facts is not None:
                found = packed.facts.loss_sum(smaller.rows, some, range(packed.num_layers))
                aids.append(("facts", self.facts_weight, found))
            yield self.with_aids(f"side {side}", answers, aids)
