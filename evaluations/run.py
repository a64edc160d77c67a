"""The main job: `python -m evaluations.run --suite fine-grained` compares methods on tasks and writes a report.

Arguments become a checked configuration, the configuration a plan of cells, the plan an accuracy pass, a timing pass
and a report. Names and numbers are checked before anything is loaded. The same command in the same folder continues.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluations.suite import load_suite, suite_names

if TYPE_CHECKING:
    from evaluations.cells import Plan, PlannedTask, Planner
    from evaluations.config import RunConfig
    from evaluations.models import Models
    from evaluations.records import RunFolder
    from evaluations.sweep import SweepResult

OK, FAILURES, USAGE, INTERRUPTED = 0, 1, 2, 130


def say(text: str) -> None:
    """A line for people; stdout is kept for results."""
    print(text, file=sys.stderr, flush=True)


def names(text: str) -> list[str]:
    """ "a,b" to ["a", "b"]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str, what: str = "budgets") -> list[float]:
    """ "0.5,0.25" to [0.5, 0.25]."""
    try:
        return [float(part) for part in names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{what} are numbers like 0.5,0.25, got {text!r}") from None


def method_and_model(text: str) -> tuple[str, str]:
    """ "visor=FOLDER" to ("visor", "FOLDER")."""
    method, equals, model = text.partition("=")
    if not (method and equals and model):
        raise argparse.ArgumentTypeError(f"a checkpoint is given as METHOD=MODEL, like visor=my-visor, got {text!r}")
    return method, model


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluations.run",
        description="Compare efficiency methods of vision-language models: accuracy, FLOPs, time, memory.",
        epilog="Exit status: 0 all done; 1 a cell or a sample failed, the rest is done; 2 the request cannot be met. "
        "The last line on stdout is a JSON document that says where the results are.",
    )
    add = parser.add_argument
    add("--suite", default="smoke", help=f"{', '.join(suite_names())}, or a .yaml file (default: %(default)s)")
    add("--tasks", type=names, metavar="A,B", help="tasks to run (default: the suite's)")
    add("--methods", type=names, metavar="A,B",
        help="methods to compare, `a+b` for two at once, or all (default: the suite's)")  # fmt: skip
    add("--budgets", type=numbers, metavar="X,Y",
        help="decoder prefill FLOPs relative to dense, in (0, 1] (default: the suite's)")  # fmt: skip
    add("--model", default="dense-tiny", help="shipped model, folder, or owner/name of the Hub (default: %(default)s)")
    add("--checkpoint", dest="checkpoints", type=method_and_model, action="append", metavar="METHOD=MODEL",
        help="what a trained method runs on (default: the shipped one; visor-tiny for dense-tiny)")  # fmt: skip
    add("--visor-model", type=lambda model: ("visor", model), dest="checkpoints", action="append", metavar="MODEL",
        help="the same as --checkpoint visor=MODEL")  # fmt: skip
    add("--policies", type=names, metavar="A,B",
        help="how a method with several configurations chooses: fixed (all of them, always run), per-task, router, "
        "cascade, random, oracle (default: fixed,router,random,oracle)")  # fmt: skip
    add("--cost-weights", type=lambda text: numbers(text, "cost weights"), metavar="X,Y",
        help="lambdas of the cost-aware router: success - lambda * relative cost (default: 0 to 1.6)")  # fmt: skip
    add("--thresholds", type=lambda text: numbers(text, "thresholds"), metavar="X,Y",
        help="of the cascade: it goes on while the first token is less likely (default: 0.5,0.7,0.9,0.97)")  # fmt: skip
    add("--device", default="cpu", help="cpu, cuda, cuda:N or mps (default: %(default)s)")
    add("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    add("--attention", default="sdpa", help="sdpa, eager or flash_attention_2 (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="samples in a batch of the accuracy pass (default: %(default)s)")
    add("--limit", type=int, help="samples of each task, for a quick look (default: the suite's)")
    add("--out", type=Path, help="run folder, new or to be continued (default: runs/<suite>)")
    add("--seed", type=int, default=0, help="for methods that draw at random (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the cells and what they will cost, and run nothing")
    add("--no-timing", dest="timing", action="store_false", help="leave the timing pass out")
    add("--no-report", dest="report", action="store_false", help="leave the report out")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = vars(make_parser().parse_args(argv))
    dry_run, report = options.pop("dry_run"), options.pop("report")
    command = shlex.join(["python", "-m", "evaluations.run", *argv])
    try:
        from evaluations.config import RunConfig

        config = RunConfig.of(load_suite(options.pop("suite")), **options)
        return execute(config, command, dry_run=dry_run, report=report)
    except ValueError as error:
        say(f"error: {error}")
        return USAGE
    except KeyboardInterrupt:
        say("interrupted; the same command continues where this one stopped")
        return INTERRUPTED


def load_model(config: RunConfig) -> Any:
    """The model of a run.

    Raises:
        ValueError: the device is not there, or the checkpoint cannot be used.
    """
    from visor.inference import LoadedModel

    try:
        return LoadedModel.load(config.model, device=config.device, dtype=config.dtype, attention=config.attention)
    except (OSError, ImportError) as error:  # how transformers reports a broken folder, or an absent attention kernel
        raise ValueError(f"model {config.model!r} cannot be loaded: {error}") from error


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
    from evaluations.cells import Planner, make_plan
    from evaluations.models import Models
    from evaluations.records import RunFolder, setting_id

    started = time.monotonic()

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
    if dry_run:
        print(dry_run_table(plan, planner))
        print(json.dumps({"dry_run": True, "run_folder": str(config.out), "cells": len(plan.all_cells),
                          "derived": len(plan.derived), "unreachable": list(plan.unreachable)}))  # fmt: skip
        return OK
    folder = RunFolder(config.out)
    with folder.locked():
        _write_run(config, command, folder, plan, models)
        result, hit_rate = _accuracy(config, folder, plan, planner, models)
        untimed = _timing(config, folder, plan, planner, models) if config.timing else {}
        report_path, report_error = _report(folder) if report else (None, None)
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


def _plan_task(entry: Any, config: RunConfig, models: Models, split: str = "test") -> PlannedTask:
    from budgets.registry import TASKS
    from evaluations.cells import VALIDATION, plan_task

    say(f"reading {entry.name}" + f", {split} split" * (split != "test"))
    task = TASKS.get(entry.name)()
    samples = task.samples(entry.limit) if split == "test" else task.samples(entry.limit, split)
    name = entry.name + VALIDATION * (split == "validation")
    return plan_task(name, task, samples, config.batch_size, models.base)


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


def _checkpoint(name: str, loaded: Any) -> dict[str, Any]:
    return {
        "name": name,
        "path": str(loaded.path),
        "sha256": loaded.checkpoint_sha256,
        "trained": card_says_trained(loaded.card),
        "card": loaded.card,
    }


def _write_run(config: RunConfig, command: str, folder: RunFolder, plan: Plan, models: Models) -> None:
    """Write run.json, or extend that of an earlier run in the folder."""
    from evaluations.provenance import collect
    from evaluations.records import RunFolder

    checkpoint = _checkpoint(config.model, models.base)
    others = {method: _checkpoint(name, models[name]) for method, name in models.by_method.items()}
    suite_tasks = {
        task.name: {
            "name": task.name, "title": task.task.title, "version": task.task.version, "metric": task.task.metric,
            "kind": task.task.kind, "num_samples": len(task.samples),
        }
        for task in plan.tasks
    }  # fmt: skip
    provenance = collect(config.device, config.dtype, config.attention, checkpoint)
    cells, created, commands = [cell.key for cell in plan.all_cells], datetime.now(timezone.utc).isoformat(), [command]
    unreachable = list(plan.unreachable)
    if folder.run_path.exists():
        earlier = RunFolder.open(folder.path).read_run()
        check_continues(earlier, config, checkpoint["sha256"], suite_tasks, folder, others)
        others = {**earlier["provenance"].get("checkpoints", {}), **others}
        earlier_tasks = {task["name"]: task for task in earlier["suite"]["tasks"]}
        suite_tasks = {**earlier_tasks, **suite_tasks}
        cells = list(dict.fromkeys([*earlier["cells"], *cells]))
        created, commands = earlier["created"], list(dict.fromkeys([*earlier["commands"], command]))
        unreachable = [e for e in earlier["unreachable"] if e["method"] not in config.methods] + unreachable
    folder.write_run(
        {
            "created": created,
            "command": command,
            "commands": commands,
            "config": config.to_dict(),
            "suite": {
                "name": config.suite.name, "title": config.suite.title, "description": config.suite.description,
                "tasks": list(suite_tasks.values()),
            },
            "provenance": {**provenance, "checkpoints": others},
            "limit": config.limit,
            "unreachable": unreachable,
            "not_timed": {},
            "cells": cells,
        }
    )  # fmt: skip


def card_says_trained(card: str | None) -> bool | None:
    """What the line `trained: true` or `trained: false` of a model card says; None where there is no such line.

    A folder of random weights can only be told from a trained one by what its maker wrote.
    """
    for line in (card or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() == "trained" and value.strip().lower() in ("true", "false"):
            return value.strip().lower() == "true"
    return None


def check_continues(
    earlier: dict[str, Any],
    config: RunConfig,
    checkpoint: str,
    tasks: dict[str, dict[str, Any]],
    folder: RunFolder,
    others: dict[str, dict[str, Any]],
) -> None:
    """Refuse to mix two runs in a folder. Methods, budgets and tasks may be added; nothing else may differ.

    Raises:
        ValueError: something else differs; the message says what.
    """
    now = {**config.to_dict(), "checkpoint": checkpoint}
    before = {**earlier["config"], "checkpoint": earlier["provenance"]["checkpoint"]["sha256"]}
    must_agree = ("suite", "checkpoint", "device", "dtype", "attention", "batch_size", "limit", "seed")
    differ = [f"{name} was {before[name]}, now {now[name]}" for name in must_agree if before[name] != now[name]]
    for method, each in earlier["provenance"].get("checkpoints", {}).items():
        if method in others and others[method]["sha256"] != each["sha256"]:
            differ.append(f"checkpoint of {method} was {each['name']}, now {others[method]['name']} or other weights")
    for task in earlier["suite"]["tasks"]:
        same = tasks.get(task["name"], task)
        differ += [
            f"{name} of task {task['name']} was {task[name]}, now {same[name]}"
            for name in ("version", "metric", "num_samples")
            if task[name] != same[name]
        ]
    if differ:
        raise ValueError(
            f"{folder.path} holds another run: {'; '.join(differ)}. Choose another --out; a run is continued by the "
            "command that began it, to which methods, budgets and tasks may be added"
        )


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


def _report(folder: RunFolder) -> tuple[Path | None, str | None]:
    """The report's path, or why there is none: the records are worth keeping without it."""
    try:
        from reports.build import build

        path = build(folder.path)
    except Exception as error:
        say(f"the report could not be made: {type(error).__name__}: {error}; try `python -m reports {folder.path}`")
        return None, f"{type(error).__name__}: {error}"
    say(f"report: {path}")
    return path, None


if __name__ == "__main__":
    sys.exit(main())
