"""Decoding in fixed shapes gives the tokens of decoding in growing ones, for every kind of schedule and padding."""

import pytest
import torch
from schedules import schedules
from tiny_models import make_model, make_prompt, positions_in_generate, visual_counts, wake_cross_blocks

from visor.engine.compat import CACHE, cache_of
from visor.engine.decoder import install, running
from visor.engine.static_decode import FixedDecode

pytestmark = pytest.mark.compat

NUM_TOKENS = 6
CASES = {
    "dense": ("ssss", {}, "kept"),
    "cross and self": ("tcsc", {}, "kept"),
    "fastv": ("ssss", {2: 0.5}, "kept"),
    "renumbered": ("ssss", {2: 0.5}, "contiguous"),
}


@pytest.fixture(scope="module")
def model():
    return wake_cross_blocks(install(make_model("llava_onevision", num_layers=4), range(4)))


def prefilled(model, name, device="cpu"):
    """(cache, first token, its positions, schedules, mask) of a left-padded batch of two."""
    modes, keep, positions = CASES[name]
    prompt = {key: value.to(device) for key, value in make_prompt(model, 2).items()}
    plan = schedules(modes, visual_counts(prompt), keep=keep, positions=positions)
    numbers = positions_in_generate(model, prompt)[0]
    with torch.no_grad(), running(model, plan):
        output = model(**prompt, position_ids=numbers, use_cache=True)
    first = output.logits[:, -1:].argmax(-1)
    return cache_of(output), first, numbers[:, -1:] + 1, plan, prompt["attention_mask"]


def growing(model, cache, ids, positions, plan, mask):
    """Tokens of the engine's own decoding."""
    found = []
    with torch.no_grad(), running(model, plan):
        for _ in range(NUM_TOKENS):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            output = model(input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE: cache})
            ids, positions = output.logits[:, -1:].argmax(-1), positions + 1
            found.append(ids)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", CASES)
def test_the_tokens_are_the_same(model, name):
    cache, first, positions, plan, mask = prefilled(model, name)
    lengths = cache.layer_lengths
    fixed = FixedDecode(model, cache, first, positions, NUM_TOKENS)
    ids = torch.cat([fixed.run(2), fixed.run(NUM_TOKENS - 2)], 1)  # may be continued
    assert cache.layer_lengths == lengths  # the cache is copied
    assert ids.equal(growing(model, cache, first, positions, plan, mask))
    assert len(set(ids.flatten().tolist())) > 2  # no constant answer
    with pytest.raises(ValueError, match="there is room for 6 tokens, 7 are asked for"):
        fixed.run(1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: a CUDA graph is captured")
@pytest.mark.parametrize("name", CASES)
def test_a_cuda_graph_replays_the_same_tokens(name):
    model = wake_cross_blocks(install(make_model("llava_onevision", num_layers=4), range(4))).to("cuda")
    cache, first, positions, plan, mask = prefilled(model, name, "cuda")
    fixed = FixedDecode(model, cache, first, positions, NUM_TOKENS)
    ids = fixed.run(NUM_TOKENS)
    assert fixed.graph is not None
    assert ids.equal(growing(model, cache, first, positions, plan, mask))
