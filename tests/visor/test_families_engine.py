"""Every family under the engine: dense is Hugging Face bit for bit; reductions and VISOR's modes equal the plain
reference, which never drops a token; cached equals recomputed. M-RoPE and DeepStack are in these numbers."""

import copy
import functools

import pytest
import torch
from reference import reference
from schedules import schedules
from tiny_models import (
    NEW_FAMILIES,
    NUM_LAYERS,
    continued,
    generate,
    make_model,
    make_prompt,
    single,
    visual_counts,
    wake_cross_blocks,
)

from budgets.geometry import from_config
from budgets.registry import METHODS
from budgets.schedule import dense
from visor.engine.compat import CACHE, cache_of
from visor.engine.decoder import install, running
from visor.engine.positions import close_gaps
from visor.families.base import adapter_for

pytestmark = pytest.mark.compat

TOLERANCE = 2e-4
MODES = {
    "fastv": dict(modes="ssssss", keep={2: 0.5}),
    "reduced twice, contiguous": dict(modes="ssssss", keep={1: 0.75, 4: 0.3}, positions="contiguous"),
    "text only": dict(modes="tttttt"),
    "visor": dict(modes="tcscts"),
    "visor, reduced, contiguous": dict(modes="tsctcs", keep={2: 0.5}, positions="contiguous"),
}


@functools.cache
def model_of(family, attention="sdpa"):
    return wake_cross_blocks(install(make_model(family, attention), range(NUM_LAYERS)))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", NEW_FAMILIES)
def test_dense_schedule_equals_hugging_face(family, batch):
    plain = make_model(family)
    elastic, prompt = install(copy.deepcopy(plain)), make_prompt(plain, batch)
    with torch.no_grad(), running(elastic, dense(NUM_LAYERS, 0)):
        found, found_tokens = elastic(**prompt, output_hidden_states=True), generate(elastic, prompt, 4)
        found_beams = generate(elastic, prompt, 3, num_beams=2)
    with torch.no_grad():
        expected, expected_tokens = plain(**prompt, output_hidden_states=True), generate(plain, prompt, 4)
    assert torch.equal(expected.logits, found.logits)
    assert len(found.hidden_states) == NUM_LAYERS + 1
    assert all(map(torch.equal, expected.hidden_states, found.hidden_states))
    assert torch.equal(expected_tokens.sequences, found_tokens.sequences)
    assert all(map(torch.equal, expected_tokens.logits, found_tokens.logits))
    assert torch.equal(generate(plain, prompt, 3, num_beams=2).sequences, found_beams.sequences)


@pytest.mark.parametrize("setting", MODES)
@pytest.mark.parametrize("family", NEW_FAMILIES)
def test_schedules_equal_the_reference(family, setting):
    eager, model = model_of(family, "eager"), model_of(family)
    prompt = make_prompt(eager, 3)
    plan = schedules(counts=visual_counts(prompt), shares=(1.0, 0.6, 0.3), **MODES[setting])
    with running(model, plan):
        output = generate(model, prompt, 4)
        masks, kept = model.get_decoder().last_kept_by_layer, model.get_decoder().last_kept
    new_ids = output.sequences[:, prompt["input_ids"].shape[1] : -1]
    expected, expected_kept = reference(eager, prompt, plan, new_ids)
    logits = torch.stack(output.logits, 1)
    assert all(map(torch.equal, kept, expected_kept))
    assert (logits - expected).abs().max() < TOLERANCE
    with running(model, plan, keep_masks=masks), torch.no_grad():
        recomputed = model(**continued(prompt, new_ids), use_cache=False).logits[:, -logits.shape[1] :]
    assert (logits - recomputed).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", NEW_FAMILIES)
def test_a_batch_keeps_what_its_samples_keep_alone(family):
    model = model_of(family)
    prompt = make_prompt(model, 3)
    plan = schedules("ssssss", visual_counts(prompt), (1.0, 0.6, 0.3), keep={2: 0.5}, positions="contiguous")
    with torch.no_grad(), running(model, plan):
        together = model(**prompt).logits[:, -1]
        kept = model.get_decoder().last_kept
    for row in range(3):
        with torch.no_grad(), running(model, plan[row]):
            alone = model(**single(prompt, row)).logits[0, -1]
            assert torch.equal(model.get_decoder().last_kept[0], kept[row])
        assert (together[row] - alone).abs().max() < TOLERANCE


