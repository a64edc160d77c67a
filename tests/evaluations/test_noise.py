"""Medians, percentiles and ratios of timings, by hand and under drift."""

import random

import pytest

from evaluations.noise import percentile, ratio_by_round, spread


def test_by_hand():
    found = spread([10, 12, 11, 10, 100])
    assert found.median == 11 and found.num_runs == 5
    assert found.noise == pytest.approx(1.4826 / 11)  # deviations 1, 1, 0, 1, 89
    assert found.p95 == pytest.approx(12 + 0.8 * 88) and found.p5 == 10
    assert percentile([3], 0.95) == 3
    assert spread([5.0]).noise == 0


def test_one_disturbed_run_is_no_noise_and_a_restless_machine_is():
    assert not spread([10, 10.1, 9.9, 10, 40]).is_noisy
    assert spread([10, 13, 8, 15, 9, 12]).is_noisy


def test_drift_cancels_within_a_round():
    generator = random.Random(1)
    drift = [1 + round_ / 3 for round_ in range(12)]
    slow = [40 * d * generator.uniform(0.99, 1.01) for d in drift]
    fast = [10 * d * generator.uniform(0.99, 1.01) for d in drift]
    assert spread(slow).is_noisy
    ratio = ratio_by_round(slow, fast)
    assert 3.95 < ratio.low <= ratio.median <= ratio.high < 4.05
    assert ratio == ratio_by_round(slow, fast)  # the bootstrap is repeatable


def test_ratios_need_pairs():
    with pytest.raises(ValueError, match="got 2 and 1"):
        ratio_by_round([1, 2], [1])
    with pytest.raises(ValueError, match="got 0 and 0"):
        ratio_by_round([], [])
