"""A matched setting never costs more than its budget, and no other setting comes nearer."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from budgets.geometry import ModelGeometry, VisionGeometry
from budgets.match import BudgetError, fit, relative_cost
from budgets.presets import preset
from budgets.registry import METHODS

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
    for name in set(METHODS.names()) - {"visor", "visor_tr2", "visor_tr4", "pooling_by", "dart"}:
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