@pytest.mark.parametrize("method", ["sparsevlm", "dart"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_merged_and_moved_tokens_keep_their_place_and_their_levels(family, method):
    """SparseVLM puts recycled tokens behind the kept ones; a batch decodes as its samples do alone."""
    model = model_of(family)
    prompt, geometry = make_prompt(model, 3), from_config(model.config)
    plan = [METHODS.get(method)().schedule(geometry, n) for n in visual_counts(prompt)]
    with running(model, plan):
        together = torch.stack(generate(model, prompt, 3).logits, 1)
    for row in range(3):
        with running(model, plan[row]):
            alone = torch.stack(generate(model, single(prompt, row), 3).logits, 1)
        assert (together[row] - alone[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", NEW_FAMILIES)
@pytest.mark.parametrize("no_image", [(1,), (0, 1)])
def test_samples_without_image(family, no_image):
    eager, model = model_of(family, "eager"), model_of(family)
    prompt = make_prompt(eager, 2, no_image=no_image)
    plan = schedules("tcsctc", visual_counts(prompt))
    with running(model, plan):
        output = generate(model, prompt, 3)
    expected, _ = reference(eager, prompt, plan, output.sequences[:, prompt["input_ids"].shape[1] : -1])
    assert (torch.stack(output.logits, 1) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "smolvlm"])
def test_second_turn_on_the_cache_equals_one_long_prompt(family):
    model = model_of(family)
    prompt = make_prompt(model, 2)
    plan = schedules("tsctcs", visual_counts(prompt), (1.0, 0.5), keep={2: 0.5}, positions="contiguous")
    with running(model, plan):
        first = generate(model, prompt, 3)
        masks = model.get_decoder().last_kept_by_layer
        said = torch.cat([first.sequences[:, prompt["input_ids"].shape[1] :], torch.full((2, 4), 11)], 1)
        longer = continued(prompt, said)
        turn = {name: x for name, x in longer.items() if name in ("input_ids", "attention_mask")}
        second = generate(model, turn, 3, **{CACHE: cache_of(first)})
    with running(model, plan, keep_masks=masks):
        fresh = generate(model, longer, 3)
    assert torch.equal(second.sequences, fresh.sequences)
    assert (torch.stack(second.logits) - torch.stack(fresh.logits)).abs().max() < TOLERANCE


def test_deepstack_levels_matter_and_reach_standing_tokens():
    """Without the levels the answer is another one, also where visual tokens only stand and are read."""
    model = model_of("qwen3_vl")
    prompt = make_prompt(model, 1)
    output = model.get_image_features(prompt["pixel_values"], prompt["image_grid_thw"], return_dict=True)
    adapter, features = adapter_for(model), list(output.pooler_output)
    rest = {name: x for name, x in prompt.items() if name not in ("pixel_values",)}
    with torch.no_grad(), running(model, schedules("ttctct", [16])):
        own = model(**prompt).logits
        fed = [level[0] for level in output.deepstack_features]
        same = model(**rest, mm_encoder_outputs=adapter.image_outputs(features, [fed])).logits
        without = [torch.zeros_like(level) for level in fed]
        other = model(**rest, mm_encoder_outputs=adapter.image_outputs(features, [without])).logits
    assert torch.equal(own, same)
    assert (own - other)[:, -1].abs().max() > 1e-2


def test_closing_gaps():
    """A 2 x 3 image between text: the last column goes, so the text behind falls by one; a hole moves nothing."""
    positions = torch.tensor([[0, 1, 2, 2, 2, 2, 2, 2, 5], [0, 1, 2, 2, 2, 3, 3, 3, 5], [0, 1, 2, 3, 4, 2, 3, 4, 5]]).T[
        None
    ]
    live = torch.ones(1, 9, dtype=torch.bool)
    stay = live.clone()
    stay[0, [4, 7]] = False
    moved, fall = close_gaps(positions, live, stay)
    assert fall.tolist() == [[1]] and moved[0, 8].tolist() == [4, 4, 4] and moved[0, 6].tolist() == [2, 3, 3]
    stay[0, 7] = True
    moved, fall = close_gaps(positions, live, stay)
    assert fall.tolist() == [[0]] and torch.equal(moved, positions)
    swapped, fall = close_gaps(positions.flip(1), live.flip(1), stay.flip(1), positions)
    assert fall.tolist() == [[0]] and torch.equal(swapped, positions.flip(1))
    stay[0, 2:8] = False  # nothing of the image is left: the text is contiguous
    moved, fall = close_gaps(positions, live, stay)
    assert fall.tolist() == [[3]] and moved[0, [0, 1, 8], 0].tolist() == [0, 1, 2]
    padded, fall = close_gaps(
        torch.tensor([[0, 0, 0, 1, 2, 3]]), *torch.tensor([[[0, 0, 1, 1, 1, 1]], [[0, 0, 1, 0, 0, 1]]]).bool()
    )
    assert fall.tolist() == [[2]] and padded[0, 5] == 1


def test_positions_of_three_axes_need_mrope():
    model = model_of("smolvlm")
    prompt = make_prompt(model, 1)
    positions = torch.arange(prompt["input_ids"].shape[1]).expand(3, 1, -1)
    with (
        running(model, dense(NUM_LAYERS, 0)),
        pytest.raises(ValueError, match=r"position ids \[batch, length\], got shape \(3, 1,"),
    ):
        model(**prompt, position_ids=positions)
