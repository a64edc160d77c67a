"""A schedule that skips work really skips it: counted FLOPs, on the meta device, follow the schedule."""

import pytest
import torch
import transformers
from schedules import schedule
from torch.utils.flop_counter import FlopCounterMode

from visor.engine.compat import cache_of
from visor.engine.decoder import install, running

D, HEADS, KV_HEADS, WIDTH, INNER = 64, 4, 2, 16, 96
NUM_TEXT, NUM_VISUAL = 20, 48


@pytest.fixture(scope="module")
def meta_model():
    text = transformers.Qwen2Config(
        hidden_size=D, intermediate_size=INNER, num_hidden_layers=6, num_attention_heads=HEADS, vocab_size=64,
        num_key_value_heads=KV_HEADS, pad_token_id=0,
    )  # fmt: skip
    tower = transformers.SiglipVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    with torch.device("meta"):
        config = transformers.LlavaConfig(vision_config=tower, text_config=text, image_token_id=3)
        model = transformers.LlavaForConditionalGeneration(config).eval()
        return install(model, range(6))


def layer_flops(n):
    return 4 * n * D * (HEADS + KV_HEADS) * WIDTH + 6 * n * D * INNER + 4 * n * n * HEADS * WIDTH


def cross_flops(num_visual):
    convolution = 2 * num_visual * 7 * D
    projections = 4 * NUM_TEXT * D * HEADS * WIDTH + 4 * num_visual * D * KV_HEADS * WIDTH
    return projections + convolution + 4 * NUM_TEXT * num_visual * HEADS * WIDTH


def scoring_flops(n):
    return 2 * D * HEADS * WIDTH + 2 * n * HEADS * WIDTH


@pytest.mark.parametrize(
    "modes, keep, method",
    [
        ("ssssss", {}, ""),
        ("tctstc", {}, ""),
        ("tttttt", {}, ""),
        ("ssssss", {2: 0.5}, "fastv"),
        ("sscsct", {2: 0.25}, "fastv"),
    ],
)
@pytest.mark.parametrize("batch", [1, 2])
def test_counted_flops_are_the_schedules(meta_model, modes, keep, method, batch):
    plan = schedule(modes, NUM_VISUAL, keep, method)
    visual = torch.zeros(batch, NUM_TEXT + NUM_VISUAL, dtype=torch.bool)
    visual[:, 4 : 4 + NUM_VISUAL] = True
    embeds = torch.empty(batch, NUM_TEXT + NUM_VISUAL, D, device="meta")
    with torch.no_grad(), running(meta_model, plan, visual=visual), FlopCounterMode(display=False) as counter:
        cache = cache_of(meta_model.get_decoder()(inputs_embeds=embeds, use_cache=True))
    expected = 0
    for i, (mode, live) in enumerate(zip(modes, plan.visual_tokens, strict=True)):
        expected += layer_flops(NUM_TEXT + (live if mode == "s" else 0))
        expected += cross_flops(live) if mode == "c" else 0
        expected += scoring_flops(NUM_TEXT + plan.visual_tokens[i - 1]) if i in keep else 0
    assert counter.get_total_flops() == batch * expected
    assert cache.layer_lengths == tuple(
        NUM_TEXT + (live if mode == "s" else 0) for mode, live in zip(modes, plan.visual_tokens, strict=True)
    )
