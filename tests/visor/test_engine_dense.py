"""The dense schedule is the Hugging Face model, bit for bit; and `install` leaves no trace outside `running`."""

import copy
import io
import pickle

import pytest
import torch
from tiny_models import FAMILIES, NUM_LAYERS, generate, make_model, make_prompt

from budgets.schedule import dense
from visor.engine.cache import ElasticCache
from visor.engine.compat import CACHE, cache_of
from visor.engine.decoder import ElasticDecoder, install, running

pytestmark = pytest.mark.compat

SCHEDULE = dense(NUM_LAYERS, 0)


def assert_same_outputs(plain, elastic, prompt):
    with torch.no_grad():
        expected = plain(**prompt, output_hidden_states=True)
        found = elastic(**prompt, output_hidden_states=True)
    assert torch.equal(expected.logits, found.logits)
    assert len(expected.hidden_states) == len(found.hidden_states) == NUM_LAYERS + 1
    assert all(map(torch.equal, expected.hidden_states, found.hidden_states))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_schedule_equals_hugging_face(family, attention, batch):
    plain = make_model(family, attention)
    elastic, prompt = install(copy.deepcopy(plain)), make_prompt(plain, batch)
    with running(elastic, SCHEDULE):
        assert_same_outputs(plain, elastic, prompt)
        found, found_beams = generate(elastic, prompt), generate(elastic, prompt, 4, num_beams=3)
    expected, expected_beams = generate(plain, prompt), generate(plain, prompt, 4, num_beams=3)
    assert isinstance(cache_of(found), ElasticCache)
    assert torch.equal(expected.sequences, found.sequences)
    assert all(map(torch.equal, expected.logits, found.logits))
    assert torch.equal(expected_beams.sequences, found_beams.sequences)


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_without_cache_and_in_a_loop(family):
    plain = make_model(family)
    elastic, prompt = install(copy.deepcopy(plain)), make_prompt(plain, 2)
    with torch.no_grad(), running(elastic, SCHEDULE):
        assert torch.equal(plain(**prompt, use_cache=False).logits, elastic(**prompt, use_cache=False).logits)
        caches = [cache_of(model(**prompt)) for model in (plain, elastic)]
        for _ in range(3):  # a hand-written loop: no position ids, a mask that is all ones in places
            step = dict(input_ids=torch.full((2, 2), 7))
            step["attention_mask"] = torch.cat([prompt["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)
            prompt["attention_mask"] = step["attention_mask"]
            logits = [m(**step, **{CACHE: c}).logits for m, c in zip((plain, elastic), caches, strict=True)]
            assert torch.equal(*logits)


def test_outside_running_the_forward_is_the_familys_own():
    plain = make_model("llava")
    elastic, prompt = install(copy.deepcopy(plain)), make_prompt(plain, 2)
    assert_same_outputs(plain, elastic, prompt)
    assert not isinstance(cache_of(generate(elastic, prompt)), ElasticCache)


def test_install_twice_adds_nothing():
    model = install(make_model("llava"))
    cls, num_hooks = type(model.get_decoder()), len(model.base_model._forward_pre_hooks)
    install(model)
    assert type(model.get_decoder()) is cls and len(model.base_model._forward_pre_hooks) == num_hooks == 1


def test_install_keeps_parameter_names():
    plain = make_model("llava")
    assert list(install(copy.deepcopy(plain)).state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch.save"])
def test_copies_survive_install(duplicate):
    model = install(make_model("llava_onevision"), cross_layers=[1])
    with running(model, SCHEDULE):  # copied in the middle of a run, a copy starts outside of it
        if duplicate == "deepcopy":
            other = copy.deepcopy(model)
        elif duplicate == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            other = torch.load(buffer, weights_only=False)
    assert isinstance(other.get_decoder(), ElasticDecoder) and other.get_decoder()._run is None
    prompt = make_prompt(model, 2)  # not before: transformers' own hooks on hidden states do not pickle
    with running(other, SCHEDULE):
        assert_same_outputs(model, other, prompt)
    assert model.get_decoder()._record is None, "running the copy must not touch the original"


def test_save_and_load(tmp_path):
    model = install(make_model("llava"))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    prompt = make_prompt(model, 1)
    assert not isinstance(loaded.get_decoder(), ElasticDecoder)
    assert_same_outputs(loaded, model, prompt)


def test_another_family_is_refused():
    import transformers

    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=11, n_positions=8)
    with pytest.raises(ValueError, match="'gpt2', which has no adapter.*llava"):
        install(transformers.GPT2LMHeadModel(config))
