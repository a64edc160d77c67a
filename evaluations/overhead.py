"""The command `python -m evaluations.overhead`: how long choosing tokens takes, by `evaluations.overhead_job`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from budgets.geometry import ModelGeometry
from budgets.presets import load
from budgets.registry import METHODS
from evaluations.arguments import names
from evaluations.command import USAGE, say
from evaluations.overhead_job import execute
from evaluations.speed_config import SpeedConfig, SpeedSetting
from evaluations.suite import TimingPlan


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluations.overhead",
        description="Time what methods take to choose tokens, relative to the dense prefill; no weights are fetched.",
        epilog="The last line on stdout is a JSON document with the table.",
    )
    add = parser.add_argument
    add("--geometry", default="llava-1.5-7b", help="a name of `python -m budgets.cost --list`, or a config.json "
        "(default: %(default)s)")  # fmt: skip
    add("--layers", type=int, help="decoder layers that run (default: all of the geometry)")
    add("--visual-tokens", type=int, default=576, help="default: %(default)s")
    add("--text-tokens", type=int, default=64, help="default: %(default)s")
    add("--methods", type=names, metavar="A,B", help="default: all")
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    add("--dtype", help="default: float32 on the CPU, bfloat16 elsewhere")
    add("--attention", default="sdpa", help="sdpa, eager or flash_attention_2 (default: %(default)s)")
    add("--rounds", type=int, default=5, help="runs of every method (default: %(default)s)")
    add("--threads", type=int, default=1, help="threads of torch on the CPU (default: %(default)s)")
    add("--out", type=Path, help="write conditions and raw values to this .json file")
    return parser


def configure(options: argparse.Namespace) -> tuple[ModelGeometry, SpeedConfig]:
    """The whole geometry, and what runs: its first layers, so far with the dense schedule only.

    Raises:
        ValueError: what is wrong, and what would be right.
    """
    whole = load(options.geometry)
    layers = whole.num_layers if options.layers is None else options.layers
    if not 1 <= layers <= whole.num_layers:
        raise ValueError(f"--layers takes 1 to {whole.num_layers} of {whole.name}'s layers, got {layers}")
    if min(options.rounds, options.threads) < 1:
        raise ValueError(f"--rounds and --threads must be at least 1, got {options.rounds} and {options.threads}")
    dense_only = (SpeedSetting("dense", METHODS.get("dense")(), label="dense"),)
    timing = TimingPlan(num_samples=1, throughput_batch=1, new_tokens=2, min_runs=options.rounds, min_seconds=0,
                        max_runs=options.rounds)  # fmt: skip
    return whole, SpeedConfig(
        replace(whole, num_layers=layers), dense_only, (options.visual_tokens,), options.text_tokens, (1,),
        options.device, options.dtype or ("float32" if options.device == "cpu" else "bfloat16"), options.attention,
        timing, Path(), threads=options.threads,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    try:
        options = make_parser().parse_args(argv)
        return execute(*configure(options), options.methods, options.out)
    except ValueError as error:
        say(f"error: {error}")
        return USAGE


if __name__ == "__main__":
    sys.exit(main())
