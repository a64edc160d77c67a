"""TEXT, CROSS and SELF layers in one schedule, alone and with token reduction, against the plain reference."""

import functools

import pytest
import torch
from reference import reference
from schedules import schedules
from tiny_models import FAMILIES, continued, generate, make_model, make_prompt, visual_counts, wake_cross_blocks

from visor.engine.compat import CACHE, cache_of
from visor.engine.decoder import install, running

pytestmark = pytest.mark.compat

TOLERANCE = 2e-4
MIXTURES = {
    "text only": dict(modes="tttttt"),
    "no self": dict(modes="tctctc"),
    "self then cross": dict(modes="tcsctc"),
    "late self": dict(modes="ttstss"),
    "cross reads refined": dict(modes="scsccs"),
    "reduced": dict(modes="tsctcs", keep={2: 0.5}),
    "reduced twice": dict(modes="sscssc", keep={2: 0.75, 5: 0.3}),
    "reduced, contiguous": dict(modes="tsctst", keep={2: 0.5}, positions="contiguous"),
    "reduced twice, contiguous": dict(modes="sstsct", keep={2: 0.75, 4: 0.3}, positions="contiguous"),
}
CROSS_LAYERS = range(6)


@functools.cache
def model_of(family, attention="sdpa"):
    return wake_cross_blocks(install(make_model(family, attention), CROSS_LAYERS))


def new_tokens(output, prompt):
    return output.sequences[:, prompt["input_ids"].shape[1] : -1]


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixture_equals_reference(family, batch, mixture):
    eager, model = model_of(family, "eager"), model_of(family)
    prompt = make_prompt(eager, batch)
    plan = schedules(counts=visual_counts(prompt), shares=(1.0, 0.6, 0.3), **MIXTURES[mixture])
    with running(model, plan), torch.no_grad():
        prefill = model(**prompt).logits[:, -1:]
        output = generate(model, prompt)
        masks = model.get_decoder().last_kept_by_layer
    expected, kept = reference(eager, prompt, plan)
    assert (prefill - expected).abs().max() < TOLERANCE
    assert all(map(torch.equal, kept, model.get_decoder().last_kept))
    logits = torch.stack(output.logits, 1)
    expected, _ = reference(eager, prompt, plan, new_tokens(output, prompt))
    assert (logits - expected).abs().max() < TOLERANCE
    longer = continued(prompt, new_tokens(output, prompt))
    with running(model, plan, keep_masks=masks), torch.no_grad():
        recomputed = model(**longer, use_cache=False).logits[:, -logits.shape[1] :]
    assert (logits - recomputed).abs().max() < TOLERANCE


@pytest.mark.parametrize("no_image", [(1,), (0, 1), (0, 1, 2)])
def test_samples_without_image(no_image):
    eager, model = model_of("llava_onevision", "eager"), model_of("llava_onevision")
    prompt = make_prompt(eager, 3, no_image=no_image)
    plan = schedules("tcsctc", visual_counts(prompt))
    with running(model, plan):
        output = generate(model, prompt)
    expected, _ = reference(eager, prompt, plan, new_tokens(output, prompt))
    assert (torch.stack(output.logits, 1) - expected).abs().max() < TOLERANCE


def test_cache_lengths_are_the_schedules():
    model = model_of("llava_onevision")
    prompt = make_prompt(model, 3)
    counts = visual_counts(prompt)
    plan = schedules("tsctcs", counts, (1.0, 0.6, 0.3), keep={2: 0.5})
    with running(model, plan):
        cache = cache_of(generate(model, prompt, 4))
    num_text = [int(real) - visual for real, visual in zip(prompt["attention_mask"].sum(1), counts, strict=True)]
    kept = [row.visual_tokens[-1] for row in plan]
    text, full = max(num_text) + 3, max(map(sum, zip(num_text, counts, strict=True))) + 3
    reduced = max(map(sum, zip(num_text, kept, strict=True))) + 3
    assert cache.layer_lengths == (text, full, text, text, text, reduced)
    assert cache.cross_lengths == (0, 0, max(kept), 0, max(kept), 0)
    assert cache.get_seq_length() == prompt["input_ids"].shape[1] + 3
    heads_width = 2 * 16
    held = 3 * (sum(cache.layer_lengths) + sum(cache.cross_lengths)) * heads_width * 2 * 4
    assert cache.kv_bytes == held


def test_new_cross_blocks_change_nothing():
    model = install(make_model("llava"), CROSS_LAYERS)
    prompt = make_prompt(model, 2)
    with torch.no_grad():
        logits = []
        for modes in ("tctstc", "tttstt"):
            with running(model, schedules(modes, visual_counts(prompt))):
                logits.append(model(**prompt).logits[:, -1])
    assert torch.equal(*logits)


@pytest.mark.parametrize("modes, keep", [("tcsctc", {}), ("ssssss", {2: 0.5}), ("tsctcs", {2: 0.5})])
def test_beams_equal_beams_without_cache(modes, keep):
    model = model_of("llava_onevision")
    prompt = make_prompt(model, 2)
    plan = schedules(modes, visual_counts(prompt), (1.0, 0.5), keep=keep, positions="contiguous")
    with running(model, plan), torch.no_grad():
        model(**prompt)
    masks = model.get_decoder().last_kept_by_layer
    with running(model, plan, keep_masks=masks):
        cached = generate(model, prompt, 5, num_beams=3)
        recomputed = generate(model, prompt, 5, num_beams=3, use_cache=False)
    assert torch.equal(cached.sequences, recomputed.sequences)


