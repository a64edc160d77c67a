"""In-decoder token reduction against a reference that never drops a token."""

import copy
import functools

import pytest
import torch
from reference import reference
from schedules import schedules
from tiny_models import FAMILIES, continued, generate, make_model, make_prompt, single, visual_counts

from budgets.registry import METHODS
from visor.engine.compat import cache_of
from visor.engine.decoder import install, running
from visor.reduction.method import Method

pytestmark = pytest.mark.compat

TOLERANCE = 2e-4  # logits are of size ten
UNEVEN = (1.0, 0.6, 0.3)
CASES = {
    "fastv": dict(keep={2: 0.5}),
    "pyramid": dict(keep={2: 0.75, 4: 0.3}),
    "before layer 0": dict(keep={0: 0.5}, method="longest"),
}


shared_model = functools.cache(make_model)


@functools.cache
def elastic_model(family, attention="sdpa"):
    """Shared by the tests of this file: none of them changes it, which is part of what they show."""
    return install(make_model(family, attention))


@pytest.fixture(autouse=True)
def longest_method():
    """A method that needs no layer before it."""

    class Longest(Method):
        title = "longest"

        def schedule(self, geometry, num_visual):
            raise NotImplementedError

        def score_tokens(self, context):
            return context.hidden_BND.norm(dim=-1)

    METHODS.names()
    METHODS._objects["longest"] = Longest
    yield
    del METHODS._objects["longest"]


