"""Rows of one batch under different schedules: what they share runs once, each row equals its own reference."""

import pytest
import torch
from reference import reference
from schedules import schedule, schedules
from test_engine_mixtures import CROSS_LAYERS, FAMILIES, TOLERANCE, model_of, new_tokens
from tiny_models import continued, generate, make_model, make_prompt, visual_counts, wake_cross_blocks

from visor.engine.compat import cache_of
from visor.engine.decoder import install, running

pytestmark = pytest.mark.compat

MIXED = {
    "two": ["tctctc", "tcsctc", "tctctc"],
    "three": ["tctctc", "tcscts", "tcsctc"],
    "part at once": ["tcttst", "stctst", "ctsttc"],
    "cross or self": ["tcscst", "tcsccc", "tcsstt"],
}


def plan_of(modes, prompt):
    return [schedule(mode, n) for mode, n in zip(modes, visual_counts(prompt), strict=True)]


@pytest.mark.parametrize("modes", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("no_image", [(), (1,)])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_equal_reference(family, no_image, modes):
    eager, model = model_of(family, "eager"), model_of(family)
    prompt = make_prompt(eager, 3, no_image=no_image)
    plan = plan_of(modes, prompt)
    with running(model, plan), torch.no_grad():
        output = generate(model, prompt)
        longer = continued(prompt, new_tokens(output, prompt))
        logits = torch.stack(output.logits, 1)
        recomputed = model(**longer, use_cache=False).logits[:, -logits.shape[1] :]
    expected, _ = reference(eager, prompt, plan, new_tokens(output, prompt))
    assert (logits - expected).abs().max() < TOLERANCE
    assert (logits - recomputed).abs().max() < TOLERANCE


@pytest.mark.parametrize("visual_source", ["latest", "initial"])
def test_choice_is_made_where_alternatives_part(visual_source):
    """And what was before is not run again: every layer sees each row once."""
    model = wake_cross_blocks(install(make_model("llava_onevision"), CROSS_LAYERS, visual_source=visual_source))
    prompt = make_prompt(model, 3)
    alternatives, choice = ("tctctc", "tcstct", "tcsscs"), [2, 0, 1]
    rows, asked = {}, []
    for i, layer in enumerate(model.get_decoder().layers):
        count = lambda _, args, kwargs, i=i: rows.__setitem__(i, rows.get(i, 0) + args[0].shape[0])
        layer.register_forward_pre_hook(count, with_kwargs=True)

    def choose(streams):
        asked.append(dict(rows))
        return choice

    with running(model, [schedule(modes, 0) for modes in alternatives], choose=choose), torch.no_grad():
        found = model(**prompt).logits[:, -1]
    assert asked == [{0: 3, 1: 3}]
    assert rows == dict.fromkeys(range(6), 3)
    with running(model, plan_of([alternatives[i] for i in choice], prompt)), torch.no_grad():
        assert torch.equal(model(**prompt).logits[:, -1], found)


def test_stop_runs_nothing_more():
    model = model_of("llava")
    prompt = make_prompt(model, 2)
    handle = model.get_decoder().layers[2].register_forward_pre_hook(lambda *_: pytest.fail("layer 2 ran"))
    seen = []
    plan = [schedule("tctctc", 16), schedule("tcsctc", 16)]
    with running(model, plan, choose=lambda s: seen.append(s) or [0, 0], stop=True), torch.no_grad():
        model(**prompt)
    handle.remove()
    assert len(seen) == 1


@pytest.mark.parametrize("modes", MIXED.values(), ids=MIXED)
def test_beams_equal_beams_without_cache(modes):
    model = model_of("llava_onevision")
    prompt = make_prompt(model, 3)
    with running(model, plan_of(modes, prompt)):
        cached = generate(model, prompt, 4, num_beams=2)
        recomputed = generate(model, prompt, 4, num_beams=2, use_cache=False)
    assert torch.equal(cached.sequences, recomputed.sequences)


def test_cache_holds_what_each_row_needs():
    model = model_of("llava_onevision")
    prompt = make_prompt(model, 3)
    counts, plan = visual_counts(prompt), plan_of(["tctctc", "tcsctc", "tctctc"], prompt)
    with running(model, plan):
        cache = cache_of(generate(model, prompt, 4))
    num_text = [int(real) - visual for real, visual in zip(prompt["attention_mask"].sum(1), counts, strict=True)]
    text, full = max(num_text) + 3, max(num_text[1] + counts[1], *num_text) + 3
    assert cache.layer_lengths == (text, text, full, text, text, text)
    assert cache.cross_lengths == (0, max(counts), 0, max(counts), 0, max(counts))
    assert cache.get_seq_length() == prompt["input_ids"].shape[1] + 3


def test_gradients_pass_the_parting():
    model = wake_cross_blocks(install(make_model("llava"), CROSS_LAYERS)).train()
    prompt = make_prompt(model, 3)
    plan = plan_of(["tctctc", "tcsctc", "tctcts"], prompt)
    gradients = []
    for together in (True, False):
        model.zero_grad()
        total = 0.0
        for group in [plan] if together else [[p] * 3 for p in plan]:
            with running(model, group):
                logits = model(**prompt, use_cache=False).logits[:, -1]
            rows = range(3) if together else [plan.index(group[0])]
            total = total + logits[list(rows)].log_softmax(-1)[:, 7].sum()
        total.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-3, atol=1e-4)


