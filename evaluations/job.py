"""The main job: a configuration becomes a plan of cells, the plan an accuracy pass, a timing pass and a report.

The same configuration in the same folder continues where an earlier process stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluations.command import FAILURES, OK, say

if TYPE_CHECKING:
    from evaluations.batches import PlannedTask
    from evaluations.cells import Plan
    from evaluations.config import RunConfig
    from evaluations.models import Models
    from evaluations.records import RunFolder
    from evaluations.settings import Planner
    from evaluations.sweep import SweepResult


def load_model(config: RunConfig) -> Any:
    """The model of a run.

    Raises:
        ValueError: the device is not there, or the checkpoint cannot be used.
    """
    from visor.inference import LoadedModel

    try:
        loaded = LoadedModel.load(
            config.model,
            device=config.device,
            dtype=config.dtype,
            attention=config.attention,
            generation_settings=dict(config.generation),
            system=config.system,
        )
    except (OSError, ImportError) as error:  # how transformers reports a broken folder, or an absent attention kernel
        raise ValueError(f"model {config.model!r} cannot be loaded: {error}") from error
    loaded.max_pixels = config.max_pixels
    return loaded


def execute(
    config: RunConfig,
    command: str,
    *,
    dry_run: bool = False,
    report: bool = True,
    load: Callable[[RunConfig], Any] = load_model,
) -> int:
    """Run a configuration.

    Args:
        command: as it was typed, for run.json.
        load: makes the model; tests put a small one here.

    Returns:
        The exit status: 0, or 1 if a cell, a sample or the report failed.

    Raises:
        ValueError: the request cannot be met; nothing has been run.
    """
    from evaluations.records import RunFolder
    from evaluations.run_file import write_run

    started = time.monotonic()
    models, planner, plan = _plan(config, load)
    if dry_run:
        print(dry_run_table(plan, planner))
        print(json.dumps({"dry_run": True, "run_folder": str(config.out), "cells": len(plan.all_cells),
                          "derived": len(plan.derived), "unreachable": list(plan.unreachable)}))  # fmt: skip
        return OK
    folder = RunFolder(config.out)
    with folder.locked():
        write_run(config, command, folder, plan, models)
        result, hit_rate = _accuracy(config, folder, plan, planner, models)
        untimed = _timing(config, folder, plan, planner, models) if config.timing else {}
        report_path, report_error = make_report(folder) if report else (None, None)
    failed = result.num_failed_cells + result.num_failed_samples > 0 or bool(untimed) or report_error is not None
    print(
        json.dumps(
            {
                "run_folder": str(config.out),
                "report": report_path and str(report_path),
                "report_error": report_error,
                "cells": result.num_cells,
                "failed": result.num_failed_cells,
                "samples": result.num_samples,
                "failed_samples": result.num_failed_samples,
                "unreachable": list(plan.unreachable),
                "not_timed": untimed,
                "feature_cache_hit_rate": hit_rate,
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    )
    return FAILURES if failed else OK


def _plan(config: RunConfig, load: Callable[[RunConfig], Any]) -> tuple[Models, Planner, Plan]:
    """The models, loaded, and what they will be asked."""
    from evaluations.cells import make_plan
    from evaluations.models import Models
    from evaluations.records import setting_id
    from evaluations.settings import Planner

    def load_and_say(each: RunConfig) -> Any:
        say(f"loading {each.model} on {each.device} ({each.dtype}, {each.attention} attention)")
        return load(each)

    models = Models.load(config, load_and_say)
    planner = Planner.of(models, config.dtype)
    tasks = [_plan_task(entry, config, models) for entry in config.tasks]
    validates = "per-task" in config.policies and any(each.geometry.visor for each in models.all)
    validation = [_plan_task(entry, config, models, "validation") for entry in config.tasks] if validates else []
    plan = make_plan(config, tasks, planner, models, validation)
    for entry in plan.unreachable:
        say(f"left out: {setting_id(entry['method'], entry['budget'], entry['policy'])}: {entry['reason']}")
    return models, planner, plan


def _plan_task(entry: Any, config: RunConfig, models: Models, split: str = "test") -> PlannedTask:
    from evaluations.batches import VALIDATION, plan_task
    from evaluations.task import open_task

    say(f"reading {entry.name}" + f", {split} split" * (split != "test"))
    task = open_task(entry.name, config.data_root)
    samples = task.samples(entry.limit) if split == "test" else task.samples(entry.limit, split)
    name = entry.name + VALIDATION * (split == "validation")
    return plan_task(name, task, samples, config.batch_size, models.base, config.max_pixels)


def dry_run_table(plan: Plan, planner: Planner) -> str:
    """The cells with the predicted cost of each, at the longest question of its task."""
    columns = ("GFLOPs a sample", "of dense", "visual tokens")
    header = f"{'task':22} {'setting':22} {'samples':>7} {columns[0]:>16} {columns[1]:>9} {columns[2]:>14}  cell"
    lines = [header, "-" * len(header)]
    for cell in plan.all_cells:
        figures = f"{'?':>16} {'?':>9} {'?':>14}"  # no sample of the task could be prepared
        if cell.setting.derived and cell.setting.policy is not None:
            figures = f"{'by sample':>16} {'':>9} {'':>14}"
        elif cell.task.lengths:
            lengths = cell.task.lengths[-1]
            schedule = planner.fitted(cell.setting, lengths)[1]
            cost = planner.cost(schedule, lengths.num_text, cell.setting.model)
            relative = planner.relative_cost(cell.setting, lengths)
            figures = f"{cost.decoder_prefill / 1e9:16.3f} {relative:9.1%} {cost.visual_tokens_mean:14.1f}"
        num_sources = sum(map(len, cell.sources.values()))
        key = f"derived from {num_sources} cells" if cell.setting.derived else cell.key
        lines.append(f"{cell.task.name:22} {cell.setting.id:22} {len(cell.task.samples):7} {figures}  {key}")
    lines.append("GFLOPs: prefill of the decoder layers, 2 x MACs; visual tokens: mean over the layers.")
    return "\n".join(lines)


def _accuracy(
    config: RunConfig, folder: RunFolder, plan: Plan, planner: Planner, models: Models
) -> tuple[SweepResult, float | None]:
    from evaluations.features import FeatureCache
    from evaluations.progress import progress
    from evaluations.sweep import Sweep

    cache = FeatureCache()
    sweep = Sweep(models, plan, planner, folder, config.suite.name, cache)
    states = sweep.pending()
    total = sum(len(state.cell.task.samples) for state in states.values())
    done = sum(state.num_resumed for state in states.values())
    num_done = len(plan.cells) - len(states)
    if num_done or done:
        say(f"continuing: {num_done} of {len(plan.cells)} cells are done, {done:,} samples of the others")
    with progress("accuracy", total, done) as line:
        result = sweep.run(states, line)
    say(cache.summary())
    return result, cache.hit_rate


def _timing(config: RunConfig, folder: RunFolder, plan: Plan, planner: Planner, models: Models) -> dict[str, str]:
    from evaluations.measure import TimingPass
    from evaluations.progress import progress
    from evaluations.provenance import load_average

    timing_pass = TimingPass(models, plan, planner, folder, config.suite.timing)
    pending = timing_pass.pending()
    total = config.suite.timing.min_runs * sum(map(len, pending.values()))
    load = load_average()
    if total and load and load[0] > 1.5:
        say(f"the load average is {load[0]:.1f}: other work on this machine makes the timings slower and noisier")
    with progress("timing", total) as line:
        failed = timing_pass.run(pending, line)
    if failed:
        folder.write_run({**folder.read_run(), "not_timed": failed})
    return failed


def make_report(folder: RunFolder) -> tuple[Path | None, str | None]:
    """The report's path, or why there is none: the records are worth keeping without it."""
    try:
        from reports.build import build

        path = build(folder.path)
    except Exception as error:
        say(f"the report could not be made: {type(error).__name__}: {error}; try `python -m reports {folder.path}`")
        return None, f"{type(error).__name__}: {error}"
    say(f"report: {path}")
    return path, None
