"""A run folder as the report sees it: settings, tasks, one table of samples, timings. Reads, never computes.

A *setting* is a method at a budget or under a policy; a *cell* is a setting on a task. Reading goes through
`evaluations.records`, so there is one reader of the schema. Imports neither torch nor the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from budgets.match import budget_label
from evaluations.records import Manifest, RunFolder, SampleRecord, TimingRecord
from reports.style import method_rank

FLOPS_PARTS = (
    "decoder_projections",
    "decoder_attention",
    "decoder_mlp",
    "cross_projections",
    "cross_attention",
    "scoring",
    "router",
    "tower",
    "projector",
    "lm_head",
)


POLICY_ORDER = ("fixed", "per-task", "router", "cascade", "random", "oracle")
DIALS = {"fixed": "configuration", "router": "cost_weight", "cascade": "threshold"}  # parameter that a policy sweeps
HEADLINES = {"router": None, "cascade": 0.9}  # the value that stands for the whole sweep


@dataclass(frozen=True)
class Setting:
    """A method at one budget or under one policy.

    Args:
        id: `<method>`, `<method>@<budget>`, `<method>:<policy>` or `<method>:<policy>(<value>)`.
        params: the method's own options, as the manifests give them, of the first task.
        configurations: SELF layers of each configuration of a method that has several, cheapest first; else empty.
        model: checkpoint, where it is not the run's own.
    """

    id: str
    method: str
    title: str
    budget: float | None
    policy: str | None
    trained: bool
    params: dict[str, Any] = field(hash=False, compare=False, default_factory=dict)
    configurations: tuple[str, ...] = ()
    model: str | None = None

    @property
    def is_dense(self) -> bool:
        """True for the reference."""
        return self.method == "dense"

    @property
    def is_blind(self) -> bool:
        """True for the control that sees no image: the floor under all methods, never a rival."""
        return self.method == "blind"

    @property
    def is_policy(self) -> bool:
        """True if it chooses among configurations; a fixed configuration is none."""
        return self.policy not in (None, "fixed")

    @property
    def value(self) -> float | None:
        """Where on its policy's dial it stands: configuration, cost weight or threshold."""
        return self.params.get(DIALS.get(self.policy or "", ""))

    @property
    def is_swept(self) -> bool:
        """True for a point of a policy's curve that does not stand for the policy in tables and matrices."""
        return self.policy in HEADLINES and self.value != HEADLINES[self.policy]

    @property
    def is_composed(self) -> bool:
        """True if its answers are other settings' answers, so that it has no run of its own to time."""
        return self.is_policy and self.policy != "router"

    @property
    def repeats(self) -> bool:
        """True for a budget of a method with configurations: it gives the answers of one that stands by itself."""
        return bool(self.configurations) and self.budget is not None

    @property
    def is_oracle(self) -> bool:
        """An oracle knows the answers: a bound, never a rival."""
        return self.policy == "oracle"

    @property
    def dial(self) -> str:
        """What tells settings of one method apart, for a reader: "25 %", "1 SELF, layer 4", "router policy"."""
        if self.policy == "fixed" and self.configurations and self.value is not None:
            return configuration_name(self.configurations[int(self.value)])
        if self.policy in ("router", "cascade") and self.value is not None:
            return f"{self.policy}, {'lambda' if self.policy == 'router' else 'threshold'} = {self.value:g}"
        if self.policy is not None:
            return f"{self.policy} policy"
        return "" if self.budget is None or self.is_dense else budget_label(self.budget)

    @property
    def label(self) -> str:
        """Title and dial."""
        if self.policy == "fixed":
            return f"{self.title} ({self.dial})"
        return (
            f"{self.title} at {self.dial}" if self.policy is None and self.dial else f"{self.title} {self.dial}".strip()
        )


def configuration_name(self_layers: str) -> str:
    """ "4,7" to "2 SELF, layers 4, 7"; "" to "0 SELF"."""
    layers = self_layers.split(",") if self_layers else []
    where = f", layer{'s' * (len(layers) > 1)} {', '.join(layers)}" if layers else ""
    return f"{len(layers)} SELF{where}"


@dataclass(frozen=True)
class TaskInfo:
    """What the run says about a task."""

    name: str
    title: str
    metric: str
    kind: str
    version: Any
    num_samples: int | None


@dataclass(frozen=True)
class Run:
    """Everything read from a run folder.

    Args:
        run: run.json.
        settings: dense first, then by method and falling budget.
        tasks: the suite's, in its order, those without a finished cell too.
        manifests: by (setting id, task name); the cells that are shown.
        samples: one row a record of a shown cell: its fields, and `setting_id`, `task`.
        timings: the raw measured runs of the shown settings.
        num_left_out: finished cells of the folder that are not shown, being of another suite or superseded.
    """

    folder: RunFolder
    run: dict[str, Any]
    settings: list[Setting]
    tasks: list[TaskInfo]
    manifests: dict[tuple[str, str], Manifest]
    samples: pd.DataFrame
    timings: list[TimingRecord]
    num_left_out: int

    @property
    def dense(self) -> Setting | None:
        """The reference's setting; None in a run without it."""
        return next((setting for setting in self.settings if setting.is_dense), None)

    @property
    def untrained(self) -> bool:
        """True if a checkpoint of the run says that its weights were never trained."""
        provenance = self.run.get("provenance", {})
        shown = {setting.method for setting in self.settings}
        others = [each for method, each in (provenance.get("checkpoints") or {}).items() if method in shown]
        return any(each.get("trained") is False for each in (provenance.get("checkpoint") or {}, *others))

    @property
    def limit(self) -> int | None:
        """Samples of each task, where the suite's own limits were overridden."""
        return self.run.get("limit")

    def scores(self, task: str) -> pd.DataFrame:
        """Scores [sample_id x setting id] of a task, NaN where a setting has no such sample."""
        rows = self.samples[self.samples.task == task]
        table = rows.pivot(index="sample_id", columns="setting_id", values="score")
        return table.reindex(columns=[s.id for s in self.settings]).sort_index()

    def images_of(self, task: str) -> pd.Series:
        """Image id by sample id: the clusters of a task."""
        rows = self.samples[self.samples.task == task].drop_duplicates("sample_id")
        return rows.set_index("sample_id").image_id


