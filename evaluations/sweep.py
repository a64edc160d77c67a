"""The accuracy pass: every cell gets one record a sample, whatever happens to the process on the way.

The order is task, batch, setting: a batch is prepared and encoded once and then answered under every setting, so the
vision tower runs once an image however many methods are compared. A cell's records are a prefix of its batches.
Continuing cuts a cell back to whole batches and goes on with the same batches, which gives the same bytes as an
unbroken run.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from evaluations.batches import Lengths, PlannedTask, check_sample
from evaluations.cells import Cell, Plan
from evaluations.features import FeatureCache, FeatureKey
from evaluations.models import Models, tower_key
from evaluations.policies import derive_all, manifest_of
from evaluations.progress import Progress
from evaluations.records import NUM_EXPLORER_SAMPLES, RunFolder, SampleRecord, digest, pack_bits
from evaluations.settings import Planner, Setting
from evaluations.task import prepare_sample
from visor.reduction.method import tower_reduction

if TYPE_CHECKING:
    from budgets.schedule import Schedule
    from evaluations.task import Sample


@dataclass
class CellState:
    """A cell while it is run."""

    cell: Cell
    num_batches_done: int = 0
    num_resumed: int = 0
    error: str | None = None
    seconds: float = 0.0

    @property
    def open(self) -> bool:
        """True if there is something left to run."""
        return self.error is None and self.num_batches_done < len(self.cell.task.batches)


@dataclass
class BatchInputs:
    """One batch, ready for every setting of a checkpoint: what could be prepared, and why the rest could not."""

    samples: Sequence[Sample]
    prepared: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepResult:
    """What an accuracy pass left behind."""

    num_cells: int
    num_failed_cells: int
    num_samples: int
    num_failed_samples: int
    seconds: float


class Sweep:
    """Runs the cells of a plan that are not done.

    Args:
        models: the checkpoints.
        planner: schedules and prices for their geometries.
        folder: where records go; the caller holds its lock.
        suite: name of the suite, for the manifests.
        cache: vision features.
    """

    def __init__(
        self, models: Models, plan: Plan, planner: Planner, folder: RunFolder, suite: str, cache: FeatureCache
    ) -> None:
        self.models, self.plan, self.planner, self.folder, self.suite = models, plan, planner, folder, suite
        self.cache = cache
        self.unsaved: dict[str, str] = {}  # why the image of a sample is not among those of the report
        # One look at the tower serves all methods: what any of them wants to see is recorded for all.
        self.taps = frozenset().union(*(setting.method.taps for setting in plan.settings))

    def pending(self) -> dict[str, CellState]:
        """Where each cell stands, by key; a cell with a manifest that says "ok" is absent. Changes nothing."""
        states = {}
        for cell in self.plan.cells:
            manifest = self.folder.manifest(cell.key)
            if manifest is None or manifest.status != "ok":
                states[cell.key] = self._state(cell)
        return states

    def _state(self, cell: Cell) -> CellState:
        """Whole batches that are already recorded."""
        recorded = [record.sample_id for record in self.folder.samples(cell.key)]
        state = CellState(cell)
        for batch in cell.task.batches:
            end = state.num_resumed + len(batch)
            if recorded[state.num_resumed : end] != [sample.sample_id for sample in batch]:
                break
            state.num_resumed, state.num_batches_done = end, state.num_batches_done + 1
        return state

    def run(self, states: dict[str, CellState], progress: Progress) -> SweepResult:
        """Complete the cells of `states`; a cell that fails is recorded as such and the others go on."""
        started = time.monotonic()
        for state in states.values():
            self.folder.samples_file(state.cell.key).cut(state.num_resumed)
        for task in (*self.plan.tasks, *self.plan.validation):
            of_task = [states[cell.key] for cell in self.plan.cells if cell.task is task and cell.key in states]
            if of_task:
                if task in self.plan.tasks:
                    self._save_images(task)
                self._run_task(task, of_task, progress)
        derive_all(self.plan, self.folder, self.planner, self.suite, progress)
        return self._result(time.monotonic() - started)

    def _save_images(self, task: PlannedTask) -> None:
        """The images that the report's explorer shows: a rule, not a choice.

        An image that cannot be saved fails its sample, not the run.
        """
        for sample in sorted(task.samples, key=lambda sample: sample.sample_id)[:NUM_EXPLORER_SAMPLES]:
            try:
                image = check_sample(sample, self.plan.max_pixels)
            except ValueError:
                continue  # it fails for the same reason when it is prepared
            if image is None:
                continue
            try:
                self.folder.save_image(sample.image_id, image)
            except (OSError, ValueError) as error:  # an id that is no file name, say
                self.unsaved[sample.sample_id] = f"its image cannot be saved for the report: {describe(error)}"

    def _run_task(self, task: PlannedTask, states: list[CellState], progress: Progress) -> None:
        for number, batch in enumerate(task.batches):
            waiting = [state for state in states if state.open and state.num_batches_done == number]
            inputs: dict[str, BatchInputs] = {}
            for state in waiting:
                model = state.cell.setting.model
                if model not in inputs:
                    inputs[model] = self._prepare(batch, model)
                self._run_batch(state, inputs[model], progress)
        for state in states:
            self._finish(state)

    def _prepare(self, batch: Sequence[Sample], model: str) -> BatchInputs:
        inputs = BatchInputs(batch)
        for sample in batch:
            try:
                check_sample(sample, self.plan.max_pixels)
                if sample.sample_id in self.unsaved:
                    raise ValueError(self.unsaved[sample.sample_id])
                inputs.prepared[sample.sample_id] = prepare_sample(self.models[model], sample)
            except Exception as error:
                inputs.errors[sample.sample_id] = describe(error)
        return inputs

    def _run_batch(self, state: CellState, inputs: BatchInputs, progress: Progress) -> None:
        started = time.monotonic()
        cell = state.cell
        try:
            records = self._answer(cell, inputs)
            self.folder.samples_file(cell.key).append(record.to_dict() for record in records)
        except Exception as error:
            state.error = describe(error)
            details = "".join(traceback.format_exception(error))
            (self.folder.cell_path(cell.key)).mkdir(parents=True, exist_ok=True)
            (self.folder.cell_path(cell.key) / "error.txt").write_text(details, encoding="utf-8")
            progress.say(f"{cell.setting.id} on {cell.task.name} failed: {state.error}")
            left = sum(map(len, cell.task.batches[state.num_batches_done :]))
            progress.advance(left, f"{cell.task.name} {cell.setting.id}")
        else:
            state.num_batches_done += 1
            progress.advance(len(inputs.samples), f"{cell.task.name} {cell.setting.id}")
        state.seconds += time.monotonic() - started

    def _answer(self, cell: Cell, inputs: BatchInputs) -> list[SampleRecord]:
        """Records of one batch under one setting, in the order of the batch."""
        loaded = self.models[cell.setting.model]
        errors, schedules = dict(inputs.errors), {}
        for sample_id, prepared in inputs.prepared.items():
            try:
                lengths = Lengths(prepared.num_visual, prepared.num_text)
                schedules[sample_id] = self.planner.fitted(cell.setting, lengths)[1]
            except ValueError as error:
                errors[sample_id] = describe(error)
        generations = {}
        if schedules:
            ids = list(schedules)
            prepared = [inputs.prepared[i] for i in ids]
            vision = self._encode(loaded, prepared, [schedules[i] for i in ids])
            if cell.setting.method.adaptive:
                resolved = loaded.resolve(vision, [schedules[i] for i in ids])
                schedules = dict(zip(ids, resolved, strict=True))
            for i, one in zip(ids, prepared, strict=True):
                try:
                    loaded.check_length(one, schedules[i])
                except ValueError as error:
                    errors[i] = describe(error)
            rows = [row for row, i in enumerate(ids) if i not in errors]
            ids, prepared, vision = ([items[row] for row in rows] for items in (ids, prepared, vision))
        if schedules and ids:
            ordered = [schedules[i] for i in ids]
            stop = cell.task.task.stop_strings
            limits = {"max_new_tokens": cell.task.task.max_new_tokens, **({"stop_strings": stop} if stop else {})}
            answers = loaded.generate(prepared, vision, ordered, **limits)
            # What the router says of a sample does not depend on the configuration: it is asked once, with the first.
            asks = cell.setting.configuration == 0 and self._has_router(cell.setting)
            routing = loaded.route(prepared, vision, ordered) if asks else [None] * len(ids)
            for i, answer, logits in zip(ids, answers, routing, strict=True):
                if answer.error is not None:
                    errors[i] = answer.error
                elif logits is not None and not all(map(math.isfinite, logits)):
                    errors[i] = f"the router's logits are not finite: {logits}"
            generations = {i: each for i, *each in zip(ids, answers, vision, routing, strict=True)}
        records = []
        for sample in inputs.samples:
            i = sample.sample_id
            if i not in errors:
                try:
                    records.append(self._record(cell, sample, inputs.prepared[i], schedules[i], *generations[i]))
                except ValueError as error:  # a benchmark's own rules may not know what to make of an answer
                    errors[i] = describe(error)
            if i in errors:
                records.append(_failed(sample, errors[i]))
        return records

    def _has_router(self, setting: Setting) -> bool:
        trained = self.planner.geometries[setting.model].visor
        return trained is not None and bool(trained.router)

    def _encode(self, loaded: Any, prepared: Sequence[Any], schedules: Sequence[Schedule]) -> list[Any]:
        """Vision features of each sample, from the cache or from one call for all images that are encoded alike."""
        features: list[Any] = [None] * len(prepared)
        treatments = [(schedule.image_scale, tower_reduction(schedule)) for schedule in schedules]
        for scale, inside in sorted(set(treatments), key=lambda t: (-t[0], repr(t[1]))):
            places = [i for i, treatment in enumerate(treatments) if treatment == (scale, inside)]
            places = [i for i in places if prepared[i].image_key is not None]  # a question may come without an image
            if not places:
                continue
            images = {prepared[i].image_key: prepared[i] for i in places}
            group = digest(list(images))
            keys = {
                image: FeatureKey(tower_key(loaded), str(loaded.dtype), scale, image, repr(inside or ""), group)
                for image in images
            }
            found = {image: self.cache.get(key) for image, key in keys.items()}
            if any(value is None for value in found.values()):
                encode = loaded.encode if inside is None else partial(loaded.encode, inside=inside)
                encoded = encode(list(images.values()), self.taps if inside is None else (), scale)
                found = dict(zip(images, encoded, strict=True))
                for image, value in found.items():
                    self.cache.put(keys[image], value)
            for i in places:
                features[i] = found[prepared[i].image_key]
        return features

    def _record(
        self,
        cell: Cell,
        sample: Sample,
        prepared: Any,
        schedule: Schedule,
        answer: Any,
        vision: Any,
        routing: list[float] | None,
    ) -> SampleRecord:
        lengths = Lengths(prepared.num_visual, prepared.num_text)
        cost = self.planner.cost(schedule, lengths.num_text, cell.setting.model)
        scored = cell.task.task.score(sample, answer.text)
        grid = vision and vision.grid and [round(side / schedule.image_scale) for side in vision.grid]  # at full size
        return SampleRecord(
            **identity(sample),
            answer=answer.text,
            score=float(scored.score),
            num_text=lengths.num_text,
            num_visual=lengths.num_visual,
            grid=grid or None,
            decoder_flops=cost.decoder_prefill,
            dense_decoder_flops=self.planner.dense_cost(lengths).decoder_prefill,
            flops=dict(cost.parts),
            visual_tokens=list(cost.visual_tokens),
            kv_bytes=cost.kv_bytes,
            layer_flops=list(cost.per_layer),
            confidence=answer.confidence,
            routing=routing,
            configuration=cell.setting.configuration,
            kept=pack_bits(answer.kept),
            values=scored.values,
        )

    def _finish(self, state: CellState) -> None:
        """Write the manifest, the last thing that is written of a cell."""
        cell = state.cell
        records = self.folder.samples(cell.key)
        if state.error is None:
            (self.folder.cell_path(cell.key) / "error.txt").unlink(missing_ok=True)  # of an earlier attempt
        self.folder.write_manifest(
            replace(
                manifest_of(cell, self.suite, records, state.error),
                params=self._params(cell, records),
                seconds=round(state.seconds, 3),
                num_resumed=state.num_resumed,
            )
        )

    def _params(self, cell: Cell, records: Sequence[SampleRecord]) -> dict[str, Any]:
        """The method's options over the records; one that differs between samples as [smallest, largest]."""
        lengths = {Lengths(record.num_visual, record.num_text) for record in records if record.error is None}
        options = [self.planner.fitted(cell.setting, each)[0].options() for each in lengths]
        merged = {}
        for name, value in (options[0] if options else cell.setting.method.options()).items():
            values = sorted({each[name] for each in options}, key=lambda v: (str(type(v)), v)) if options else [value]
            merged[name] = values[0] if len(values) == 1 else [values[0], values[-1]]
        configuration = cell.setting.configuration
        return merged if configuration is None else {"configuration": configuration, **merged}

    def _result(self, seconds: float) -> SweepResult:
        keys = {cell.key for cell in self.plan.all_cells}
        manifests = [manifest for key in sorted(keys) if (manifest := self.folder.manifest(key))]
        return SweepResult(
            num_cells=len(manifests),
            num_failed_cells=sum(manifest.status == "failed" for manifest in manifests),
            num_samples=sum(manifest.num_samples for manifest in manifests),
            num_failed_samples=sum(manifest.num_failed for manifest in manifests),
            seconds=seconds,
        )


def describe(error: Exception) -> str:
    """An error in one line, with what to do where we know."""
    text = " ".join(str(error).split()) or type(error).__name__
    torch = sys.modules.get("torch")  # an error of torch's can only come up once it is loaded
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: use a smaller --batch-size in a new folder ({text})"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def identity(sample: Sample) -> dict[str, Any]:
    """The fields of a record that say which sample it is of."""
    return {
        "sample_id": sample.sample_id,
        "image_id": sample.image_id,
        "question": sample.question,
        "references": list(sample.references),
        "difficulty": sample.difficulty,
    }


def _failed(sample: Sample, error: str) -> SampleRecord:
    return SampleRecord(**identity(sample), answer=None, score=0.0, error=error)
