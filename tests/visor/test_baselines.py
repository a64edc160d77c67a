"""Every method on every family that it applies to: batched or alone, under any attention kernel,
before and after another method, it keeps the same tokens; and the cache holds what the schedule says.

A family joins by its name in `FAMILIES`; what does not apply stands in `REFUSED` with the reason that the user reads.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from samples import loaded, samples
from tiny_models import ALL_FAMILIES, CONFIGS, QWEN_LIKE, WINDOWED_FAMILIES

from budgets.match import BudgetError, fit
from budgets.registry import METHODS
from visor.engine.decoder import running
from visor.reduction._compose import role
from visor.reduction.method import Method, tower_reduction

FAMILIES = ("llava", "llava_onevision", "llava_next")
EVERY_FAMILY = (*ALL_FAMILIES, *WINDOWED_FAMILIES)
JOINED = tuple(family for family in EVERY_FAMILY if family not in FAMILIES)  # three samples instead of eight
BUDGET = 0.7
COMPOSED = ("visionzip+fastv", "prumerge++pyramiddrop", "divprune+sparsevlm", "hired+dart", "random+vtw")
TRAINED = [name for name in METHODS.names() if METHODS.get(name).trained]  # their own tests are test_modeling*.py
NAMES = [*(name for name in METHODS.names() if name not in TRAINED and name != "dense"), *COMPOSED]
KEPT = {"prumerge++pyramiddrop": {"prumerge_plus_keep": 144}}
"""What a composed method needs beside its defaults: a number, where a part counts by the image."""
TILES = ("llava_onevision", "llava_next", "smolvlm", "idefics3", "internvl", "ovis2", "aya_vision")
ANY_SIZE = (*QWEN_LIKE, "pixtral", "mistral3")
IN_DECODER = [name for name in NAMES if name not in COMPOSED and role(METHODS.get(name)) != "encoder"]
IN_DECODER += [name for name in COMPOSED if name != "divprune+sparsevlm"]  # which drops nothing of so few tokens
REFUSED = {
    **{
        (name, family): "dissolves its grid"
        for name in ("tome", "flowcut")
        for family in (*TILES, *ANY_SIZE, "gemma3")
    },
    **{("downsample", family): "cuts an image into tiles" for family in TILES},
    **{("downsample", family): "takes images of any size" for family in ANY_SIZE},
    **{("pooling_by", family): "is not the square" for family in ANY_SIZE if family not in ("pixtral", "mistral3")},
}
"""Refused by `schedule`, before anything runs."""
REFUSED_LATER = {
    (name, family): "several blocks of tokens"
    for name in ("pooling", "pooling_by")
    for family in ("smolvlm", "idefics3", "ovis2", "aya_vision")
}
REFUSED_LATER |= {("pooling_by", family): "several blocks of tokens" for family in ("pixtral", "mistral3")}
REFUSED_LATER["downsample", "gemma3"] = "a smaller image"
REFUSED_LATER |= {(name, "vipllava"): "features come from one layer" for name in ("tome", "flowcut")}
REFUSED_LATER |= {(name, family): "sliding-window layers" for name in IN_DECODER for family in WINDOWED_FAMILIES}
"""Refused when the prompt is built (only there an image of several tiles is several blocks), the tower runs, or the
schedule is priced."""
REFUSED = {pair: why for pair, why in REFUSED.items() if pair[1] in EVERY_FAMILY}
REFUSED_LATER = {pair: why for pair, why in REFUSED_LATER.items() if pair[1] in EVERY_FAMILY}
APPLY = lambda family: [name for name in NAMES if (name, family) not in {**REFUSED, **REFUSED_LATER}]
CASES = [(name, family) for family in FAMILIES for name in APPLY(family)]
CASES_JOINED = [(name, family) for family in JOINED for name in APPLY(family)]


@functools.cache
def plan(name, family):
    """The schedule of each sample at the budget."""
    geometry, schedules = loaded(family).geometry, []
    for sample in samples(family, 8 if family in FAMILIES else 3):
        method = METHODS.get(name)(**KEPT.get(name, {}))
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
    schedules = plan(name, family)
    model, prepared, schedules = loaded(family, attention), samples(family, len(schedules))[rows], schedules[rows]
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


@pytest.mark.parametrize(("name", "family"), CASES_JOINED)
def test_a_batch_keeps_what_each_sample_keeps_alone_on_the_other_families(name, family):
    together = run(name, family)
    assert together == [run(name, family, rows=slice(i, i + 1))[0] for i in range(3)]


@pytest.mark.parametrize(("name", "family"), REFUSED_LATER)
def test_what_does_not_fit_a_prompt_is_refused_with_its_reason(name, family):
    with pytest.raises(ValueError, match=REFUSED_LATER[name, family]):
        run(name, family)


@pytest.mark.parametrize(("name", "family"), REFUSED)
def test_what_does_not_apply_is_refused_with_its_reason(name, family):
    geometry = loaded(family).geometry
    with pytest.raises(ValueError, match=REFUSED[name, family]):
        METHODS.get(name)().schedule(geometry, samples(family, 3)[-1].num_visual)


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


def test_the_table_in_the_docs_is_this_one():
    text = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = {cells[0].strip("` "): cells[1:] for line in text.splitlines() if (cells := line.strip("| ").split(" | "))}
    columns = [[name.strip("` ") for name in cell.split(",")] for cell in rows["method"]]  # families that agree
    if set(EVERY_FAMILY) == set(CONFIGS):  # this version of transformers has them all
        assert sorted(family for column in columns for family in column) == sorted(EVERY_FAMILY)
    for name in METHODS.names():
        if name in TRAINED or name == "dense":
            continue
        marks = [cell.strip() for cell in rows[name]]
        runs = [{(name, family) not in {**REFUSED, **REFUSED_LATER} for family in column} for column in columns]
        assert [{mark == "yes"} for mark in marks] == runs, name
