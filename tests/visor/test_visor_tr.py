"""VISOR-TR: fewer visual tokens before the decoder, in the harness and in a model that carries its reduction."""

import functools

import pytest
import torch
import transformers
from tiny_checkpoint import NUM_VISUAL, make_image, make_llava, make_processor
from tiny_models import PAD, make_prompt
from visor_models import CROSS_LAYERS, SLOTS, make_visor

from budgets.costs import price
from budgets.registry import METHODS
from visor.engine.compat import CACHE, cache_of
from visor.inference import LoadedModel
from visor.model.conversion import convert
from visor.vision.encode import taps_of

REDUCTIONS = {
    "pooling_by": {"factor": 2},
    "pooling": {"side": 3},
    "visionzip": {"keep": 10},
    "vispruner": {},
    "downsample": {},
    "random": {"keep": 9},
}


@functools.cache
def checkpoint_model(name=None):
    reduction = None if name is None else {"method": name, "params": REDUCTIONS[name]}
    torch.manual_seed(1)
    model = convert(make_llava(), CROSS_LAYERS, SLOTS, configurations=[[], [4], [1, 4]], reduction=reduction)
    with torch.no_grad():
        for weight in model.get_decoder().cross_blocks.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape) * 0.15)
    return LoadedModel(model, make_processor())


@pytest.mark.parametrize("method, left", [("visor_tr2", 18), ("visor_tr4", 9), ("visor+visionzip", 36)])
def test_schedules_compose(method, left):
    geometry = checkpoint_model().geometry
    found = [setting.schedule(geometry, NUM_VISUAL) for setting in METHODS.get(method)().settings(geometry, NUM_VISUAL)]
    full = [setting.schedule(geometry, NUM_VISUAL) for setting in METHODS.get("visor")().settings(geometry, NUM_VISUAL)]
    if method.startswith("visor_tr"):
        assert [row.layers for row in found] == [row.layers for row in full]
        assert {row.visual_tokens for row in found} == {(left,) * 6}
        for ours, whole in zip(found, full, strict=True):
            assert price(geometry, ours, 20).decoder_prefill < price(geometry, whole, 20).decoder_prefill
    else:
        assert found[-1].layers == full[-1].layers and found[-1].decoder_visual == left


@pytest.mark.parametrize("method", ["visor", "visor_tr2", "visor_tr4", "visor+visionzip", "visor+vispruner"])
def test_harness_runs_them(method):
    loaded = checkpoint_model()
    samples = [loaded.prepare(make_image(i), question) for i, question in ((1, "what"), (2, "which colour"))]
    chosen = METHODS.get(method)().settings(loaded.geometry, NUM_VISUAL)[0]
    plan = [chosen.schedule(loaded.geometry, sample.num_visual) for sample in samples]
    loaded.check(plan)
    answers = loaded.generate(samples, loaded.encode(samples, taps_of(plan)), plan, 3)
    alone = [
        loaded.generate([sample], loaded.encode([sample], taps_of(plan)), [row], 3)[0]
        for sample, row in zip(samples, plan, strict=True)
    ]
    assert [a.token_ids for a in answers] == [a.token_ids for a in alone]


def inputs_of(loaded, questions=("what", "which colour")):
    samples = [loaded.prepare(make_image(i), question) for i, question in enumerate(questions)]
    longest = max(len(sample.input_ids) for sample in samples)
    pad = lambda x, fill: [fill] * (longest - len(x)) + list(x)
    return samples, {
        "input_ids": torch.tensor([pad(sample.input_ids, 0) for sample in samples]),
        "attention_mask": torch.tensor([pad([1] * len(sample.input_ids), 0) for sample in samples]),
        "pixel_values": torch.cat([sample.pixel_inputs["pixel_values"] for sample in samples]),
    }


