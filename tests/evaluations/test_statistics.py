"""Statistics against scipy, brute force, and simulated coverage."""

import itertools

import numpy as np
import pytest
from scipy import stats

from evaluations import statistics as st


@pytest.mark.parametrize("right,num", [(0, 10), (7, 10), (20, 20), (431, 500)])
def test_wilson_is_scipys(right, num):
    expected = stats.binomtest(right, num).proportion_ci(0.95, method="wilson")
    assert st.wilson(right / num, num) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("only_a,only_b", [(0, 0), (5, 5), (1, 9), (30, 12), (0, 6)])
def test_mcnemar_is_the_binomial_test(only_a, only_b):
    total = only_a + only_b
    expected = stats.binomtest(only_a, total).pvalue if total else 1.0
    assert st.mcnemar_exact(only_a, only_b) == pytest.approx(expected, abs=1e-12)


def test_sign_flips_enumerated_match_brute_force_and_scipy():
    differences = np.array([0.3, -0.1, 0.4, 0.2, 0.0, 0.25, -0.05])
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=len(differences))]
    brute = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-12)
    assert st.sign_flip_test(differences) == pytest.approx(brute)
    scipys = stats.permutation_test(
        (differences,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    assert st.sign_flip_test(differences) == pytest.approx(scipys.pvalue)


def test_drawn_sign_flips_approach_the_exact_answer():
    differences = np.random.default_rng(3).normal(0.15, 1, 40)
    drawn = st.sign_flip_test(differences, num_resamples=20_000, seed=1)
    assert drawn == st.sign_flip_test(differences, num_resamples=20_000, seed=1)
    normal = 2 * stats.norm.sf(abs(differences.sum()) / np.sqrt((differences**2).sum()))
    assert drawn == pytest.approx(normal, abs=0.03)


def test_sign_flips_equal_mcnemar_on_single_questions():
    differences = np.array([1.0] * 9 + [-1.0] * 3 + [0.0] * 50)
    assert st.sign_flip_test(differences) == pytest.approx(st.mcnemar_exact(9, 3))


def test_holm_by_hand_and_order():
    assert st.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert st.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert st.holm([]) == []
    with pytest.raises(ValueError, match="0..1"):
        st.holm([1.2])


def test_bootstrap_means_are_joint_seeded_and_by_cluster():
    scores = np.array([1, 1, 0, 0, 1, 0], float)
    clusters = ["a", "a", "b", "b", "c", "c"]
    both = st.bootstrap_means(np.stack([scores, scores], 1), clusters, 200, seed=5)
    assert (both[:, 0] == both[:, 1]).all()
    assert (both == st.bootstrap_means(np.stack([scores, scores], 1), clusters, 200, seed=5)).all()
    # Three images of two questions: a resampled mean is a sum of three of {2, 0, 1} over 6.
    assert set(np.round(both[:, 0] * 6).astype(int)) <= set(range(7))


def test_bootstrap_interval_matches_scipy_without_clusters():
    scores = np.random.default_rng(0).beta(2, 3, 80)
    ours = st.mean_interval(scores, num_resamples=5000)
    scipys = stats.bootstrap(
        (scores,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((scipys.low, scipys.high), abs=0.006)


def test_clusters_widen_the_interval_by_the_design_effect():
    once = np.random.default_rng(2).integers(0, 2, 100).astype(float)
    single = st.mean_interval(once)
    # Every question asked four times about the same image carries no new information.
    repeated = st.mean_interval(np.repeat(once, 4), np.repeat(np.arange(100), 4))
    assert (repeated.low, repeated.high) == pytest.approx((single.low, single.high), abs=2e-3)
    assert repeated.num_samples == 400 and repeated.num_clusters == 100
    assert st.mean_interval(np.repeat(once, 4)).high < repeated.high


def test_all_right_is_not_proof_of_perfection():
    interval = st.mean_interval([1.0] * 20)
    assert interval.high == 1.0 and 0.8 < interval.low < 0.9
    assert st.mean_interval([1.0] * 20, ["one image"] * 20).low < 0.3


def test_average_interval_is_narrower_than_each_and_contains_the_mean():
    parts = [st.mean_interval([1.0] * 80 + [0.0] * 20), st.mean_interval([1.0] * 50 + [0.0] * 50)]
    average = st.average_interval(parts)
    assert average.estimate == pytest.approx(0.65)
    assert average.high - average.low < parts[1].high - parts[1].low
    assert average.num_samples == 200


def test_median_interval_ranks():
    values = np.arange(1, 11, dtype=float)
    interval = st.median_interval(values)  # n = 10: ranks 2 and 9 cover 97.9 %
    assert (interval.low, interval.estimate, interval.high) == (2, 5.5, 9)
    assert st.median_interval([3.0, 1.0]).low == 1.0


def test_comparison_picks_its_test_and_never_claims_zero_width():
    same = [1.0] * 20
    comparison = st.paired_comparison([(same, same, None)])
    assert comparison.test == "exact McNemar" and comparison.p_value == 1.0
    assert not st.non_inferior(comparison, 0.01), "twenty equal answers do not prove equality within a point"
    many = [1.0] * 3000
    assert st.non_inferior(st.paired_comparison([(many, many, None)]), 0.01)
    graded = st.paired_comparison([([0.5, 1.0], [0.2, 1.0], None)])
    assert graded.test.startswith("paired permutation")
    with pytest.raises(ValueError, match="2 scores of A against 1 of B"):
        st.paired_comparison([([1.0, 0.0], [1.0], None)])


def test_macro_average_weighs_tasks_not_samples():
    big = ([1.0] * 300, [0.0] * 300, None)
    small = ([0.0] * 10, [0.0] * 10, None)
    assert st.paired_comparison([big, small]).difference == pytest.approx(0.5)


def test_intervals_cover_what_they_claim():
    """Clustered right/wrong data, two methods: the 95 % intervals hold the truth about 95 times in 100."""
    random = np.random.default_rng(11)
    num_images, questions, rounds, mean_hits, difference_hits = 60, 3, 300, 0, 0
    for _ in range(rounds):
        ability = random.beta(6, 3, num_images).repeat(questions)
        clusters = np.arange(num_images).repeat(questions)
        a = (random.random(ability.size) < ability).astype(float)
        b = (random.random(ability.size) < ability * 0.9).astype(float)
        interval = st.mean_interval(a, clusters)
        mean_hits += interval.low <= 6 / 9 <= interval.high
        comparison = st.paired_comparison([(a, b, clusters)], num_resamples=10)
        difference_hits += comparison.low <= 6 / 9 * 0.1 <= comparison.high
    assert 0.91 <= mean_hits / rounds <= 0.99
    assert 0.91 <= difference_hits / rounds <= 0.99


@pytest.mark.parametrize("bad", [[], [np.nan], [[1.0]]])
def test_bad_scores_are_refused(bad):
    with pytest.raises(ValueError):
        st.mean_interval(bad)
