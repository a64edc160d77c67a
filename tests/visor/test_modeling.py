"""The model: every configuration against the plain reference, and what makes it a citizen of transformers."""

import copy
import functools
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from reference import reference
from tiny_checkpoint import make_image, make_llava, make_processor
from tiny_models import continued, generate, make_model, make_prompt, single, visual_counts
from visor_models import CONFIGURATIONS, VISOR_FAMILIES, make_visor

import visor.engine.decoder
from budgets.costs import price
from budgets.geometry import from_config
from budgets.schedule import dense
from visor.engine.compat import CACHE, cache_of
from visor.model.conversion import convert
from visor.model.modeling import VisorForConditionalGeneration

pytestmark = pytest.mark.compat

TOLERANCE = 1e-4
LOGITS = dict(return_dict_in_generate=True, output_logits=True)


@functools.cache
def model_of(family, attention="sdpa", **fields):
    return make_visor(family, attention, **fields)


def new_tokens(output, prompt):
    return output.sequences[:, prompt["input_ids"].shape[1] : -1]


def check(model, eager, prompt, configurations, **request):
    """Generated logits against the reference, and against recomputation without a cache."""
    output = generate(model, prompt, **request)
    tokens, logits = new_tokens(output, prompt), torch.stack(output.logits, 1)
    plan = model.schedules(configurations, visual_counts(prompt))
    expected, _ = reference(eager.base, prompt, plan, tokens)
    assert (logits - expected).abs().max() < TOLERANCE
    with torch.no_grad():
        again = model(**continued(prompt, tokens), configuration=configurations, use_cache=False)
    assert (logits - again.logits[:, -logits.shape[1] :]).abs().max() < TOLERANCE
    assert again.configurations.tolist() == configurations


@pytest.mark.parametrize("configurations", [[0, 0, 0], [3, 3, 3], [0, 2, 3], [1, 0, 2]])
@pytest.mark.parametrize("family", VISOR_FAMILIES)
def test_configurations_equal_reference(family, configurations):
    eager, model = model_of(family, "eager"), model_of(family)
    prompt = make_prompt(eager.base, 3)
    request = configurations[0] if len(set(configurations)) == 1 else configurations
    check(model, eager, prompt, configurations, configuration=request)


@pytest.mark.parametrize("cost_weight", [None, 0.0, 0.8])
@pytest.mark.parametrize("family", VISOR_FAMILIES)
def test_router_in_a_mixed_batch_equals_reference(family, cost_weight):
    eager, model = model_of(family, "eager"), model_of(family)
    prompt = make_prompt(eager.base, 3)
    with torch.no_grad():
        chosen = model(**prompt, policy="router", cost_weight=cost_weight).configurations.tolist()
        alone = [
            model(**single(prompt, row), policy="router", cost_weight=cost_weight).configurations.item()
            for row in range(3)
        ]
    assert chosen == alone
    check(model, eager, prompt, chosen, policy="router", cost_weight=cost_weight)


def test_router_does_mix():
    """Else the tests above would show less than they say."""
    seen = set()
    for family in VISOR_FAMILIES:
        model = model_of(family)
        with torch.no_grad():
            seen.add(tuple(model(**make_prompt(model.base, 3), policy="router").configurations.tolist()))
    assert any(len(set(chosen)) > 1 for chosen in seen)


def test_initial_visual_source():
    eager, model = (model_of("llava", kernel, visual_source="initial") for kernel in ("eager", "sdpa"))
    prompt = make_prompt(eager.base, 2)
    check(model, eager, prompt, [3, 1], configuration=[3, 1])
    with torch.no_grad():
        latest = model_of("llava")(**prompt, configuration=3).logits
        assert not torch.allclose(model(**prompt, configuration=3).logits[:, -1], latest[:, -1], atol=1e-2)


@pytest.mark.parametrize("family", VISOR_FAMILIES)
def test_router_beams_and_padding(family):
    model = model_of(family)
    prompt = make_prompt(model.base, 3)
    together = generate(model, prompt, 4, num_beams=2, policy="router")
    recomputed = generate(model, prompt, 4, num_beams=2, policy="router", use_cache=False)
    assert torch.equal(together.sequences, recomputed.sequences)
    for row in range(3):
        alone = generate(model, single(prompt, row), 4, num_beams=2, policy="router").sequences
        assert torch.equal(together.sequences[row, -4:], alone[0, -4:])


def test_samples_without_image_run_the_first_configuration():
    model = model_of("llava")
    prompt = make_prompt(model.base, 3, no_image=(0, 2))
    with torch.no_grad():
        found = model(**prompt, policy="router", cost_weight=0.0).configurations.tolist()
        assert found[0] == found[2] == 0
        assert model(**prompt, budget=1.0).configurations.tolist() == [0, 3, 0]


