"""A matched setting never costs more than its budget, and no other setting comes nearer."""

import json

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from budgets.costs import price
from budgets.geometry import ModelGeometry, VisionGeometry
from budgets.match import BudgetError, budget_label, fit, fit_tokens, relative_cost
from budgets.presets import preset
from budgets.registry import METHODS
from budgets.schedule import dense

REDUCERS = ["fastv", "pyramiddrop", "visionzip", "pooling", "downsample", "random", "visor", "sparsevlm",
            "sparsevlm-v2", "dart", "vtw", "hired", "prumerge", "prumerge+", "fastervlm", "vispruner", "divprune",
            "cdpruner"]  # fmt: skip


@st.composite
def geometries(draw) -> ModelGeometry:
    """Small decoders of 6 to 24 layers behind one square tile of up to 12 x 12 tokens."""
    heads, kv_heads = draw(st.sampled_from([(4, 1), (4, 2), (4, 4)]))
    width = draw(st.sampled_from([64, 192, 896]))
    tile = VisionGeometry(
        num_layers=4, hidden_size=48, intermediate_size=96, num_heads=4, patch_size=14,
        image_size=14 * draw(st.integers(2, 12)), projector=((48, width), (width, width)),
        num_prefix_tokens=draw(st.integers(0, 1)),
    )  # fmt: skip
    layers = draw(st.integers(6, 24))
    return ModelGeometry("drawn", layers, width, width * draw(st.integers(1, 5)), heads, kv_heads, 16, 100, tile)


@settings(deadline=None)
@given(geometries(), st.sampled_from(REDUCERS), st.integers(1, 200), st.floats(0.001, 1.0))
def test_nearest_below(geometry, name, num_text, budget):
    method, num_visual = METHODS.get(name)(), geometry.vision.visual_tokens_per_tile
    costs = [
        relative_cost(setting, geometry, num_visual, num_text) for setting in method.settings(geometry, num_visual)
    ]
    within = [cost for cost in costs if cost <= budget]
    if within:
        reached = relative_cost(fit(method, geometry, num_visual, num_text, budget), geometry, num_visual, num_text)
        assert reached <= budget
        assert reached == max(within)
    else:
        with pytest.raises(BudgetError) as error:
            fit(method, geometry, num_visual, num_text, budget)
        assert f"{costs[0]:.4g}" in str(error.value)


@settings(deadline=None)
@given(st.sampled_from(REDUCERS), st.sampled_from(["llava-1.5-7b", "llava-onevision-0.5b"]), st.data())
def test_a_setting_meets_its_own_cost(name, model, data):
    assume(not (name == "downsample" and preset(model).vision.packs_tiles))  # refused there
    geometry, method = preset(model), METHODS.get(name)()
    num_visual = geometry.vision.visual_tokens_per_tile
    choices = method.settings(geometry, num_visual)
    setting = choices[data.draw(st.integers(0, len(choices) - 1))]
    budget = relative_cost(setting, geometry, num_visual, 40)
    if budget <= 1:
        assert relative_cost(fit(method, geometry, num_visual, 40, budget), geometry, num_visual, 40) == budget


@pytest.mark.parametrize("name", ["visionzip+fastv", "visor+divprune", "fastv+visor", "prumerge++vtw"])
def test_two_methods_at_once_never_cost_more_than_the_budget(name):
    geometry = preset("llava-1.5-7b")
    for budget in (0.3, 0.5, 1.0):
        method = fit(METHODS.get(name)(), geometry, 576, 40, budget)
        assert relative_cost(method, geometry, 576, 40) <= budget
    # Keeping everything on the encoder's side leaves the other method, which scores nothing twice.
    if name == "visionzip+fastv":
        assert method.schedule(geometry, 576) == METHODS.get("fastv")().schedule(geometry, 576)


def test_dial_keeps_other_options():
    method = fit(METHODS.get("fastv")(layer=5), preset("llava-1.5-7b"), 576, 36, 0.4)
    assert method.layer == 5
    method = fit(METHODS.get("visionzip")(contextual=0.0, merge="mean"), preset("llava-1.5-7b"), 576, 36, 0.4)
    assert (method.contextual, method.merge) == (0.0, "mean")


def test_full_budget_keeps_everything():
    geometry = preset("llava-1.5-7b")
    for name in set(METHODS.names()) - {"visor", "visor_tr2", "visor_tr4", "pooling_by", "dart", "blind"}:
        assert fit(METHODS.get(name)(), geometry, 576, 36, 1.0).schedule(geometry, 576).is_dense, name


