"""Methods as arithmetic: what their schedules keep, what their dial offers, what scores cost, what they refuse."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgets import geometry as geometries
from budgets import presets
from budgets.costs import price
from budgets.match import fit
from budgets.registry import METHODS
from budgets.schedule import LayerMode, dense

LLAVA = presets.preset("llava-1.5-7b")
TINY = geometries.ModelGeometry(
    "tiny", 12, 192, 512, 6, 3, 32, 200,
    vision=geometries.VisionGeometry(4, 192, 512, 6, 12, 144, projector=((192, 192), (192, 192))),
)  # fmt: skip
BY_COUNT = ("random", "visionzip")
BY_SIDE = ("pooling", "downsample")


def kept(schedule):
    return schedule.visual_tokens[-1]


def test_the_methods_of_this_house_are_registered():
    names = {"dense", "fastv", "visionzip", "pooling", "downsample", "random", "pyramiddrop", "visor"}
    assert names <= set(METHODS.names())
    for name in names:
        method = METHODS.get(name)()
        assert METHODS.get(name)(**method.options()) == method
        assert method.title


def test_pricing_needs_no_torch():
    code = (
        "import sys; from budgets.registry import METHODS; from budgets import presets; "
        "g = presets.preset('llava-1.5-7b'); "
        "[METHODS.get(n)().scoring_flops(g, METHODS.get(n)().schedule(g, 576), 9) for n in METHODS.names()]; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_fastv_keeps_the_authors_share_at_the_authors_layer():
    schedule = METHODS.get("fastv")(layer=2, drop=0.5).schedule(LLAVA, 576)
    assert schedule.visual_tokens == (576, 576, *[288] * 30)
    assert schedule.positions == "kept"
    assert sum(METHODS.get("fastv")().schedule(LLAVA, 576).visual_tokens) / 32 == 306


def test_pyramiddrop_halves_at_the_quarters():
    schedule = METHODS.get("pyramiddrop")().schedule(LLAVA, 576)
    assert schedule.visual_tokens == tuple([576] * 8 + [288] * 8 + [144] * 8 + [72] * 8)
    assert schedule.positions == "contiguous"
    schedule = METHODS.get("pyramiddrop")(stages="0.5,0.5,0.1").schedule(TINY, 100)
    assert schedule.visual_tokens == tuple([100] * 3 + [50] * 6 + [10] * 3)


def test_visionzip_splits_as_the_authors_do():
    zipped = METHODS.get("visionzip")()
    assert [zipped.num_contextual(keep) for keep in (192, 128, 64)] == [30, 20, 10]
    assert [zipped.num_contextual(keep) for keep in (1, 2, 6)] == [0, 0, 1]


def test_sides_become_square_counts_and_an_image_scale():
    assert METHODS.get("pooling")(side=5).schedule(TINY, 144).encoder.keep == 25
    schedule = METHODS.get("downsample")(side=6).schedule(TINY, 144)
    assert (schedule.encoder.keep, schedule.image_scale) == (36, 0.5)
    cost, full = (price(TINY, s, 20) for s in (schedule, dense(12, 144)))
    assert cost.parts["tower"] < full.parts["tower"] / 3.9  # a smaller image costs the tower less, too


def test_visor_reads_before_it_reworks():
    schedule = METHODS.get("visor")().schedule(LLAVA, 576)
    assert len(schedule.layers_in(LayerMode.SELF)) == len(schedule.layers_in(LayerMode.CROSS)) == 10
    schedule = METHODS.get("visor")(self_layers=2).schedule(TINY, 144)
    assert schedule.layers_in(LayerMode.CROSS) == (0, 3, 6, 9)
    assert schedule.layers_in(LayerMode.SELF) == (4, 10)
    assert schedule.visual_tokens == (144,) * 12
    named = METHODS.get("visor")(self_layers="", cross_layers="2,5").schedule(TINY, 9)
    assert (named.layers_in(LayerMode.SELF), named.layers_in(LayerMode.CROSS)) == ((), (2, 5))


def test_m3_runs_on_the_sides_that_its_model_was_trained_on():
    trained = replace(TINY, trained_sides=(12, 6, 4, 1))
    assert [each.side for each in METHODS.get("m3")().settings(trained, 144)] == [1, 4, 6, 12]
    assert len(METHODS.get("m3")().settings(TINY, 144)) == 12  # to price, any
    with pytest.raises(ValueError, match="M3: .* was trained on grids of the sides 1, 4, 6, 12, not 5"):
        METHODS.get("m3")(side=5).schedule(trained, 144)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", *BY_COUNT, *BY_SIDE])
def test_keeping_everything_is_the_dense_schedule(name):
    assert METHODS.get(name)().settings(TINY, 144)[-1].schedule(TINY, 144) == dense(12, 144)


@given(num_visual=st.integers(1, 200), drop=st.floats(0, 0.999), layer=st.integers(1, 11))
def test_fastv_keeps_at_least_one_and_never_more(num_visual, drop, layer):
    schedule = METHODS.get("fastv")(layer=layer, drop=drop).schedule(TINY, num_visual)
    assert kept(schedule) == max(1, round(num_visual * (1 - drop)))
    assert set(schedule.visual_tokens[:layer]) == {num_visual}


@given(num_visual=st.integers(1, 200), keep=st.integers(1, 300), name=st.sampled_from(BY_COUNT))
def test_counts_are_clipped_to_what_there_is(num_visual, keep, name):
    assert METHODS.get(name)(keep=keep).schedule(TINY, num_visual).decoder_visual == min(keep, num_visual)


@given(side=st.integers(1, 20), wanted=st.integers(1, 30), name=st.sampled_from(BY_SIDE))
def test_sides_are_clipped_to_the_grid(side, wanted, name):
    schedule = METHODS.get(name)(side=wanted).schedule(TINY, side * side)
    assert schedule.decoder_visual == min(side, wanted) ** 2


@settings(max_examples=15, deadline=None)
@given(
    num_visual=st.integers(1, 14).map(lambda side: side * side),
    num_text=st.integers(1, 60),
    name=st.sampled_from(["fastv", "pyramiddrop", *BY_COUNT, *BY_SIDE, "visor"]),
)
def test_the_dial_rises_in_tokens_and_in_price(num_visual, num_text, name):
    schedules = [each.schedule(TINY, num_visual) for each in METHODS.get(name)().settings(TINY, num_visual)]
    counts = [sum(schedule.visual_tokens) for schedule in schedules]
    prices = [price(TINY, schedule, num_text).decoder_prefill for schedule in schedules]
    assert counts == sorted(counts)
    # A step that drops nothing is left out and saves its scoring, which may weigh more than the tokens it lets pass.
    num_steps = [bool(s.encoder) + sum(op.reduce is not None for op in s.layers) for s in schedules]
    for i in range(1, len(schedules)):
        assert prices[i] >= prices[i - 1] or num_steps[i] < num_steps[i - 1]


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", *BY_COUNT, *BY_SIDE])
def test_a_budget_is_met_from_below(name):
    full = price(TINY, dense(12, 144), 20).decoder_prefill
    fitted = fit(METHODS.get(name)(), TINY, 144, 20, 0.5)
    share = price(TINY, fitted.schedule(TINY, 144), 20).decoder_prefill / full
    assert 0.3 < share <= 0.5


def test_scores_cost_what_they_say():
    schedule = METHODS.get("fastv")().schedule(LLAVA, 576)
    assert METHODS.get("fastv")().scoring_flops(LLAVA, schedule, 36) == 2 * 4096 * 4096 + 2 * 4096 * (576 + 36)
    zipped = METHODS.get("visionzip")(keep=64)
    schedule = zipped.schedule(TINY, 144)
    assert zipped.scoring_flops(TINY, schedule, 36) == 2 * 144 * 144 * 192 + 2 * (90 - 10) * 10 * 32
    schedule = zipped.schedule(LLAVA, 576)  # CLIP: one row, over the CLS too; the CLS is a dominant token
    assert zipped.scoring_flops(LLAVA, schedule, 36) == 2 * 577 * 1024 + 2 * (577 - 54 - 10) * 10 * 64
    for name in ("dense", "pooling", "downsample", "random", "visor"):
        method = METHODS.get(name)()
        assert method.scoring_flops(TINY, method.schedule(TINY, 144), 36) == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fastv", {"layer": 0}, "layer must be an integer of at least 1"),
        ("fastv", {"layer": True}, "layer must be an integer"),
        ("fastv", {"drop": 1.0}, r"drop must be a number in \[0, 1\), got 1.0"),
        ("fastv", {"drop": float("nan")}, "drop must be"),
        ("fastv", {"drop": "half"}, "drop must be a number"),
        ("visionzip", {"keep": 0}, "keep must be an integer of at least 1, got 0"),
        ("visionzip", {"merge": "sum"}, "merge must be 'add' or 'mean', got 'sum'"),
        ("visionzip", {"contextual": 1.0}, "contextual must be"),
        ("pooling", {"side": 0}, "side must be an integer"),
        ("downsample", {"side": 2.5}, "side must be an integer"),
        ("random", {"keep": -3}, "keep must be"),
        ("random", {"seed": -1}, "seed must be"),
        ("pyramiddrop", {"stages": "0.25,0.5"}, "do not rise"),
        ("pyramiddrop", {"stages": "a"}, "numbers like '0.5,0.25'"),
        ("pyramiddrop", {"positions": "gone"}, "'contiguous' or 'kept'"),
        ("visor", {"self_layers": -1}, "self_layers must be a number of layers"),
        ("visor", {"self_layers": "3,3"}, "ascending order"),
        ("visor", {"cross_layers": "x"}, "layer numbers like '3,9'"),
        ("visor", {"self_layers": "1,2", "cross_layers": "2"}, "either SELF or CROSS"),
    ],
)
def test_wrong_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        METHODS.get(name)(**options)


@pytest.mark.parametrize(
    ("name", "options", "num_visual", "message"),
    [
        ("fastv", {"layer": 12}, 144, "layers are 0 to 11"),
        ("pooling", {}, 150, "150 is not the square"),
        ("downsample", {}, 150, "150 is not the square"),
        ("visor", {"self_layers": 5}, 144, r"4 slots \(1,4,7,10\)"),
        ("visor", {"self_layers": "12"}, 144, "layers are 0 to 11"),
        ("visor", {"self_layers": "3"}, 144, "either SELF or CROSS"),
        ("pyramiddrop", {"stages": ",".join(["0.5"] * 12)}, 144, "12 stages do not fit"),
    ],
)
def test_what_a_model_cannot_do_is_named(name, options, num_visual, message):
    with pytest.raises(ValueError, match=message):
        METHODS.get(name)(**options).schedule(TINY, num_visual)
