"""How fast methods are on a real geometry, without its weights: `python -m evaluations.speed --geometry ...`.

Random weights run through the same passes as in the main job's timing (tower, choosing tokens, prefill, decode, end
to end, memory), in turns, at one or several batch sizes, with a fixed number of tokens. Where the device is not there,
the same table comes from the roofline (`budgets.roofline`) and every row says so. The run folder has the main job's
format; `python -m reports` shows it.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgets.costs import price
from budgets.geometry import ModelGeometry
from budgets.presets import load
from budgets.roofline import DEVICES, Floor, device, floors, layer_weights, tower_weights
from budgets.schedule import LayerMode, dense
from evaluations.arguments import integers
from evaluations.cells import DTYPE_BYTES, Lengths, Planner, Setting
from evaluations.config import ATTENTIONS, DTYPES, check_name
from evaluations.machine import machine, memory_bytes, state
from evaluations.measure import TimingPass, synchroniser
from evaluations.models import Models
from evaluations.progress import progress
from evaluations.records import RunFolder, TimingRecord
from evaluations.run import FAILURES, OK, USAGE, say
from evaluations.suite import TimingPlan

if TYPE_CHECKING:
    from budgets.schedule import Schedule

DEFAULT_METHODS = "dense,visor[self_layers=2],visor[self_layers=0],fastv,visionzip"
KIND = "speed"


@dataclass(frozen=True)
class SpeedSetting(Setting):
    """A method with options; `label` tells settings of one method apart."""

    label: str = ""

    @property
    def id(self) -> str:
        return self.label


@dataclass(frozen=True)
class SpeedConfig:
    """What is measured. Building one checks it.

    Args:
        device: cpu, cuda, cuda:N, or meta; the last measures nothing.
        model_as: device of the roofline where there is nothing to measure on.
        isolate: every (setting, number of visual tokens, batch size) in a process of its own, not in turns.
    """

    geometry: ModelGeometry
    settings: tuple[SpeedSetting, ...]
    visual_tokens: tuple[int, ...]
    text_tokens: int
    batch_sizes: tuple[int, ...]
    device: str
    dtype: str
    attention: str
    timing: TimingPlan
    out: Path
    model_as: str = "h100"
    threads: int | None = None
    isolate: bool = False

    def __post_init__(self) -> None:
        check_name("device", re.sub(r"^cuda:\d+$", "cuda", self.device), ("cpu", "cuda", "meta"))
        check_name("dtype", self.dtype, DTYPES)
        check_name("attention", self.attention, ATTENTIONS)
        check_name("device of the roofline", self.model_as, (*DEVICES, "cpu"))
        numbers = {"visual-tokens": self.visual_tokens, "batch-sizes": self.batch_sizes,
                   "text-tokens": (self.text_tokens,), "threads": (self.threads or 1,)}  # fmt: skip
        for name, values in numbers.items():
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise ValueError(f"--{name} takes different numbers of at least 1, got {values}")
        labels = [setting.label for setting in self.settings]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"--methods takes different settings, at least one, got {labels}")
        if self.geometry.vision is None:
            raise ValueError(f"{self.geometry.name} has no vision tower")

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """Layers that need a cross-attention block for any of the settings."""
        schedules = [setting.method.schedule(self.geometry, self.visual_tokens[0]) for setting in self.settings]
        return tuple(sorted({i for schedule in schedules for i in schedule.layers_in(LayerMode.CROSS)}))


def parse_settings(texts: Sequence[str], budgets: Sequence[float]) -> tuple[SpeedSetting, ...]:
    """ "visor[self_layers=2;cross_layers=8]" or "fastv" to settings; those without options once at every budget."""
    from budgets.cost import build_method

    settings = []
    for text in texts:
        match = re.fullmatch(r"([\w.+-]+)(?:\[(.*)\])?", text)
        if match is None:
            raise ValueError(f"--methods takes names like fastv or visor[self_layers=2;cross_layers=8], got {text!r}")
        name, options = match[1], [part for part in (match[2] or "").split(";") if part.strip()]
        method = build_method(name, options)
        if options or name == "dense" or not budgets:
            label = f"{name}[{';'.join(options)}]" if options else name
            settings.append(SpeedSetting(name=name, method=method, label=label))
        else:
            at = lambda budget, name=name, method=method: SpeedSetting(
                name=name, method=method, budget=budget, label=f"{name}@{budget:g}"
            )
            settings += [at(budget) for budget in budgets]
    return tuple(settings)


def split_methods(text: str) -> list[str]:
    """ "a,b[c=1;d=2,3]" to ["a", "b[c=1;d=2,3]"]: commas inside brackets belong to an option."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


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


