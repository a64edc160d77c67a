"""What the engine cannot do, it says."""

import copy
import functools

import pytest
import torch
import transformers
from schedules import schedule, schedules
from tiny_models import NUM_LAYERS, generate, make_model, make_prompt, visual_counts

from budgets.schedule import dense
from visor.engine.cache import ElasticCache
from visor.engine.compat import CACHE, cache_of
from visor.engine.decoder import install, running


@functools.cache
def model_of(family="llava"):
    return install(make_model(family), cross_layers=[1])


def test_running_needs_install():
    with pytest.raises(ValueError, match="install"), running(make_model("llava"), dense(NUM_LAYERS, 16)):
        pass


@pytest.mark.parametrize(
    "plan, message",
    [
        ([], "at least one schedule"),
        ([dense(NUM_LAYERS + 1, 16)], "7 layers, the decoder has 6"),
        ([schedule("tctctc", 16)], r"layers \[3, 5\] are CROSS.*layers with one: \[1\]"),
        ([schedule("ssssss", 16, {2: 0.5}), schedule("ssssss", 16)], "share their structure"),
        ([schedule("ssssss", 16, {2: 0.5}, method="fastvv")], "unknown method 'fastvv'.*nearest first: fastv"),
    ],
)
def test_schedules_that_do_not_fit_the_model(plan, message):
    with pytest.raises(ValueError, match=message), running(model_of(), plan):
        pass


@pytest.mark.parametrize(
    "plan, message",
    [
        ([schedule("ssssss", 20, {2: 0.5})], "row 0: its schedule is for 20 visual tokens, the prompt has 16"),
        ([schedule("tttttt", 16)] * 2, "2 schedules for a batch of 3"),
        ([schedule("ssssss", 16, {1: 0.5, 2: 0.25})] * 3, None),
        ([schedule("stssss", 16, {2: 0.5})], "layer 1 has no attention to visual tokens: it is a TEXT layer"),
        ([schedule("ssssss", 16, {0: 0.5})], "there is no such layer"),
    ],
)
def test_schedules_that_do_not_fit_the_batch(plan, message):
    model, prompt = model_of(), make_prompt(model_of(), 3)
    with running(model, plan), torch.no_grad():
        if message is None:
            model(**prompt)
        else:
            with pytest.raises(ValueError, match=message):
                model(**prompt)


def test_keep_masks_are_checked():
    model, prompt = model_of(), make_prompt(model_of(), 1)
    plan = schedule("ssssss", 16, {2: 0.5})
    with pytest.raises(ValueError, match="keep_masks for layers"), running(model, plan, keep_masks={3: []}):
        pass
    with (
        running(model, plan, keep_masks={2: [torch.ones(16, dtype=torch.bool)]}),
        pytest.raises(ValueError, match="expected 8 of 16 visual tokens, got 16 of 16"),
    ):
        model(**prompt)


@pytest.mark.parametrize("implementation", ["static", "offloaded"])
def test_caches_of_one_length_are_refused(implementation):
    model, prompt = model_of(), make_prompt(model_of(), 1)
    if implementation == "offloaded":
        caches = {CACHE: transformers.DynamicCache.__new__(transformers.DynamicCache)}
        caches[CACHE].layers, caches[CACHE].offloading = [], True
    else:
        caches = dict(cache_implementation="static")
    with running(model, schedule("tttttt", 16)), pytest.raises(ValueError, match="static, quantized and offloaded"):
        model(**prompt, **caches) if implementation == "offloaded" else generate(model, prompt, 2, **caches)


@pytest.mark.parametrize("implementation", ["static", "quantized"])
@torch.no_grad()
def test_a_dense_schedule_takes_any_cache(implementation):
    if implementation == "quantized":
        pytest.importorskip("optimum.quanto")
    model, prompt = model_of(), make_prompt(model_of(), 2)
    expected = generate(model, prompt, cache_implementation=implementation)
    with running(model, dense(NUM_LAYERS, 16)):
        found = generate(model, prompt, cache_implementation=implementation)
    assert torch.equal(found.sequences, expected.sequences)
    assert type(cache_of(found)) is type(cache_of(expected))


@torch.no_grad()
def test_a_dense_schedule_goes_on_where_the_model_itself_began():
    model, prompt = model_of(), make_prompt(model_of(), 1)
    caches = [cache_of(generate(model, prompt, 2)) for _ in range(2)]
    assert not isinstance(caches[0], ElasticCache)
    expected = model(input_ids=torch.tensor([[7]]), **{CACHE: caches[0]}).logits
    with running(model, dense(NUM_LAYERS, 16)):
        assert torch.equal(model(input_ids=torch.tensor([[7]]), **{CACHE: caches[1]}).logits, expected)


