"""A loaded model: text in, text out under any mix of schedules, the same alone and in a batch, and clear refusals."""

from __future__ import annotations

import json
import shutil

import pytest
import safetensors.torch
import torch
from PIL import Image
from tiny_checkpoint import GRID, NUM_LAYERS, NUM_VISUAL, make_image, make_llava, make_processor
from torch.utils.flop_counter import FlopCounterMode

from budgets.registry import METHODS
from budgets.schedule import LayerOp, Reduction, Schedule, dense
from visor.engine.decoder import install
from visor.inference import LoadedModel, checkpoint
from visor.inference.generation import stop_ids, truncate_at_stop
from visor.vision.encode import taps_of

QUESTIONS = ("what is it?", "how many dots are there in the second row?", "hi")
METHOD_SETTINGS = {
    "dense": METHODS.get("dense")(),
    "fastv": METHODS.get("fastv")(layer=2, drop=0.6),
    "pyramiddrop": METHODS.get("pyramiddrop")(stages="0.6,0.3"),
    "visionzip": METHODS.get("visionzip")(keep=14),
    "pooling": METHODS.get("pooling")(side=3),
    "downsample": METHODS.get("downsample")(side=3),
    "random": METHODS.get("random")(keep=14),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_llava().save_pretrained(path)
    make_processor().save_pretrained(path)
    (path / "README.md").write_text("# a card\n")
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return LoadedModel.load(folder)


@pytest.fixture(scope="module")
def prepared(loaded):
    return [loaded.prepare(make_image(seed), question) for seed, question in enumerate(QUESTIONS)]


def encode(loaded, prepared, schedules):
    vision = [None] * len(prepared)
    for scale in {schedule.image_scale for schedule in schedules}:
        places = [i for i, schedule in enumerate(schedules) if schedule.image_scale == scale]
        rows = loaded.encode([prepared[i] for i in places], taps_of(schedules), scale)
        for i, row in zip(places, rows, strict=True):
            vision[i] = row
    return vision


def answer(loaded, prepared, schedules, num_tokens=5):
    return loaded.generate(prepared, encode(loaded, prepared, schedules), schedules, num_tokens)


def schedules_of(loaded, prepared, method):
    return [method.schedule(loaded.geometry, sample.num_visual) for sample in prepared]


# --- text in, text out ----------------------------------------------------------------------------------------------


def test_a_prompt_is_the_question_and_one_block_of_image_tokens(loaded, prepared):
    sample = prepared[0]
    ids = list(sample.input_ids)
    assert (sample.num_visual, sample.num_text) == (NUM_VISUAL, len(QUESTIONS[0]) + 1)
    assert ids[:NUM_VISUAL] == [loaded.adapter.image_token_ids[0]] * NUM_VISUAL
    assert loaded.processor.tokenizer.decode(ids[NUM_VISUAL:], skip_special_tokens=True) == QUESTIONS[0]
    again = loaded.prepare(make_image(0), "another question")
    assert again.image_key == sample.image_key != prepared[1].image_key


def test_dense_is_hugging_face_to_the_token(loaded, prepared):
    """An unmodified copy of the model, fed by the processor as its documentation says."""
    model, processor = make_llava(), make_processor()
    for seed, (question, generation) in enumerate(
        zip(QUESTIONS, answer(loaded, prepared, schedules_of(loaded, prepared, METHOD_SETTINGS["dense"])), strict=True)
    ):
        content = [{"type": "image", "image": make_image(seed)}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert generation.text == processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert generation.kept == [True] * NUM_VISUAL


def test_an_answer_ends_at_the_stop_token(loaded):
    stop = stop_ids(loaded.model)
    assert stop == {2}
    assert truncate_at_stop([20, 21, 2, 0, 0], stop) == [20, 21]
    assert truncate_at_stop([20, 21], stop) == [20, 21]


# --- mixes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHOD_SETTINGS)
def test_a_batch_answers_as_its_samples_do(loaded, prepared, name):
    schedules = schedules_of(loaded, prepared, METHOD_SETTINGS[name])
    together = answer(loaded, prepared, schedules)
    apart = [answer(loaded, [p], [s])[0] for p, s in zip(prepared, schedules, strict=True)]
    assert together == apart
    merges = name in ("pooling", "downsample")
    for generation, schedule in zip(together, schedules, strict=True):
        assert generation.kept is None if merges else sum(generation.kept) == schedule.visual_tokens[-1]


@pytest.mark.parametrize("name", ["fastv", "visionzip", "pooling", "random"])
def test_keeping_everything_answers_as_dense(loaded, prepared, name):
    """Through the reducing path itself: the schedule of a method that keeps everything would be the dense one."""
    in_decoder = name == "fastv"
    everything = Reduction(name, NUM_VISUAL)
    layers = [LayerOp()] * NUM_LAYERS
    if in_decoder:
        layers[2] = LayerOp(reduce=everything)
    schedule = Schedule(tuple(layers), NUM_VISUAL, encoder=None if in_decoder else everything)
    full = answer(loaded, prepared, [dense(NUM_LAYERS, NUM_VISUAL)] * 3)
    assert [g.text for g in answer(loaded, prepared, [schedule] * 3)] == [g.text for g in full]


def test_one_batch_may_mix_methods_counts_and_text_only(loaded, prepared):
    samples = [*prepared, prepared[0], prepared[1], loaded.prepare(None, "no image")]
    keep = lambda n: METHODS.get("random")(keep=n).schedule(loaded.geometry, NUM_VISUAL)
    others = [METHOD_SETTINGS[n].schedule(loaded.geometry, NUM_VISUAL) for n in ("fastv", "downsample", "visionzip")]
    schedules = [keep(5), others[0], keep(20), others[1], others[2], dense(NUM_LAYERS, 0)]
    together = answer(loaded, samples, schedules)
    assert together == [answer(loaded, [p], [s])[0] for p, s in zip(samples, schedules, strict=True)]
    assert [g.kept and sum(g.kept) for g in together] == [5, 14, 20, None, 14, None]


def test_no_method_leaves_a_trace(loaded, prepared):
    """A, B, A gives A's answers twice, for all pairs that a sweep may run."""
    first = {n: answer(loaded, prepared, schedules_of(loaded, prepared, m)) for n, m in METHOD_SETTINGS.items()}
    for name in reversed(METHOD_SETTINGS):
        assert answer(loaded, prepared, schedules_of(loaded, prepared, METHOD_SETTINGS[name])) == first[name]
    assert len({tuple(g.token_ids for g in answers) for answers in first.values()}) == len(first)


def test_the_tower_runs_once_an_image(loaded, prepared):
    seen = []
    handle = loaded.adapter.tower.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    vision = loaded.encode([prepared[0], prepared[1], prepared[0]], {"salience", "keys"})
    schedules = schedules_of(loaded, prepared[:2], METHOD_SETTINGS["fastv"])
    loaded.generate(prepared[:2], vision[:2], schedules, 2)
    handle.remove()
    assert seen == [2]


def test_prefill_and_decode_are_generate_in_pieces(loaded, prepared):
    model = LoadedModel(make_llava(), loaded.processor)
    model.model.generation_config.eos_token_id = None  # so that both go on to the end
    schedules = [METHOD_SETTINGS[n].schedule(model.geometry, NUM_VISUAL) for n in ("fastv", "visionzip", "fastv")]
    vision = encode(model, prepared, schedules)
    states = model.prefill(prepared, vision, schedules)
    ids = torch.cat([model.decode(states, 2), model.decode(states, 2)], dim=1)
    expected = model.generate(prepared, vision, schedules, 5)
    assert ids.tolist() == [list(generation.token_ids[1:]) for generation in expected]


# --- what in-decoder scores see -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layer", "scored"), [("fastv", 2, 1), ("pyramiddrop", 2, 2)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_kept_tokens_are_those_of_eager_attention(loaded, prepared, name, layer, scored, attention):
    model = LoadedModel(make_llava(attention), loaded.processor)
    options = {"layer": layer} if name == "fastv" else {"stages": "0.5,0.5"}
    method = METHODS.get(name)(**options)
    eager = make_llava("eager")
    for sample, generation in zip(
        prepared, answer(model, prepared, schedules_of(model, prepared, method), 1), strict=True
    ):
        with torch.no_grad():
            rows = eager(
                input_ids=torch.tensor([sample.input_ids]), **sample.pixel_inputs, output_attentions=True
            ).attentions[scored]
        scores = rows[0].mean(0)[-1, :NUM_VISUAL]
        best = scores.topk(NUM_VISUAL // 2).indices.sort().values
        assert [index for index, kept in enumerate(generation.kept) if kept] == best.tolist()


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop"])
def test_in_decoder_scores_execute_the_flops_that_they_are_priced_at(loaded, prepared, name, monkeypatch):
    method, counted = METHOD_SETTINGS[name], []
    score = type(method).score_tokens

    def counting(self, context):
        with FlopCounterMode(display=False) as counter:
            scores = score(self, context)
        counted.append(counter.get_total_flops())
        return scores

    monkeypatch.setattr(type(method), "score_tokens", counting)
    schedule = method.schedule(loaded.geometry, NUM_VISUAL)
    answer(loaded, prepared[:1], [schedule], 1)
    assert sum(counted) == method.scoring_flops(loaded.geometry, schedule, prepared[0].num_text)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_visor_needs_cross_blocks(loaded, prepared):
    schedules = schedules_of(loaded, prepared[:1], METHODS.get("visor")())
    with pytest.raises(ValueError, match=r"no trained cross-attention blocks at layers \[0, 3\]"):
        answer(loaded, prepared[:1], schedules)
    model = LoadedModel(install(make_llava(), cross_layers=(0, 3)), loaded.processor)
    assert answer(model, prepared[:1], schedules)[0].kept == [True] * NUM_VISUAL


def test_schedules_must_fit_sample_features_and_model(loaded, prepared):
    vision = loaded.encode(prepared[:1])
    run = lambda schedule: loaded.generate(prepared[:1], vision, [schedule], 1)
    with pytest.raises(ValueError, match="made for 9 visual tokens, the sample has 36"):
        run(dense(NUM_LAYERS, 9))
    with pytest.raises(ValueError, match="the schedule has 3 layers, the decoder 6"):
        run(dense(3, NUM_VISUAL))
    with pytest.raises(ValueError, match="encoded at image_scale=1.0, the schedule needs 0.5"):
        run(METHOD_SETTINGS["downsample"].schedule(loaded.geometry, NUM_VISUAL))
    with pytest.raises(ValueError, match="without the tap 'salience'"):
        run(METHOD_SETTINGS["visionzip"].schedule(loaded.geometry, NUM_VISUAL))
    with pytest.raises(ValueError, match="exactly the samples that have an image"):
        loaded.generate(prepared[:1], [None], [dense(NUM_LAYERS, NUM_VISUAL)], 1)


def test_bad_samples_are_refused(loaded, tmp_path):
    with pytest.raises(ValueError, match="the question is empty"):
        loaded.prepare(make_image(0), "  ")
    with pytest.raises(ValueError, match="holds '<image>'"):
        loaded.prepare(make_image(0), "is <image> a word?")
    path = tmp_path / "cut.png"
    make_image(0).save(path)
    path.write_bytes(path.read_bytes()[:900])
    with Image.open(path) as image, pytest.raises(ValueError, match="the image cannot be read"):
        loaded.prepare(image, "what is it?")


def test_transparent_and_grey_images_are_read(loaded):
    for mode in ("RGBA", "L", "P", "1"):
        assert loaded.prepare(make_image(0).convert(mode), "what is it?").num_visual == NUM_VISUAL


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_what_is_known_of_a_checkpoint(loaded, folder):
    assert loaded.card == "# a card\n" and loaded.path == folder.resolve()
    assert (loaded.device, loaded.dtype, loaded.geometry.num_layers) == ("cpu", "float32", NUM_LAYERS)
    assert loaded.geometry.vision.visual_tokens() == GRID * GRID
    assert LoadedModel.load(folder, dtype="bfloat16").dtype == "bfloat16"


def test_the_hash_is_of_what_can_change_an_answer(loaded, folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("another card")
    assert checkpoint.content_sha256(copy) == loaded.checkpoint_sha256
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "note": 1}))
    assert checkpoint.content_sha256(copy) != loaded.checkpoint_sha256


def test_a_bare_name_is_an_embedded_checkpoint(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHECKPOINTS", folder.parent)
    assert checkpoint.resolve("tiny") == folder.resolve()
    with pytest.raises(ValueError, match="unknown model 'tinny'; .* nearest first: tiny"):
        LoadedModel.load("tinny")
    with pytest.raises(ValueError, match="unknown model './tinny/there'"):
        LoadedModel.load("./tinny/there")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:99"}, "unknown device 'cuda:99'; the devices that exist here, nearest first: .*cpu"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"dtype": "float8"}, "unknown dtype 'float8'; the dtypes that exist, nearest first: float16, float32"),
        ({"attention": "flash"}, "unknown attention 'flash'; the attentions that exist, nearest first: flash_"),
    ],
)
def test_unknown_names_list_what_exists(folder, options, message):
    with pytest.raises(ValueError, match=message):
        LoadedModel.load(folder, **options)