def why_not_measured(config: SpeedConfig) -> str | None:
    """Why nothing can be measured here, or None.

    Raises:
        ValueError: the model does not fit into the memory of the device that was asked for.
    """
    kind = config.device.partition(":")[0]
    if kind == "meta":
        return "nothing runs on the device meta"
    needed, available = model_bytes(config), memory_bytes()
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            return "there is no CUDA device"
        available = torch.cuda.get_device_properties(config.device).total_memory
    if available is not None and needed > 0.9 * available:
        raise ValueError(
            f"{config.geometry.name} in {config.dtype} has {needed / 1e9:.1f} GB of weights, {config.device} has "
            f"{available / 1e9:.1f} GB of memory; try --dtype bfloat16, or --device meta for the roofline"
        )
    return None


def model_bytes(config: SpeedConfig) -> int:
    """Bytes of all matrices of the model: decoder, embeddings and head, tower."""
    geometry = config.geometry
    weights = geometry.num_layers * layer_weights(geometry) + 2 * geometry.vocab_size * geometry.hidden_size
    return (weights + tower_weights(geometry)) * DTYPE_BYTES[config.dtype]


# --- measured -------------------------------------------------------------------------------------------------------


class SpeedPass(TimingPass):
    """The timing pass over made samples of one length."""

    def __init__(self, loaded: Any, config: SpeedConfig, planner: Planner, folder: RunFolder, num_visual: int) -> None:
        self.loaded, self.planner, self.folder, self.timing = loaded, planner, folder, config.timing
        self.models, self.settings, self._prepared = Models(loaded), config.settings, {}
        self.num_visual, self.num_text = num_visual, config.text_tokens
        self.synchronise = synchroniser(str(loaded.device))
        self.batch_sizes = list(config.batch_sizes)
        self.samples = list(range(max(config.batch_sizes)))

    def prepare(self) -> list[Any]:
        return [self.loaded.sample(self.num_visual, self.num_text, seed) for seed in self.samples]

    def rows(self) -> list[TimingRecord]:
        rows = self.folder.timings()
        return [row for row in rows if row.num_visual == self.num_visual and not row.modelled]


def measure(config: SpeedConfig, planner: Planner, folder: RunFolder) -> dict[str, str]:
    """Measure what the folder lacks. Returns the settings that failed, with the reason."""
    import torch

    from evaluations.random_model import RandomModel, build

    if config.threads:
        torch.set_num_threads(config.threads)
    say(f"making {config.geometry.name} with random weights on {config.device} ({config.dtype})")
    model = build(config.geometry, config.device, config.dtype, config.attention, config.cross_layers)
    loaded, failed = RandomModel(config.geometry, model), {}
    for num_visual in config.visual_tokens:
        timing_pass = SpeedPass(loaded, config, planner, folder, num_visual)
        pending = timing_pass.pending()
        with progress(f"{num_visual} visual tokens", config.timing.min_runs * sum(map(len, pending.values()))) as line:
            found = timing_pass.run(pending, line)
        failed |= {f"{setting}, {num_visual} visual tokens": reason for setting, reason in found.items()}
    return failed


