"""The methods' published figures, reproduced through the public functions and the command line."""

import json

import pytest

from budgets.conventions import layer_macs, macs_of_lengths, price_by_formula
from budgets.cost import main
from budgets.costs import price
from budgets.presets import preset
from budgets.registry import METHODS
from budgets.schedule import dense


def cost(capsys, *arguments: str) -> dict:
    """The JSON document of `python -m budgets.cost`."""
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def lengths(visual: str, text: str) -> list[str]:
    return ["--visual-tokens", visual, "--text-tokens", text]


@pytest.mark.parametrize(("model", "published"), [("llava-1.5-7b", 99.3e9), ("llava-1.5-13b", 154.6e9)])
def test_fastv_dense_layer(capsys, model, published):
    document = cost(capsys, "--model", model, "--method", "dense", "--convention", "f2", *lengths("576", "36"))
    assert document["unit"] == "MACs"
    assert document["per_layer"][0] == pytest.approx(published, rel=1e-3)
    assert document["decoder_prefill"] == pytest.approx(len(document["per_layer"]) * published, rel=1e-3)


@pytest.mark.parametrize(("drop", "published"), [(0.9, 29.7e9), (0.75, 50.2e9), (0.5, 84.6e9)])
def test_fastv_mean_per_layer(capsys, drop, published):
    settings = ["--set", "layer=2", "--set", f"drop={drop}"]
    document = cost(
        capsys, "--model", "llava-1.5-13b", "--method", "fastv", *settings, "--convention", "f2", *lengths("576", "36")
    )
    assert document["decoder_prefill"] / 40 == pytest.approx(published, rel=2e-3)


def test_llava_without_text(capsys):
    document = cost(capsys, "--model", "llava-1.5-7b", "--convention", "f3", *lengths("576", "0"))
    assert document["decoder_prefill"] == pytest.approx(3.82e12, rel=1e-3)


def test_pyramiddrop(capsys):
    document = cost(
        capsys, "--model", "llava-1.5-7b", "--method", "pyramiddrop", "--convention", "f3", *lengths("576", "0")
    )
    assert document["decoder_prefill"] == pytest.approx(1.78e12, rel=2e-3)
    assert document["visual_tokens_per_layer"] == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert document["visual_tokens_mean"] == 270.0
    table = macs_of_lengths(preset("llava-1.5-7b"), document["visual_tokens_per_layer"], "f3")
    assert table == document["decoder_prefill"]


def test_divprune_mean_over_its_text_lengths():
    geometry = preset("llava-1.5-7b")
    text_lengths = (15, 15, 23, 83, 25, 113, 15, 39, 21, 91, 57)
    figures = [price_by_formula(geometry, dense(32, 576), text, "f2").decoder_prefill for text in text_lengths]
    assert sum(figures) / len(figures) == pytest.approx(3.228e12, rel=1e-4)


@pytest.mark.parametrize(("visual", "computed"), [("729", 0.2837e12), ("7290", 4.8942e12)])
def test_onevision_half_billion(capsys, visual, computed):
    document = cost(capsys, "--model", "llava-onevision-0.5b", "--convention", "gqa", *lengths(visual, "0"))
    assert document["decoder_prefill"] == pytest.approx(computed, rel=1e-3)


def test_kv_cache(capsys):
    document = cost(capsys, "--model", "llava-1.5-7b", *lengths("576", "0"))
    assert document["kv_bytes"] == 288 * 2**20
    document = cost(capsys, "--model", "llava-1.5-7b", *lengths("576", "36"))
    assert document["kv_bytes"] == 306 * 2**20


def test_fastv_kv_cache_and_average_tokens(capsys):
    settings = ["--set", "layer=2", "--set", "drop=0.5"]
    document = cost(capsys, "--model", "llava-1.5-7b", "--method", "fastv", *settings, *lengths("576", "36"))
    assert document["kv_bytes"] / 2**20 == pytest.approx(171.0, rel=1e-3)
    assert document["visual_tokens_mean"] == 306.0


def recycled(live: int, keep: int) -> int:
    """Tokens after a SparseVLM v1.5 step: what it keeps, and one merged token a cluster of the recycled ones."""
    num_recycled = int(0.3 * (live - keep)) + 1
    return keep + int(num_recycled / 10) + 1


def test_sparsevlm_average_tokens():
    """At layers 2, 6 and 15 the layer runs on all current tokens and its output is pruned: 300, 200, 110 and merged."""
    live, entering = 576, []
    keep_after = {2: 300, 6: 200, 15: 110}
    for layer in range(32):
        entering.append(live)
        if layer in keep_after:
            live = recycled(live, keep_after[layer])
    assert entering == [576] * 3 + [309] * 4 + [204] * 9 + [113] * 16
    assert sum(entering) / len(entering) == 206.5
    # Its own figure is a token table put into f3.
    assert macs_of_lengths(preset("llava-1.5-7b"), entering, "f3") == sum(
        sum(layer_macs(preset("llava-1.5-7b"), num_tokens, "f3").values()) for num_tokens in entering
    )


def test_gqa_formula_is_f3_for_multi_head_attention():
    assert layer_macs(preset("llava-1.5-7b"), 612, "gqa") == layer_macs(preset("llava-1.5-7b"), 612, "f3")
    assert layer_macs(preset("llava-onevision-0.5b"), 612, "gqa") != layer_macs(
        preset("llava-onevision-0.5b"), 612, "f3"
    )


@pytest.mark.parametrize("method", ["dense", "fastv", "pyramiddrop", "random", "visor"])
@pytest.mark.parametrize("model", ["llava-1.5-7b", "llava-onevision-0.5b", "qwen2.5-vl-3b"])
def test_gqa_formula_is_half_of_our_flops(model, method):
    """Two counts of one thing: MACs by formula, FLOPs by ours less the scoring and the depth-wise convolution."""
    geometry = preset(model)
    schedule = METHODS.get(method)().schedule(geometry, 576)
    ours, formula = price(geometry, schedule, 50), price_by_formula(geometry, schedule, 50, "gqa")
    convolution = (
        2 * 576 * geometry.cross_kernel * geometry.hidden_size * sum(op.mode == "cross" for op in schedule.layers)
    )
    assert 2 * formula.decoder_prefill == ours.decoder_prefill - ours.parts["scoring"] - convolution


def test_engine_measurements():
    """Counted on the meta device: 64 text tokens, decoder with head; tower and projector."""
    for model, visual, decoder, front in [
        ("llava-1.5-7b", 576, 8.504e12, 0.406e12),
        ("llava-onevision-7b", 729, 10.603e12, 0.667e12),
        ("llava-onevision-7b", 7290, 117.7e12, 6.67e12),
    ]:
        geometry = preset(model)
        figure = price(geometry, dense(geometry.num_layers, visual), 64)
        assert figure.decoder_prefill + figure.parts["lm_head"] == pytest.approx(decoder, rel=1e-3)
        assert figure.parts["tower"] + figure.parts["projector"] == pytest.approx(front, rel=2e-3)
