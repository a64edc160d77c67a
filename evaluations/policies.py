"""Derived cells: the records of a budget or a policy, chosen among those of the configurations. Nothing is run.

Under greedy decoding an answer depends on the sample and the configuration alone, so the records of every configuration
on every sample hold those of every policy over them, exactly: a policy's record is the chosen configuration's with the
choice written in and all that it cost added. The router's own words stand in the records of the first configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from budgets import policies
from evaluations.batches import VALIDATION, Lengths
from evaluations.cells import Cell, Plan
from evaluations.progress import Progress
from evaluations.records import Manifest, RecordsError, RunFolder, SampleRecord
from evaluations.settings import Planner, Setting

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Table:
    """What every configuration did on the samples that all of them have answered.

    Args:
        records: by sample id, one record a configuration.
        failed: by sample id, the first error, where a configuration has one.
    """

    records: dict[str, tuple[SampleRecord, ...]]
    failed: dict[str, SampleRecord]

    @classmethod
    def read(cls, folder: RunFolder, sources: Sequence[Cell]) -> Table:
        """From the finished cells of the configurations.

        Raises:
            RecordsError: one of them is not finished, or failed.
        """
        columns = []
        for cell in sources:
            manifest = folder.manifest(cell.key)
            if manifest is None or manifest.status != "ok":
                why = "was not run" if manifest is None else manifest.error
                raise RecordsError(f"{cell.setting.id} on {cell.task.name} has no records to choose from: {why}")
            columns.append({record.sample_id: record for record in folder.samples(cell.key)})
        records, failed = {}, {}
        for sample_id in columns[0]:
            row = tuple(column[sample_id] for column in columns)
            error = next((record for record in row if record.error is not None), None)
            if error is None:
                records[sample_id] = row
            else:
                failed[sample_id] = error
        return cls(records, failed)

    @property
    def ids(self) -> list[str]:
        """Samples that every configuration has answered, in order."""
        return list(self.records)

    def matrix(self, name: str) -> NDArray[np.float64]:
        """A figure of the records, [num_samples, num_configurations]."""
        return np.array([[getattr(record, name) for record in row] for row in self.records.values()], dtype=float)

    @property
    def scores(self) -> NDArray[np.float64]:
        """Of each answer, [num_samples, num_configurations]."""
        return self.matrix("score")

    @property
    def costs(self) -> NDArray[np.float64]:
        """Decoder prefill FLOPs, the router's left out."""
        return self.matrix("decoder_flops")

    @property
    def relative_costs(self) -> NDArray[np.float64]:
        """Decoder prefill FLOPs relative to dense, the router's left out, [num_samples, num_configurations]."""
        return self.costs / self.matrix("dense_decoder_flops")

    @property
    def logits(self) -> NDArray[np.float64]:
        """What the router said.

        Raises:
            RecordsError: it was not asked.
        """
        rows = [row[0].routing for row in self.records.values()]
        if any(row is None for row in rows):
            raise RecordsError("the records of the first configuration hold no routing: run them anew, in a new folder")
        return np.array(rows, dtype=float)


def choose(setting: Setting, table: Table, planner: Planner) -> tuple[NDArray[np.int64], NDArray[np.bool_] | None]:
    """The configuration of each sample, and all that ran where these are several; policies that see one task only."""
    if setting.budget is not None:
        lengths = [Lengths(row[0].num_visual, row[0].num_text) for row in table.records.values()]
        return np.array([planner.configuration_within(setting, each) for each in lengths], dtype=int), None
    if setting.policy == "oracle":
        return policies.oracle(table.scores, table.costs), None
    if setting.policy == "router" and setting.value is None:
        return policies.most_likely(table.logits), None
    if setting.policy == "router":
        return policies.cost_aware(policies.success(table.logits), table.relative_costs, setting.value), None
    if setting.policy == "cascade":
        return policies.cascade(table.matrix("confidence"), setting.value, policies.ladder(table.costs.mean(axis=0)))
    raise AssertionError(setting.policy)


