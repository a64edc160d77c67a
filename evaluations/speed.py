"""The command of the speed job: `python -m evaluations.speed --geometry ...` times methods on a real geometry.

Arguments become a checked configuration; `evaluations.speed_job` does the rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from budgets.presets import load
from budgets.roofline import DEVICES
from evaluations.arguments import integers
from evaluations.command import FAILURES, OK, USAGE, say
from evaluations.records import RunFolder
from evaluations.settings import Planner
from evaluations.speed_config import SpeedConfig, parse_settings, split_methods
from evaluations.speed_job import execute
from evaluations.speed_pass import measure
from evaluations.suite import TimingPlan

DEFAULT_METHODS = "dense,visor[self_layers=2],visor[self_layers=0],fastv,visionzip"


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluations.speed",
        description="Time efficiency methods on a real geometry with random weights; no weights are fetched.",
        epilog="Without the device the rows come from the roofline and are marked as modelled. The last line on stdout "
        "is a JSON document that says where the results are.",
    )
    add = parser.add_argument
    add(
        "--geometry", default="llava-onevision-0.5b", help="a name of `python -m budgets.cost --list`, or a config.json"
    )
    add("--visual-tokens", type=integers, default=[729], metavar="N,N", help="default: 729")
    add("--text-tokens", type=int, default=64, help="prompt tokens beside the image (default: %(default)s)")
    add("--methods", type=split_methods, default=split_methods(DEFAULT_METHODS), metavar="A,B[option=value;...]",
        help=f"default: {DEFAULT_METHODS}")  # fmt: skip
    add("--budgets", default="", metavar="X,Y",
        help="shares of dense FLOPs for methods without options (default: their default options)")  # fmt: skip
    add("--device", default="cpu", help="cpu, cuda, cuda:N, or meta (nothing runs) (default: %(default)s)")
    add("--roofline", default="h100", metavar="DEVICE",
        help=f"modelled where none can be measured: {', '.join(DEVICES)}, cpu (default: %(default)s)")  # fmt: skip
    add("--dtype", help="default: float32 on the CPU, bfloat16 elsewhere")
    add("--attention", default="sdpa", help="sdpa, eager or flash_attention_2 (default: %(default)s)")
    add("--batch-sizes", type=integers, default=[1], metavar="N,N", help="default: 1")
    add("--new-tokens", type=int, default=8, help="tokens of every run, the first is the prefill's (default: 8)")
    add("--min-runs", type=int, default=5, help="runs of every setting (default: %(default)s)")
    add("--min-seconds", type=float, default=1.0, help="and seconds (default: %(default)s)")
    add("--threads", type=int, help="threads of torch on the CPU (default: torch's own choice)")
    add("--isolate", action="store_true", help="every setting in a process of its own")
    add("--out", type=Path, help="run folder, new or to be continued (default: runs/speed-<geometry>-<device>)")
    add("--no-report", dest="report", action="store_false", help="leave the report out")
    add("--cell", action="store_true", help=argparse.SUPPRESS)  # one process of --isolate
    return parser


def configure(options: argparse.Namespace) -> SpeedConfig:
    """The configuration that the arguments ask for.

    Raises:
        ValueError: what is wrong, and what would be right.
    """
    geometry = load(options.geometry)
    try:
        budgets = [float(part) for part in options.budgets.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--budgets takes numbers like 0.5,0.25, got {options.budgets!r}") from None
    dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    timing = TimingPlan(num_samples=1, throughput_batch=1, new_tokens=options.new_tokens, min_runs=options.min_runs,
                        min_seconds=options.min_seconds, max_runs=max(40, options.min_runs))  # fmt: skip
    name = f"speed-{geometry.name}-{options.device.replace(':', '')}"
    return SpeedConfig(
        geometry, parse_settings(options.methods, budgets), tuple(options.visual_tokens), options.text_tokens,
        tuple(options.batch_sizes), options.device, dtype, options.attention, timing,
        options.out or Path("runs") / name, options.roofline, options.threads, options.isolate,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = make_parser().parse_args(argv)
    try:
        config = configure(options)
        if not options.cell:
            return execute(config, argv, options.report)
        failed = measure(replace(config, isolate=False), Planner(config.geometry, config.dtype), RunFolder(config.out))
        if failed:
            say("; ".join(failed.values()))
        return FAILURES if failed else OK
    except ValueError as error:
        say(f"error: {error}")
        return USAGE


if __name__ == "__main__":
    sys.exit(main())
