"""The timing pass: how long a setting takes and how much memory, under conditions that are the same for all settings.

Never mixed with the accuracy pass: a fixed list of samples, batch 1 and one throughput batch, a fixed number of new
tokens, no feature cache, warm-up, synchronised clocks. Settings are measured in turns (A B C, B C A, ...), so that a
machine that slows down slows all of them, and every run is kept raw. Memory is taken in a run of its own, as watching
it costs time.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from evaluations.batches import Lengths, check_sample
from evaluations.cells import Plan
from evaluations.memory import PeakMemory, measure_memory, weights_bytes
from evaluations.models import Models
from evaluations.noise import turns
from evaluations.progress import Progress
from evaluations.records import RunFolder, TimingRecord
from evaluations.settings import Planner, Setting
from evaluations.suite import TimingPlan
from evaluations.task import prepare_sample
from visor.engine.stopwatch import ScoringClock, scoring_clock
from visor.reduction.method import tower_reduction

if TYPE_CHECKING:
    from evaluations.task import Sample


@dataclass(frozen=True)
class Clock:
    """Wall and processor time of one stage, in milliseconds. Processor time sums over the threads of the process."""

    wall_ms: float
    cpu_ms: float


@dataclass(frozen=True)
class Run:
    """One measured pass from pixels to the last token.

    Args:
        scoring: the part of tower and prefill that went into choosing tokens, and where.
        kv_bytes: keys and values that the caches hold after the prefill; None where the model does not tell.
    """

    tower: Clock
    prefill: Clock
    decode: Clock
    end_to_end: Clock
    scoring: ScoringClock
    kv_bytes: int | None = None


class CudaStream:
    """Waits for a CUDA device, and marks moments on it: its own clock sees no delay of the host."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self) -> None:
        import torch

        torch.cuda.synchronize(self.device)

    def mark(self) -> Any:
        """An event at this point of the device's queue."""
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def timed(work: Callable[[], Any], synchronise: Callable[[], None]) -> tuple[Any, Clock]:
    """The result of some work, and what it took once the device has finished it.

    On CUDA the wall time is the device's, between two events.
    """
    synchronise()
    start = synchronise.mark() if isinstance(synchronise, CudaStream) else None
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    end = synchronise.mark() if start is not None else None
    synchronise()
    wall_ms = (time.perf_counter() - wall) * 1e3 if start is None else start.elapsed_time(end)
    return result, Clock(wall_ms, (time.process_time() - cpu) * 1e3)


def synchroniser(device: str) -> Callable[[], None]:
    """What waits until a device has done what it was told to."""
    import torch

    kind = device.partition(":")[0]
    if kind == "cuda":
        return CudaStream(device)
    return torch.mps.synchronize if kind == "mps" else lambda: None


