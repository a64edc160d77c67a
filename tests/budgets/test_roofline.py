"""The roofline against arithmetic done by hand, and the properties that a floor must have."""

import json
import math

import pytest

from budgets.cost import main
from budgets.costs import price
from budgets.presets import preset
from budgets.registry import METHODS, UnknownNameError
from budgets.roofline import DEVICES, Device, device, floors, layer_weights, measured_cpu
from budgets.schedule import dense

GEOMETRY = preset("llava-onevision-0.5b")
ROUND = Device("round", "a device of round numbers", {"float32": 1e12, "bfloat16": 2e12}, 1e11, None, "made up")


def test_weights_of_a_known_model():
    """Qwen2-0.5B: 24 layers of 14.9 M parameters, 358 M without embeddings (its card says 0.36 B)."""
    assert layer_weights(GEOMETRY) == 896 * (896 + 128 + 128 + 896) + 3 * 896 * 4864
    assert 24 * layer_weights(GEOMETRY) / 1e6 == pytest.approx(358, rel=0.01)


def test_floors_by_hand():
    schedule = dense(24, 729)
    found, cost = floors(GEOMETRY, schedule, 64, ROUND, "float32"), price(GEOMETRY, schedule, 64)
    tower = found["tower"]
    assert tower.flops == cost.parts["tower"] and tower.ms == tower.flops_ms == cost.parts["tower"] / 1e9
    weights = 4 * (24 * layer_weights(GEOMETRY) + 1152 * 896 + 896**2 + 896 * 152000)
    kv_bytes = 2 * 24 * 793 * 128 * 4
    assert found["prefill"].bytes == weights + kv_bytes
    assert found["prefill"].flops == cost.decoder_prefill_causal + cost.parts["projector"] + cost.parts["lm_head"]
    assert found["decode"].bytes == weights + kv_bytes - 4 * (1152 * 896 + 896**2)
    assert found["decode"].binds == "bytes" and found["prefill"].binds == "FLOPs"


def test_a_batch_shares_the_weights_and_nothing_else():
    one, eight = (floors(GEOMETRY, dense(24, 729), 64, ROUND, "bfloat16", size)["decode"] for size in (1, 8))
    assert eight.flops == 8 * one.flops
    kv_bytes = price(GEOMETRY, dense(24, 729), 64).kv_bytes
    assert eight.bytes - one.bytes == 7 * kv_bytes
    many = floors(GEOMETRY, dense(24, 64), 64, ROUND, "bfloat16", 4096)["decode"]
    assert many.bytes_ms / 4096 < one.bytes_ms  # a large batch reads less a sample


@pytest.mark.parametrize("self_layers", [0, 2, 8])
def test_visor_reads_more_weights_and_less_cache_than_dense(self_layers):
    schedule = METHODS.get("visor")(self_layers=self_layers).schedule(GEOMETRY, 2916)
    ours, full = (floors(GEOMETRY, s, 64, ROUND, "bfloat16") for s in (schedule, dense(24, 2916)))
    assert ours["prefill"].ms < full["prefill"].ms
    assert ours["tower"] == full["tower"]
    blocks = 8 * 2 * 896 * 896 * 2  # q and o of eight blocks in two bytes
    cached = price(GEOMETRY, schedule, 64).kv_bytes - price(GEOMETRY, dense(24, 2916), 64).kv_bytes
    assert ours["decode"].bytes - full["decode"].bytes == blocks + cached


def test_data_sheets():
    """Ratios that the makers state themselves."""
    assert DEVICES["h200"].bytes_per_s / DEVICES["h100"].bytes_per_s == pytest.approx(1.43, abs=0.01)
    assert DEVICES["h200"].flops_per_s == DEVICES["h100"].flops_per_s
    assert DEVICES["h100"].flops_per_s["bfloat16"] / DEVICES["a100"].flops_per_s["bfloat16"] == pytest.approx(
        3.17, abs=0.01
    )
    for each in DEVICES.values():
        assert each.source and each.flops_per_s["float32"] < each.flops_per_s["bfloat16"]


def test_the_cpu_is_measured():
    found = measured_cpu(seconds=0.02)
    assert 1e8 < found.flops_per_s["float32"] < 1e14 and 1e8 < found.bytes_per_s < 1e13
    with pytest.raises(ValueError, match="'bfloat16' is not known; number formats that are: float32"):
        floors(GEOMETRY, dense(24, 729), 64, found, "bfloat16")


def test_bad_requests():
    with pytest.raises(UnknownNameError, match="unknown device 'h1000'; .* nearest first: h100"):
        device("h1000")
    with pytest.raises(ValueError, match="at least 1 sample, got 0"):
        floors(GEOMETRY, dense(24, 729), 64, ROUND, "float32", 0)


def test_the_command(capsys):
    arguments = ["--model", "llava-1.5-7b", "--method", "fastv", "--visual-tokens", "576", "--device", "a100"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "roofline: NVIDIA A100 SXM 80 GB, bfloat16, batch 1: 312 TFLOP/s, 2039 GB/s" in printed
    roof = json.loads(printed.splitlines()[-1])["roofline"]
    prefill = roof["floors"]["prefill"]
    assert prefill["ms"] == max(prefill["flops_ms"], prefill["bytes_ms"]) and prefill["binds"] == "FLOPs"
    assert math.isclose(prefill["flops_ms"], prefill["flops"] / 312e12 * 1e3)
    assert roof["speed_up_at_the_floor"]["prefill"] > 1.5 and roof["speed_up_at_the_floor"]["tower"] == 1
    assert main([*arguments, "--dtype", "int4"]) == 2
    assert "number formats that are: bfloat16, float16, float32" in capsys.readouterr().err