def measure_apart(config: SpeedConfig, argv: Sequence[str]) -> dict[str, str]:
    """Measure every cell in a process of its own. Returns those that failed."""
    failed = {}
    for num_visual in config.visual_tokens:
        for size in config.batch_sizes:
            for setting in config.settings:
                # Later arguments win, so the cell's own come last.
                cell = ["--methods", setting.label, "--visual-tokens", str(num_visual), "--batch-sizes", str(size)]
                command = [sys.executable, "-m", "evaluations.speed", *argv, "--cell", *cell, "--out", str(config.out)]
                say(f"{setting.label}, {num_visual} visual tokens, batch {size}: a process of its own")
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
                    failed[f"{setting.label}, {num_visual} visual tokens"] = lines[-1]
    return failed


# --- modelled -------------------------------------------------------------------------------------------------------


def modelled_row(
    setting: SpeedSetting, found: dict[str, Floor], cost: Any, config: SpeedConfig, num_visual: int, size: int, why: str
) -> TimingRecord:
    """The roofline's floors as a row that says what it is."""
    steps = config.timing.new_tokens - 1
    not_measured = dict.fromkeys(
        ("cpu_prefill_ms", "cpu_tower_ms", "cpu_decode_ms_per_token", "cpu_end_to_end_ms", "peak_memory_bytes",
         "peak_memory_without_weights_bytes"),
        f"{why}: the times are the roofline's",
    )  # fmt: skip
    not_measured["scoring_ms"] = "part of the prefill's FLOPs; the roofline does not give it apart"
    tower, prefill, decode = (found[stage].ms for stage in ("tower", "prefill", "decode"))
    return TimingRecord(
        setting.id, setting.name, setting.budget, None, size, 0, config.text_tokens, num_visual,
        config.timing.new_tokens, tower, None, prefill, decode, tower + prefill + steps * decode, None, None, None,
        device(config.model_as).title, not_measured, kv_bytes=cost.kv_bytes * size, modelled=True,
    )  # fmt: skip


def model_rows(config: SpeedConfig, planner: Planner, folder: RunFolder, why: str) -> None:
    """Append the modelled rows that the folder lacks."""
    on = device(config.model_as)
    have = {(row.setting_id, row.num_visual, row.batch_size) for row in folder.timings() if row.modelled}
    for num_visual in config.visual_tokens:
        for size in config.batch_sizes:
            for setting in config.settings:
                if (setting.id, num_visual, size) in have:
                    continue
                schedule = schedule_of(setting, config, planner, num_visual)
                found = floors(planner.geometry, schedule, config.text_tokens, on, config.dtype, size)
                cost = planner.cost(schedule, config.text_tokens)
                row = modelled_row(setting, found, cost, config, num_visual, size, why)
                folder.timings_file.append([row.to_dict()])


def schedule_of(setting: SpeedSetting, config: SpeedConfig, planner: Planner, num_visual: int) -> Schedule:
    """The schedule of a setting on the samples of this run."""
    return planner.fitted(setting, Lengths(num_visual, config.text_tokens))[1]


# --- the command ----------------------------------------------------------------------------------------------------


def priced(config: SpeedConfig, planner: Planner) -> list[dict[str, Any]]:
    """What each setting costs at each length: what the report holds the times against."""
    rows = []
    for num_visual in config.visual_tokens:
        full = price(planner.geometry, dense(planner.geometry.num_layers, num_visual), config.text_tokens)
        for setting in config.settings:
            cost = planner.cost(schedule_of(setting, config, planner, num_visual), config.text_tokens)
            method = planner.fitted(setting, Lengths(num_visual, config.text_tokens))[0]
            rows.append(
                {
                    "setting_id": setting.id, "method": setting.name, "title": method.title,
                    "options": method.options(), "trained": method.trained, "num_visual": num_visual,
                    "num_text": config.text_tokens, "decoder_flops": cost.decoder_prefill,
                    "decoder_flops_causal": cost.decoder_prefill_causal,
                    "saving": full.decoder_prefill / cost.decoder_prefill,
                    "saving_causal": full.decoder_prefill_causal / cost.decoder_prefill_causal,
                    "tower_flops": cost.parts["tower"], "kv_bytes": cost.kv_bytes,
                }
            )  # fmt: skip
    return rows


