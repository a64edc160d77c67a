"""run.json of a run folder: what was run, on what, by which commands; and what may continue it."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from evaluations.provenance import collect
from evaluations.records import RunFolder
from visor.inference.training_facts import read_training
from visor.vision.image import MAX_PIXELS

if TYPE_CHECKING:
    from evaluations.cells import Plan
    from evaluations.config import RunConfig
    from evaluations.models import Models


def write_run(config: RunConfig, command: str, folder: RunFolder, plan: Plan, models: Models) -> None:
    """Write run.json, or extend that of an earlier run in the folder."""
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
    before = {"max_pixels": MAX_PIXELS, **earlier["config"]}  # an option that older runs do not name
    before["checkpoint"] = earlier["provenance"]["checkpoint"]["sha256"]
    for name, default in (("generation", []), ("system", None)):  # nor these
        before.setdefault(name, default)
        now[name] = json.loads(json.dumps(now[name]))
    numerics = ("device", "dtype", "attention", "batch_size", "generation", "system")
    must_agree = ("suite", "checkpoint", *numerics, "limit", "seed", "max_pixels")
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


def card_says_trained(card: str | None) -> bool | None:
    """What the line `trained: true` or `trained: false` of a model card says; None where there is no such line.

    A folder of random weights can only be told from a trained one by what its maker wrote.
    """
    for line in (card or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() == "trained" and value.strip().lower() in ("true", "false"):
            return value.strip().lower() == "true"
    return None


def _checkpoint(name: str, loaded: Any) -> dict[str, Any]:
    return {
        "name": name,
        "path": str(loaded.path),
        "sha256": loaded.checkpoint_sha256,
        "trained": card_says_trained(loaded.card),
        "training": read_training(loaded.path, loaded.card),
        "card": loaded.card,
        "own_generation": getattr(loaded, "own_generation", {}),  # what the checkpoint asks for, and does not get
    }