def test_a_prompt_cut_into_chunks_is_called_that():
    model, prompt = model_of(), make_prompt(model_of(), 1)
    expected = generate(model, prompt, 2).sequences
    with running(model, schedule("tttttt", 16)), pytest.raises(ValueError, match="leave prefill_chunk_size unset"):
        generate(model, prompt, 2, prefill_chunk_size=8)
    with running(model, dense(NUM_LAYERS, 16)):
        assert torch.equal(generate(model, prompt, 2, prefill_chunk_size=8).sequences, expected)


def test_a_cache_filled_elsewhere_is_refused():
    model, prompt = model_of(), make_prompt(model_of(), 1)
    cache = cache_of(generate(model, prompt, 2))
    with running(model, schedule("tttttt", 16)), pytest.raises(ValueError, match="cached outside"):
        model(input_ids=torch.tensor([[7]]), **{CACHE: cache})


def test_new_images_in_a_later_turn_are_refused():
    model, prompt = model_of(), make_prompt(model_of(), 1)
    with running(model, schedule("tttttt", 16)), torch.no_grad():
        cache = cache_of(model(**prompt))
        with pytest.raises(ValueError, match="new images in a later turn start a new conversation"):
            model(**prompt, **{CACHE: cache})


def test_prepared_4d_masks_are_refused():
    model, prompt = model_of(), make_prompt(model_of(), 1)
    n = prompt["input_ids"].shape[1]
    with running(model, schedule("tttttt", 16)), pytest.raises(ValueError, match="2D attention_mask"):
        model(**{**prompt, "attention_mask": torch.zeros(1, 1, n, n)})


def merged_by_the_caller(model, prompt):
    """The prompt's embeddings with its image features in them."""
    embeds, ids = model.get_input_embeddings()(prompt["input_ids"]), prompt["input_ids"]
    features = torch.cat(list(model.get_image_features(pixel_values=prompt["pixel_values"]).pooler_output))
    return embeds.masked_scatter((ids == model.config.image_token_id)[..., None], features)


@pytest.mark.parametrize("with_pixels", [True, False])
@pytest.mark.parametrize("plan", [schedule("tttttt", 16), schedule("ssssss", 16, {2: 0.5})])
@torch.no_grad()
def test_images_without_input_ids_need_a_visual_mask(plan, with_pixels):
    """Merged into the embeddings by the caller, images look like text: FastV and VISOR ran as dense."""
    model, prompt = model_of(), make_prompt(model_of(), 1)
    embeds, visual = merged_by_the_caller(model, prompt), prompt["input_ids"] == model.config.image_token_id
    pixels = {"pixel_values": prompt["pixel_values"]} if with_pixels else {}
    with running(model, plan):
        expected = model(**prompt).logits
        with pytest.raises(ValueError, match=r"running\(..., visual=mask\)"):
            model(inputs_embeds=embeds, **pixels)
        with pytest.raises(ValueError, match=r"running\(..., visual=mask\)"):
            model.generate(inputs_embeds=embeds, max_new_tokens=2, do_sample=False)
    if not with_pixels:
        with running(model, plan, visual=visual):
            assert torch.equal(model(inputs_embeds=embeds).logits, expected)
    with running(model, dense(NUM_LAYERS, 16)):
        model(inputs_embeds=embeds)


def test_pixels_without_image_tokens_are_refused():
    model, prompt = model_of(), make_prompt(model_of(), 1)
    prompt["input_ids"] = prompt["input_ids"].masked_fill(prompt["input_ids"] == model.config.image_token_id, 7)
    with running(model, schedule("tttttt", 16)), pytest.raises(ValueError, match=r"none of the image tokens \(290,\)"):
        model(**prompt)


@pytest.mark.parametrize("plan", [schedule("tctstt", 16), schedule("ssssss", 16, {2: 0.5})])
def test_a_layer_that_caches_something_else_is_named(plan):
    """Here a layer that caches its first 5 tokens twice."""
    model, prompt = copy.deepcopy(model_of()), make_prompt(model_of(), 2)
    layer = model.get_decoder().layers[4]

    def twice(module, args, output):
        held = seen["cache"].layers[4]
        held.update(held.keys[:, :, :5], held.values[:, :, :5])

    seen = {}
    layer.register_forward_pre_hook(lambda m, args, kwargs: seen.update(cache=kwargs[CACHE]), with_kwargs=True)
    layer.register_forward_hook(twice)
    with running(model, plan), torch.no_grad(), pytest.raises(ValueError, match="after the prefill layer 4 holds"):
        model(**prompt)


def test_a_forward_that_was_replaced_is_refused_or_noticed():
    model, prompt = make_model("llava"), make_prompt(model_of(), 1)
    own = model.get_decoder().forward
    model.get_decoder().forward = lambda *args, **kwargs: own(*args, **kwargs)
    with pytest.raises(ValueError, match="install first, and wrap the model after that"):
        install(model)
    del model.get_decoder().forward
    install(model).get_decoder().forward = own  # bound to the family's class
    own = type(own)(type(model.get_decoder()).__mro__[2].forward, model.get_decoder())
    model.get_decoder().forward = own
    with running(model, schedule("tttttt", 16)), torch.no_grad(), pytest.raises(ValueError, match="did not run"):
        model(**prompt)