@pytest.mark.parametrize("positions", ["kept", "contiguous"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_reduction_equals_masked_reference(family, attention, batch, case, positions):
    eager = shared_model(family, "eager")
    model, prompt = elastic_model(family, attention), make_prompt(eager, batch)
    plan = schedules("ssssss", visual_counts(prompt), UNEVEN, positions=positions, **CASES[case])
    with running(model, plan), torch.no_grad():
        prefill = model(**prompt).logits[:, -1:]
        output = generate(model, prompt)
    expected, kept = reference(eager, prompt, plan)
    assert (prefill - expected).abs().max() < TOLERANCE
    assert all(map(torch.equal, kept, model.get_decoder().last_kept))
    new_ids = output.sequences[:, prompt["input_ids"].shape[1] :]
    expected, _ = reference(eager, prompt, plan, new_ids[:, :-1])
    assert (torch.stack(output.logits, 1) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("positions", ["kept", "contiguous"])
def test_cached_decode_equals_recomputation(positions):
    model = elastic_model("llava_onevision")
    prompt = make_prompt(model, 3)
    plan = schedules("ssssss", visual_counts(prompt), UNEVEN, positions=positions, keep={2: 0.75, 4: 0.3})
    with running(model, plan):
        output = generate(model, prompt)
    masks = model.get_decoder().last_kept_by_layer
    assert sorted(masks) == [2, 4]
    # Scores look at the last row, so a longer prompt would choose anew: fix the choice.
    longer = continued(prompt, output.sequences[:, prompt["input_ids"].shape[1] : -1])
    with running(model, plan, keep_masks=masks), torch.no_grad():
        logits = model(**longer, use_cache=False).logits[:, -len(output.logits) :]
    assert (torch.stack(output.logits, 1) - logits).abs().max() < TOLERANCE


def test_cache_lengths_are_the_schedules():
    model = elastic_model("llava_onevision")
    prompt = make_prompt(model, 3)
    counts, num_real = visual_counts(prompt), prompt["attention_mask"].sum(1).tolist()
    plan = schedules("ssssss", counts, UNEVEN, keep={2: 0.75, 4: 0.3})
    with running(model, plan):
        cache = cache_of(generate(model, prompt, 4))
    num_text = [real - visual for real, visual in zip(num_real, counts, strict=True)]
    expected = [
        max(text + row.visual_tokens[i] for text, row in zip(num_text, plan, strict=True)) + 3 for i in range(6)
    ]
    assert cache.layer_lengths == tuple(expected)
    assert cache.get_seq_length() == prompt["input_ids"].shape[1] + 3
    for i, layer in enumerate(cache.layers):
        held = [layer.keys.shape[-2]] * 3 if layer.valid_BK is None else layer.valid_BK.sum(1).tolist()
        assert held == [text + row.visual_tokens[i] + 3 for text, row in zip(num_text, plan, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_keeps_what_single_samples_keep(family):
    model = elastic_model(family)
    prompt = make_prompt(model, 3)
    plan = schedules("ssssss", visual_counts(prompt), UNEVEN, keep={2: 0.75, 4: 0.3})
    with torch.no_grad():
        with running(model, plan):
            logits, batched = model(**prompt).logits[:, -1], model.get_decoder().last_kept
        for row, schedule in enumerate(plan):
            with running(model, schedule):
                alone = model(**single(prompt, row)).logits[0, -1]
            assert torch.equal(model.get_decoder().last_kept[0], batched[row])
            assert (alone - logits[row]).abs().max() < TOLERANCE


def test_order_of_methods_changes_nothing():
    model = install(make_model("llava"), cross_layers=[1])
    prompt = make_prompt(model, 3)
    counts = visual_counts(prompt)
    plans = {
        "A": schedules("ssssss", counts, UNEVEN, keep={2: 0.5}, positions="contiguous"),
        "B": schedules("tcstst", counts),
    }
    results = []
    for name in "ABA":
        with running(model, plans[name]):
            results.append(torch.stack(generate(model, prompt).logits).numpy().tobytes())
    assert results[0] == results[2] != results[1]


def test_keeping_everything_is_the_dense_model():
    plain = make_model("llava")
    model, prompt = install(copy.deepcopy(plain)), make_prompt(plain, 2)
    plan = schedules("ssssss", visual_counts(prompt), (1.0,), keep={2: 1.0})
    with running(model, plan), torch.no_grad():
        assert torch.equal(model(**prompt).logits, plain(**prompt).logits)
    assert all(kept.all() for kept in model.get_decoder().last_kept)


@pytest.mark.parametrize("no_image", [(1,), (0, 2), (0, 1, 2)])
def test_samples_without_image(no_image):
    eager, model = shared_model("llava", "eager"), elastic_model("llava")
    prompt = make_prompt(eager, 3, no_image=no_image)
    plan = schedules("ssssss", [16] * 3, keep={2: 0.5})
    with running(model, plan):
        output = generate(model, prompt)
    new_ids = output.sequences[:, prompt["input_ids"].shape[1] : -1]
    expected, _ = reference(eager, prompt, plan, new_ids)
    assert (torch.stack(output.logits, 1) - expected).abs().max() < TOLERANCE
    assert [len(kept) for kept in model.get_decoder().last_kept] == [0 if i in no_image else 16 for i in range(3)]


def test_attention_row_is_the_eager_row():
    model = elastic_model("llava_onevision", "eager")
    prompt, seen = make_prompt(model, 3), {}

    class Look(Method):
        title = "look"

        def schedule(self, geometry, num_visual):
            raise NotImplementedError

        def score_tokens(self, context):
            last = context.last_B1
            seen["before"] = context.attention_row()
            seen["two rows"] = context.attention_row(torch.cat([last - 1, last], 1))
            seen["next"] = context.attention_row(layer=context.layer)
            return seen["before"]

    METHODS._objects["longest"] = Look
    plan = schedules("ssssss", visual_counts(prompt), (1.0,), keep={3: 0.9}, method="longest")
    with torch.no_grad():
        attentions = model(**prompt, output_attentions=True).attentions
        for use_cache in (True, False):
            with running(model, plan):
                model(**prompt, use_cache=use_cache)
            rows = attentions[2].mean(1)
            assert torch.allclose(seen["before"], rows[:, -1], atol=1e-6)
            assert torch.allclose(seen["two rows"], rows[:, -2:].mean(1), atol=1e-6)
            assert torch.allclose(seen["next"], attentions[3].mean(1)[:, -1], atol=1e-6)


HELD = {
    "fastv": dict(keep={2: 0.5}),
    "pyramid": dict(keep={2: 0.75, 4: 0.3}),
    "sparsevlm": dict(keep={2: 0.6, 4: 0.3}, method="sparsevlm"),
    "renumbered": dict(keep={1: 0.6, 3: 0.3}, positions="contiguous"),
}


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("case", HELD)
@torch.no_grad()
def test_generation_without_a_cache_holds_its_first_choice(case, beams):
    """Each step runs the prompt again: scored anew, it would keep other tokens for every word of the answer."""
    model = elastic_model("llava_onevision", "eager")
    prompt = make_prompt(model, 2)
    plan = schedules("ssssss", visual_counts(prompt), UNEVEN, **HELD[case])
    with running(model, plan):
        cached = generate(model, prompt, 8, num_beams=beams)
        kept = model.get_decoder().last_kept_by_layer
        found = generate(model, prompt, 8, num_beams=beams, use_cache=False)
        again = model.get_decoder().last_kept_by_layer
    assert torch.equal(found.sequences, cached.sequences)
    assert all(torch.equal(a, b) for layer in kept for a, b in zip(kept[layer], again[layer], strict=True))
    if beams == 1:
        for logits, expected in zip(found.logits, cached.logits, strict=True):
            torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=TOLERANCE)


@torch.no_grad()
def test_another_image_behind_the_same_words_is_chosen_from_anew():
    model = elastic_model("llava_onevision", "eager")
    prompt, other = make_prompt(model, 1), make_prompt(model, 1)
    other["pixel_values"] = torch.randn(other["pixel_values"].shape, generator=torch.Generator().manual_seed(9))
    longer = continued(other, torch.tensor([[7, 8]]))
    plan = schedules("ssssss", visual_counts(prompt), keep={2: 0.4})
    with running(model, plan):
        expected = model(**longer, use_cache=False).logits
    with running(model, plan):
        model(**prompt, use_cache=False)
        assert torch.equal(model(**longer, use_cache=False).logits, expected)
