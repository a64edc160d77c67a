"""Training's float32 attention kernel serves the cross-attention blocks too, under bfloat16 autocast."""

import torch

from visor.engine.attention import FLOAT32, cross_attention
from visor.training.attention import NAME


def test_cross_attention_runs_in_float32_under_autocast():
    assert FLOAT32 == NAME
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 4, 5, 8, generator=generator).bfloat16()
    keys, values = (torch.randn(2, 2, 9, 8, generator=generator).bfloat16() for _ in range(2))
    valid = torch.arange(9)[None] < torch.tensor([[9], [6]])
    for mask in (None, valid):
        with torch.autocast("cpu", torch.bfloat16):
            mine = cross_attention(queries, keys, values, mask, NAME)
            plain = cross_attention(queries, keys, values, mask, "sdpa")
        exact = cross_attention(queries.float(), keys.float(), values.float(), mask, "sdpa")
        assert mine.dtype == torch.float32 and plain.dtype == torch.bfloat16
        torch.testing.assert_close(mine, exact, atol=1e-6, rtol=1e-6)
