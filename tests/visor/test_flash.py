"""The cross-attention blocks over flash-attn, whose place a stand-in in plain torch takes."""

import sys
from types import SimpleNamespace

import pytest
import torch

from visor.engine.attention import cross_attention, flash_attention


def stand_in(queries_BTHd, keys_BVGd, values_BVGd, causal):
    """What flash_attn_func promises: heads behind tokens, fewer key heads than query heads, its own scale."""
    assert not causal and queries_BTHd.shape[2] % keys_BVGd.shape[2] == 0
    repeats = queries_BTHd.shape[2] // keys_BVGd.shape[2]
    keys, values = (x.repeat_interleave(repeats, 2) for x in (keys_BVGd, values_BVGd))
    weights = torch.einsum("bthd,bvhd->bhtv", queries_BTHd, keys) * queries_BTHd.shape[-1] ** -0.5
    return torch.einsum("bhtv,bvhd->bthd", weights.softmax(-1), values)


@pytest.fixture
def package(monkeypatch):
    calls = []

    def flash_attn_func(*args, **kwargs):
        calls.append(args)
        return stand_in(*args, **kwargs)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    return calls


def inputs(num_kv_heads):
    generator = torch.Generator().manual_seed(1)
    draw = lambda heads, length: torch.randn(2, heads, length, 8, generator=generator)
    return draw(4, 5), draw(num_kv_heads, 11), draw(num_kv_heads, 11)


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_the_kernels_agree(package, num_kv_heads):
    arguments = inputs(num_kv_heads)
    flash, torch_own = (cross_attention(*arguments, kernel=kernel) for kernel in ("flash_attention_2", "sdpa"))
    assert len(package) == 1
    torch.testing.assert_close(flash, torch_own)


def test_padding_uses_torchs_kernel(package):
    """And reads nothing that is not valid, whatever lies there."""
    queries, keys, values = inputs(2)
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[0, :4] = False
    read = cross_attention(queries, keys, values, valid, "flash_attention_2")
    assert not package
    alone = cross_attention(queries[:1], keys[:1, :, 4:], values[:1, :, 4:], kernel="flash_attention_2")
    torch.testing.assert_close(read[:1], alone)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match="pip install --no-build-isolation 'flash-attn"):
        flash_attention()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and flash-attn")
def test_the_real_kernel():
    pytest.importorskip("flash_attn")
    half = [x.to("cuda", torch.bfloat16) for x in inputs(2)]
    flash, torch_own = (cross_attention(*half, kernel=kernel) for kernel in ("flash_attention_2", "sdpa"))
    torch.testing.assert_close(flash, torch_own, atol=2e-2, rtol=2e-2)
