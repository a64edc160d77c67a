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
    """One forward pass of a step.

    Args:
        name: of what ran, for the log.
        answers: what came out, with the auxiliary losses in its loss.
        auxiliary: by auxiliary loss, which of its predictions were right.
    """

    name: str
    answers: Answers
    auxiliary: dict[str, list[bool]] = field(default_factory=dict)


class Objective(ABC):
    """What is minimised: one or several passes over a batch, which count equally."""

    @abstractmethod
    def passes(self, packed: PackedModel, batch: Batch, features: Sequence[Features], step: int) -> Iterable[Pass]:
        """The passes of a step, each ready for its backward before the next one runs."""

    @abstractmethod
    def num_passes(self, step: int) -> int:
        """How many they are."""


AuxiliaryLoss = tuple[Tensor | None, list[bool]]
"""A summed loss with which predictions were right; None where a batch has no targets for it."""


@dataclass(frozen=True, kw_only=True)
class _Averaging(Objective):
    """An objective on averaged grids, with the auxiliary loss of the words in their windows
    (`visor.training.auxiliary.window_words`).

    Args:
        seed: of all draws.
        pad_id: token id of padding.
        hint_weight: of a hint beside an answer token.
        fact_supervision_weight: of a fact (`visual_facts`, `question_facts`) or a word in a window (`window_words`)
            beside an answer token.
        window_words_share: share of the steps on window words alone. Such a step runs no decoder.
    """

    seed: int = 0
    pad_id: int = 0
    hint_weight: float = 0.0
    fact_supervision_weight: float = 0.0
    window_words_share: float = 0.0

    def is_window_words_step(self, step: int) -> bool:
        """Whether a step is on window words alone; equal on all processes."""
        return np.random.default_rng([self.seed, step, 17]).random() < self.window_words_share

    def window_words(
        self,
        packed: PackedModel,
        batch: Batch,
        features: Sequence[Features],
        shapes: Sequence[Callable[[int], tuple[int, int]]],
    ) -> AuxiliaryLoss:
        """The mean over some grids, whichever the step runs on: it costs little, and the tower has much to learn."""
        if packed.window_words is None:
            return None, []
        grids = [averaged_rows(batch.rows, features, shape_of) for shape_of in shapes]
        found = [packed.window_words.loss_sum(*grid) for grid in grids]
        losses = [loss / len(found) for loss, _ in found if loss is not None]
        return (sum(losses) if losses else None), [ok for _, right in found for ok in right]

    def with_auxiliary(self, name: str, answers: Answers, losses: Sequence[tuple[str, float, AuxiliaryLoss]]) -> Pass:
        """A pass with its auxiliary losses, each with its name and weight."""
        auxiliary = {}
        for own, weight, (loss, right) in losses:
            if loss is not None:
                answers.loss_sum, auxiliary[own] = answers.loss_sum + weight * loss, right
        return Pass(name, answers, auxiliary)

    def words_alone(self, words: AuxiliaryLoss, batch: Batch, features: Sequence[Features]) -> Pass:
        """A pass on window words, in which no question is asked."""
        nothing = [[] for _ in batch.rows]
        answers = Answers(0.0 * features[0][0].sum(), nothing, nothing)
        return self.with_auxiliary("words", answers, [("window words", self.fact_supervision_weight, words)])


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
        attention_supervision_weight: of an attention target beside an answer token
            (`visor.training.auxiliary.attention_supervision`).
    """

    configurations: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...] = ()
    factors: tuple[int, ...] = ()
    pooled_share: float = 0.0
    factor_weights: tuple[float, ...] = ()
    attention_supervision_weight: float = 0.0

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
        words = self.window_words(packed, batch, features, [_shape_by(each) for each in self.factors])
        if self.is_window_words_step(step):
            yield self.words_alone(words, batch, features)
            return
        weight = self.fact_supervision_weight
        losses = [("window words", weight, words)]
        if factor is not None:
            batch, features = averaged(batch, features, _shape_by(factor), self.pad_id)
        answers = answers_of(packed.logits(batch, features, subset), batch, self.hint_weight)
        if packed.visual_facts is not None:
            losses.append(("visual facts", weight, packed.visual_facts.loss_sum(batch.rows, features, subset)))
            losses.append(("question facts", weight, packed.question_facts.loss_sum(batch.rows, subset)))
        if packed.attention_supervision is not None:
            attention = packed.attention_supervision.loss_sum(batch.rows)
            losses.append(("attention", self.attention_supervision_weight, attention))
        yield self.with_auxiliary(name, answers, losses)


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
        return 1 if self.is_window_words_step(step) else len(self.draw(step))

    def passes(self, packed: PackedModel, batch: Batch, features: Sequence[Features], step: int) -> Iterable[Pass]:
        full = min(isqrt(row.num_visual) for row in batch.rows)
        finest = [_square(side) for side in sorted(self.sides) if side < full][-1:]  # that averages anything
        if self.is_window_words_step(step):
            yield self.words_alone(self.window_words(packed, batch, features, finest), batch, features)
            return
        for side in self.draw(step):
            words = self.window_words(packed, batch, features, finest)
            smaller, some = averaged(batch, features, _square(side), self.pad_id)
            answers = answers_of(packed.logits(smaller, some, None), smaller, self.hint_weight)
            losses = [("window words", self.fact_supervision_weight, words)]
            if packed.visual_facts is not None:
                facts = packed.visual_facts.loss_sum(smaller.rows, some, range(packed.num_layers))
                losses.append(("visual facts", self.fact_supervision_weight, facts))
            yield self.with_auxiliary(f"side {side}", answers, losses)
