"""Where and with what a run was made: enough to judge its timings and to make it again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scipy", "pandas", "pyarrow", "pillow", "matplotlib",
            "scikit-learn", "easy-vqa", "visor")  # fmt: skip


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it) of the source tree; (None, None) for an installed package."""

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return result.stdout.strip()

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return commit, None if changes is None else bool(changes)


def cpu_name() -> str:
    """The processor as its maker calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def load_average() -> list[float] | None:
    """Runnable processes over 1, 5 and 15 minutes: other work on the machine makes timings slower."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def packages() -> dict[str, str | None]:
    """Installed versions; None where a package is absent."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def collect(device: str, dtype: str, attention: str, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The provenance entry of run.json. Imports torch, which the run has loaded by then."""
    import torch

    commit, dirty = git_state(Path(__file__).resolve().parent)
    kind = device.partition(":")[0]
    return {
        "git_commit": commit,
        "git_dirty": dirty,
        "python": sys.version.split()[0],
        "packages": packages(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else device,
        "dtype": dtype,
        "attention": attention,
        "load_average": load_average(),
        "checkpoint": checkpoint,
    }
