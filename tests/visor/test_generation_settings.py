"""What could change an answer is what a run asked for, and what cannot be answered is said of the one sample alone."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny_checkpoint import NUM_LAYERS, NUM_VISUAL, make_image, make_llava, make_processor

from budgets.registry import METHODS
from budgets.schedule import dense
from visor.inference import LoadedModel
from visor.inference.chat import context_length
from visor.inference.generation import check_settings
from visor.vision.encode import taps_of

QUESTIONS = ("what is it?", "how many dots are there in the second row?", "hi")


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel(make_llava(), make_processor())


def ask(loaded, questions=QUESTIONS, method=None, max_new_tokens=6):
    prepared = [loaded.prepare(make_image(seed), question) for seed, question in enumerate(questions)]
    plan = [
        dense(NUM_LAYERS, NUM_VISUAL) if method is None else method.schedule(loaded.geometry, NUM_VISUAL)
        for _ in questions
    ]
    return loaded.generate(prepared, loaded.encode(prepared, taps_of(plan)), plan, max_new_tokens)


CHANGES = {
    "no_repeat_ngram_size": dict(no_repeat_ngram_size=1),
    "suppress_tokens": dict(suppress_tokens=list(range(20, 90))),
    "bad_words_ids": dict(bad_words_ids=[[i] for i in range(20, 90)]),
    "exponential_decay_length_penalty": dict(exponential_decay_length_penalty=(1, 50.0)),
    "repetition_penalty": dict(repetition_penalty=5.0),
    "num_beams": dict(num_beams=3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_checkpoints_own_settings_change_no_answer_unless_asked_for(loaded, name):
    expected = ask(loaded)
    model = copy.deepcopy(loaded.model)
    model.generation_config.update(**CHANGES[name])
    other = LoadedModel(model, loaded.processor)
    assert other.own_generation == CHANGES[name] and loaded.own_generation == {}
    before = model.generation_config.to_dict()
    assert ask(other) == expected
    assert model.generation_config.to_dict() == before, "nothing stays on the model"
    other.generation = CHANGES[name]
    asked = ask(other)
    assert [a.error for a in asked] == [None] * 3
    if name not in ("num_beams", "exponential_decay_length_penalty"):  # these may agree with greedy by chance
        assert asked != expected


def test_beams_say_what_was_kept_and_how_sure_the_first_token_is(loaded):
    other, fastv = LoadedModel(loaded.model, loaded.processor), METHODS.get("fastv")(layer=2, drop=0.6)
    other.generation = {"num_beams": 2}
    for one, greedy in zip(ask(other, method=fastv), ask(loaded, method=fastv), strict=True):
        assert one.kept == greedy.kept and one.confidence == pytest.approx(greedy.confidence, abs=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"no_repeat_ngram": 1}, "unknown generation setting 'no_repeat_ngram'.*no_repeat_ngram_size"),
        ({"max_new_tokens": 5}, "a task says how long"),
        ({"eos_token_id": 5}, "token ids are the checkpoint's"),
        ({"do_sample": True}, "answers are deterministic"),
        ({"prefill_chunk_size": 8}, "a prompt in one piece"),
        ({"num_beams": "many"}, "num_beams must be a positive integer, got 'many'"),
        ({"top_p": 0.5}, "top_p"),
    ],
)
def test_settings_that_cannot_be_asked_for(settings, message):
    with pytest.raises(ValueError, match=message):
        check_settings(settings)


def test_a_system_turn_stands_in_the_prompt_or_is_refused(tmp_path):
    make_llava().save_pretrained(tmp_path)
    processor = make_processor()
    processor.save_pretrained(tmp_path)
    loaded = LoadedModel.load(tmp_path, system="be short")
    ids = loaded.prepare(make_image(0), "hi").input_ids
    assert processor.tokenizer.decode(ids).startswith("be short<image>")
    processor.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content[-1].text }}{% endfor %}"
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="leaves the system text 'be short' out"):
        LoadedModel.load(tmp_path, system="be short")


# --- lengths and numbers ---


def test_a_prompt_longer_than_the_context_names_both_lengths(loaded):
    question = "x" * (512 - NUM_VISUAL)
    with pytest.raises(ValueError, match="context: 513 tokens enter it .477 of text, 36 visual.*positions for 512"):
        ask(loaded, (question,))
    (answer,) = ask(loaded, (question,), METHODS.get("visionzip")(keep=14))  # fewer visual tokens: it fits
    assert answer.error is None


@pytest.mark.parametrize(
    "rope, expected",
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "dynamic", "factor": 2.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 256, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0}, 512),
    ],
)  # fmt: skip
def test_rope_scaling_stretches_the_context(rope, expected):
    config = transformers.LlamaConfig(max_position_embeddings=512, rope_parameters={"rope_theta": 1e4, **rope})
    assert context_length(config) == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_fail_one_sample_and_not_its_batch(loaded, value):
    expected = ask(loaded)

    def spoil(module, args, output):
        output = output.clone()
        output[1, -1, 7] = value
        return output

    handle = loaded.model.lm_head.register_forward_hook(spoil)
    try:
        first, spoiled, last = ask(loaded)
    finally:
        handle.remove()
    assert (first, last) == (expected[0], expected[2])
    assert "logits of answer token 0 are NaN or infinite" in spoiled.error
    assert (spoiled.text, spoiled.token_ids, spoiled.kept, spoiled.confidence) == ("", (), None, None)


def test_an_image_that_is_no_number_fails_one_sample(loaded):
    prepared = [loaded.prepare(make_image(seed), question) for seed, question in enumerate(QUESTIONS)]
    expected, plan = ask(loaded), [dense(NUM_LAYERS, NUM_VISUAL)] * 3
    rows = loaded.encode(prepared, ())
    features = rows[2]
    rows[2] = copy.deepcopy(features)
    for value in vars(rows[2]).values():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            value.fill_(float("nan"))
    answers = loaded.generate(prepared, rows, plan, 6)
    assert answers[:2] == expected[:2] and "NaN or infinite" in answers[2].error
