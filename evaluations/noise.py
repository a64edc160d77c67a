"""What repeated timings say: median, percentiles, and how far they can be trusted. Plain arithmetic on raw values.

Machines slow down and speed up while settings are measured in turns, so settings are compared within a round: the
ratio of two settings is taken round by round, and the median of these ratios has only the noise that the drift leaves.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

NOISY = 0.10  # spread relative to the median from which on a figure is flagged
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
NUM_RESAMPLES = 2000
Item = TypeVar("Item")


@dataclass(frozen=True)
class Spread:
    """Repeated runs of one thing.

    Args:
        noise: standard deviation relative to the median, as the median absolute deviation estimates it: one run that
            was disturbed does not count, a machine that is never quiet does.
    """

    num_runs: int
    median: float
    p5: float
    p95: float
    noise: float

    @property
    def is_noisy(self) -> bool:
        """True if the noise is above `NOISY`."""
        return self.noise > NOISY


def turns(items: Sequence[Item], number: int) -> list[Item]:
    """The order of a round: in each another item comes first."""
    turn = number % len(items)
    return [*items[turn:], *items[:turn]]


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of the others lies, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> Spread:
    """Median, percentiles and noise of at least one value."""
    middle = median(values)
    deviation = median(abs(value - middle) for value in values)
    noise = _MAD_TO_SIGMA * deviation / middle if middle else 0.0
    return Spread(len(values), middle, percentile(values, 0.05), percentile(values, 0.95), noise)


@dataclass(frozen=True)
class Ratio:
    """A median of ratios with its 95 % interval (bootstrap over the rounds)."""

    num_rounds: int
    median: float
    low: float
    high: float


def ratio_by_round(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Median of numerator / denominator over rounds, and what it might be in other rounds of the same kind.

    Raises:
        ValueError: the sequences differ in length, or are empty.
    """
    if len(numerators) != len(denominators) or not numerators:
        raise ValueError(f"a ratio takes as many values on both sides, got {len(numerators)} and {len(denominators)}")
    ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
    generator = random.Random(0)
    draws = [median(generator.choices(ratios, k=len(ratios))) for _ in range(NUM_RESAMPLES)]
    return Ratio(len(ratios), median(ratios), percentile(draws, 0.025), percentile(draws, 0.975))