def damaged(folder, tmp_path, change):
    copy = tmp_path / "damaged"
    shutil.copytree(folder, copy)
    change(copy / "model.safetensors")
    return copy


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
    path.write_bytes(b"\xff" * 100)


def poison(path, value=float("nan")):
    weights = safetensors.torch.load_file(path)
    next(iter(weights.values())).view(-1)[0] = value
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


def forget(path):
    weights = safetensors.torch.load_file(path)
    weights.pop(next(name for name in weights if name.endswith("q_proj.weight")))
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, r"damaged/model.safetensors is truncated or corrupt"),
        (garble, r"damaged/model.safetensors is truncated or corrupt"),
        (poison, r"damaged/model.safetensors holds NaN or infinity, first in '"),
        (lambda path: poison(path, float("inf")), "holds NaN or infinity"),
        (forget, r"damaged lacks 1 weights of its model, such as .*q_proj"),
        (lambda path: path.unlink(), "damaged has no .safetensors file"),
        (lambda path: (path.parent / "config.json").unlink(), "is no checkpoint: it has no config.json"),
    ],
)
def test_damaged_checkpoints_name_the_file(folder, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        LoadedModel.load(damaged(folder, tmp_path, change))


def test_a_missing_shard_is_named(folder, tmp_path):
    copy = damaged(folder, tmp_path, lambda path: path.unlink())
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1-of-1.safetensors"}}))
    with pytest.raises(ValueError, match="lacks weight files that its index names: model-1-of-1.safetensors"):
        LoadedModel.load(copy)
