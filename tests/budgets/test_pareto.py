"""The frontier against brute force; the hypervolume against counting cells of a grid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgets.pareto import dominates, frontier, hypervolume, probability_non_dominated

points = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=12)


@settings(deadline=None)
@given(points)
def test_frontier_is_what_nobody_dominates(drawn):
    costs, scores = zip(*drawn, strict=True)
    expected = [not any(dominates(*other, *point) for other in drawn) for point in drawn]
    assert frontier(costs, scores).tolist() == expected
    assert any(expected)


@settings(deadline=None)
@given(points)
def test_hypervolume_is_the_area_dominated(drawn):
    costs, scores = zip(*drawn, strict=True)
    cells = sum(
        any(cost <= x and score >= y + 1 for cost, score in drawn) for x in range(8) for y in range(8)
    )  # unit cells of the square below reference_cost = 8, above reference_score = 0
    assert hypervolume(costs, scores, reference_cost=8, reference_score=0) == cells
    on_frontier = frontier(costs, scores)
    kept = [np.asarray(values)[on_frontier] for values in (costs, scores)]
    assert hypervolume(*kept, reference_cost=8) == cells  # dominated points add nothing


def test_equal_points_share_the_frontier():
    assert frontier([1, 1, 2], [0.5, 0.5, 0.4]).tolist() == [True, True, False]


def test_bootstrap():
    generator = np.random.default_rng(0)
    good = generator.random(400) < 0.8
    bad = generator.random(400) < 0.3
    costs, scores = [0.5, 0.6, 0.4, 0.5], np.array([good, bad, bad, good], dtype=float)
    probability = probability_non_dominated(costs, scores, num_resamples=200)
    # Dearer and worse: never. Cheapest: always. Twins are scored on the same samples, so they tie: both always.
    assert probability.tolist() == [1.0, 0.0, 1.0, 1.0]
    close = probability_non_dominated([0.5, 0.6], np.array([good, good[::-1]], dtype=float), num_resamples=400)
    assert close[0] == 1.0 and 0.2 < close[1] < 0.8  # the dearer one must win, and wins in about half of the draws
    again = probability_non_dominated([0.5, 0.6], np.array([good, good[::-1]], dtype=float), num_resamples=400)
    assert (close == again).all()


def test_bootstrap_averages_over_tasks():
    """A task of 4 samples weighs as much as one of 400."""
    large, small = np.ones(400), np.ones(4)
    scores = np.array([np.concatenate([large, 0 * small]), np.concatenate([0.9 * large, small])])
    tasks = ["large"] * 400 + ["small"] * 4
    assert probability_non_dominated([1, 1], scores, tasks, num_resamples=20).tolist() == [0.0, 1.0]
    assert probability_non_dominated([1, 1], scores, num_resamples=20).tolist() == [1.0, 0.0]


def test_bad_input():
    with pytest.raises(ValueError, match="one length"):
        frontier([1, 2], [1])
    with pytest.raises(ValueError, match="finite"):
        frontier([1, 2], [1, float("nan")])
    with pytest.raises(ValueError, match="num_samples"):
        probability_non_dominated([1, 2], [[1.0, 2.0]])