@pytest.mark.parametrize("family", VISOR_FAMILIES[:2])
def test_budget_takes_the_costliest_within(family):
    model = model_of(family)
    prompt = make_prompt(model.base, 3)
    geometry = from_config(model.config)
    counts = visual_counts(prompt)
    texts = [int(n) - v for n, v in zip(prompt["attention_mask"].sum(1), counts, strict=True)]
    costs = [
        [
            price(geometry, row, text).decoder_prefill / price(geometry, dense(6, n), text).decoder_prefill
            for row in model.schedules(range(4), [n] * 4)
        ]
        for n, text in zip(counts, texts, strict=True)
    ]
    budget = costs[0][2] + 1e-6
    expected = [max(i for i in range(4) if row[i] <= budget) for row in costs]
    with torch.no_grad():
        assert model(**prompt, budget=budget).configurations.tolist() == expected
    assert expected[0] == 2
    with pytest.raises(ValueError, match="no configuration meets a budget of 0.01 .*they cost 0"):
        model(**prompt, budget=0.01)


# --- citizenship ----------------------------------------------------------------------------------------------------


def loaded_quietly(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = VisorForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **options)
    assert {name: list(value) for name, value in info.items()} == dict.fromkeys(info, [])
    return model


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("family", VISOR_FAMILIES)
def test_saving_and_loading_change_nothing(family, shards, tmp_path, caplog):
    model = model_of(family)
    model.save_pretrained(tmp_path, **({"max_shard_size": "100KB"} if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == shards
    assert (
        json.loads((tmp_path / "config.json").read_text())["base_config"]["model_type"] == model.base.config.model_type
    )
    again = loaded_quietly(tmp_path)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], x) for name, x in model.state_dict().items())
    assert again.config.configurations == CONFIGURATIONS
    assert again.generation_config.pad_token_id == 0 and again.base.generation_config is again.generation_config
    prompt = make_prompt(model.base, 2)
    with torch.no_grad():
        mine, its = (m(**prompt, policy="router") for m in (model, again))
    assert torch.equal(mine.logits, its.logits) and torch.equal(mine.configurations, its.configurations)


def test_tied_embeddings_stay_tied(tmp_path):
    base = make_model("llava")
    base.config.text_config.tie_word_embeddings = base.config.tie_word_embeddings = True
    base.lm_head.weight = base.get_input_embeddings().weight
    type(base)(base.config)
    convert(type(base)(base.config)).save_pretrained(tmp_path)
    again = loaded_quietly(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_fresh_model_starts_as_a_converted_one():
    torch.manual_seed(0)
    model = VisorForConditionalGeneration(copy.deepcopy(model_of("llava").config))
    for block in model.get_decoder().cross_blocks.values():
        assert not block.o_proj.weight.any() and block.q_proj.weight.any()
    assert not model.router.head.weight.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(dtype, tmp_path):
    model_of("llava").save_pretrained(tmp_path)
    model = loaded_quietly(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    prompt = make_prompt(model_of("llava").base, 1)
    with torch.no_grad():
        logits = model(**{**prompt, "pixel_values": prompt["pixel_values"].to(dtype)}, policy="router").logits
    assert logits.dtype is dtype and logits.isfinite().all()


def test_attention_kernel_reaches_the_base(tmp_path):
    model_of("llava").save_pretrained(tmp_path)
    model = loaded_quietly(tmp_path, attn_implementation="eager")
    assert model.get_decoder().config._attn_implementation == "eager"
    prompt = make_prompt(model.base, 2)
    with torch.no_grad():
        assert torch.allclose(model(**prompt).logits, model_of("llava")(**prompt).logits, atol=TOLERANCE)


@pytest.mark.parametrize(
    "first",
    [
        "import visor\nassert not {'torch', 'transformers'} & set(sys.modules), 'import visor imports torch'",
        "import transformers, visor",
        "import visor, transformers\ntransformers.AutoModelForImageTextToText",
        "import visor.model.configuration",
        "import visor.model.modeling",
        "import visor.model.registration as r\nr.register()\nr.register()",
    ],
)
def test_import_is_cheap_and_registers_whatever_comes_first(first):
    code = (
        f"import sys\n{first}\n"
        "from transformers import AutoConfig, AutoModelForImageTextToText\n"
        "config = AutoConfig.for_model('visor', cross_layers=[0], self_layers=[1])\n"
        "kind = AutoModelForImageTextToText._model_mapping[type(config)]\n"
        "assert kind.__name__ == 'VisorForConditionalGeneration', kind\n"
        "assert not [f for f in sys.meta_path if 'AfterImport' in type(f).__name__]\n"
    )
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)


def test_pipeline_and_auto_classes(tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

    model = convert(make_llava(), configurations=[[], [1]], router={"hidden_size": 8})
    model.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(again) is VisorForConditionalGeneration
    pipe = pipeline("image-text-to-text", model=again, processor=processor)
    turn = lambda image: [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what"}]}
    ]
    image = make_image(1)
    for options, expected in (({}, {}), ({"policy": "router"}, {"configuration": 0})):
        said = pipe(text=turn(image), max_new_tokens=4, return_full_text=False, generate_kwargs=options)
        inputs = processor.apply_chat_template(
            turn(image), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=4, **expected)[0, inputs["input_ids"].shape[1] :]
        assert said[0]["generated_text"] == processor.decode(ids, skip_special_tokens=True)


def test_resized_embeddings(tmp_path):
    model = copy.deepcopy(model_of("llava"))
    model.resize_token_embeddings(320)
    assert model.config.get_text_config().vocab_size == 320
    model.save_pretrained(tmp_path)
    again = loaded_quietly(tmp_path)
    with torch.no_grad():
        logits = again(**make_prompt(model.base, 1)).logits
    assert logits.shape[-1] == 320
    assert torch.allclose(logits[..., :300], model_of("llava")(**make_prompt(model.base, 1)).logits, atol=TOLERANCE)


def test_copies_are_independent():
    model = model_of("llava_onevision")
    prompt = make_prompt(model.base, 2)
    with torch.no_grad():
        expected = model(**prompt, policy="router").logits
        unused = make_visor("llava_onevision")  # transformers' own hooks of the first forward cannot be pickled
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(unused))):
            assert torch.equal(twin(**prompt, policy="router").logits, expected)
            twin.router.head.weight.zero_()
            twin.router.head.bias.zero_()
        assert torch.equal(model(**prompt, policy="router").logits, expected)


