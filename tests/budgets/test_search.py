"""The search for viable SELF subsets: families, order, short list; on scores that are known in advance."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgets.search import Candidate, eliminate, evenly_spaced, search, shortlist, table

SLOTS = (0, 3, 6, 9)
WORTH = {0: 0.05, 3: 0.4, 6: 0.2, 9: 0.0}


def additive(subsets):
    """Every layer adds its worth, so greedy elimination is optimal and its order known."""
    return [sum(WORTH[layer] for layer in subset) for subset in subsets]


def test_elimination_drops_what_is_missed_least():
    assert eliminate(SLOTS, additive) == [(0, 3, 6, 9), (0, 3, 6), (3, 6), (3,), ()]


def test_of_equals_the_latest_layer_goes():
    assert eliminate((1, 2, 3), lambda subsets: [0.0] * len(subsets)) == [(1, 2, 3), (1, 2), (1,), ()]


@pytest.mark.parametrize(("num", "expected"), [(0, ()), (1, (6,)), (2, (3, 9)), (3, (0, 6, 9)), (4, SLOTS)])
def test_evenly_spaced(num, expected):
    assert evenly_spaced(SLOTS, num) == expected


def test_short_list_runs_from_none_to_all_and_keeps_what_buys_something():
    scores = {(): 0.2, (3,): 0.6, (6,): 0.4, (3, 6): 0.6, (0, 3): 0.7, (0, 3, 6): 0.8, SLOTS: 0.75}
    costs = {subset: 0.1 + 0.05 * len(subset) for subset in scores}
    assert shortlist(scores, costs) == [(), (3,), (0, 3), (0, 3, 6), SLOTS]
    assert shortlist(scores, costs, margin=0.15) == [(), (3,), (0, 3, 6), SLOTS]
    assert shortlist(scores, costs, longest=3) == [(), (3,), SLOTS], "the smallest gains go first"
    assert shortlist(scores, costs, longest=2) == [(), SLOTS]


def test_search_evaluates_each_subset_once_and_marks_the_short_list():
    seen = []

    def evaluate(subsets):
        seen.extend(subsets)
        return additive(subsets)

    found = search(SLOTS, evaluate, lambda subset: 0.2 + 0.1 * len(subset))
    assert len(seen) == len(set(seen)) and set(seen) == {one.layers for one in found}
    assert [one.layers for one in found if one.viable] == [(), (3,), (3, 6), (0, 3, 6), SLOTS]
    by_layers = {one.layers: one for one in found}
    assert by_layers[SLOTS].found_by == ("elimination", "evenly spaced")
    assert by_layers[(3, 9)].found_by == ("evenly spaced",) and by_layers[(3,)].found_by == ("elimination",)
    assert by_layers[(3, 6, 9)].found_by == ("tried on the way",)
    text = table(found)
    assert "* none" in text and "* 0, 3, 6, 9" in text and "  3, 9" in text
    assert by_layers[(3,)].to_dict() == {
        "layers": [3], "score": 0.4, "cost": pytest.approx(0.3), "found_by": ["elimination"], "viable": True,
    }  # fmt: skip


def test_a_model_without_slots_has_one_configuration():
    (only,) = search((), lambda subsets: [0.5] * len(subsets), lambda subset: 0.2)
    assert only == Candidate((), 0.5, 0.2, ("elimination", "evenly spaced"), True)


@given(st.dictionaries(st.integers(0, 30), st.floats(0, 1), min_size=1, max_size=7))
def test_the_chain_is_nested_and_never_dearer_than_n_squared(worth):
    slots, calls = sorted(worth), []

    def evaluate(subsets):
        calls.extend(subsets)
        return [sum(worth[layer] for layer in subset) for subset in subsets]

    chain = eliminate(slots, evaluate)
    assert [len(subset) for subset in chain] == list(range(len(slots), -1, -1))
    assert all(set(small) < set(large) for large, small in zip(chain, chain[1:], strict=False))
    assert len(calls) == len(slots) * (len(slots) + 1) // 2


@given(st.dictionaries(st.frozensets(st.integers(0, 5)), st.floats(0, 1), min_size=1))
def test_short_list_ascends_in_cost_and_score(scores):
    scores = {tuple(sorted(subset)): score for subset, score in scores.items()}
    costs = {subset: float(len(subset)) for subset in scores}
    kept = shortlist(scores, costs)
    assert [costs[s] for s in kept] == sorted({costs[s] for s in kept})
    middle = kept[:-1]
    assert [scores[s] for s in middle] == sorted({scores[s] for s in middle})
    assert costs[kept[0]] == min(costs.values()) and costs[kept[-1]] == max(costs.values())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evenly_spaced((3, 0), 1), "ascending order"),
        (lambda: evenly_spaced((0, 3), 3), "cannot take 3 of 2"),
        (lambda: eliminate((1, 1), additive), "different layers"),
        (lambda: shortlist({}, {}), "needs subsets"),
        (lambda: shortlist({(1,): 0.5}, {}), r"without cost: \[\(1,\)\]"),
        (lambda: shortlist({(1,): 0.5}, {(1,): 0.1}, longest=1), "at least"),
    ],
)
def test_bad_input_says_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
