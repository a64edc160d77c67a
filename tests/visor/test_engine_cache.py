"""The elastic cache alone: rows move together, lengths stay honest."""

import pytest
import torch

from visor.engine.cache import ElasticCache
from visor.engine.streams import PromptLayout, left_padding, put, take

pytestmark = pytest.mark.compat


@pytest.fixture
def cache():
    """Two samples; layer 0 holds 5 tokens, layer 1 holds 3 (one padded) and the cross keys of 4 visual tokens."""
    cache = ElasticCache(2)
    for i, held in enumerate((5, 3)):
        cache.update(torch.randn(2, 1, held, 4), torch.randn(2, 1, held, 4), i)
    layer = cache.layers[1]
    layer.valid_BK = torch.tensor([[False, True, True], [True, True, True]])
    layer.shift_B1 = torch.tensor([[2], [3]])
    layer.cross = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), torch.tensor([[True] * 4, [False] * 4]), None
    cache.end_prefill(7, 4)
    return cache


def rows_of(layer):
    return [layer.keys, layer.values, layer.valid_BK, layer.shift_B1, *layer.cross[:3]]


@pytest.mark.parametrize(
    "operation, argument, order",
    [
        ("reorder_cache", torch.tensor([1, 0]), [1, 0]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
        ("batch_select_indices", torch.tensor([1]), [1]),
    ],
)
def test_everything_that_has_rows_moves_with_them(cache, operation, argument, order):
    before = [x.clone() for x in rows_of(cache.layers[1])]
    getattr(cache, operation)(argument)
    assert all(torch.equal(x, y[order]) for x, y in zip(rows_of(cache.layers[1]), before, strict=True))
    assert cache.layers[1].cross[3] is None and cache.layers[0].keys.shape[0] == len(order)


def test_the_length_is_what_the_model_has_seen(cache):
    assert cache.get_seq_length() == 7 and cache.layer_lengths == (5, 3) and cache.cross_lengths == (0, 4)
    assert cache.get_seq_length(1) == cache.get_query_offset(1) == 3
    cache.update(torch.randn(2, 1, 1, 4), torch.randn(2, 1, 1, 4), 0)
    assert cache.get_seq_length() == 8
    assert cache.kv_bytes == 2 * 2 * (6 + 3 + 4) * 4 * 4


@pytest.mark.parametrize("argument", [-2, 5])  # 5: older transformers name the length to crop to
def test_crop_is_felt_by_all_layers(cache, argument):
    cache.crop(argument)
    assert cache.get_seq_length() == 5 and cache.layer_lengths == (3, 1) and cache.cross_lengths == (0, 4)
    assert cache.layers[1].valid_BK.tolist() == [[False], [True]]
    with pytest.raises(ValueError, match="cannot crop 2 of 5 tokens.*first 4"):
        cache.crop(-2)


def test_streams_put_back_what_they_took():
    x, index = torch.randn(2, 5, 3), torch.tensor([[1, 4], [0, 2]])
    assert torch.equal(put(x, index, None, take(x, index)), x)
    valid = torch.tensor([[False, True], [True, True]])
    new = torch.zeros(2, 2, 3)
    changed = put(x, index, valid, new)
    assert torch.equal(changed[0, 1], x[0, 1]) and not changed[0, 4].any() and not changed[1, [0, 2]].any()


def test_left_padding():
    assert left_padding([3, 3]) == (3, None)
    longest, valid = left_padding([1, 3])
    assert longest == 3 and valid.tolist() == [[False, False, True], [True, True, True]]


def test_layout_knows_padding_on_either_side():
    visual = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]])
    layout = PromptLayout.of(visual, torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0]]))
    assert layout.num_visual == (1, 2) and layout.num_text == (2, 1)
    assert layout.last_B1.tolist() == [[3], [2]]
    assert PromptLayout.of(visual, torch.ones(2, 4)).valid_BP is None
