"""From settings and tasks to the plan of a run: its cells, and the key of each.

A *cell* is a setting on a task. A cell's key is a hash of everything that can change its output, so a record found
under a key can be trusted, and anything new only adds cells. The cells of derived settings choose among the records of
others, and their keys follow from theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from evaluations.batches import VALIDATION, PlannedTask
from evaluations.config import RunConfig
from evaluations.models import Models
from evaluations.records import SCHEMA_VERSION, digest
from evaluations.settings import Planner, Setting, make_settings
from visor.vision.image import MAX_PIXELS


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
        max_pixels: samples with a larger image fail.
    """

    tasks: tuple[PlannedTask, ...]
    settings: tuple[Setting, ...]
    cells: tuple[Cell, ...]
    unreachable: tuple[dict[str, Any], ...] = field(default=())
    derived: tuple[Cell, ...] = ()
    validation: tuple[PlannedTask, ...] = ()
    seed: int = 0
    max_pixels: int = MAX_PIXELS

    @property
    def all_cells(self) -> tuple[Cell, ...]:
        """Run and derived, in the order of the tasks."""
        places = {task.name: place for place, task in enumerate((*self.tasks, *self.validation))}
        return tuple(sorted((*self.cells, *self.derived), key=lambda cell: places[cell.task.name]))


def cell_key(cell_setting: Setting, task: PlannedTask, planner: Planner, config: RunConfig, checkpoint: str) -> str:
    """A hash of everything that can change the records of a cell."""
    return digest(
        {
            "schema": SCHEMA_VERSION,
            "checkpoint": checkpoint,
            "method": [cell_setting.name, *_identity(cell_setting), *_rule_version(cell_setting)],
            # The schedules at the shortest and longest question stand for the rule that makes them.
            "schedules": [planner.fitted(cell_setting, each)[1].to_json() for each in task.lengths],
            "task": [task.name, task.task.version, task.task.metric, task.task.max_new_tokens],
            "samples": task.samples_digest,
            "numerics": [config.device.partition(":")[0], config.dtype, config.attention, config.batch_size],
            # Only where it was asked for: the keys of all other runs stay what they were.
            **({"generation": sorted(config.generation)} if config.generation else {}),
            **({"system": config.system} if config.system is not None else {}),
        }
    )[:20]


def _rule_version(setting: Setting) -> list[int]:
    """The method's version where its rule has changed since records were first kept."""
    return [setting.method.version] if setting.method.version > 1 else []


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
    return Plan(
        tuple(tasks), settings, tuple(cells), unreachable, derived, tuple(validation), config.seed, config.max_pixels
    )


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
