"""Routing through `LoadedModel`: what a sweep derives from configurations is what the router's own run gives."""

import copy

import numpy as np
import pytest
import torch
from tiny_checkpoint import make_image, make_llava, make_processor
from visor_models import CONFIGURATIONS, CROSS_LAYERS, SLOTS, wake_cross_blocks

from budgets import policies
from budgets.policies import cost_aware
from budgets.schedule import dense
from visor.inference import LoadedModel
from visor.model.conversion import convert
from visor.model.selection import Request, relative_costs

QUESTIONS = ["what is it?", "how many are there in all?", "where?", "is this a long question or a short one?"]


def schedules(loaded, prepared, indices):
    return loaded.model.schedules(indices, [each.num_visual for each in prepared])


@pytest.fixture(scope="module")
def base():
    return LoadedModel(make_llava(), make_processor())


@pytest.fixture(scope="module")
def loaded(base):
    model = convert(copy.deepcopy(base.model), CROSS_LAYERS, SLOTS, configurations=CONFIGURATIONS)
    wake_cross_blocks(model)
    model.add_router(8)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.router.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator))
    loaded = LoadedModel(model.eval(), make_processor(), name="tiny-visor")
    prepared = [loaded.prepare(make_image(i), question) for i, question in enumerate(QUESTIONS)]
    said = torch.tensor(loaded.route(prepared, loaded.encode(prepared), schedules(loaded, prepared, [0] * 4)))
    with torch.no_grad():  # so that the samples differ, and no sigmoid is saturated
        scale = 1 / said.sub(said.mean(0)).std()
        model.router.head.weight.mul_(scale)
        model.router.head.bias.mul_(scale).sub_(said.mean(0) * scale)
    return loaded


@pytest.fixture(scope="module")
def batch(loaded):
    prepared = [loaded.prepare(make_image(i), question) for i, question in enumerate(QUESTIONS)]
    return prepared, loaded.encode(prepared)


@pytest.fixture(scope="module")
def logits(loaded, batch):
    prepared, vision = batch
    return np.array(loaded.route(prepared, vision, schedules(loaded, prepared, [0] * 4)))


def test_what_the_router_says_depends_on_nothing_but_the_sample(loaded, batch, logits):
    prepared, vision = batch
    assert logits.shape == (4, len(CONFIGURATIONS)) and len(set(logits.argmax(1).tolist())) > 1
    for i in range(4):
        alone = loaded.route([prepared[i]], [vision[i]], schedules(loaded, [prepared[i]], [3]))
        assert alone[0] == pytest.approx(logits[i], abs=1e-4)


@pytest.mark.parametrize("cost_weight", [None, 0.0, 0.7])
def test_a_derived_choice_is_the_models_own(loaded, batch, logits, cost_weight):
    prepared, vision = batch
    costs = [relative_costs(loaded.model.config, loaded.geometry, p.num_visual, p.num_text) for p in prepared]
    success = policies.success(logits)
    derived = policies.most_likely(logits) if cost_weight is None else cost_aware(success, costs, cost_weight)
    answers = loaded.generate(prepared, vision, schedules(loaded, prepared, derived.tolist()), 4)
    states = loaded.prefill(
        prepared,
        vision,
        schedules(loaded, prepared, [0] * 4),
        4,
        request=Request(policy="router", cost_weight=cost_weight),
    )
    first = {i: int(state.next_ids_B1[row, 0]) for state in states for row, i in enumerate(state.members)}
    rest = loaded.decode(states, 3)
    for i, answer in enumerate(answers):
        ids = [first[i], *rest[i].tolist()]
        assert ids[: len(answer.token_ids)] == list(answer.token_ids)


def test_confidence_is_the_probability_of_the_first_token(loaded, batch):
    prepared, vision = batch
    plan = schedules(loaded, prepared, [2] * 4)
    answers = loaded.generate(prepared, vision, plan, 3)
    for i, answer in enumerate(answers):
        inputs = {**prepared[i].pixel_inputs, "input_ids": torch.tensor([prepared[i].input_ids])}
        with torch.no_grad():
            last = loaded.model(**inputs, configuration=2).logits[0, -1]
        assert answer.confidence == pytest.approx(float(last.softmax(-1).max()), abs=1e-4)
    assert len({round(answer.confidence, 3) for answer in answers}) > 1


def test_checkpoints_around_one_tower_share_its_features(base, loaded):
    assert loaded.tower_sha256 == base.tower_sha256
    other = LoadedModel(make_llava(seed=1), make_processor())
    assert other.tower_sha256 != base.tower_sha256


def test_a_model_without_configurations_has_nothing_to_route(base):
    prepared = [base.prepare(make_image(0), "what?")]
    with pytest.raises(ValueError, match="has no configurations to choose from; a VISOR model has"):
        base.prefill(
            prepared, base.encode(prepared), [dense(6, prepared[0].num_visual)], request=Request(policy="router")
        )