def derive(cell: Cell, folder: RunFolder, planner: Planner, seed: int) -> tuple[list[SampleRecord], dict[str, Any]]:
    """The records of a derived cell in the order of its samples, and what was decided for the whole of it.

    Raises:
        ValueError: a cell that it chooses from is missing or failed, or the policy cannot be computed.
    """
    setting, task = cell.setting, cell.task.name
    tables = {name: Table.read(folder, sources) for name, sources in cell.sources.items()}
    table, params, ran = tables[task], {}, None
    if not table.records:
        return [table.failed[sample.sample_id] for sample in cell.task.samples], params
    if setting.policy == "per-task":
        validation = tables[task + VALIDATION]
        chosen_for = policies.best_per_task(validation.scores, validation.costs, [task] * len(validation.records))
        choice = policies.by_task(chosen_for, [task] * len(table.records))
        params = {"configuration": chosen_for[task], "validation_samples": len(validation.records)}
    elif setting.policy == "random":
        choice, params = _dealt(cell, tables, planner, seed)
    else:
        choice, ran = choose(setting, table, planner)
    if setting.budget is not None:
        used = sorted(set(choice.tolist()))
        params = {"configuration": used[0] if len(used) == 1 else [used[0], used[-1]]}
    if setting.policy == "router":
        params = {"cost_weight": setting.value}
    if setting.policy == "cascade":
        params = {"threshold": setting.value, "configurations": policies.ladder(table.costs.mean(axis=0))}
    records = dict(table.failed)
    for number, (sample_id, row) in enumerate(table.records.items()):
        attempts = [int(choice[number])] if ran is None else np.flatnonzero(ran[number]).tolist()
        records[sample_id] = combined(row, int(choice[number]), attempts, planner.router_flops(setting))
    return [records[sample.sample_id] for sample in cell.task.samples], params


def _dealt(
    cell: Cell, tables: Mapping[str, Table], planner: Planner, seed: int
) -> tuple[NDArray[np.int64], dict[str, Any]]:
    """The router's choices over the whole suite, dealt out; without a router, all configurations equally likely."""
    setting, table = cell.setting, tables[cell.task.name]
    if not planner.router_flops(replace(setting, policy="router")):
        return policies.uniform(len(setting.family), table.ids, seed), {"matches": "nothing: uniform"}
    ids, choices = [], []
    for name in sorted(tables):  # the order in which tasks were asked for must not matter
        if tables[name].records:
            ids += [f"{name}:{sample_id}" for sample_id in tables[name].ids]
            choices.append(policies.most_likely(tables[name].logits))
    dealt = dict(zip(ids, policies.deal(np.concatenate(choices), ids, seed).tolist(), strict=True))
    return np.array([dealt[f"{cell.task.name}:{i}"] for i in table.ids], dtype=int), {"matches": "router"}


def combined(row: Sequence[SampleRecord], chosen: int, attempts: Sequence[int], router_flops: int) -> SampleRecord:
    """The record of the configuration that answered, with everything paid that was run to get there.

    The tower and the projector run once however many configurations are tried. Memory is that of the last attempt:
    the caches of the others are gone by then.
    """
    record, others = row[chosen], [row[i] for i in attempts if i != chosen]
    parts = dict(record.flops)
    parts["router"] = parts.get("router", 0) + router_flops
    layers = list(record.layer_flops)
    for other in others:
        for part, flops in other.flops.items():
            parts[part] += flops if part not in ("tower", "projector") else 0
        layers = [mine + more for mine, more in zip(layers, other.layer_flops, strict=True)]
    return replace(
        record,
        decoder_flops=record.decoder_flops + router_flops + sum(other.decoder_flops for other in others),
        flops=parts,
        layer_flops=layers,
        routing=None,
        configuration=chosen,
        attempts=list(attempts) if others else None,
    )


def manifest_of(cell: Cell, suite: str, records: Sequence[SampleRecord], error: str | None = None) -> Manifest:
    """A cell's manifest but for its options and its time."""
    setting, task = cell.setting, cell.task
    return Manifest(
        key=cell.key,
        method=setting.name,
        title=setting.method.title,
        params={},
        trained=setting.method.trained,
        budget=setting.budget,
        policy=setting.policy,
        suite=suite,
        task=task.name,
        metric=task.task.metric,
        num_samples=len(task.samples),
        num_failed=sum(record.error is not None for record in records),
        status="ok" if error is None else "failed",
        error=error,
        seconds=0.0,
        setting_id=setting.id,
        model=setting.model or None,
        configurations=[each.options() for each in setting.family] or None,
        aggregate=task.task.aggregate(records) if error is None else None,
    )


def derive_all(plan: Plan, folder: RunFolder, planner: Planner, suite: str, progress: Progress) -> None:
    """Write the derived cells that are not done; one that cannot be derived is recorded as failed."""
    for cell in plan.derived:
        manifest = folder.manifest(cell.key)
        if manifest is not None and manifest.status == "ok":
            continue
        records, params, error = [], {}, None
        try:
            records, params = derive(cell, folder, planner, plan.seed)
        except ValueError as problem:
            error = " ".join(str(problem).split())
            progress.say(f"{cell.setting.id} on {cell.task.name} failed: {error}")
        file = folder.samples_file(cell.key)
        file.cut(0)
        file.append(record.to_dict() for record in records)
        folder.write_manifest(replace(manifest_of(cell, suite, records, error), params=params))
