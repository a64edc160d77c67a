"""How fast methods are on a real geometry, without its weights.

Random weights run through the same passes as in the main job's timing (tower, choosing tokens, prefill, decode, end
to end, memory), in turns, at one or several batch sizes, with a fixed number of tokens. Where the device is not there,
the same table comes from the roofline (`budgets.roofline`) and every row says so. The run folder has the main job's
format; `python -m reports` shows it.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from budgets.costs import price
from budgets.roofline import device
from budgets.schedule import dense
from evaluations.batches import Lengths
from evaluations.command import FAILURES, OK, say
from evaluations.machine import machine, state
from evaluations.records import RunFolder
from evaluations.settings import Planner
from evaluations.speed_config import SpeedConfig, why_not_measured
from evaluations.speed_pass import measure, measure_in_processes, model_rows, schedule_of

KIND = "speed"


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
        failed = measure_in_processes(config, argv)
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


def price_rows(config: SpeedConfig, planner: Planner) -> list[dict[str, Any]]:
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
    commands, prices, created = [command], price_rows(config, planner), datetime.now(timezone.utc).isoformat()
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
