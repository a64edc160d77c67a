"""What the report says of policies: labels, confusion, what random would do, who beats whom."""

import numpy as np
import pytest

from budgets import policies
from reports.comparisons import analyse
from reports.data import load
from reports.policy import chosen, dealt, sections
from reports.tables import accuracy_table, standings_table


@pytest.fixture(scope="module")
def analysis(policy_folder):
    return analyse(load(policy_folder))


@pytest.fixture(scope="module")
def section(analysis):
    (one,) = sections(analysis)
    return one


def test_settings_say_what_they_are(analysis):
    labels = {s.id: s.label for s in analysis.run.settings}
    assert labels["visor:fixed(0)"] == "VISOR (0 SELF)" and labels["visor:fixed(1)"] == "VISOR (1 SELF, layer 4)"
    assert labels["visor:fixed(2)"] == "VISOR (2 SELF, layers 4, 8)"
    assert labels["visor:router(0.1)"] == "VISOR router, lambda = 0.1" and labels["visor@0.5"] == "VISOR at 50 %"
    order = [s.id for s in analysis.run.settings]
    assert order[:4] == ["dense", "visor:fixed(0)", "visor:fixed(1)", "visor:fixed(2)"] and order[-1] == "visor:oracle"


def test_labels_and_confusion(section):
    family = section.family
    expected = policies.pseudo_labels(family.scores, family.relative_costs)
    assert family.samples.label.tolist() == expected.tolist()
    router = next(c for c in section.choices if c.setting.id == "visor:router")
    assert sum(router.confusion.values()) == pytest.approx(1) and router.num_confusion == len(expected) == 540
    assert 0.3 < router.agreement < 1
    assert {c.setting.id for c in section.choices} == {
        "visor:per-task", "visor:router", "visor:cascade(0.9)", "visor:random", "visor:oracle",
    }  # fmt: skip
    assert router.rows[0].num_samples == 540 and sum(router.rows[0].shares.values()) == pytest.approx(1)


def test_dealt_at_random_is_the_expectation(analysis, section):
    family = section.family
    router = next(p for p in section.points if p.setting.id == "visor:router")
    choice = chosen(analysis.run, family, router.setting)
    cost, score = dealt(family, choice)
    random = np.random.default_rng(0)
    draws = [policies.taken(family.scores, random.permutation(choice)).mean() for _ in range(200)]
    assert score == pytest.approx(np.mean(draws), abs=0.01) and cost == pytest.approx(router.cost, rel=0.02)
    assert router.score.estimate > score, "the made router knows more than chance"


def test_standings_compare_with_what_costs_no_more(section):
    for standing in section.standings:
        assert not standing.setting.is_oracle and standing.setting.is_policy
        fixed = {p.setting.id: p for p in section.points if p.setting.policy == "fixed"}
        if standing.rival is not None:
            mine = fixed[standing.rival.id]
            assert mine.cost <= standing.cost * 1.00001
            assert standing.against_rival.difference == pytest.approx(standing.score.estimate - mine.score.estimate)
    assert [s.cost for s in section.standings] == sorted(s.cost for s in section.standings)
    router = next(s for s in section.standings if s.setting.id == "visor:router")
    assert router.against_random.low > 0
    assert len(standings_table(section).groups[0].rows) == len(section.standings)


def test_points_of_a_sweep_stay_out_of_matrices_and_repeats_off_the_frontier(analysis):
    compared = {i for pair in analysis.matrices["policies"] for i in pair}
    assert "visor:router" in compared and "visor:router(0.1)" not in compared
    assert "visor@0.5" not in analysis.frontier and "visor:fixed(1)" in analysis.frontier
    rows = [r for g in accuracy_table(analysis).groups for r in g.rows]
    assert next(r for r in rows if r.setting.id == "visor@0.5").cells[-1].text == "as its configuration"


def test_composed_settings_say_why_they_have_no_time(analysis):
    costs = analysis.costs["visor:oracle"]
    assert "without a run of its own" in costs.not_measured["peak_memory_bytes"]
