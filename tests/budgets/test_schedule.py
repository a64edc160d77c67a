"""Schedules: what they refuse, what they count, and that JSON carries them unchanged."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budgets.schedule import LayerMode, LayerOp, Reduction, Schedule, dense


@st.composite
def any_schedule(draw):
    """Any valid schedule: counts never rise."""
    live = source = draw(st.integers(1, 400))
    params = st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers() | st.booleans() | st.text("xy"))

    def reduction():
        nonlocal live
        if not draw(st.booleans()):
            return None
        live = draw(st.integers(1, live))
        return Reduction(draw(st.sampled_from(["fastv", "pooling"])), live, tuple(sorted(draw(params).items())))

    encoder = reduction()
    modes = draw(st.lists(st.sampled_from(LayerMode), min_size=1, max_size=8))
    layers = tuple(LayerOp(mode, reduction()) for mode in modes)
    scale, positions = draw(st.sampled_from([1.0, 0.5])), draw(st.sampled_from(["kept", "contiguous"]))
    return Schedule(layers, source, encoder, scale, positions)


@given(any_schedule())
def test_json_round_trip_is_exact(schedule):
    text = schedule.to_json()
    again = Schedule.from_json(text)
    assert again == schedule and hash(again) == hash(schedule) and again.to_json() == text


@given(any_schedule())
def test_counts_never_rise(schedule):
    counts = (schedule.source_visual, schedule.decoder_visual, *schedule.visual_tokens)
    assert all(before >= after >= 1 for before, after in zip(counts, counts[1:], strict=False))
    assert len(schedule.visual_tokens) == schedule.num_layers


@given(any_schedule())
def test_every_layer_has_one_mode(schedule):
    by_mode = [i for mode in LayerMode for i in schedule.layers_in(mode)]
    assert sorted(by_mode) == list(range(schedule.num_layers))


def test_visual_tokens_fall_at_the_layer_that_reduces():
    layers = (LayerOp(), LayerOp(reduce=Reduction("fastv", 8)), LayerOp(LayerMode.CROSS), LayerOp(LayerMode.TEXT))
    schedule = Schedule(layers, 20, encoder=Reduction("pooling", 16))
    assert schedule.decoder_visual == 16
    assert schedule.visual_tokens == (16, 8, 8, 8)


def test_dense_is_dense():
    schedule = dense(3, 10)
    assert schedule.is_dense and schedule.visual_tokens == (10, 10, 10) and schedule.decoder_visual == 10
    assert not Schedule(schedule.layers, 10, image_scale=0.5).is_dense
    assert not Schedule(schedule.layers, 10, encoder=Reduction("pooling", 10)).is_dense
    assert not Schedule((LayerOp(LayerMode.TEXT),), 10).is_dense


def test_structure_forgets_counts_only():
    def make(keep=8, source=16, method="fastv", layer=1, positions="kept", params=()):
        ops = [LayerOp()] * 3
        ops[layer] = LayerOp(reduce=Reduction(method, keep, params))
        return Schedule(tuple(ops), source, positions=positions).structure

    assert make() == make(keep=3, source=99)
    others = [make(method="random"), make(layer=2), make(positions="contiguous"), make(params=(("a", 1),))]
    assert all(make() != other for other in others)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Schedule((), 4), "at least one layer"),
        (lambda: dense(2, -1), "source_visual must be >= 0, got -1"),
        (lambda: Schedule((LayerOp(),), 4, positions="gapped"), "'kept' or 'contiguous', got 'gapped'"),
        (lambda: Schedule((LayerOp(),), 4, image_scale=0.0), r"image_scale must be in \(0, 1\], got 0.0"),
        (lambda: Schedule((LayerOp(),), 4, image_scale=1.5), "got 1.5"),
        (lambda: Reduction("fastv", 0), "'fastv' got keep=0"),
        (lambda: Reduction("fastv", 2.0), "as an integer"),
        (lambda: Reduction("fastv", 2, (("b", 1), ("a", 1))), "sorted by name"),
        (lambda: Schedule((LayerOp(),), 4, encoder=Reduction("pooling", 5)), "encoder: 'pooling' would keep 5 of 4"),
        (
            lambda: Schedule((LayerOp(reduce=Reduction("a", 2)), LayerOp(reduce=Reduction("b", 3))), 4),
            "layer 1: 'b' would keep 3 of 2",
        ),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_importing_budgets_imports_no_torch():
    code = "import sys, budgets.schedule, budgets.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
