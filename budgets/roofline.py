"""The physical ceiling: how fast a device could run a schedule at best, by its FLOPs and by its memory.

A stage can be no faster than its FLOPs at the device's peak rate, nor than the bytes it must move at the device's
bandwidth; the larger of the two times is its floor, and says which of them binds. Counted is what cannot be avoided:
attention causally, every weight read once a pass (whatever the batch), the cache written in the prefill and read in
the decode. Activations are not counted. A measurement above the floor is normal; one below it is a mistake.

Peak rates are dense (without structured sparsity), with fp32 accumulation, from the makers' public data sheets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from budgets.costs import price
from budgets.geometry import ModelGeometry
from budgets.registry import check_name
from budgets.schedule import LayerMode, Schedule

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Device:
    """What a device can do at most.

    Args:
        flops_per_s: peak FLOP/s of matrix products, by number format.
        bytes_per_s: bandwidth of its main memory.
        memory_bytes: size of that memory; None where it was not asked.
        source: where the figures are from.
    """

    name: str
    title: str
    flops_per_s: dict[str, float]
    bytes_per_s: float
    memory_bytes: int | None
    source: str


def _gpu(name: str, title: str, half: float, single: float, bandwidth: float, gigabytes: int, source: str) -> Device:
    rates = {"bfloat16": half, "float16": half, "float32": single}
    return Device(name, title, rates, bandwidth, gigabytes * 10**9, source)


# float32 is the rate of the plain cores: torch does not use TF32 for matrix products unless told to.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu("h100", "NVIDIA H100 SXM 80 GB", 989.4e12, 66.9e12, 3.35e12, 80, "NVIDIA H100 data sheet"),
        _gpu("h200", "NVIDIA H200 SXM 141 GB", 989.4e12, 66.9e12, 4.8e12, 141, "NVIDIA H200 data sheet"),
        _gpu("a100", "NVIDIA A100 SXM 80 GB", 312e12, 19.5e12, 2.039e12, 80, "NVIDIA A100 80 GB data sheet"),
        _gpu("rtx-4090", "NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12, 1.008e12, 24, "NVIDIA Ada architecture paper"),
    )
}


def device_names() -> list[str]:
    """All devices that a floor can be given for; "cpu" is measured when it is asked for."""
    return [*DEVICES, "cpu"]


def device(name: str) -> Device:
    """A device by name.

    Raises:
        UnknownNameError: no such device; the message lists those that exist, nearest first.
    """
    if name == "cpu":
        return measured_cpu()
    check_name("device", name, device_names())
    return DEVICES[name]


def measured_cpu(seconds: float = 0.5) -> Device:
    """This machine's processor, by what numpy reaches now: products of 512 x 512 matrices, and copies of 2 MiB pieces
    of an array that no cache holds.

    The best of many pieces of a few milliseconds, as other work on the machine can only make one slower.
    """
    import numpy as np

    side, words, piece = 512, 1 << 25, 1 << 19
    ones, origin, target = np.ones((side, side), np.float32), np.ones(words, np.float32), np.ones(words, np.float32)

    def copy(turn: int) -> None:
        start = turn * piece % words
        np.copyto(target[start : start + piece], origin[start : start + piece])

    def best(work: Callable[[int], Any]) -> float:
        least, turn, end = math.inf, 0, time.perf_counter() + seconds
        while turn < 10 or time.perf_counter() < end:
            started = time.perf_counter()
            work(turn)
            least, turn = min(least, time.perf_counter() - started), turn + 1
        return least

    flops = 2 * side**3 / best(lambda turn: ones @ ones)
    bandwidth = 2 * 4 * piece / best(copy)  # read once, written once
    source = "measured now with numpy: float32 matrix product and copy, with the threads that numpy takes"
    return Device("cpu", "this machine's CPU", {"float32": flops}, bandwidth, None, source)


@dataclass(frozen=True)
class Floor:
    """The least time of one stage, in milliseconds, and which limit sets it: "FLOPs" or "bytes"."""

    stage: str
    flops: int
    bytes: int
    flops_ms: float
    bytes_ms: float

    @property
    def ms(self) -> float:
        """The larger of the two times: no kernel is faster."""
        return max(self.flops_ms, self.bytes_ms)

    @property
    def binds(self) -> str:
        """The limit that sets it: "FLOPs" or "bytes"."""
        return "FLOPs" if self.flops_ms >= self.bytes_ms else "bytes"

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {**asdict(self), "ms": self.ms, "binds": self.binds}


def layer_weights(geometry: ModelGeometry, layer: int = 0, active: bool = False) -> int:
    """Parameters of one decoder layer's matrices.

    Args:
        active: of a mixture of experts only those that one token goes through.
    """
    width = geometry.hidden_size
    attention = 2 * width * geometry.query_size + 2 * width * geometry.kv_size
    return attention + geometry.mlp_weights(layer, active)


def decoder_weights(geometry: ModelGeometry, active: bool = False) -> int:
    """The same of all layers together."""
    return sum(layer_weights(geometry, layer, active) for layer in range(geometry.num_layers))


def cross_weights(geometry: ModelGeometry, decoding: bool = False) -> int:
    """Parameters of one cross-attention block; while decoding its keys and values are cached, and not computed."""
    width = geometry.hidden_size
    reading = 2 * width * geometry.query_size
    return reading if decoding else reading + 2 * width * geometry.kv_size + geometry.cross_kernel * width


def tower_weights(geometry: ModelGeometry) -> int:
    """Parameters of the tower's matrices and patch embedding; 0 without a tower."""
    vision = geometry.vision
    if vision is None:
        return 0
    width = vision.hidden_size
    matrices = 4 * width**2 + vision.num_mlp_matrices * width * vision.intermediate_size
    return vision.num_layers * matrices + width * vision.num_channels * vision.num_frames * vision.patch_size**2


