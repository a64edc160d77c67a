"""Policies on matrices of scores and costs: definitions, bounds, and what must not matter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from budgets import policies

SCORES = np.array([[0, 0, 1], [1, 1, 1], [0, 0, 0], [1, 0, 0], [0.2, 0.5, 0.5]], dtype=float)
COSTS = np.tile([1.0, 2.0, 4.0], (5, 1))
matrices = arrays.arrays(
    float, arrays.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=st.sampled_from([0.0, 0.5, 1.0])
)


def test_oracle_is_the_cheapest_that_is_right():
    assert policies.oracle(SCORES, COSTS).tolist() == [2, 0, 0, 0, 1]


def test_what_suffices_is_the_label_or_costs_more():
    logits = np.log([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    assert policies.success(logits) == pytest.approx(np.array([[0.5, 0.8, 1.0], [0.1, 0.2, 1.0]]))
    assert policies.success(logits + 1000) == pytest.approx(policies.success(logits))
    with pytest.raises(ValueError, match="logits must be a matrix"):
        policies.success([1.0, 2.0])


def test_labels_ask_for_no_more_than_the_full_model_knows():
    assert policies.pseudo_labels(SCORES, COSTS).tolist() == [2, 0, 0, 0, 1]
    assert policies.pseudo_labels([[0.0, 1.0, 0.0]], [[1, 2, 3]]).tolist() == [0]
    assert policies.oracle([[0.0, 1.0, 0.0]], [[1, 2, 3]]).tolist() == [1]
    assert policies.pseudo_labels([[0.985, 0.995, 1.0]], [[1, 2, 3]]).tolist() == [1]


@given(matrices)
def test_no_policy_beats_the_oracle_nor_answers_as_well_for_less(scores):
    costs = np.tile(np.arange(1.0, scores.shape[1] + 1), (len(scores), 1))
    best = policies.oracle(scores, costs)
    reached = policies.taken(scores, best)
    for configuration in range(scores.shape[1]):
        rival, cheaper = scores[:, configuration], costs[:, configuration] < policies.taken(costs, best)
        assert (rival <= reached).all() and (rival < reached)[cheaper].all()


def test_a_task_gets_the_cheapest_configuration_that_is_good_enough():
    scores = np.array([[0.5, 1, 1], [0.5, 1, 1], [0.995, 1, 1]])
    assert policies.best_per_task(scores, COSTS[:3], ["read", "read", "look"]) == {"read": 1, "look": 0}
    assert policies.by_task({"read": 1, "look": 0}, ["look", "read"]).tolist() == [0, 1]
    with pytest.raises(ValueError, match="chosen for count; chosen for: read"):
        policies.by_task({"read": 1}, ["count"])
    with pytest.raises(ValueError, match="task of each of 3 samples"):
        policies.best_per_task(scores, COSTS[:3], ["read"])


def test_a_larger_cost_weight_never_chooses_dearer():
    random = np.random.default_rng(0)
    success, costs = random.random((200, 4)), np.array([0.1, 0.2, 0.4, 0.8])
    choices = [policies.cost_aware(success, costs, weight) for weight in (0, 0.1, 0.5, 2, 100)]
    assert (choices[0] == success.argmax(1)).all() and (choices[-1] == 0).all()
    for less, more in zip(choices, choices[1:], strict=False):
        assert (costs[more] <= costs[less]).all()
    assert policies.cost_aware([[0.5, 0.5]], [1, 2], 0).tolist() == [0], "of equals the cheaper one"
    with pytest.raises(ValueError, match="cost_weight must be a number >= 0, got -1"):
        policies.cost_aware(success, costs, -1)


def test_a_cascade_stops_where_it_is_certain_and_pays_for_all_it_ran():
    confidence = np.array([[0.95, 0.1, 0.1], [0.5, 0.1, 0.95], [0.5, 0.1, 0.2]])
    chosen, ran = policies.cascade(confidence, 0.9, [0, 2])
    assert chosen.tolist() == [0, 2, 2]
    assert ran.tolist() == [[True, False, False], [True, False, True], [True, False, True]]
    everything, _ = policies.cascade(confidence, 1.0, [0, 1, 2])
    assert (everything == 2).all()
    nothing, ran = policies.cascade(confidence, 0.0, [0, 1, 2])
    assert (nothing == 0).all() and ran[:, 1:].sum() == 0
    with pytest.raises(ValueError, match=r"rungs must name configurations 0 to 2, got \[3\]"):
        policies.cascade(confidence, 0.5, [3])


def test_a_ladder_doubles_and_ends_with_the_largest():
    assert policies.ladder([1, 1.5, 2, 3, 4, 5]) == [0, 2, 4, 5]
    assert policies.ladder([1, 1.1]) == [0, 1] and policies.ladder([3]) == [0]
    with pytest.raises(ValueError, match="cheapest first"):
        policies.ladder([2, 1])


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=9))
def test_a_whole_climb_costs_at_most_three_times_the_last_rung(costs):
    costs = sorted(costs)
    assert sum(costs[rung] for rung in policies.ladder(costs)) <= 3 * costs[-1] + 1e-9


def test_dealing_keeps_the_choices_and_forgets_the_samples():
    random = np.random.default_rng(1)
    choices, ids = random.integers(0, 4, 3000), [f"sample{i}" for i in range(3000)]
    dealt = policies.deal(choices, ids)
    assert (np.bincount(dealt) == np.bincount(choices)).all()
    assert abs(np.corrcoef(choices, dealt)[0, 1]) < 0.06
    order = random.permutation(3000)
    again = policies.deal(choices[order], [ids[i] for i in order])
    assert (again == dealt[order]).all() and (policies.deal(choices, ids, seed=1) != dealt).any()
    right = (choices[:, None] == np.arange(4)).astype(float)  # only the choice itself is right
    assert policies.taken(right, choices).mean() == 1
    by_chance = ((np.bincount(choices) / len(choices)) ** 2).sum()
    assert policies.taken(right, dealt).mean() == pytest.approx(by_chance, abs=0.03)


def test_uniform_choices_are_spread():
    counts = np.bincount(policies.uniform(4, [f"s{i}" for i in range(2000)]), minlength=4)
    assert counts.sum() == 2000 and counts.min() > 430


def test_shapes_and_numbers_are_checked():
    with pytest.raises(ValueError, match=r"costs must be a matrix \[5, 3\], got shape \[5, 2\]"):
        policies.oracle(SCORES, COSTS[:, :2])
    with pytest.raises(ValueError, match="scores must be finite"):
        policies.oracle([[np.nan]], [[1]])
    with pytest.raises(ValueError, match="2 samples need one choice each"):
        policies.deal([1], ["a", "b"])
    with pytest.raises(ValueError, match="share must be in 0..1"):
        policies.pseudo_labels(SCORES, COSTS, 2)