def write_run(
    folder: RunFolder, config: SpeedConfig, planner: Planner, command: str, started: dict[str, Any],
    failed: dict[str, str], why: str | None,
) -> None:  # fmt: skip
    """run.json, extended where the folder holds an earlier run of the same conditions.

    Raises:
        ValueError: the folder holds a run of another kind or under other conditions.
    """
    from evaluations.provenance import collect

    conditions = {
        "geometry": asdict(config.geometry), "text_tokens": config.text_tokens, "device": config.device,
        "dtype": config.dtype, "attention": config.attention, "new_tokens": config.timing.new_tokens,
        "model_as": config.model_as if why else None, "threads": config.threads, "isolate": config.isolate,
    }  # fmt: skip
    conditions = json.loads(json.dumps(conditions))
    commands, prices, created = [command], priced(config, planner), datetime.now(timezone.utc).isoformat()
    if folder.run_path.exists():
        earlier = RunFolder.open(folder.path).read_run()
        if earlier.get("kind") != KIND or earlier["config"] != conditions:
            differ = [name for name in conditions if earlier.get("config", {}).get(name) != conditions[name]]
            raise ValueError(f"{folder.path} holds another run (other {', '.join(differ)}); choose another --out")
        known = {(row["setting_id"], row["num_visual"]) for row in prices}
        prices = [r for r in earlier["prices"] if (r["setting_id"], r["num_visual"]) not in known] + prices
        commands, created = list(dict.fromkeys([*earlier["commands"], command])), earlier["created"]
    checkpoint = {"name": config.geometry.name, "path": None, "sha256": None, "trained": False, "card": None}
    on = device(config.model_as) if why else None
    folder.write_run(
        {
            "kind": KIND, "created": created, "command": command, "commands": commands, "config": conditions,
            "suite": {"name": KIND, "title": f"Speed of {config.geometry.name}",
                      "description": "Random weights of a real geometry; times and memory only.", "tasks": []},
            "provenance": collect("cpu" if why else config.device, config.dtype, config.attention, checkpoint),
            "machine": {**started, "end": state()},
            "modelled": on and {"device": on.title, "source": on.source, "reason": why},
            "prices": prices, "limit": None, "unreachable": [], "not_timed": failed, "cells": [],
        }
    )  # fmt: skip


def execute(config: SpeedConfig, argv: Sequence[str], report: bool = True) -> int:
    """Measure or model, write the folder and its report. Returns the exit status."""
    began, started = time.monotonic(), machine()
    folder, why = RunFolder(config.out), why_not_measured(config)
    planner = Planner(config.geometry, config.dtype)
    command = shlex.join(["python", "-m", "evaluations.speed", *argv])
    write_run(folder, config, planner, command, started, {}, why)
    folder.timings_file.drop_torn_line()
    if why is not None:
        say(f"{why}: the times below are the least that {device(config.model_as).title} could take")
        model_rows(config, planner, folder, why)
        failed: dict[str, str] = {}
    elif config.isolate:
        failed = measure_apart(config, argv)
    else:
        with folder.locked():
            failed = measure(config, planner, folder)
    write_run(folder, config, planner, command, started, failed, why)
    path = None
    if report:
        from reports.speed import build, text_table

        path = build(folder.path)
        print(text_table(folder.path))
    document = {"run_folder": str(config.out), "report": path and str(path), "modelled": why is not None,
                "failed": failed, "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
    print(json.dumps(document))
    return FAILURES if failed else OK


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