@pytest.mark.parametrize("modes, keep", [("tcsctc", {}), ("ssssss", {2: 0.5}), ("tsctcs", {2: 0.5})])
def test_right_padding_equals_left_padding(modes, keep):
    model = model_of("llava_onevision")
    left = make_prompt(model, 3)
    lengths = left["attention_mask"].sum(1).tolist()
    shift = lambda x: torch.stack([row.roll(n) for row, n in zip(x, lengths, strict=True)])
    right = {**left, "input_ids": shift(left["input_ids"]), "attention_mask": shift(left["attention_mask"])}
    assert right["attention_mask"][:, 0].all() and not right["attention_mask"][:, -1].all()
    plan = schedules(modes, visual_counts(left), (1.0, 0.6, 0.3), keep=keep, positions="contiguous")
    with running(model, plan), torch.no_grad():
        expected, kept = model(**left).logits[:, -1], model.get_decoder().last_kept
        found = model(**right).logits
    last = torch.stack([row[n - 1] for row, n in zip(found, lengths, strict=True)])
    assert (last - expected).abs().max() < TOLERANCE
    assert all(map(torch.equal, kept, model.get_decoder().last_kept))


def test_image_token_ids_without_images_are_text():
    """A model may generate one; and a later turn repeats those of the first."""
    model = model_of("llava")
    prompt = make_prompt(model, 2, no_image=(0, 1))
    prompt["input_ids"][:, -3] = model.config.image_token_id
    with torch.no_grad():
        expected = model(**prompt).logits
        with running(model, schedules("tcstct", [16, 16])):
            assert torch.equal(model(**prompt).logits, expected)


@pytest.mark.parametrize("modes, keep", [("tcsctc", {}), ("ssssss", {2: 0.5})])
def test_prompt_lookup_equals_greedy(modes, keep):
    """Prompt lookup feeds several tokens at once and crops the rejected ones from the cache."""
    model = model_of("llava")
    prompt = make_prompt(model, 1)
    prompt["input_ids"][0, -4:] = prompt["input_ids"][0, -8:-4]  # repeats invite wrong guesses
    plan = schedules(modes, visual_counts(prompt), keep=keep, positions="contiguous")
    with running(model, plan):
        greedy = generate(model, prompt, 12).sequences
        if keep:  # the first guesses are part of the prompt's forward, and would help to choose tokens
            with pytest.raises(ValueError, match="keep_masks"):
                generate(model, prompt, 12, prompt_lookup_num_tokens=3)
            generate(model, prompt, 1)
    with running(model, plan, keep_masks=model.get_decoder().last_kept_by_layer):
        looked_up = generate(model, prompt, 12, prompt_lookup_num_tokens=3).sequences
    assert torch.equal(greedy, looked_up)


@pytest.mark.parametrize("modes, keep", [("tcsctc", {}), ("ssssss", {2: 0.5}), ("tsctcs", {2: 0.5})])
def test_second_turn_equals_one_long_prompt(modes, keep):
    model = model_of("llava_onevision")
    prompt = make_prompt(model, 2)
    plan = schedules(modes, visual_counts(prompt), (1.0, 0.5), keep=keep, positions="contiguous")
    with running(model, plan):
        first = generate(model, prompt, 3)
        masks = model.get_decoder().last_kept_by_layer
        said = torch.cat([first.sequences[:, prompt["input_ids"].shape[1] :], torch.full((2, 4), 11)], 1)
        longer = continued(prompt, said)
        turn = {name: longer[name] for name in ("input_ids", "attention_mask")}
        second = generate(model, turn, 3, **{CACHE: cache_of(first)})
    with running(model, plan, keep_masks=masks):
        fresh = generate(model, longer, 3)
    assert torch.equal(second.sequences, fresh.sequences)
    assert (torch.stack(second.logits) - torch.stack(fresh.logits)).abs().max() < TOLERANCE


@pytest.mark.parametrize("modes, keep", [("ssssss", {}), ("tcsctc", {}), ("ssssss", {2: 0.5}), ("tsctcs", {2: 0.5})])
def test_gradient_checkpointing_changes_no_gradient(modes, keep):
    model = wake_cross_blocks(install(make_model("llava_onevision"), CROSS_LAYERS)).train()
    prompt = make_prompt(model, 2)
    labels = prompt["input_ids"].masked_fill((prompt["attention_mask"] == 0) | (prompt["input_ids"] == 290), -100)
    labels[:, : int((labels[0] != -100).nonzero()[0]) + 1] = -100  # never predict a row's first token from padding
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            if hasattr(model, "activation_checkpointing_enable"):  # the name from transformers 5.2x on
                model.activation_checkpointing_enable()
            else:
                model.gradient_checkpointing_enable()
            assert all(block.gradient_checkpointing for block in model.get_decoder().cross_blocks.values())
        model.zero_grad()
        with running(model, schedules(modes, visual_counts(prompt), (1.0, 0.5), keep=keep)):
            model(**prompt, labels=labels, use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    reached = {name for name, gradient in gradients[0].items() if gradient.abs().sum() > 0}
    assert any("vision_tower" in name for name in reached)
    assert {name.split(".")[3] for name in reached if "cross_blocks" in name} == {
        str(i) for i, mode in enumerate(modes) if mode == "c"
    }
