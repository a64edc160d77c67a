"""What the stages minimise: VISOR under one configuration a step, or M3's mean over nested scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from visor.reduction.pooling_by import PoolingBy
from visor.training.averaging import averaged, averaged_rows
from visor.training.batch import Batch
from visor.training.forward import Answers, Features, PackedModel, answers_of
from visor.training.optimise import Objective, Pass


def check_sides(name: str, sides: Sequence[int]) -> tuple[int, ...]:
    """Sides of token grids.

    Raises:
        ValueError: not a list of different positive integers.
    """
    good = [side for side in sides if isinstance(side, int) and not isinstance(side, bool) and side >= 1]
    if len(good) != len(sides) or len(set(good)) != len(good):
        raise ValueError(f"{name} must list different sides of token grids, such as [12, 6, 3], got {list(sides)}")
    return tuple(sides)


Aid = tuple[str, float, tuple[Tensor | None, list[bool]]]
"""Name of a side loss, its weight, and the loss with what was right; None where there was nothing to ask."""


def _with_aids(name: str, answers: Answers, aids: Sequence[Aid]) -> Pass:
    facts = {}
    for aid, weight, (loss, right) in aids:
        if loss is not None:
            answers.loss_sum, facts[aid] = answers.loss_sum + weight * loss, right
    return Pass(name, answers, facts)


@dataclass(frozen=True)
class VisorObjective(Objective):
    """One configuration a step, drawn from a list; now and then on an averaged token grid (VISOR-TR).

    Args:
        configurations: SELF subsets to draw from. With one, nothing is random.
        weights: how often each of them is drawn, beside the others; the last one holds for all that follow. Empty is
            equally often.
        factors: of pooling to draw from (`visor.reduction.pooling_by`), beside the full token grid.
        pooled_share: share of the steps that run on one of the `factors`.
        seed: of the draws.
        facts_weight: of a fact that a refined visual token should hold, beside an answer token
            (`visor.training.refined`), or a word of a question (`asked`), and of a word in an averaged window
            (`written`).
        looks_weight: of a look that text should take (`visor.training.looks`).
    """

    configurations: tuple[tuple[int, ...], ...]
    weights: tuple[float, ...] = ()
    factors: tuple[int, ...] = ()
    pooled_share: float = 0.0
    seed: int = 0
    pad_id: int = 0
    hint_weight: float = 0.0
    facts_weight: float = 0.0
    looks_weight: float = 0.0

    def __post_init__(self) -> None:
        if any(not weight >= 0 for weight in self.weights) or (self.weights and not sum(self._weights)):
            raise ValueError(
                f"configuration_weights must not be negative, nor all zero, got {list(self.weights)} for "
                f"{len(self.configurations)} configurations"
            )

    @property
    def _weights(self) -> tuple[float, ...]:
        missing = len(self.configurations) - len(self.weights)
        return (*self.weights, *self.weights[-1:] * missing)[: len(self.configurations)]

    def num_passes(self, step: int) -> int:
        return 1

    def draw(self, step: int) -> tuple[tuple[int, ...], int | None]:
        """The configuration and the factor of a step (None is the full grid); equal on all processes."""
        rng = np.random.default_rng([self.seed, step, 11])
        if self.weights:
            shares = np.divide(self._weights, sum(self._weights))
            chosen = self.configurations[int(rng.choice(len(self.configurations), p=shares))]
        else:
            chosen = self.configurations[int(rng.integers(len(self.configurations)))]
        reduce = bool(self.factors) and rng.random() < self.pooled_share
        return chosen, self.factors[int(rng.integers(len(self.factors)))] if reduce else None

    def passes(self, packed: PackedModel, batch: Batch, features: Sequence[Features], step: int) -> Iterable[Pass]:
        subset, factor = self.draw(step)
        name = f"{len(subset)} SELF" + (f" pooled {factor}x" if factor else "")
        aids = [("written", self.facts_weight, self._written(packed, batch, features))]
        if factor is not None:
            batch, features = averaged(batch, features, _shape_by(factor), self.pad_id)
        answers = answers_of(packed.logits(batch, features, subset), batch, self.hint_weight)
        if packed.facts is not None:
            aids.append(("facts", self.facts_weight, packed.facts.loss_sum(batch.rows, features, subset)))
            aids.append(("asked", self.facts_weight, packed.asked.loss_sum(batch.rows, subset)))
        if packed.looks is not None:
            aids.append(("looks", self.looks_weight, packed.looks.loss_sum(batch.rows)))
        yield _with_aids(name, answers, aids)

    def _written(
        self, packed: PackedModel, batch: Batch, features: Sequence[Features]
    ) -> tuple[Tensor | None, list[bool]]:
        """The mean over all factors, whichever the step runs on: it costs little, and the tower has much to learn."""
        if packed.written is None:
            return None, []
        grids = [averaged_rows(batch.rows, features, _shape_by(factor)) for factor in self.factors]
        found = [packed.written.loss_sum(*grid) for grid in grids]
        losses = [loss / len(found) for loss, _ in found if loss is not None]
        return (sum(losses) if losses else None), [ok for _, right in found for ok in right]


def _shape_by(factor: int) -> Callable[[int], tuple[int, int]]:
    return lambda side: PoolingBy(factor).shape(side, side)


@dataclass(frozen=True)
class NestedPooling(Objective):
    """M3 (Cai et al., Matryoshka Multimodal Models, arXiv 2405.17430): the mean loss over nested scales.

    Every scale averages the same tokens; all of them are run at every step, or `at_once` of them, drawn at random.

    Args:
        sides: of the token grids, the scales.
        at_once: scales a step; None is all, as in the paper.
        facts_weight: of a word in an averaged window, beside an answer token (`visor.training.written`).
    """

    sides: tuple[int, ...]
    at_once: int | None = None
    seed: int = 0
    pad_id: int = 0
    hint_weight: float = 0.0
    facts_weight: float = 0.0

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
        return len(self.sides) if self.at_once is None else self.at_once

    def passes(self, packed: PackedModel, batch: Batch, features: Sequence[Features], step: int) -> Iterable[Pass]:
        for side in self.draw(step):
            smaller, some = averaged(batch, features, lambda _, side=side: (side, side), self.pad_id)
            answers = answers_of(packed.logits(smaller, some, None), smaller, self.hint_weight)
            written = (None, []) if packed.written is None else packed.written.loss_sum(smaller.rows, some)
            yield _with_aids(f"side {side}", answers, [("written", self.facts_weight, written)])