def test_outer_schedule_wins_and_every_method_runs():
    """The harness runs any method's schedule on the same model."""
    model = model_of("llava")
    prompt = make_prompt(model.base, 2)
    with torch.no_grad():
        with visor.engine.decoder.running(model, dense(6, 16)):
            assert torch.equal(model(**prompt).logits, model(**prompt, configuration="dense").logits)


# --- training -------------------------------------------------------------------------------------------------------


def labels_of(prompt, num=3):
    labels = torch.full_like(prompt["input_ids"], -100)
    labels[:, -num:] = prompt["input_ids"][:, -num:]
    return labels


def test_loss_is_of_text_that_text_predicts():
    model = model_of("llava_onevision")
    prompt = make_prompt(model.base, 3)
    with torch.no_grad():
        output = model(**prompt, labels=labels_of(prompt), configuration=1)
        logits, targets = output.logits[:, -4:-1], prompt["input_ids"][:, -3:]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        assert torch.allclose(output.loss, expected)
        everything = prompt["input_ids"].clone()
        few = model(**prompt, labels=everything, configuration=1, logits_to_keep="labels")
        summed = model(**prompt, labels=everything, configuration=1, num_items_in_batch=10).loss
    text = (prompt["input_ids"] != 290) & prompt["attention_mask"].bool()
    assert len(few.logits) == int((text[:, 1:] & text[:, :-1]).sum())
    assert torch.allclose(few.loss * len(few.logits) / 10, summed)


def test_training_computes_no_logits_that_nobody_reads():
    model = copy.deepcopy(model_of("llava")).train()
    prompt = make_prompt(model.base, 2)
    assert model(**prompt, labels=labels_of(prompt), use_cache=False).logits is None
    assert model(**prompt, labels=labels_of(prompt), use_cache=False, logits_to_keep=1).logits.shape[1] == 1


