"""The feature cache is bounded in bytes, forgets what was unused for longest, and counts."""

from dataclasses import dataclass, replace

import pytest
import torch

from evaluations.features import FeatureCache, FeatureKey, num_bytes

KEY = FeatureKey("tower", "float32", 1.0, "pixels", "group")


def key(i):
    return replace(KEY, image_key=str(i))


@dataclass
class Row:
    features: torch.Tensor
    taps: dict
    grid: tuple


def test_num_bytes_counts_tensors_wherever_they_are():
    row = Row(torch.zeros(2, 3), {"keys": torch.zeros(4, dtype=torch.bfloat16)}, (1, 2))
    assert num_bytes(row) == 24 + 8
    assert num_bytes([row, row]) == 64
    assert num_bytes(None) == 0


def test_what_was_unused_for_longest_goes_first():
    cache = FeatureCache(100)
    for i in range(3):
        cache.put(key(i), torch.zeros(40, dtype=torch.uint8))
        assert cache.get(key(0)) is not None or i
    assert key(0) in cache or key(1) in cache
    assert cache.held_bytes == 80 and len(cache) == 2 and cache.evictions == 1
    assert key(1) not in cache or key(0) not in cache


def test_a_look_up_keeps_features_alive():
    cache = FeatureCache(100)
    cache.put(key(0), torch.zeros(50, dtype=torch.uint8))
    cache.put(key(1), torch.zeros(50, dtype=torch.uint8))
    cache.get(key(0))
    cache.put(key(2), torch.zeros(50, dtype=torch.uint8))
    assert key(0) in cache and key(1) not in cache


def test_the_bound_holds():
    cache = FeatureCache(1000)
    for i in range(200):
        cache.put(key(i % 70), torch.zeros(1 + 37 * i % 400, dtype=torch.uint8))
        assert cache.held_bytes <= 1000
        assert cache.held_bytes == sum(size for _, size in cache._values.values())


def test_what_is_larger_than_the_cache_is_not_kept_and_evicts_nothing():
    cache = FeatureCache(100)
    cache.put(key(0), torch.zeros(50, dtype=torch.uint8))
    cache.put(key(1), torch.zeros(101, dtype=torch.uint8))
    assert key(0) in cache and key(1) not in cache and cache.evictions == 0
    with pytest.raises(ValueError, match="capacity_bytes"):
        FeatureCache(-1)


def test_putting_again_replaces():
    cache = FeatureCache(100)
    cache.put(key(0), torch.zeros(50, dtype=torch.uint8))
    cache.put(key(0), torch.ones(60, dtype=torch.uint8))
    assert cache.held_bytes == 60 and cache.get(key(0)).sum() == 60


def test_the_hit_rate_counts_look_ups_only():
    cache = FeatureCache(100)
    assert cache.hit_rate is None and "none were needed" in cache.summary()
    assert cache.get(key(0)) is None
    cache.put(key(0), torch.zeros(8))
    assert key(0) in cache and key(1) not in cache
    cache.get(key(0)), cache.get(key(0)), cache.get(key(0))
    assert cache.hit_rate == 0.75 and "75.0% of 4 look-ups" in cache.summary()


@pytest.mark.parametrize(
    "change",
    [{"tower_sha256": "x"}, {"dtype": "bfloat16"}, {"image_scale": 0.5}, {"image_key": "x"}, {"group": "x"}],
)
def test_everything_that_changes_features_is_in_the_key(change):
    cache = FeatureCache()
    cache.put(KEY, torch.zeros(1))
    assert cache.get(replace(KEY, **change)) is None
