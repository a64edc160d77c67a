"""Local data in the benchmarks' schema, and tiny models; the tests are skipped where lmms-eval is not installed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "visor")]

NEEDS_LMMS_EVAL = "lmms-eval is not installed: `make test-lmms` has it in an environment of its own"


@pytest.fixture(scope="session")
def lmms_eval():
    """The package, or the reason why a test is skipped."""
    if find_spec("lmms_eval") is None:
        pytest.skip(NEEDS_LMMS_EVAL)
    import lmms_eval

    return lmms_eval


@pytest.fixture(scope="session")
def data_root(lmms_eval, tmp_path_factory):
    """A folder with the data sets of all benchmarks, a few rows each, and nothing from the network."""
    import benchmark_rows
    import datasets
    import huggingface_hub

    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_OFFLINE", "1")  # for other processes; this one has read it already
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    root = benchmark_rows.write(tmp_path_factory.mktemp("data"))
    yield root
    patch.undo()