@pytest.mark.parametrize("offload", [False, True])
@torch.no_grad()
def test_hooks_of_accelerate_put_on_before_install(offload):
    accelerate = pytest.importorskip("accelerate")
    plain, prompt = make_model("llava"), make_prompt(model_of(), 2)
    model = copy.deepcopy(plain)
    if offload:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for module in (model, model.get_decoder()):
        accelerate.hooks.add_hook_to_module(module, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True))
    install(model)
    install(plain)
    assert torch.equal(model(**prompt).logits, plain(**prompt).logits)
    for plan in (schedule("tttttt", 16), schedule("ssssss", 16, {2: 0.5})):
        with running(model, plan), running(plain, plan):
            found, expected = generate(model, prompt), generate(plain, prompt)
        assert torch.equal(found.sequences, expected.sequences)
        assert cache_of(found).layer_lengths == cache_of(expected).layer_lengths
    if offload:
        with pytest.raises(ValueError, match="offloaded.*before accelerate's dispatch"):
            install(model, cross_layers=[1])


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_blocks_beside_quantised_weights_compute_in_the_dtype_of_the_norms(dtype):
    model = make_model("llava").to(torch.bfloat16)
    for layer in model.get_decoder().layers:
        quantised = torch.zeros(layer.self_attn.q_proj.weight.shape, dtype=dtype)
        layer.self_attn.q_proj.weight = torch.nn.Parameter(quantised, requires_grad=False)
    blocks = install(model, cross_layers=[1]).get_decoder().cross_blocks
    assert {weight.dtype for weight in blocks.parameters()} == {torch.bfloat16}


def test_sliding_windows_run_dense_schedules_only():
    model = make_model("llava_onevision")
    config = model.get_decoder().config
    config.layer_types = ["full_attention"] * 3 + ["sliding_attention"] * 3
    config.sliding_window, model.get_decoder().has_sliding_layers = 8, True
    prompt = make_prompt(model, 2)
    with torch.no_grad():
        expected = model(**prompt).logits
        with running(install(model), dense(NUM_LAYERS, 0)):
            assert torch.equal(model(**prompt).logits, expected)
    with pytest.raises(ValueError, match="sliding-window"), running(model, schedule("tttttt", 16)):
        pass


def test_crop_stops_at_what_decided_the_cache():
    model, prompt = model_of(), make_prompt(model_of(), 1)
    n, num_trailing = prompt["input_ids"].shape[1], 9
    with torch.no_grad():
        with running(model, schedule("tttttt", 16)):
            cache = cache_of(model(**prompt))
        cache.crop(-num_trailing)
        assert cache.get_seq_length() == n - num_trailing
        with pytest.raises(ValueError, match="cannot crop 1 of"):
            cache.crop(-1)
        with running(model, schedules("ssssss", visual_counts(prompt), keep={2: 0.5})):
            cache = cache_of(model(**prompt))
    with pytest.raises(ValueError, match=f"first {n}"):
        cache.crop(-1)


def test_a_reset_cache_starts_over():
    model, prompt = model_of(), make_prompt(model_of(), 2)
    with torch.no_grad():
        with running(model, schedule("tctstt", 16)):
            cache = cache_of(model(**prompt))
        assert isinstance(cache, ElasticCache) and cache.cross_lengths[1] == 16
        cache.reset()
        assert cache.get_seq_length() == 0 and not any(cache.cross_lengths)
        expected = model(**prompt).logits
        assert torch.equal(model(**prompt, **{CACHE: cache}).logits, expected)


def test_last_kept_needs_a_run():
    model = install(make_model("llava"))
    with pytest.raises(ValueError, match="no prompt has run"):
        _ = model.get_decoder().last_kept
    assert model.get_decoder().last_kept_by_layer == {}


def test_cross_layers_that_do_not_exist():
    with pytest.raises(ValueError, match=r"\[6\] do not exist: the decoder has layers 0 to 5"):
        install(make_model("llava"), cross_layers=[0, 6])


@pytest.mark.parametrize("batch", [1, 2])
def test_a_bare_decoder_runs_with_a_visual_mask(batch):
    model = model_of()
    prompt = make_prompt(model, batch)
    plan, seen = schedule("tcstts", 16, {3: 0.5}), {}
    hook = model.get_decoder().register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        with running(model, plan):
            expected = model(**prompt, use_cache=False).logits
        hook.remove()
        visual = prompt["input_ids"] == model.config.image_token_id
        inputs = dict(inputs_embeds=seen["inputs_embeds"], attention_mask=prompt["attention_mask"], use_cache=False)
        with running(model, plan, visual=visual):
            found = model.lm_head(model.get_decoder()(**inputs).last_hidden_state)
        assert torch.equal(found, expected)
        with running(model, plan, visual=visual[:, 1:]), pytest.raises(ValueError, match="prompt's shape"):
            model.get_decoder()(**inputs)
