"""Who is worth looking at when accuracy costs something: dominance, frontier, hypervolume, and how sure we are.

A point is a cost (lower is better) and a score (higher is better).
"""

from __future__ import annotations

from collections.abc import Sequence

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


def probability_non_dominated(
    costs: npt.ArrayLike,
    sample_scores: npt.ArrayLike,
    tasks: Sequence | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """How often each point is on the frontier when the samples are drawn anew, [num_points] in 0..1.

    Paired bootstrap: every point is scored on the same drawn samples. With tasks, samples are drawn within each task
    and the score is the macro-average, as in the report's main table.

    Args:
        costs: [num_points]; taken as exact.
        sample_scores: [num_points, num_samples].
        tasks: the task of each sample; None for one task.
    """
    costs, sample_scores = np.asarray(costs, dtype=float), np.asarray(sample_scores, dtype=float)
    if sample_scores.ndim != 2 or len(sample_scores) != len(costs) or sample_scores.shape[1] == 0:
        raise ValueError(f"sample_scores must be [{len(costs)} points, num_samples > 0], got {sample_scores.shape}")
    labels = np.zeros(sample_scores.shape[1], dtype=int) if tasks is None else np.unique(tasks, return_inverse=True)[1]
    if len(labels) != sample_scores.shape[1]:
        raise ValueError(f"tasks must name the task of each of {sample_scores.shape[1]} samples, got {len(labels)}")
    groups = [np.flatnonzero(labels == label) for label in range(labels.max() + 1)]
    generator = np.random.default_rng(seed)
    hits = np.zeros(len(costs))
    for _ in range(num_resamples):
        drawn = [generator.choice(group, size=len(group)) for group in groups]
        hits += frontier(costs, np.mean([sample_scores[:, index].mean(axis=1) for index in drawn], axis=0))
    return hits / num_resamples