@pytest.mark.parametrize("configuration", [0, 1, 3, "dense", [0, 3]])
def test_packed_texts_have_the_loss_of_texts_alone(configuration):
    model = model_of("llava")
    prompt = make_prompt(model.base, 2)
    heads = [row[mask.bool()][:19] for row, mask in zip(prompt["input_ids"], prompt["attention_mask"], strict=True)]
    texts = [[torch.arange(20, 25), torch.arange(40, 44)], [torch.arange(60, 63), torch.arange(70, 76)]]
    ids = torch.stack([torch.cat([head, *tails]) for head, tails in zip(heads, texts, strict=True)])
    numbers = [[0] * 19 + [k for k, t in enumerate(tails, 1) for _ in t] for tails in texts]
    positions = [[*range(19), *(19 + i for t in tails for i in range(len(t)))] for tails in texts]
    packed = model(
        input_ids=ids, labels=ids, segment_ids=torch.tensor(numbers), position_ids=torch.tensor(positions),
        pixel_values=prompt["pixel_values"], configuration=configuration, use_cache=False, num_items_in_batch=1,
        logits_to_keep="labels",
    )  # fmt: skip
    total = 0.0
    for row, (head, tails) in enumerate(zip(heads, texts, strict=True)):
        own = configuration if not isinstance(configuration, list) else configuration[row]
        for number, tail in enumerate(tails):
            alone = torch.cat([head, tail])[None]
            labels = alone.clone()
            labels[0, :20] = -100  # the first token of a packed text is predicted by none of its own
            if number == 0:
                labels[0, :19] = alone[0, :19]  # what the texts share is counted once
            total = total + model(
                input_ids=alone, labels=labels, pixel_values=prompt["pixel_values"][row : row + 1], configuration=own,
                use_cache=False, num_items_in_batch=1, logits_to_keep="labels",
            ).loss  # fmt: skip
    assert torch.allclose(packed.loss, total, rtol=1e-4)


def test_shifted_labels_may_ask_for_hints():
    model = model_of("llava")
    prompt = make_prompt(model.base, 1)
    shifted = torch.full_like(prompt["input_ids"], -100)
    shifted[0, -1] = shifted[0, -3] = 7
    shifted[0, 5] = 7  # at a visual token: there is no prediction
    with torch.no_grad():
        output = model(**prompt, shift_labels=shifted, logits_to_keep="labels")
        full = model(**prompt).logits[0, [-3, -1]]
    assert torch.allclose(output.logits, full, atol=1e-5)


def test_gradient_checkpointing_changes_no_gradient():
    model, gradients = copy.deepcopy(model_of("llava")).train(), []
    prompt = make_prompt(model.base, 3)
    for checkpointing in (False, True):
        if checkpointing:
            enable = "activation_checkpointing_enable"  # the name from transformers 5.2x on
            getattr(model, enable if hasattr(model, enable) else "gradient_checkpointing_enable")()
            assert all(block.gradient_checkpointing for block in model.get_decoder().cross_blocks.values())
        model.zero_grad()
        model(**prompt, labels=labels_of(prompt), configuration=[0, 3, 1], use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert any("vision_tower" in name for name in gradients[0]) and any("cross_blocks" in name for name in gradients[0])


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_, message",
    [
        (dict(configuration=4), r"configuration 4 does not exist.*3: \[1, 2, 4\]"),
        (dict(configuration="densest"), "configuration 'densest' does not exist"),
        (dict(configuration=[0, 1]), "2 configurations for a batch of 3"),
        (dict(configuration=0, budget=0.5), "configuration and budget both say what runs"),
        (dict(budget=1.5), "a budget is a number in"),
        (dict(policy="routre"), "unknown policy 'routre'; a model itself knows: router"),
        (dict(cost_weight=1.0), "cost_weight belongs to policy"),
        (dict(logits_to_keep="labels"), '"labels" with labels'),
    ],
)
def test_requests_that_cannot_be_met(request_, message):
    model = model_of("llava")
    with pytest.raises(ValueError, match=message):
        model(**make_prompt(model.base, 3), **request_)


def test_what_is_missing_is_named():
    model, prompt = make_visor("llava", router=None), make_prompt(model_of("llava").base, 2)
    with pytest.raises(ValueError, match="has no router; train one"):
        model(**prompt, policy="router")
    with pytest.raises(ValueError, match="has no router; see add_router"):
        model.route(**prompt)
    with torch.no_grad():
        first = model(**prompt, configuration=0, use_cache=True)
    with pytest.raises(ValueError, match="give the configuration with the prompt"):
        model(prompt["input_ids"][:, -1:], **{CACHE: cache_of(first)}, configuration=1)


def test_image_tokens_that_do_not_match_the_image():
    model = model_of("llava")
    prompt = make_prompt(model.base, 1)
    keep = torch.arange(prompt["input_ids"].shape[1]) != 4  # one image token too few
    fewer = {name: prompt[name][:, keep] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="tokens: 15, features"):
        model(**{**prompt, **fewer})


def test_weights_of_another_base(tmp_path):
    from visor.inference import LoadedModel

    model = convert(make_llava())
    model.save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["base_config"]["text_config"]["hidden_size"] = 56
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another (base|model)"):
        LoadedModel.load(tmp_path)
