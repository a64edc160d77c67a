"""Who is worth looking at when accuracy costs something: dominance, frontier, hypervolume.

A point is a cost (lower is better) and a score (higher is better).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def _points(costs: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    costs, scores = np.asarray(costs, dtype=float), np.asarray(scores, dtype=float)
    if costs.ndim != 1 or costs.shape != scores.shape:
        raise ValueError(
            f"costs and scores must be two lists of one length, got shapes {costs.shape} and {scores.shape}"
        )
    if not (np.isfinite(costs).all() and np.isfinite(scores).all()):
        raise ValueError("costs and scores must be finite; leave out points that were not measured")
    return costs, scores


def dominates(cost: float, score: float, other_cost: float, other_score: float) -> bool:
    """True if the first point is at least as good in both, and better in one."""
    return cost <= other_cost and score >= other_score and (cost < other_cost or score > other_score)


def frontier(costs: npt.ArrayLike, scores: npt.ArrayLike) -> np.ndarray:
    """Which points nobody dominates, [num_points] bool. Equal points are on it together."""
    costs, scores = _points(costs, scores)
    no_dearer = costs[:, None] <= costs  # [other, point]
    no_worse = scores[:, None] >= scores
    better = (costs[:, None] < costs) | (scores[:, None] > scores)
    return ~(no_dearer & no_worse & better).any(axis=0)


def hypervolume(
    costs: npt.ArrayLike, scores: npt.ArrayLike, reference_cost: float = 1.0, reference_score: float = 0.0
) -> float:
    """Area that the points dominate inside cost <= reference_cost, score >= reference_score. Larger is better."""
    costs, scores = _points(costs, scores)
    inside = (costs < reference_cost) & (scores > reference_score)
    area, top = 0.0, reference_score
    costs, scores = costs[inside], scores[inside]
    for index in np.lexsort((-scores, costs)):
        if scores[index] > top:
            area += (reference_cost - costs[index]) * (scores[index] - top)
            top = scores[index]
    return float(area)