# --- several texts packed into one row -------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", ["tttttt", "tctctc", "tcsctc", "scsccs", "ssssss"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_texts_equal_texts_alone(family, attention, modes):
    model = model_of(family, attention)
    prompt = make_prompt(model, 2)
    ids, counts = prompt["input_ids"], visual_counts(prompt)
    prefix = [row[mask.bool()][: 3 + n] for row, mask, n in zip(ids, prompt["attention_mask"], counts, strict=True)]
    texts = [[torch.arange(20, 25), torch.arange(40, 47), torch.arange(60, 63)], [torch.arange(70, 72)] * 2]
    rows = []
    for head, tails in zip(prefix, texts, strict=True):
        numbers = [torch.full((len(t),), i) for i, t in enumerate(tails, 1)]
        positions = [len(head) + torch.arange(len(t)) for t in tails]
        zeros = torch.zeros_like(head)
        parts = ([head, *tails], [zeros, *numbers], [torch.arange(len(head)), *positions])
        rows.append([torch.cat(part) for part in parts])
    length = max(len(row[0]) for row in rows)
    pad = lambda k, fill: torch.stack(
        [torch.nn.functional.pad(r[k], (0, length - len(r[k])), value=fill) for r in rows]
    )
    packed_ids, segments, positions = pad(0, 0), pad(1, -1), pad(2, 0)
    images = {name: x for name, x in prompt.items() if name not in ("input_ids", "attention_mask")}
    with running(model, schedules(modes, counts), segments=segments), torch.no_grad():
        mask = (segments >= 0).long()
        packed = model(input_ids=packed_ids, attention_mask=mask, position_ids=positions, **images, use_cache=False)
    for row, (head, tails) in enumerate(zip(prefix, texts, strict=True)):
        start = len(head)
        for tail in tails:
            alone = torch.cat([head, tail])[None]
            image = {name: x[row : row + 1] for name, x in images.items()}
            with running(model, schedules(modes, [counts[row]])), torch.no_grad():
                expected = model(input_ids=alone, attention_mask=torch.ones_like(alone), **image).logits[0, len(head) :]
            found = packed.logits[row, start : start + len(tail)]
            assert (found - expected).abs().max() < TOLERANCE
            start += len(tail)


def test_packed_texts_want_no_cache_and_share_their_image():
    model = model_of("llava")
    prompt = make_prompt(model, 1)
    segments = torch.zeros_like(prompt["input_ids"])
    with torch.no_grad(), running(model, schedule("tctstc", 16), segments=segments):
        with pytest.raises(ValueError, match="use_cache=False"):
            model(**prompt)
    with torch.no_grad(), running(model, schedule("tctstc", 16), segments=segments + 1):
        with pytest.raises(ValueError, match="visual tokens outside segment 0"):
            model(**prompt, use_cache=False)
    with torch.no_grad(), running(model, schedule("tctstc", 16), segments=segments[:, 1:]):
        with pytest.raises(ValueError, match="must have the prompt's shape"):
            model(**prompt, use_cache=False)
