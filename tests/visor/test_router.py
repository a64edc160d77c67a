"""The router: what it reads, what its two readings choose, what it costs."""

import functools

import numpy as np
import pytest
import torch
from tiny_models import make_prompt, single
from torch.utils.flop_counter import FlopCounterMode
from visor_models import VISOR_FAMILIES, make_visor

from budgets.costs import price
from budgets.geometry import from_config
from budgets.policies import success
from visor.engine.decoder import running
from visor.model.router import Router, RouterOutput


@functools.cache
def model_of(family, **fields):
    return make_visor(family, **fields)


@pytest.mark.parametrize("family", VISOR_FAMILIES)
def test_vector_is_that_of_the_sample_alone(family):
    model = model_of(family)
    prompt = make_prompt(model.base, 3)
    together = model.routing_vectors(**prompt)
    assert together.shape == (3, 3 * 64)
    for row in range(3):
        assert torch.allclose(together[row], model.routing_vectors(**single(prompt, row))[0], atol=1e-4)


def test_vector_is_what_its_name_says():
    model = model_of("llava")
    prompt = make_prompt(model.base, 2)
    seen = {}
    layer = model.get_decoder().layers[1]  # configurations part before layer 1, which here runs on the text
    hook = layer.register_forward_pre_hook(lambda _, args: seen.update(text=args[0]))
    with torch.no_grad():
        model(**prompt, configuration=0)
    hook.remove()
    last, text, visual = model.routing_vectors(**prompt).chunk(3, -1)
    assert torch.allclose(last, seen["text"][:, -1])
    real = prompt["attention_mask"].sum(1) - 16
    means = torch.stack([row[len(row) - int(n) :].mean(0) for row, n in zip(seen["text"], real, strict=True)])
    assert torch.allclose(text, means, atol=1e-5)
    features = model.get_image_features(prompt["pixel_values"], return_dict=True).pooler_output
    assert torch.allclose(visual, torch.stack(list(features)).mean(1), atol=1e-5)


@pytest.mark.parametrize("inputs", [["last"], ["last", "visual"], ["text"]])
def test_inputs_can_be_chosen(inputs):
    model = make_visor("llava", router={"hidden_size": 8, "inputs": inputs})
    assert model.routing_vectors(**make_prompt(model.base, 2)).shape == (2, 64 * len(inputs))


def test_without_image_the_visual_part_is_zero():
    model = model_of("llava")
    for no_image in ((1,), (0, 1)):
        prompt = make_prompt(model.base, 2, no_image=no_image)
        vector = model.routing_vectors(**prompt)
        assert not vector[1, 128:].any() and vector[0, 128:].any() == (0 not in no_image)


def test_forward_runs_what_the_router_says():
    model = model_of("llava_onevision")
    prompt = make_prompt(model.base, 3)
    output = model.route(**prompt)
    with torch.no_grad():
        assert model(**prompt, policy="router").configurations.tolist() == output.choose()


def test_two_readings_of_one_head():
    output = RouterOutput(torch.tensor([[0.0, 2.0, 2.0], [3.0, 3.1, -1.0]]))
    assert torch.allclose(output.probabilities.sum(-1), torch.ones(2))
    assert torch.allclose(output.success[:, -1], torch.ones(2, dtype=torch.float64))
    assert torch.allclose(output.success.diff(dim=-1).float(), output.probabilities[:, 1:])
    assert np.allclose(output.success, success(output.logits))
    assert output.choose() == [1, 1]  # of equals the cheaper one
    costs = [[0.1, 0.5, 1.0]] * 2
    assert output.choose(0.0, costs) == [2, 2]  # success alone: the largest
    assert output.choose(0.5, costs) == [2, 1]  # 0.06, 0.28, 0.5; 0.42, 0.74, 0.5
    assert output.choose(1.0, costs) == [1, 1]  # -0.04, 0.03, 0.0; 0.37, 0.49, 0.0
    assert output.choose(10.0, costs) == [0, 0]


def test_a_larger_weight_never_costs_more():
    generator = torch.Generator().manual_seed(0)
    output = RouterOutput(torch.randn(50, 4, generator=generator) * 2)
    costs = [[0.1, 0.2, 0.5, 0.9]] * 50
    spent = [sum(costs[0][i] for i in output.choose(weight, costs)) for weight in (0, 0.1, 0.3, 1, 3, 10)]
    assert spent == sorted(spent, reverse=True) and spent[0] > spent[-1]


def test_flops_are_counted_and_priced():
    model = model_of("llava")
    geometry = from_config(model.config)
    vector = torch.zeros(1, 192)
    with FlopCounterMode(display=False) as counter:
        model.router(vector)
    assert counter.get_total_flops() == geometry.visor.router_flops == 2 * (192 * 8 + 8 * 4)
    schedule = model.schedules([1], [16])[0]
    free, routed = (price(geometry, schedule, 12, routed=each) for each in (False, True))
    assert routed.parts["router"] == geometry.visor.router_flops and free.parts["router"] == 0
    assert routed.decoder_prefill - free.decoder_prefill == geometry.visor.router_flops
    with pytest.raises(ValueError, match="has no router"):
        price(from_config(model.base.config), schedule, 12, routed=True)


def test_new_configurations_need_a_new_router():
    model = make_visor("llava")
    model.set_configurations([[], [1], [2, 4]], default=0)
    assert model.router.head.out_features == 3 and not model.router.head.weight.any()
    assert model.config.check_index(model.config.default_configuration) == 0
    with pytest.raises(ValueError, match=r"no slots; the slots are \[1, 2, 4\]"):
        model.set_configurations([[], [5]])
    assert model.config.configurations == [[], [1], [2, 4]]
    router = model.add_router(16, ["last"])
    assert router is model.router and model.config.router == {"hidden_size": 16, "inputs": ["last"]}
    with pytest.raises(ValueError, match="positive integer"):
        model.add_router(0)
    model.set_configurations([[1]])
    with pytest.raises(ValueError, match="one configuration only"):
        model.route(**make_prompt(model.base, 1))
    with torch.no_grad():
        assert model(**make_prompt(model.base, 1), policy="router").configurations.tolist() == [0]


def test_outer_run_may_choose_too():
    """As the harness does: the model's alternatives, and its own function."""
    model = model_of("llava")
    prompt = make_prompt(model.base, 2)
    with torch.no_grad(), running(model, model.schedules(range(4), [0] * 4), choose=lambda _: [3, 0]):
        mine = model(**prompt).logits
    with torch.no_grad():
        assert torch.equal(mine, model(**prompt, configuration=[3, 0]).logits)


def test_router_is_light():
    router = Router(192, ("last", "text", "visual"), 64, 5)
    assert sum(p.numel() for p in router.parameters()) < 50_000