def cache_bytes(cache: Any) -> int | None:
    """Bytes of the keys and values that a cache holds, padding included; None if it is no cache that tells."""
    if (told := getattr(cache, "kv_bytes", None)) is not None:
        return told
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    held = [x for layer in layers for x in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    return sum(x.numel() * x.element_size() for x in held if x is not None)


def run_once(
    loaded: Any,
    prepared: Sequence[Any],
    setting: Setting,
    planner: Planner,
    new_tokens: int,
    synchronise: Callable[[], None],
) -> Run:
    """One pass over one batch, stage by stage; reduction and projector count as prefill.

    Choosing tokens is a part of the tower's time (what a method reads there) and of the prefill's, and is also given
    apart.

    The image is already pixels: reading and resizing files is not timed.
    """
    # A router chooses inside the prefill, and what it takes counts there. All configurations begin alike.
    routed = setting.policy == "router"
    known = replace(setting, policy="fixed", value=0) if routed else setting
    schedules = [planner.fitted(known, Lengths(p.num_visual, p.num_text))[1] for p in prepared]
    request = {"request": routing_request(setting.value)} if routed else {}

    def encode() -> list[Any]:
        features: list[Any] = [None] * len(prepared)
        treatments = [(schedule.image_scale, tower_reduction(schedule)) for schedule in schedules]
        for scale, inside in set(treatments):
            places = [i for i, treatment in enumerate(treatments) if treatment == (scale, inside)]
            options = {} if inside is None else {"inside": inside}
            encoded = loaded.encode([prepared[i] for i in places], setting.method.taps, scale, **options)
            for i, value in zip(places, encoded, strict=True):
                features[i] = value
        return features

    def prefill(vision: list[Any]) -> list[Any]:
        adapted = loaded.resolve(vision, schedules) if setting.method.adaptive else schedules
        return loaded.prefill(prepared, vision, adapted, new_tokens, **request)

    # On a CPU the watch waits for nothing, so the pass that is timed can be watched. Elsewhere it would make the pass
    # slower, and a second one, which is not timed otherwise, is watched.
    on_cpu = not isinstance(synchronise, CudaStream) and str(loaded.device).partition(":")[0] == "cpu"
    with scoring_clock(synchronise) if on_cpu else nullcontext() as watch:
        vision, tower_clock = timed(encode, synchronise)
        states, prefill_clock = timed(lambda: prefill(vision), synchronise)
    held = [cache_bytes(getattr(state, "cache", None)) for state in states]
    _, decode_clock = timed(lambda: loaded.decode(states, new_tokens - 1), synchronise)
    if watch is None:
        with scoring_clock(synchronise) as watch:
            prefill(encode())
    clocks = (tower_clock, prefill_clock, decode_clock)
    total = Clock(sum(clock.wall_ms for clock in clocks), sum(clock.cpu_ms for clock in clocks))
    kv_bytes = None if None in held else sum(held)
    return Run(*clocks, total, watch, kv_bytes)


def routing_request(cost_weight: float | None) -> Any:
    """What a VISOR model is asked for when its router is to choose."""
    from visor.model.selection import Request

    return Request(policy="router", cost_weight=cost_weight)


def is_timed(setting: Setting) -> bool:
    """False for policies that are composed of other settings' answers, and so have no run of their own to time."""
    return setting.policy in (None, "fixed", "router")


def timing_samples(plan: Plan, timing: TimingPlan) -> list[Sample]:
    """The samples that are timed: one of each task in turn, in the order of their ids, no image twice.

    An image that came twice in a batch would be encoded once, and the tower would look faster than it is.
    """
    queues = [sorted(task.samples, key=lambda sample: sample.sample_id) for task in plan.tasks]
    chosen: dict[str, Sample] = {}
    for depth in range(max(map(len, queues))):
        for queue in queues:
            if len(chosen) == max(timing.num_samples, timing.throughput_batch):
                return list(chosen.values())
            if depth < len(queue):
                try:
                    check_sample(queue[depth], plan.max_pixels)
                except ValueError:  # a failed record of the accuracy pass; here the next sample takes its place
                    continue
                chosen.setdefault(queue[depth].image_id, queue[depth])
    return list(chosen.values())


class TimingPass:
    """Measures the settings of a plan that lack runs, and appends every run to timings.jsonl.

    Args:
        loaded: the model, or the checkpoints of a run. `prefill` and `decode` are timed apart.
    """

    def __init__(self, loaded: Any, plan: Plan, planner: Planner, folder: RunFolder, timing: TimingPlan) -> None:
        self.models = loaded if isinstance(loaded, Models) else Models(loaded)
        self.loaded, self.plan, self.planner, self.folder, self.timing = self.models.base, plan, planner, folder, timing
        self.settings = [setting for setting in plan.settings if is_timed(setting)]
        self._prepared: dict[str, list[Any]] = {}
        self.synchronise = synchroniser(str(self.loaded.device))
        self.samples = timing_samples(plan, timing)
        # With fewer images than the throughput batch wants, the batch is what there is, and the rows say so.
        self.batch_sizes = sorted({1, min(timing.throughput_batch, len(self.samples))}) if self.samples else []

    def pending(self) -> dict[int, list[Setting]]:
        """By batch size, the settings with fewer runs than the plan asks for."""
        runs: dict[tuple[int, str], list[float]] = defaultdict(list)
        for row in self.rows():
            runs[row.batch_size, row.setting_id].append(row.end_to_end_ms)
        enough = lambda rows: self._enough(len(rows), sum(rows) / 1e3)
        return {
            size: [setting for setting in self.settings if not enough(runs[size, setting.id])]
            for size in self.batch_sizes
        }

    def rows(self) -> list[TimingRecord]:
        """Runs that were measured before under the conditions of this pass."""
        return self.folder.timings()

    def prepare(self) -> list[Any]:
        """The samples, ready for the model."""
        return [prepare_sample(self.loaded, sample) for sample in self.samples]

    def _enough(self, num_runs: int, seconds: float) -> bool:
        least = num_runs >= self.timing.min_runs and seconds >= self.timing.min_seconds
        return least or num_runs >= self.timing.max_runs

    def run(self, pending: dict[int, list[Setting]], progress: Progress) -> dict[str, str]:
        """Measure. Returns the settings that could not be, with the reason; the others are not disturbed."""
        if not self.samples:
            return {setting.id: "no sample can be read" for setting in self.settings}
        self.folder.timings_file.drop_torn_line()
        self._prepared = {"": (prepared := self.prepare())}
        failed: dict[str, str] = {}
        for size, settings in pending.items():
            settings = [setting for setting in settings if setting.id not in failed]
            batches = [[each] for each in prepared[: self.timing.num_samples]] if size == 1 else [prepared[:size]]
            self._measure(size, batches, settings, failed, progress)
        return failed

    def _measure(
        self, size: int, batches: list[list[Any]], settings: list[Setting], failed: dict[str, str], progress: Progress
    ) -> None:
        def attempt(setting: Setting, work: Callable[[], Any]) -> Any:
            try:
                return work()
            except Exception as error:
                failed[setting.id] = f"{type(error).__name__}: {' '.join(str(error).split())}"
                progress.say(f"timing of {setting.id} at batch {size} failed: {failed[setting.id]}")
                return None

        memory = {setting.id: attempt(setting, lambda s=setting: self._memory(s, batches[0])) for setting in settings}
        seconds = dict.fromkeys(memory, 0.0)
        first = 1 + max((row.round for row in self.rows() if row.batch_size == size), default=-1)
        number = 0
        while alive := [setting for setting in settings if setting.id not in failed]:
            if all(self._enough(number, seconds[setting.id]) for setting in alive):
                break
            batch = batches[number % len(batches)]
            for setting in turns(alive, number):
                run = attempt(setting, lambda s=setting, b=batch: self._once(s, b))
                if run is not None:
                    seconds[setting.id] += run.end_to_end.wall_ms / 1e3
                    row = self._row(setting, size, first + number, batch, run, memory[setting.id])
                    self.folder.timings_file.append([row.to_dict()])
            number += 1
            progress.advance(len(alive) if number <= self.timing.min_runs else 0, f"batch {size}, round {number}")

    def _memory(self, setting: Setting, batch: list[Any]) -> PeakMemory:
        """The first run is the warm-up: it chooses kernels and grows pools, and is measured neither way."""
        self._once(setting, batch)
        return measure_memory(
            lambda: self._once(setting, batch),
            str(self.loaded.device),
            weights_bytes(self.models[setting.model].model),
        )

    def _once(self, setting: Setting, batch: list[Any]) -> Run:
        loaded, own = self.models[setting.model], self._own(setting, batch)
        return run_once(loaded, own, setting, self.planner, self.timing.new_tokens, self.synchronise)

    def _own(self, setting: Setting, batch: list[Any]) -> list[Any]:
        """The samples of a batch as the setting's own checkpoint prepares them."""
        if not setting.model:
            return batch
        if setting.model not in self._prepared:
            loaded = self.models[setting.model]
            self._prepared[setting.model] = [prepare_sample(loaded, each) for each in self.samples]
        places = {id(sample): place for place, sample in enumerate(self._prepared[""])}
        return [self._prepared[setting.model][places[id(sample)]] for sample in batch]

    def _row(
        self, setting: Setting, size: int, number: int, batch: list[Any], run: Run, memory: PeakMemory
    ) -> TimingRecord:
        not_measured, steps = {}, self.timing.new_tokens - 1
        if run.kv_bytes is None:
            not_measured["kv_bytes"] = "this model does not show its cache"
        if memory.reason:
            not_measured["peak_memory_bytes"] = not_measured["peak_memory_without_weights_bytes"] = memory.reason
        return TimingRecord(
            setting_id=setting.id,
            method=setting.name,
            budget=setting.budget,
            policy=setting.policy,
            batch_size=size,
            round=number,
            num_text=max(prepared.num_text for prepared in batch),
            num_visual=max(prepared.num_visual for prepared in batch),
            num_new_tokens=self.timing.new_tokens,
            tower_ms=run.tower.wall_ms,
            scoring_ms=run.scoring.wall_ms,
            prefill_ms=run.prefill.wall_ms,
            decode_ms_per_token=run.decode.wall_ms / steps,
            end_to_end_ms=run.end_to_end.wall_ms,
            cpu_prefill_ms=run.prefill.cpu_ms,
            cpu_tower_ms=run.tower.cpu_ms,
            cpu_decode_ms_per_token=run.decode.cpu_ms / steps,
            cpu_end_to_end_ms=run.end_to_end.cpu_ms,
            kv_bytes=run.kv_bytes,
            peak_memory_bytes=memory.total_bytes,
            peak_memory_without_weights_bytes=memory.without_weights_bytes,
            device=str(self.loaded.device),
            not_measured=not_measured,
        )