@pytest.mark.parametrize("name", REDUCTIONS)
def test_model_with_a_reduction_equals_the_harness(name):
    plain, carrying = checkpoint_model(), checkpoint_model(name)
    samples, inputs = inputs_of(plain)
    method = METHODS.get(name)(**REDUCTIONS[name])
    for index, layers in enumerate(carrying.model.config.configurations):
        before = method.schedule(plain.geometry, NUM_VISUAL)
        modes = plain.model.schedules([index], [before.decoder_visual])[0].layers
        plan = [type(before)(modes, NUM_VISUAL, before.encoder, before.image_scale)] * 2
        expected = plain.generate(samples, plain.encode(samples, taps_of(plan), before.image_scale), plan, 4)
        sequences = carrying.model.generate(**inputs, configuration=index, max_new_tokens=4, do_sample=False)
        assert torch.equal(sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
        for row, answer in zip(sequences[:, inputs["input_ids"].shape[1] :].tolist(), expected, strict=True):
            assert row[: len(answer.token_ids)] == list(answer.token_ids), layers


def test_training_with_a_reduction():
    """Labels and packed texts move with their tokens, and gradients reach the tower."""
    model = checkpoint_model("pooling_by").model
    _, inputs = inputs_of(checkpoint_model())
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    output = model(**inputs, labels=labels, configuration=2, use_cache=False)
    expected = torch.nn.functional.cross_entropy(output.logits[:, -4:-1].flatten(0, 1), labels[:, -3:].flatten())
    assert output.logits.shape[1] == inputs["input_ids"].shape[1] - NUM_VISUAL // 2
    assert torch.allclose(output.loss, expected)
    output.loss.backward()
    assert any("vision_tower" in n and p.grad is not None and p.grad.any() for n, p in model.named_parameters())
    model.zero_grad()

    one = {name: value[:1, ...] for name, value in inputs.items()}
    ids = one["input_ids"][0][one["attention_mask"][0].bool()]
    head, tail = ids[:NUM_VISUAL], ids[NUM_VISUAL:]
    assert (head == 3).all()  # the image comes first in this template
    packed = torch.cat([head, tail, tail])[None]
    segments = torch.tensor([[0] * len(head) + [1] * len(tail) + [2] * len(tail)])
    positions = torch.tensor([[*range(len(ids)), *range(len(head), len(ids))]])
    with torch.no_grad():
        twice = model(packed, labels=packed, segment_ids=segments, position_ids=positions, configuration=2,
                      pixel_values=one["pixel_values"], use_cache=False)  # fmt: skip
        once = model(ids[None], labels=ids[None], configuration=2, pixel_values=one["pixel_values"], use_cache=False)
    assert torch.allclose(twice.loss, once.loss, atol=1e-5)


def test_budget_and_router_see_the_shorter_prompt():
    model = make_visor("llava_onevision", reduction={"method": "pooling_by", "params": {"factor": 4}})
    prompt = make_prompt(model.base, 2)
    with torch.no_grad():
        output = model(**prompt, policy="router", cost_weight=0.1)
        sequences = model.generate(**prompt, policy="router", max_new_tokens=3, num_beams=2, num_return_sequences=2)
    counts = (prompt["input_ids"] == 290).sum(1)
    real = prompt["attention_mask"].sum(1) - counts + (counts / 4).round().long()
    assert output.logits.shape[1] == int(real.max())
    assert sequences.shape == (4, prompt["input_ids"].shape[1] + 3)
    assert torch.equal(sequences[::2, : prompt["input_ids"].shape[1]], prompt["input_ids"])


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_a_second_turn_feeds_what_the_cache_has_not_seen(beams):
    """The ids that come back are the given ones, so the cache must count them; and positions go on where it ends."""
    model = checkpoint_model("pooling_by").model
    _, inputs = inputs_of(checkpoint_model())
    length, fed = inputs["input_ids"].shape[1], []
    options = dict(do_sample=False, return_dict_in_generate=True, num_beams=beams, configuration=1)
    first = model.generate(**inputs, max_new_tokens=3, **options)
    more = torch.full((2, 5), 9)
    ids = torch.cat([first.sequences, more], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, ids.shape[1] - length, dtype=torch.long)], 1)
    hook = model.get_decoder().register_forward_pre_hook(
        lambda m, args, kwargs: fed.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    assert cache_of(first).get_seq_length() == length + 2
    assert cache_of(first).layers[0].shift_B1.shape == (2 * beams, 1)
    if beams == 1:
        second = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False,
                                **{CACHE: cache_of(first)})  # fmt: skip
        assert fed[0] == 6  # the last answer token, which no forward has seen, and the new turn
        recomputed = model.generate(
            input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], max_new_tokens=3, do_sample=False,
            configuration=1,
        )  # fmt: skip
        assert torch.equal(second, recomputed)
    hook.remove()


@pytest.mark.parametrize("given", ["keyword", "config", "own"])
@torch.no_grad()
def test_total_lengths_count_the_prompt_as_it_was_given(given):
    model = checkpoint_model("pooling_by").model
    _, inputs = inputs_of(checkpoint_model())
    length, own = inputs["input_ids"].shape[1], model.generation_config
    total = transformers.GenerationConfig(max_length=length + 4, min_length=length + 4, do_sample=False, pad_token_id=0)
    if given == "keyword":
        found = model.generate(**inputs, max_length=length + 4, min_length=length + 4, do_sample=False)
    elif given == "config":
        found = model.generate(**inputs, generation_config=total)
        assert total.max_length == length + 4, "the caller's own config stays as it is"
    else:
        model.generation_config = total
        try:
            found = model.generate(**inputs)
        finally:
            model.generation_config = own
    assert found.shape[1] == length + 4
    with pytest.raises(ValueError, match=f"the prompt has {length} tokens"):
        model.generate(**inputs, max_length=length, do_sample=False)


def test_what_a_reduction_cannot_do():
    qwen = make_visor("qwen2_5_vl", reduction={"method": "random", "params": {}})
    with pytest.raises(ValueError, match=r"visor\+random"):
        qwen(**make_prompt(qwen.base, 1))
    model = checkpoint_model("pooling").model
    _, inputs = inputs_of(checkpoint_model())
    inputs["input_ids"][0, NUM_VISUAL // 2 + 10] = PAD
    with pytest.raises(ValueError, match="row 0 has several blocks of image tokens"):
        model(**inputs)
