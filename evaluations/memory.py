"""Peak memory of a piece of work: what torch allocated on CUDA, how much the process grew on a CPU."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PeakMemory:
    """Highest memory of one run. None with the reason why it was not measured."""

    total_bytes: int | None
    without_weights_bytes: int | None
    reason: str | None = None


class ResidentMemory:
    """Highest resident memory of this process during a block, over what it had before.

    Linux can reset its own high-water mark (/proc/self/clear_refs); elsewhere a thread looks every few milliseconds.
    """

    INTERVAL_S = 0.002

    def __init__(self) -> None:
        self.growth_bytes: int | None = None

    def __enter__(self) -> ResidentMemory:
        # What was freed but not given back would hide the growth of this block.
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (AttributeError, OSError):
            pass
        self.before = resident_bytes()
        self.can_reset = self.before is not None and _reset_high_water_mark()
        self.highest, self.finished = self.before or 0, threading.Event()
        if self.before is not None and not self.can_reset:
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.finished.wait(self.INTERVAL_S):
            self.highest = max(self.highest, resident_bytes() or 0)

    def __exit__(self, *error: Any) -> None:
        if self.before is None:
            return
        if self.can_reset:
            self.highest = max(self.highest, _status_bytes("VmHWM") or 0)
        else:
            self.finished.set()
            self.thread.join()
        self.growth_bytes = max(0, self.highest - self.before)


def resident_bytes() -> int | None:
    """Memory of this process that is in RAM, or None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


def _status_bytes(field: str) -> int | None:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _status_bytes("VmHWM") is not None


def measure_memory(work: Callable[[], Any], device: str, weights_bytes: int) -> PeakMemory:
    """Peak memory of some work: on CUDA what torch allocated, on a CPU the growth of the process plus the weights.

    The interpreter and its libraries are left out on a CPU, so that both figures mean the same on every device.
    """
    kind = device.partition(":")[0]
    if kind == "cuda":
        import torch

        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return PeakMemory(peak, peak - before)
    if kind != "cpu":
        work()
        return PeakMemory(None, None, f"peak memory is not measured on {kind}")
    with ResidentMemory() as memory:
        work()
    if memory.growth_bytes is None:
        return PeakMemory(None, None, "this system does not tell the resident memory of a process")
    return PeakMemory(weights_bytes + memory.growth_bytes, memory.growth_bytes)


def weights_bytes(model: Any) -> int:
    """Memory of the parameters and buffers of a model; tied weights count once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])
