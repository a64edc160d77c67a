"""Every method on every family that it applies to (BASELINES.md, 4): batched or alone, under any attention kernel,
before and after another method, it keeps the same tokens; and the cache holds what the schedule says.

A family joins by its name in `FAMILIES`; what does not apply stands in `REFUSED` with the reason that the user reads.
"""

from __future__ import annotations

import functools

import pytest
import torch
from samples import loaded, samples
from tiny_models import ALL_FAMILIES

from budgets.match import BudgetError, fit
from budgets.registry import METHODS
from visor.decoder import running
from visor.method import Method, tower_reduction

FAMILIES = ("llava", "llava_onevision", "llava_next")
BUDGET = 0.7
COMPOSED = ("visionzip+fastv", "prumerge++pyramiddrop", "divprune+sparsevlm", "hired+dart", "random+vtw")
TRAINED = [name for name in METHODS.names() if METHODS.get(name).trained]  # their own tests are test_modeling and below
NAMES = [*(name for name in METHODS.names() if name not in TRAINED and name != "dense"), *COMPOSED]
PACKED = "packs tiles|several packed tiles|cuts an image into tiles"
REFUSED = {
    (name, family): PACKED for name in ("tome", "flowcut", "downsample") for family in ("llava_onevision", "llava_next")
}
CASES = [(name, family) for name in NAMES for family in FAMILIES if (name, family) not in REFUSED]


@functools.cache
def plan(name, family):
    """The schedule of each sample at the budget."""
    geometry, schedules = loaded(family).geometry, []
    for sample in samples(family):
        method = METHODS.get(name)()
        try:
            method = fit(method, geometry, sample.num_visual, sample.num_text, BUDGET)
        except BudgetError:  # few settings, as DART's with few tokens: its own default
            pass
        schedules.append(method.schedule(geometry, sample.num_visual))
    return schedules


def encoded(model, prepared, schedules, taps):
    """As the sweep does it: one call for all images that the tower treats alike."""
    rows = [None] * len(prepared)
    ways = [(schedule.image_scale, tower_reduction(schedule)) for schedule in schedules]
    for way in dict.fromkeys(ways):
        places = [i for i, each in enumerate(ways) if each == way]
        inside = {} if way[1] is None else {"inside": way[1]}
        for i, row in zip(places, model.encode([prepared[i] for i in places], taps, way[0], **inside), strict=True):
            rows[i] = row
    return rows


def run(name, family, attention="sdpa", rows=slice(None)):
    """(first token, tokens kept after the last reduction) of each sample."""
    model, prepared, schedules = loaded(family, attention), samples(family)[rows], plan(name, family)[rows]
    vision = encoded(model, prepared, schedules, METHODS.get(name).taps)
    return [(answer.token_ids, answer.kept) for answer in model.generate(prepared, vision, schedules, 1)]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_batch_of_eight_keeps_what_each_sample_keeps_alone(name, family):
    assert any(not schedule.is_dense for schedule in plan(name, family))
    together = run(name, family)
    for i in (0, 1, 2, 7):
        assert together[i] == run(name, family, rows=slice(i, i + 1))[0]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_the_attention_kernel_does_not_matter(name, family):
    assert run(name, family, "eager", slice(3)) == run(name, family, "sdpa", slice(3))


def prefilled(name, family):
    model, prepared, schedules = loaded(family), samples(family)[:2], plan(name, family)[:2]
    return model.prefill(prepared, encoded(model, prepared, schedules, METHODS.get(name).taps), schedules)


def to_bytes(states):
    """All that a prefill leaves in the cache, to the bit."""
    return [layer.keys.numpy().tobytes() for state in states for layer in state.cache.layers]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_the_cache_holds_what_the_schedule_says_whatever_ran_before(name, family):
    states = prefilled(name, family)
    before = to_bytes(states)
    assert to_bytes(prefilled("divprune" if name == "fastv" else "fastv", family)) != before
    assert to_bytes(prefilled(name, family)) == before
    for num_decoded in (0, 2):
        for state in states:
            for index, layer in enumerate(state.cache.layers):
                sees_image = [schedule.layers[index].mode.value == "self" for schedule in state.schedules]
                visual = [s.visual_tokens[index] * sees for s, sees in zip(state.schedules, sees_image, strict=True)]
                text = [samples(family)[member].num_text + num_decoded for member in state.members]
                length = layer.keys.shape[-2]
                held = [length] * len(text) if layer.valid_BK is None else layer.valid_BK.sum(1).tolist()
                assert held == [v + t for v, t in zip(visual, text, strict=True)]
                assert length == max(held)
        loaded(family).decode(states, 2)


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_what_does_not_apply_is_refused_with_its_reason(name, family):
    geometry = loaded(family).geometry
    with pytest.raises(ValueError, match=REFUSED[name, family]):
        METHODS.get(name)().schedule(geometry, samples(family)[0].num_visual)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "sparsevlm-v2", "dart"])
def test_in_decoder_methods_share_no_encoder(name):
    """Their features are the dense ones: what a sweep caches for one serves all."""
    assert METHODS.get(name).taps == frozenset()
    assert all(schedule.encoder is None for schedule in plan(name, "llava"))


def test_all_methods_are_here():
    """A method that is added is tested on every family, or stands among the trained ones with tests of its own."""
    assert set(METHODS.names()) == {*NAMES, *TRAINED, "dense"} - set(COMPOSED)
    assert set(FAMILIES) <= set(ALL_FAMILIES)
    assert all(issubclass(METHODS.get(name), Method) for name in (*NAMES, *TRAINED))


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "sparsevlm-v2", "dart", "vtw"])
def test_a_prompt_without_image_is_the_dense_model(name):
    model = loaded("llava").model
    ids = torch.tensor([samples("llava")[0].input_ids[:3]])
    with torch.no_grad(), running(model, plan(name, "llava")[0]):
        found = model(input_ids=ids).logits
    with torch.no_grad():
        assert torch.allclose(found, model(input_ids=ids).logits, atol=1e-5)
