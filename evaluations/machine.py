"""The machine that timings were taken on: processor, clocks, load, accelerator. Everything is read, nothing is set."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from evaluations.provenance import cpu_name, load_average

_GPU_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu",
               "utilization.gpu", "memory.used")  # fmt: skip


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def cpu_clocks_mhz() -> list[float] | None:
    """Clock of each core now, as Linux tells it."""
    lines = (_read("/proc/cpuinfo") or "").splitlines()
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return clocks or None


def memory_bytes() -> int | None:
    """Main memory of the machine."""
    for line in (_read("/proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def gpus() -> list[dict[str, str]] | None:
    """What nvidia-smi says of each GPU now; None without it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split(", ") for line in found.splitlines() if line.strip()]
    return [dict(zip(_GPU_FIELDS, row, strict=False)) for row in rows]


def cpu_pressure() -> float | None:
    """Share of the last ten seconds in which some process waited for a core, in percent; None where it is not told."""
    first = (_read("/proc/pressure/cpu") or "").partition("\n")[0]
    for entry in first.split():
        if entry.startswith("avg10="):
            return float(entry[6:])
    return None


def state() -> dict[str, Any]:
    """What may differ between the beginning and the end of a run."""
    return {
        "load_average": load_average(), "cpu_pressure_percent": cpu_pressure(), "cpu_clocks_mhz": cpu_clocks_mhz(),
        "gpus": gpus(),
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """What the machine is, and its state now."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu_name(), "cores": usable, "memory_bytes": memory_bytes(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"), "start": state(),
    }  # fmt: skip