def test_what_can_be_reached_is_said():
    geometry = preset("llava-1.5-7b")
    with pytest.raises(BudgetError, match="Dense cannot meet a budget of 0.5 .* it reaches only 1 of"):
        fit(METHODS.get("dense")(), geometry, 576, 36, 0.5)
    with pytest.raises(BudgetError, match=r"PyramidDrop cannot meet a budget of 0.11 .* it reaches 0\.29\d+ to 1 of"):
        fit(METHODS.get("pyramiddrop")(), geometry, 576, 36, 0.11)


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, 11, float("nan"), float("inf"), True, "half", None])
def test_budgets_outside_0_to_1_are_refused(budget):
    with pytest.raises(ValueError, match=r"number in \(0, 1\]"):
        fit(METHODS.get("fastv")(), preset("llava-1.5-7b"), 576, 36, budget)


def test_nothing_to_reduce():
    with pytest.raises(ValueError, match="at least 1 visual token"):
        fit(METHODS.get("fastv")(), preset("llava-1.5-7b"), 0, 36, 0.5)


# --- a number of tokens, as papers state it -------------------------------------------------------------------------


def mean_tokens(method, geometry, num_visual=576):
    return price(geometry, method.schedule(geometry, num_visual), 40).visual_tokens_mean


@pytest.mark.parametrize("tokens", [192, 128, 64])
@pytest.mark.parametrize("name", REDUCERS)
def test_a_token_budget_is_the_nearest_mean_over_the_layers_from_below(name, tokens):
    geometry, method = preset("llava-1.5-7b"), METHODS.get(name)()
    means = [mean_tokens(setting, geometry) for setting in method.settings(geometry, 576)]
    within = [mean for mean in means if mean <= tokens]
    if not within:  # the first layers of PyramidDrop and VISOR's SELF layers see all
        assert name in ("pyramiddrop", "visor") and min(means) == means[0]
        with pytest.raises(BudgetError, match=f"reaches {means[0]:.4g} to"):
            fit_tokens(method, geometry, 576, 40, tokens)
        return
    assert mean_tokens(fit_tokens(method, geometry, 576, 40, tokens), geometry) == max(within)


def test_token_budgets_are_those_that_papers_state():
    """After the tower the number is the number; FastV's (2, 0.5) has 306 of 576 on average over 32 layers."""
    geometry = preset("llava-1.5-7b")
    for tokens in (192, 128, 64):
        assert fit_tokens(METHODS.get("visionzip")(), geometry, 576, 40, tokens).keep == tokens
    assert fit_tokens(METHODS.get("fastv")(), geometry, 576, 40, 306).drop == pytest.approx(0.5)
    assert fit_tokens(METHODS.get("pyramiddrop")(), geometry, 576, 40, 270).stages.startswith("0.5,0.25,0.125")
    assert fit_tokens(METHODS.get("vtw")(), geometry, 576, 40, 288).layer == 16


def test_a_token_budget_and_a_share_of_flops_cannot_be_mistaken():
    geometry, method = preset("llava-1.5-7b"), METHODS.get("fastv")()
    for tokens in (1, 0.5, 0, -3, float("nan"), float("inf"), True, "192"):
        with pytest.raises(ValueError, match="above 1"):
            fit_tokens(method, geometry, 576, 40, tokens)
    with pytest.raises(ValueError, match="in \\(0, 1]"):
        fit(method, geometry, 576, 40, 192)
    with pytest.raises(BudgetError, match="it reaches 36.94 to 576 visual tokens, mean over the layers"):
        fit_tokens(method, geometry, 576, 40, 20)
    assert fit_tokens(METHODS.get("random")(), geometry, 100, 40, 192).schedule(geometry, 100).is_dense
    assert [budget_label(budget) for budget in (0.25, 1.0, 192.0)] == ["25 %", "100 %", "192 tokens"]


def test_the_command_chooses_by_tokens(capsys):
    from budgets.cost import main

    asked = ["--model", "llava-1.5-7b", "--method", "fastv", "--json"]
    assert main([*asked, "--tokens", "192"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert 190 < document["visual_tokens_mean"] <= 192 and 0 < document["flops_relative_to_dense"] < 0.5
    assert main([*asked, "--tokens", "192", "--budget", "0.5"]) == 2
    assert "give one of them" in capsys.readouterr().err


# --- no visual token ------------------------------------------------------------------------------------------------


def test_blind_costs_what_the_text_costs():
    geometry = preset("llava-1.5-7b")
    method = METHODS.get("blind")()
    cost, text = price(geometry, method.schedule(geometry, 576), 40), price(geometry, dense(32, 0), 40)
    assert cost.decoder_prefill == text.decoder_prefill and cost.visual_tokens == [0] * 32
    assert cost.kv_bytes == text.kv_bytes and cost.parts["scoring"] == 0
    assert method.settings(geometry, 576) == [method]
    with pytest.raises(ValueError, match="sees no visual token"):
        METHODS.get("blind+visionzip")
