"""torch.compile sees one graph in prefill and in decode, whatever the schedule; and it computes the same.

Compiled is the decoder, under a schedule, on prompts without padding. Counts are known before the forward, so nothing
in it asks a tensor for a value. The "eager" backend runs the captured graph as it is: what is tested is the capture.
"""

import pytest
import torch
from schedules import schedule
from tiny_models import make_model, wake_cross_blocks

from visor.engine.compat import CACHE, cache_of
from visor.engine.decoder import install, running

NUM_VISUAL, LENGTH, WIDTH = 24, 40, 64
CASES = {
    "dense": ("ssss", {}),
    "cross": ("tccc", {}),
    "cross and self": ("tcsc", {}),
    "fastv": ("ssss", {2: 0.5}),
}


@pytest.fixture(scope="module")
def decoder():
    model = wake_cross_blocks(install(make_model("llava_onevision", num_layers=4), range(4)))
    return model, model.get_decoder()


@pytest.mark.parametrize("name", CASES)
def test_one_graph_in_prefill_and_one_in_decode(decoder, name):
    modes, keep = CASES[name]
    model, layers = decoder
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randn(1, LENGTH, WIDTH, generator=generator)
    steps = [torch.randn(1, 1, WIDTH, generator=generator) for _ in range(3)]
    visual = torch.zeros(1, LENGTH, dtype=torch.bool)
    visual[:, 4 : 4 + NUM_VISUAL] = True
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    # fullgraph: a break is an error
    prefill = torch.compile(lambda x: layers(inputs_embeds=x, use_cache=True), fullgraph=True, backend=backend)
    decode = torch.compile(
        lambda x, cache: layers(inputs_embeds=x, **{CACHE: cache}, use_cache=True).last_hidden_state,
        fullgraph=True, backend=backend, dynamic=True,
    )  # fmt: skip
    with torch.no_grad(), running(model, schedule(modes, NUM_VISUAL, keep), visual=visual):
        plain = layers(inputs_embeds=prompt, use_cache=True)
        expected = [layers(inputs_embeds=x, **{CACHE: cache_of(plain)}, use_cache=True) for x in steps]
        compiled = prefill(prompt)
        assert len(graphs) == 1
        torch.testing.assert_close(compiled.last_hidden_state, plain.last_hidden_state)
        cache = cache_of(compiled)
        for x, step in zip(steps, expected, strict=True):
            torch.testing.assert_close(decode(x, cache), step.last_hidden_state)
    assert len(graphs) <= 1 + 2  # the first step may be specialised; later ones are not compiled anew
    assert cache.layer_lengths == cache_of(plain).layer_lengths
