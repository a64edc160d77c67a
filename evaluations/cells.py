"""From a configuration to cells: which settings there are, which of them are out of reach, and what each cell's key is.

A *setting* is a method at a budget or under a policy; a *cell* is a setting on a task. A cell's key is a hash of
everything that can change its output, so a record found under a key can be trusted, and anything new only adds cells.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from budgets.costs import Cost, price
from budgets.geometry import ModelGeometry
from budgets.match import fit
from budgets.registry import METHODS
from budgets.schedule import Schedule, dense
from evaluations.config import RunConfig
from evaluations.records import SCHEMA_VERSION, setting_id

if TYPE_CHECKING:
    from evaluations.task import Sample, Task
    from visor.method import Method

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Setting:
    """A method at a budget. `budget` is None for a method that has no dial; dense is the budget 1.

    Args:
        name: registered name of the method.
        method: its options before a budget changes the one that is its dial.
    """

    name: str
    method: Method
    budget: float | None = None
    policy: str | None = None

    @property
    def id(self) -> str:
        return setting_id(self.name, self.budget, self.policy)


@dataclass(frozen=True)
class Lengths:
    """What a sample's schedule and price depend on, beside the model."""

    num_visual: int
    num_text: int


class Planner:
    """Schedules and prices, each computed once: samples share few different lengths.

    Args:
        geometry: of the model.
        dtype: number format of the run, which decides the bytes of a cached key.
    """

    def __init__(self, geometry: ModelGeometry, dtype: str) -> None:
        self.geometry = replace(geometry, dtype_bytes=DTYPE_BYTES[dtype])
        self._fitted: dict[tuple[Setting, Lengths], tuple[Method, Schedule]] = {}
        self._costs: dict[tuple[Schedule, int], Cost] = {}

    def fitted(self, setting: Setting, lengths: Lengths) -> tuple[Method, Schedule]:
        """The method with its dial set for a sample of these lengths, and its schedule.

        Raises:
            ValueError: the method cannot reach the budget, or cannot run on this model.
        """
        known = self._fitted.get((setting, lengths))
        if known is None:
            method = setting.method
            if setting.budget is not None and setting.name != "dense":
                method = fit(method, self.geometry, lengths.num_visual, lengths.num_text, setting.budget)
            known = self._fitted[setting, lengths] = (method, method.schedule(self.geometry, lengths.num_visual))
        return known

    def cost(self, schedule: Schedule, num_text: int) -> Cost:
        """The price of the prefill."""
        known = self._costs.get((schedule, num_text))
        if known is None:
            known = self._costs[schedule, num_text] = price(self.geometry, schedule, num_text)
        return known

    def dense_cost(self, lengths: Lengths) -> Cost:
        """The price of the unmodified model for a sample of these lengths."""
        return self.cost(dense(self.geometry.num_layers, lengths.num_visual), lengths.num_text)

    def relative_cost(self, setting: Setting, lengths: Lengths) -> float:
        """Decoder prefill FLOPs relative to dense."""
        cost = self.cost(self.fitted(setting, lengths)[1], lengths.num_text)
        return cost.decoder_prefill / self.dense_cost(lengths).decoder_prefill


@dataclass(frozen=True)
class PlannedTask:
    """A task with its samples, cut into batches that do not depend on anything but samples and batch size.

    Args:
        lengths: of its shortest and its longest question, between which all others lie.
    """

    name: str
    task: Task
    samples: tuple[Sample, ...]
    batches: tuple[tuple[Sample, ...], ...]
    lengths: tuple[Lengths, ...]

    @cached_property
    def samples_digest(self) -> str:
        return digest([[sample.sample_id, sample.question, list(sample.references)] for sample in self.samples])


@dataclass(frozen=True)
class Cell:
    """A setting on a task."""

    key: str
    setting: Setting
    task: PlannedTask


@dataclass(frozen=True)
class Plan:
    """All cells of a run, the tasks outermost, and what was left out."""

    tasks: tuple[PlannedTask, ...]
    settings: tuple[Setting, ...]
    cells: tuple[Cell, ...]
    unreachable: tuple[dict[str, Any], ...] = field(default=())


