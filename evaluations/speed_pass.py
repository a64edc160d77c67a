"""The rows of the speed job: measured with random weights, or, where that cannot be, the floors of the roofline."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from budgets.roofline import Floor, device, floors
from evaluations.batches import Lengths
from evaluations.command import say
from evaluations.measure import TimingPass, synchroniser
from evaluations.models import Models
from evaluations.progress import progress
from evaluations.records import RunFolder, TimingRecord
from evaluations.settings import Planner
from evaluations.speed_config import SpeedConfig, SpeedSetting

if TYPE_CHECKING:
    from budgets.schedule import Schedule


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


def measure_in_processes(config: SpeedConfig, argv: Sequence[str]) -> dict[str, str]:
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
