"""The analyses against their definitions, on tiny random models of the real classes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import ALL_FAMILIES as FAMILIES
from tiny_models import make_model, make_prompt, single

from budgets.schedule import LayerMode
from visor.analysis.attention import attention_mass
from visor.analysis.cka import LayerSimilarity, cka, gram, hsic, similarity_to_first
from visor.analysis.layer_drop import without_image_in
from visor.analysis.observe import visual_places
from visor.engine import decoder
from visor.inference import LoadedModel
from visor.vision.prepared import PreparedSample


def sample_of(family, attention="eager"):
    """(model, its forward arguments, LoadedModel, prepared, vision) of one sample."""
    model = make_model(family, attention)
    prompt = single(make_prompt(model, 1), 0)
    loaded = LoadedModel(model, SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0)))
    pixels = {name: value for name, value in prompt.items() if name not in ("input_ids", "attention_mask")}
    ids = prompt["input_ids"][0].tolist()
    num_visual = int(torch.isin(prompt["input_ids"], torch.tensor(loaded.adapter.image_token_ids)).sum())
    prepared = PreparedSample(tuple(ids), len(ids) - num_visual, num_visual, pixels, "key")
    return model, prompt, loaded, prepared, loaded.encode([prepared])[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_mass_is_that_of_eager_attention(family):
    model, prompt, loaded, prepared, vision = sample_of(family)
    with torch.no_grad():
        attentions = model(**prompt, output_attentions=True).attentions
    places = visual_places(loaded, prepared)
    expected = torch.stack([each[0, :, int(places[-1]) + 1 :][..., places].sum(-1).mean(0) for each in attentions])
    mass = attention_mass(loaded, prepared, vision)
    assert mass.text == pytest.approx(expected.mean(1).tolist(), abs=1e-4)
    assert mass.last == pytest.approx(expected[:, -1].tolist(), abs=1e-4)
    assert max(mass.text) - min(mass.text) > 0.01, "the test must be able to fail"


@pytest.mark.parametrize("family", FAMILIES)
def test_looking_changes_nothing_and_leaves_nothing(family):
    model, prompt, loaded, prepared, vision = sample_of(family, "sdpa")
    with torch.no_grad():
        before = model(**prompt).logits
    attention_mass(loaded, prepared, vision)
    similarity_to_first(loaded, prepared, vision)
    with torch.no_grad():
        assert torch.equal(model(**prompt).logits, before)
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in loaded.adapter.decoder.layers)


# With DeepStack a layer's output is looked at after a level of features was added; transformers records it before.
@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith("qwen3_vl")])
def test_cka_is_that_of_the_layers_hidden_states(family):
    model, prompt, loaded, prepared, vision = sample_of(family)
    with torch.no_grad():
        hidden = model(**prompt, output_hidden_states=True).hidden_states  # the last one is normed
    places = visual_places(loaded, prepared)
    kernels = [gram(each[0, places]) for each in hidden[1:-1]]
    expected = [hsic(kernels[0], k) / np.sqrt(hsic(kernels[0], kernels[0]) * hsic(k, k)) for k in kernels]
    measured = cka([similarity_to_first(loaded, prepared, vision)])
    assert len(measured) == len(hidden) - 1 and measured[0] == pytest.approx(1)
    assert measured[:-1] == pytest.approx(expected, abs=1e-3)


def test_cka_is_one_for_equal_geometry_and_nothing_for_unrelated_tokens():
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(40, 64, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator))
    same, other = gram(3 * x_ND @ rotation + 5), gram(torch.randn(40, 64, generator=generator))
    mine = gram(x_ND)
    ratio = lambda k, m: hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    assert ratio(mine, same) == pytest.approx(1, abs=1e-4)
    assert abs(ratio(mine, other)) < 0.2, "the plain form gives 0.6 here: fewer tokens than features"


def test_hsic_is_the_published_formula():
    generator = torch.Generator().manual_seed(3)
    k, m = (gram(torch.randn(7, 5, generator=generator)).double() for _ in range(2))
    n, ones = 7, torch.ones(7, dtype=torch.double)
    expected = (k @ m).trace() + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    expected = (expected - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))
    assert hsic(k, m) == pytest.approx(float(expected))
    with pytest.raises(ValueError, match="at least 4 visual tokens, got 3"):
        hsic(k[:3, :3], m[:3, :3])


def test_cka_weighs_images():
    images = [LayerSimilarity((1.0, 0.2), (1.0, 1.0), 1.0), LayerSimilarity((1.0, 0.8), (1.0, 1.0), 1.0)]
    assert cka(images).tolist() == pytest.approx([1, 0.5])
    assert cka(images, np.array([0, 2])).tolist() == pytest.approx([1, 0.8])
    with pytest.raises(ValueError, match="at least one image"):
        cka([])


def test_a_dropped_layer_never_sees_the_image():
    model, prompt, loaded, prepared, _ = sample_of("llava", "sdpa")
    schedules = [without_image_in(layer, 6, prepared.num_visual) for layer in range(6)]
    assert [schedule.layers_in(LayerMode.TEXT) for schedule in schedules] == [(layer,) for layer in range(6)]
    with torch.no_grad():
        dense = model(**prompt).logits[0, -1]
        with decoder.running(model, schedules[2]):
            dropped = model(**prompt).logits[0, -1]
    assert not torch.allclose(dense, dropped)
    with pytest.raises(ValueError, match="layer 6 does not exist; the decoder has layers 0 to 5"):
        without_image_in(6, 6, 4)


def test_a_sample_without_image_is_refused():
    _, _, loaded, prepared, vision = sample_of("llava")
    blind = PreparedSample((5, 6, 7), 3, 0, {}, None)
    with pytest.raises(ValueError, match="has no image"):
        similarity_to_first(loaded, blind, vision)