def _better(new: Manifest, old: Manifest, current: set[str]) -> bool:
    """Which of two cells of one setting and task is shown: that of the last run, a good one, the larger one."""
    rank = lambda m: (m.key in current, m.status == "ok", m.num_samples, m.key)
    return rank(new) > rank(old)


def load(path: str | Path) -> Run:
    """Read a run folder.

    Raises:
        evaluations.records.RecordsError: no run folder, an unreadable file, another schema.
        ValueError: no finished cell in it.
    """
    folder = RunFolder.open(path)
    run = folder.read_run()
    manifests = folder.manifests()
    suite_tasks = run.get("suite", {}).get("tasks") or [{"name": name} for name in sorted({m.task for m in manifests})]
    names = [task["name"] for task in suite_tasks]
    current = set(run.get("cells", []))
    shown: dict[tuple[str, str], Manifest] = {}
    for manifest in manifests:
        place = (manifest.setting_id, manifest.task)
        if manifest.task in names and (place not in shown or _better(manifest, shown[place], current)):
            shown[place] = manifest
    if not shown:
        raise ValueError(f"{folder.path} holds no finished cell of suite tasks {', '.join(names)}; run the sweep first")
    metrics = {manifest.task: manifest.metric for manifest in shown.values()}
    tasks = [
        TaskInfo(
            task["name"],
            task.get("title") or task["name"],
            task.get("metric") or metrics.get(task["name"], ""),
            task.get("kind", ""),
            task.get("version"),
            task.get("num_samples"),
        )
        for task in suite_tasks
    ]
    settings = {}
    for manifest in shown.values():
        settings.setdefault(
            manifest.setting_id,
            Setting(
                manifest.setting_id,
                manifest.method,
                manifest.title or manifest.method,
                manifest.budget,
                manifest.policy,
                manifest.trained,
                manifest.params,
                tuple(str(each.get("self_layers", "")) for each in manifest.configurations or ()),
                manifest.model,
            ),
        )
    ordered = sorted(settings.values(), key=_place)
    timings = [record for record in folder.timings() if record.setting_id in settings]
    return Run(folder, run, ordered, tasks, shown, _samples(folder, shown), timings, len(manifests) - len(shown))


def _place(setting: Setting) -> tuple:
    """Methods in their order; of each its configurations, then budgets, then policies."""
    policy = setting.policy
    kind = 1 if policy is None else POLICY_ORDER.index(policy) * 2 if policy in POLICY_ORDER else 99
    value = setting.value if isinstance(setting.value, (int, float)) else -1.0
    return method_rank(setting.method), setting.method, kind, policy or "", -(setting.budget or 0), value


def _samples(folder: RunFolder, shown: dict[tuple[str, str], Manifest]) -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for (setting, task), manifest in shown.items():
        if manifest.status != "ok":
            continue
        seen: set[str] = set()
        for record in folder.samples(manifest.key):
            if record.sample_id not in seen:  # the same question twice in a task is one sample
                seen.add(record.sample_id)
                rows.append({"setting_id": setting, "task": task, **_flat(record)})
    fields = [name for name in SampleRecord.__dataclass_fields__ if name != "values"]  # the manifest has what they make
    columns = ["setting_id", "task", *fields]
    frame = pd.DataFrame(rows, columns=[*columns, *(f"flops_{part}" for part in FLOPS_PARTS)])
    for name in ("decoder_flops", "dense_decoder_flops", "kv_bytes", "num_text", "num_visual", "score", "confidence"):
        frame[name] = frame[name].astype(float)
    for name in (
        "kept",
        "configuration",
        "answer",
        "error",
        "grid",
        "visual_tokens",
        "layer_flops",
        "routing",
        "attempts",
    ):  # pandas makes NaN of None in texts
        column = frame[name].astype(object)
        frame[name] = column.where(column.notna(), None)
    frame["visual_tokens_mean"] = [float(np.mean(v)) if v else np.nan for v in frame.visual_tokens]
    return frame


def _flat(record: SampleRecord) -> dict[str, Any]:
    """A record's fields, and its FLOPs by part as columns of their own."""
    flops = record.flops or {}
    parts = {f"flops_{part}": float(flops[part]) if part in flops else np.nan for part in FLOPS_PARTS}
    return {**{name: value for name, value in record.to_dict().items() if name != "values"}, **parts}
