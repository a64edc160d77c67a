"""From a configuration to cells: which settings there are, which of them are out of reach, and what each cell's key is.

A *setting* is a method at a budget or under a policy; a *cell* is a setting on a task. A cell's key is a hash of
everything that can change its output, so a record found under a key can be trusted, and anything new only adds cells.

A method with several configurations (VISOR on a checkpoint trained for them) has one cell a configuration that is run,
and cells that are *derived*: its budgets and its policies choose among answers that are already there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from budgets.costs import Cost, price
from budgets.geometry import ModelGeometry
from budgets.match import BudgetError, fit
from budgets.registry import METHODS
from budgets.schedule import Schedule, dense
from evaluations.config import RunConfig
from evaluations.models import Models, configurations_of
from evaluations.records import SCHEMA_VERSION, setting_id

if TYPE_CHECKING:
    from evaluations.task import Sample, Task
    from visor.reduction.method import Method

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
VALIDATION = "@validation"  # ends the name of a task's validation split


@dataclass(frozen=True)
class Setting:
    """A method at a budget or under a policy. `budget` is None for a method that has no dial; dense is the budget 1.

    Args:
        name: registered name of the method.
        method: its options before a budget changes the one that is its dial.
        value: configuration of the policy "fixed", cost weight of "router" (None: the paper's), threshold of "cascade".
        model: checkpoint that it runs on, by name; "" is the base.
        family: the configurations of that checkpoint as settings of the method, cheapest first; empty if it has none.
    """

    name: str
    method: Method
    budget: float | None = None
    policy: str | None = None
    value: float | None = None
    model: str = ""
    family: tuple[Method, ...] = ()

    @property
    def id(self) -> str:
        """Its name in records and tables: method, budget, policy and value."""
        return setting_id(self.name, self.budget, self.policy, self.value)

    @property
    def configuration(self) -> int | None:
        """Index of the configuration that answers all samples; None where there is no such one."""
        return int(self.value) if self.policy == "fixed" else None

    @property
    def derived(self) -> bool:
        """True if its answers are chosen among those of the configurations, instead of being run."""
        return bool(self.family) and self.policy != "fixed"


@dataclass(frozen=True)
class Lengths:
    """What a sample's schedule and price depend on, beside the model."""

    num_visual: int
    num_text: int


class Planner:
    """Schedules and prices, each computed once: samples share few different lengths.

    Args:
        geometry: of the base model.
        dtype: number format of the run, which decides the bytes of a cached key.
        others: by name, the geometries of the checkpoints of trained methods.
    """

    def __init__(self, geometry: ModelGeometry, dtype: str, others: Mapping[str, ModelGeometry] | None = None) -> None:
        in_dtype = lambda each: replace(each, dtype_bytes=DTYPE_BYTES[dtype])
        self.geometry = in_dtype(geometry)
        self.geometries = {"": self.geometry, **{name: in_dtype(each) for name, each in (others or {}).items()}}
        self._fitted: dict[tuple[Setting, Lengths], tuple[Method, Schedule]] = {}
        self._costs: dict[tuple[Schedule, int, str], Cost] = {}

    @classmethod
    def of(cls, models: Models, dtype: str) -> Planner:
        """For all checkpoints of a run."""
        return cls(models.base.geometry, dtype, {name: each.geometry for name, each in models.others.items()})

    def fitted(self, setting: Setting, lengths: Lengths) -> tuple[Method, Schedule]:
        """The method with its dial set for a sample of these lengths, and its schedule.

        Raises:
            ValueError: the method cannot reach the budget, or cannot run on this model, or the policy looks at more
                than the lengths.
        """
        known = self._fitted.get((setting, lengths))
        if known is None:
            geometry = self.geometries[setting.model]
            if setting.family:
                method = setting.family[self.configuration_within(setting, lengths)]
            elif setting.budget is not None and setting.name != "dense":
                method = fit(setting.method, geometry, lengths.num_visual, lengths.num_text, setting.budget)
            else:
                method = setting.method
            known = self._fitted[setting, lengths] = (method, method.schedule(geometry, lengths.num_visual))
        return known

    def configuration_within(self, setting: Setting, lengths: Lengths) -> int:
        """The configuration of a setting for a sample of these lengths: the fixed one, or the dearest in the budget.

        Raises:
            BudgetError: even the cheapest configuration costs more.
            ValueError: a policy that looks at more than the lengths.
        """
        if setting.configuration is not None:
            return setting.configuration
        if setting.budget is None:
            raise ValueError(f"the configuration of {setting.id} depends on the sample, not on its lengths alone")
        costs = self.relative_costs(setting, lengths)
        within = [i for i, cost in enumerate(costs) if cost <= setting.budget]
        if not within:
            raise BudgetError(
                f"{setting.method.title} cannot meet a budget of {setting.budget:g} with {lengths.num_visual} visual "
                f"and {lengths.num_text} text tokens: the cheapest configuration of the checkpoint costs "
                f"{min(costs):.4g} of the dense decoder prefill FLOPs"
            )
        return max(within, key=lambda i: (costs[i], i))

    def relative_costs(self, setting: Setting, lengths: Lengths) -> list[float]:
        """Decoder prefill FLOPs of each configuration of a setting's checkpoint, relative to dense."""
        geometry, dense_flops = self.geometries[setting.model], self.dense_cost(lengths).decoder_prefill
        schedules = [method.schedule(geometry, lengths.num_visual) for method in setting.family]
        return [self.cost(s, lengths.num_text, setting.model).decoder_prefill / dense_flops for s in schedules]

    def cost(self, schedule: Schedule, num_text: int, model: str = "") -> Cost:
        """The price of the prefill on a checkpoint of the run."""
        known = self._costs.get((schedule, num_text, model))
        if known is None:
            known = self._costs[schedule, num_text, model] = price(self.geometries[model], schedule, num_text)
        return known

    def router_flops(self, setting: Setting) -> int:
        """What asking the router about a sample costs; 0 where the policy asks none."""
        trained = self.geometries[setting.model].visor
        return trained.router_flops if trained is not None and setting.policy == "router" else 0

    def dense_cost(self, lengths: Lengths) -> Cost:
        """The price of the unmodified model for a sample of these lengths."""
        return self.cost(dense(self.geometry.num_layers, lengths.num_visual), lengths.num_text)

    def relative_cost(self, setting: Setting, lengths: Lengths) -> float:
        """Decoder prefill FLOPs relative to dense."""
        cost = self.cost(self.fitted(setting, lengths)[1], lengths.num_text, setting.model)
        return cost.decoder_prefill / self.dense_cost(lengths).decoder_prefill


@dataclass(frozen=True)
class PlannedTask:
    """A split of a task with its samples, cut into batches that do not depend on anything but samples and batch size.

    Args:
        name: of the task, with "@validation" behind it for that split.
        lengths: of its shortest and its longest question, between which all others lie.
    """

    name: str
    task: Task
    samples: tuple[Sample, ...]
    batches: tuple[tuple[Sample, ...], ...]
    lengths: tuple[Lengths, ...]

    @cached_property
    def samples_digest(self) -> str:
        """Hash of what is asked and what counts as right: part of a cell's key."""
        return digest([[sample.sample_id, sample.question, list(sample.references)] for sample in self.samples])


@dataclass(frozen=True)
class Cell:
    """A setting on a task.

    Args:
        sources: of a derived cell, the cells that it chooses from: by task and split, one a configuration.
    """

    key: str
    setting: Setting
    task: PlannedTask
    sources: Mapping[str, tuple[Cell, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """All cells of a run, the tasks outermost, and what was left out.

    Args:
        cells: those that are run, on the validation splits too where a policy needs them.
        derived: those that follow from the records of others.
        validation: the validation splits of the tasks; empty where no policy needs them.
        seed: of the run, for the random policy.
    """

    tasks: tuple[PlannedTask, ...]
    settings: tuple[Setting, ...]
    cells: tuple[Cell, ...]
    unreachable: tuple[dict[str, Any], ...] = field(default=())
    derived: tuple[Cell, ...] = ()
    validation: tuple[PlannedTask, ...] = ()
    seed: int = 0

    @property
    def all_cells(self) -> tuple[Cell, ...]:
        """Run and derived, in the order of the tasks."""
        places = {task.name: place for place, task in enumerate((*self.tasks, *self.validation))}
        return tuple(sorted((*self.cells, *self.derived), key=lambda cell: places[cell.task.name]))


def digest(value: Any) -> str:
    """A hash of JSON data that is the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def make_batches(samples: Sequence[Sample], batch_size: int) -> tuple[tuple[Sample, ...], ...]:
    """Batches in a fixed order, images kept together: an image with several questions is encoded once.

    Images whose longest questions are about equally long share a batch, so that little of it is padding.

    The batches follow from the samples and the batch size alone. Rounding may depend on a batch's composition, so a
    continued run that cut its batches elsewhere could answer differently from an unbroken one.
    """
    batches: list[list[Sample]] = [[]]
    by_image: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: (sample.image_id, sample.sample_id)):
        by_image.setdefault(sample.image_id, []).append(sample)
    longest = lambda group: max(len(sample.question) for sample in group)
    for group in sorted(by_image.values(), key=longest):  # of equally long ones, in the order of their ids
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
    config: RunConfig, planner: Planner, lengths: Sequence[Lengths], models: Models
) -> tuple[tuple[Setting, ...], tuple[dict[str, Any], ...]]:
    """The settings of a run, and those left out, each with its reason.

    Raises:
        ValueError: a method cannot reach a budget that was asked for, a method or a policy that was asked for cannot be
            run at all, or nothing is left to run.
    """
    settings: list[Setting] = []
    unreachable: list[dict[str, Any]] = []
    for name in config.methods:
        method, model = _with_seed(METHODS.get(name)(), config.seed), models.by_method.get(name, "")
        family = configurations_of(method, models[model])
        if "+" in name:  # composed with a reduction, whose dial it has; the layers are the checkpoint's default
            family = ()
        if family:
            found = _of_family(Setting(name, method, model=model, family=family), config)
        else:
            found = [replace(s, model=model) for s in _of_method(name, method, config, planner, lengths, model)]
        for setting in found:
            try:
                _check_setting(setting, planner, lengths, models[model])
            except ValueError as error:
                if config.budgets_asked and not setting.family:
                    raise ValueError(f"{setting.id}: {error}") from error
                if config.policies_asked and setting.policy in config.policies:
                    raise ValueError(f"policy {setting.policy!r}: {error}") from error
                unreachable.append(
                    {"method": name, "budget": setting.budget, "policy": setting.policy, "reason": str(error)}
                )
            else:
                settings.append(setting)
        if config.methods_asked and all(setting.name != name for setting in settings):
            raise ValueError(f"{name} cannot be run: {unreachable[-1]['reason']}")
    if not settings:
        reasons = "; ".join(entry["reason"] for entry in unreachable)
        raise ValueError(f"there is nothing to run: no method reaches a budget of its list: {reasons}")
    if config.policies_asked and not any(setting.family for setting in settings):
        raise ValueError(
            f"--policies {','.join(config.policies)}: no method of this run has configurations to choose from; they "
            "come with --methods visor on a checkpoint trained for it (--visor-model)"
        )
    return tuple(settings), tuple(unreachable)


def _of_method(
    name: str, method: Method, config: RunConfig, planner: Planner, lengths: Sequence[Lengths], model: str
) -> list[Setting]:
    if name == "dense":
        return [Setting(name, method, 1.0)]
    try:
        geometry = planner.geometries[model]
        has_dial = any(len(method.settings(geometry, each.num_visual)) > 1 for each in lengths)
    except ValueError:
        has_dial = True  # what is wrong comes up, with its reason, when the settings are fitted
    own = [] if has_dial and not method.adaptive else [Setting(name, method)]  # adaptive: also as the authors have it
    return [Setting(name, method, budget) for budget in config.budgets if has_dial] + own


def _of_family(setting: Setting, config: RunConfig) -> list[Setting]:
    """Every configuration, the budgets, and the policies with their values."""
    settings = [replace(setting, policy="fixed", value=i) for i in range(len(setting.family))]
    settings += [replace(setting, budget=budget) for budget in config.budgets]
    values = {"router": (None, *config.cost_weights), "cascade": config.thresholds}
    for policy in config.policies:
        if policy != "fixed":
            settings += [replace(setting, policy=policy, value=value) for value in values.get(policy, (None,))]
    return settings


def _check_setting(setting: Setting, planner: Planner, lengths: Sequence[Lengths], loaded: Any) -> None:
    """Refuse what cannot be run.

    Raises:
        ValueError: with the reason.
    """
    if not setting.derived or setting.budget is not None:
        loaded.check([planner.fitted(setting, each)[1] for each in lengths])
    elif setting.policy == "router" and not planner.router_flops(setting):
        raise ValueError(f"{setting.method.title}: the checkpoint has no router; train one, or leave the policy out")
    elif setting.policy == "cascade" and len(setting.family) < 2:
        raise ValueError(f"{setting.method.title}: a cascade needs 2 configurations, the checkpoint has 1")


def cell_key(cell_setting: Setting, task: PlannedTask, planner: Planner, config: RunConfig, checkpoint: str) -> str:
    """A hash of everything that can change the records of a cell."""
    return digest(
        {
            "schema": SCHEMA_VERSION,
            "checkpoint": checkpoint,
            "method": [cell_setting.name, *_identity(cell_setting)],
            # The schedules at the shortest and longest question stand for the rule that makes them.
            "schedules": [planner.fitted(cell_setting, each)[1].to_json() for each in task.lengths],
            "task": [task.name, task.task.version, task.task.metric, task.task.max_new_tokens],
            "samples": task.samples_digest,
            "numerics": [config.device.partition(":")[0], config.dtype, config.attention, config.batch_size],
        }
    )[:20]


def _identity(setting: Setting) -> list[Any]:
    """What tells a setting of a method from the others, options included."""
    if not setting.family:
        return [setting.method.options(), setting.budget, setting.policy]
    return [[each.options() for each in setting.family], setting.budget, setting.policy, setting.value]


def make_plan(
    config: RunConfig,
    tasks: Sequence[PlannedTask],
    planner: Planner,
    models: Models,
    validation: Sequence[PlannedTask] = (),
) -> Plan:
    """All cells of a run.

    Args:
        validation: the validation splits of the tasks, for policies that are chosen on them.

    Raises:
        ValueError: as `make_settings`.
    """
    lengths = tuple(dict.fromkeys(each for task in tasks for each in task.lengths))
    settings, unreachable = make_settings(config, planner, lengths, models)
    cell = lambda setting, task: Cell(
        cell_key(setting, task, planner, config, models[setting.model].checkpoint_sha256), setting, task
    )
    cells = [cell(setting, task) for task in tasks for setting in settings if not setting.derived]
    if any(setting.policy == "per-task" for setting in settings):
        cells += [cell(setting, task) for task in validation for setting in settings if setting.policy == "fixed"]
    else:
        validation = ()
    derived = tuple(
        derived_cell(setting, task, cells, config.seed) for task in tasks for setting in settings if setting.derived
    )
    return Plan(tuple(tasks), settings, tuple(cells), unreachable, derived, tuple(validation), config.seed)


def derived_cell(setting: Setting, task: PlannedTask, cells: Sequence[Cell], seed: int) -> Cell:
    """A cell that chooses from others: its key follows from theirs, so that it is made anew when one of them changes.

    The random policy deals out the choices of the whole suite, so it looks at all tasks; per-task at the validation
    split of its task; the others at their own task alone.
    """
    names = [task.name]
    if setting.policy == "per-task":
        names.append(task.name + VALIDATION)
    if setting.policy == "random":
        names = [each.task.name for each in cells if not each.task.name.endswith(VALIDATION)]
    sources = {
        name: tuple(
            each
            for each in cells
            if each.task.name == name and each.setting.name == setting.name and each.setting.policy == "fixed"
        )
        for name in dict.fromkeys(names)
    }
    keys = {name: [source.key for source in group] for name, group in sources.items()}
    key = digest(["derived", setting.name, task.name, *_identity(setting), keys, seed])[:20]
    return Cell(key, setting, task, sources)
