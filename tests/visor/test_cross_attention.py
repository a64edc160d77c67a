"""Keys and values of a cross-attention block: folded into few passes over the tokens, they are what its layers say."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from visor.engine.cross_attention import CrossAttentionBlock

WIDTH, HEADS, KV_HEADS = 48, 6, 2


@pytest.fixture
def block():
    torch.manual_seed(0)
    config = transformers.Qwen2Config(hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)
    block = CrossAttentionBlock(config)
    with torch.no_grad():
        for weight in block.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (weight.ndim == 1))
    return block


def by_definition(block, visual_BVD, valid_BV=None):
    """k and v of norm(x + conv(x)), layer by layer."""
    if valid_BV is not None:
        visual_BVD = visual_BVD * valid_BV[..., None]
    conv = block.position_conv
    around_BDV = F.conv1d(visual_BVD.transpose(1, 2), conv.weight, conv.bias, padding=3, groups=WIDTH)
    visual_BVD = visual_BVD + around_BDV.transpose(1, 2)
    normed_BVD = F.rms_norm(visual_BVD, (WIDTH,), block.visual_norm.weight, block.visual_norm.eps)
    split = lambda x: x.unflatten(-1, (KV_HEADS, -1)).transpose(1, 2)
    return split(normed_BVD @ block.k_proj.weight.T), split(normed_BVD @ block.v_proj.weight.T)


class Adapted(nn.Linear):
    """A layer whose weight alone does not say what it does, as an adapter's."""

    def forward(self, x):
        return super().forward(x) + 1.0


@pytest.mark.parametrize("padded", [False, True])
def test_keys_values_and_their_gradients_are_those_of_the_layers(block, padded):
    visual_BVD = torch.randn(2, 11, WIDTH)
    valid_BV = torch.arange(11) < torch.tensor([[11], [7]]) if padded else None
    grads = []
    for compute in (block.keys_values, lambda *x: by_definition(block, *x)):
        leaf = visual_BVD.clone().requires_grad_()
        keys, values = compute(leaf, valid_BV)
        (keys * values.flip(2)).sum().backward()
        named = {n: p.grad.clone() for n, p in block.named_parameters() if p.grad is not None}
        grads.append({**named, "visual": leaf.grad, "keys": keys.detach(), "values": values.detach()})
        block.zero_grad()
    assert set(grads[0]) == set(grads[1]) and len(grads[0]) == 8
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=2e-4, rtol=2e-4, msg=name)


def test_tokens_that_are_zero_give_zero(block):
    nn.init.zeros_(block.position_conv.bias)
    visual_BVD = torch.zeros(1, 5, WIDTH, requires_grad=True)
    keys, values = block.keys_values(visual_BVD, None)
    (keys + values).sum().backward()
    assert not keys.any() and not values.any() and visual_BVD.grad.isfinite().all()


@pytest.mark.parametrize("layer", ["visual_norm", "k_proj", "v_proj", "position_conv"])
def test_a_layer_that_does_more_than_its_weight_says_is_called(block, layer):
    visual_BVD = torch.randn(1, 9, WIDTH)
    before = block.keys_values(visual_BVD, None)
    old = getattr(block, layer)
    if isinstance(old, nn.Linear):
        new = Adapted(WIDTH, old.out_features, bias=False)
        new.load_state_dict(old.state_dict())
    else:
        new = type("Adapted", (type(old),), {"forward": lambda self, x: super(type(self), self).forward(x) * 1.5})
        old.__class__ = new
        new = old
    setattr(block, layer, new)
    after = block.keys_values(visual_BVD, None)
    assert not all(torch.allclose(a, b) for a, b in zip(before, after, strict=True))
    if isinstance(old, nn.Linear):
        changed = 0 if layer == "k_proj" else 1
        torch.testing.assert_close(after[changed], before[changed] + 1.0)
        torch.testing.assert_close(after[1 - changed], before[1 - changed])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_near_and_finite_for_large_tokens(block, dtype, autocast):
    visual_BVD = torch.randn(1, 9, WIDTH) * 3_000  # products of such tokens leave the range of float16
    expected = by_definition(block, visual_BVD)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        found = (
            block.keys_values(visual_BVD, None) if autocast else block.to(dtype).keys_values(visual_BVD.to(dtype), None)
        )
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and (a.float() - b).abs().max() < 0.03 * b.abs().max()