def floors(
    geometry: ModelGeometry, schedule: Schedule, num_text: int, on: Device, dtype: str, batch_size: int = 1
) -> dict[str, Floor]:
    """Least times of the stages "tower", "prefill" (projector to first token) and "decode" (the pass after it).

    Args:
        batch_size: equal samples that share one pass, and with it the reading of the weights.

    Raises:
        ValueError: the device's rate for this number format is not known.
    """
    if dtype not in on.flops_per_s:
        known = ", ".join(on.flops_per_s)
        raise ValueError(f"{on.title}: the rate for {dtype!r} is not known; number formats that are: {known}")
    if batch_size < 1:
        raise ValueError(f"a batch has at least 1 sample, got {batch_size}")
    cost, size = price(geometry, schedule, num_text, num_new_tokens=2), DTYPE_BYTES[dtype]
    cross = sum(layer.mode == LayerMode.CROSS.value and layer.visual_tokens > 0 for layer in cost.layers)
    head = geometry.hidden_size * geometry.vocab_size
    layers = decoder_weights(geometry, active=True)  # all tokens may choose the same experts
    projector = sum(i * o for i, o in geometry.vision.projector) if geometry.vision else 0
    kv_bytes = cost.kv_bytes * size // geometry.dtype_bytes
    prefill = cost.prefill - cost.parts["tower"] - cost.parts["decoder_attention"] + cost.attention_causal
    stages = {
        "tower": (cost.parts["tower"], tower_weights(geometry) * size if cost.parts["tower"] else 0, 0),
        "prefill": (prefill, (layers + cross * cross_weights(geometry) + projector + head) * size, kv_bytes),
        "decode": (cost.decode, (layers + cross * cross_weights(geometry, True) + head) * size, kv_bytes),
    }
    rate = on.flops_per_s[dtype]
    found = {}
    for stage, (flops, weights, cached) in stages.items():
        flops, moved = flops * batch_size, weights + cached * batch_size
        found[stage] = Floor(stage, flops, moved, flops / rate * 1e3, moved / on.bytes_per_s * 1e3)
    return found