def digest(value: Any) -> str:
    """A hash of JSON data that is the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def make_batches(samples: Sequence[Sample], batch_size: int) -> tuple[tuple[Sample, ...], ...]:
    """Batches in a fixed order, images kept together: an image with several questions is encoded once.

    The batches follow from the samples and the batch size alone. Rounding may depend on a batch's composition, so a
    continued run that cut its batches elsewhere could answer differently from an unbroken one.
    """
    batches: list[list[Sample]] = [[]]
    by_image: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: (sample.image_id, sample.sample_id)):
        by_image.setdefault(sample.image_id, []).append(sample)
    for group in by_image.values():
        if len(batches[-1]) + len(group) > batch_size:
            batches.append([])
        for start in range(0, len(group), batch_size):
            if start:
                batches.append([])
            batches[-1] += group[start : start + batch_size]
    return tuple(tuple(batch) for batch in batches if batch)


def plan_task(name: str, task: Task, samples: Sequence[Sample], batch_size: int, loaded: Any) -> PlannedTask:
    """Order and measure the samples of a task.

    Raises:
        ValueError: there are none, or two have the same id.
    """
    if not samples:
        raise ValueError(f"task {name!r} yields no sample")
    ids = [sample.sample_id for sample in samples]
    if len(set(ids)) != len(ids):
        raise ValueError(f"task {name!r} yields two samples of the same id; records are told apart by it")
    batches = make_batches(samples, batch_size)
    lengths = []
    by_length = sorted(samples, key=lambda sample: (len(sample.question), sample.sample_id))
    for ordered in (by_length, by_length[::-1]):
        for sample in ordered:
            try:
                check_sample(sample)
                prepared = loaded.prepare(sample.image, sample.question)
            except Exception:  # it becomes a failed record later; here the next sample serves as well
                continue
            lengths.append(Lengths(prepared.num_visual, prepared.num_text))
            break
    return PlannedTask(name, task, tuple(s for batch in batches for s in batch), batches, tuple(dict.fromkeys(lengths)))


def check_sample(sample: Sample) -> None:
    """Refuse what no model can answer.

    Raises:
        ValueError: an empty question, or an image that cannot be decoded.
    """
    if not sample.question.strip():
        raise ValueError("the question is empty")
    if sample.image is None:
        raise ValueError("the sample has no image")
    try:
        sample.image.load()  # PIL decodes when first asked, and that is where a damaged file shows
    except Exception as error:
        raise ValueError(f"the image cannot be read: {error}") from error


def _with_seed(method: Method, seed: int) -> Method:
    return replace(method, seed=seed) if any(f.name == "seed" for f in fields(method)) else method


def make_settings(
    config: RunConfig, planner: Planner, lengths: Sequence[Lengths], check: Callable[[Sequence[Schedule]], None]
) -> tuple[tuple[Setting, ...], tuple[dict[str, Any], ...]]:
    """The settings of a run, and those left out, each with its reason.

    Args:
        check: raises ValueError if the model cannot run schedules (one of VISOR needs weights trained for it).

    Raises:
        ValueError: a method cannot reach a budget that was asked for, a method that was asked for cannot be run at all,
            or nothing is left to run.
    """
    settings: list[Setting] = []
    unreachable: list[dict[str, Any]] = []
    for name in config.methods:
        method = _with_seed(METHODS.get(name)(), config.seed)
        for setting in _of_method(name, method, config, planner, lengths):
            try:
                check([planner.fitted(setting, each)[1] for each in lengths])
            except ValueError as error:
                if config.budgets_asked:
                    raise ValueError(f"{setting.id}: {error}") from error
                unreachable.append({"method": name, "budget": setting.budget, "reason": str(error)})
            else:
                settings.append(setting)
        if config.methods_asked and all(setting.name != name for setting in settings):
            raise ValueError(f"{name} cannot be run: {unreachable[-1]['reason']}")
    if not settings:
        reasons = "; ".join(entry["reason"] for entry in unreachable)
        raise ValueError(f"there is nothing to run: no method reaches a budget of its list: {reasons}")
    return tuple(settings), tuple(unreachable)


def _of_method(
    name: str, method: Method, config: RunConfig, planner: Planner, lengths: Sequence[Lengths]
) -> list[Setting]:
    if name == "dense":
        return [Setting(name, method, 1.0)]
    try:
        has_dial = any(len(method.settings(planner.geometry, each.num_visual)) > 1 for each in lengths)
    except ValueError:
        has_dial = True  # what is wrong comes up, with its reason, when the settings are fitted
    return [Setting(name, method, budget) for budget in config.budgets] if has_dial else [Setting(name, method)]


def cell_key(cell_setting: Setting, task: PlannedTask, planner: Planner, config: RunConfig, checkpoint: str) -> str:
    """A hash of everything that can change the records of a cell."""
    return digest(
        {
            "schema": SCHEMA_VERSION,
            "checkpoint": checkpoint,
            "method": [cell_setting.name, cell_setting.method.options(), cell_setting.budget, cell_setting.policy],
            # The schedules at the shortest and longest question stand for the rule that makes them.
            "schedules": [planner.fitted(cell_setting, each)[1].to_json() for each in task.lengths],
            "task": [task.name, task.task.version, task.task.metric, task.task.max_new_tokens],
            "samples": task.samples_digest,
            "numerics": [config.device.partition(":")[0], config.dtype, config.attention, config.batch_size],
        }
    )[:20]


def make_plan(config: RunConfig, tasks: Sequence[PlannedTask], planner: Planner, loaded: Any) -> Plan:
    """All cells of a run of a loaded model.

    Raises:
        ValueError: as `make_settings`.
    """
    lengths = tuple(dict.fromkeys(each for task in tasks for each in task.lengths))
    settings, unreachable = make_settings(config, planner, lengths, loaded.check)
    cells = tuple(
        Cell(cell_key(setting, task, planner, config, loaded.checkpoint_sha256), setting, task)
        for task in tasks
        for setting in settings
    )
    return Plan(tuple(tasks), settings, cells, unreachable)
