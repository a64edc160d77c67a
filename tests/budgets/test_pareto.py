"""The frontier against brute force; the hypervolume against counting cells of a grid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgets.pareto import dominates, frontier, hypervolume

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


def test_bad_input():
    with pytest.raises(ValueError, match="one length"):
        frontier([1, 2], [1])
    with pytest.raises(ValueError, match="finite"):
        frontier([1, 2], [1, float("nan")])
