"""How long choosing tokens takes, beside the dense prefill that it is to save.

Random weights of a real geometry, all methods in turns, at their authors' settings. Each runs as far as it chooses: a
method of the encoder's side to the assembled prompt, one of the decoder's through the prefill. The share of a method
is its scoring time by the dense prefill of the same round; its FLOPs (`budgets.overhead`) stand beside it.

What a method scores does not depend on how many decoder layers there are, and these are alike; so `--layers` runs some
of them, where all would not fit or would take hours, and the dense prefill counts as many times as there are more. A
method that scores otherwise then is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from budgets import overhead
from budgets.costs import price
from budgets.geometry import ModelGeometry
from budgets.registry import METHODS
from budgets.schedule import Schedule, dense
from evaluations.command import OK, say
from evaluations.machine import machine, state
from evaluations.measure import Clock, synchroniser, timed
from evaluations.noise import Ratio, ratio_by_round, turns
from evaluations.progress import progress
from evaluations.records import write_json_atomically
from evaluations.speed_config import SpeedConfig, SpeedSetting, why_not_measured
from visor.engine.stopwatch import PLACES, ScoringClock, scoring_clock
from visor.reduction.method import tower_reduction


@dataclass(frozen=True)
class Pass:
    """Milliseconds of one run of one method: processor time on a CPU, the device's elsewhere.

    Args:
        tower_ms: what the method reads of the tower included.
        prefill_ms: None for a method that chooses before it.
        scoring_ms: by place. The clock waits for the device, so beside scoring no prefill but the dense one tells much.
    """

    tower_ms: float
    prefill_ms: float | None
    scoring_ms: Mapping[str, float]


class Round:
    """Every method once. The tower runs once for all methods that see the same of it."""

    def __init__(self, loaded: Any, sample: Any) -> None:
        self.loaded, self.sample = loaded, sample
        self.device = str(loaded.device)
        self.synchronise = synchroniser(self.device)
        self._encoded: dict[Any, tuple[Any, float, Mapping[str, float]]] = {}

    def run(self, schedule: Schedule) -> Pass:
        """One method."""
        vision, tower_ms, in_tower = self._encode(schedule)
        inputs, prefill_ms = ([self.sample], vision, [schedule]), None
        with scoring_clock(self.synchronise) as watch:
            is_dense = schedule == dense(schedule.num_layers, schedule.source_visual)
            if is_dense or any(op.reduce for op in schedule.layers):
                _, clock = timed(lambda: self.loaded.prefill(*inputs, 1), self.synchronise)
                prefill_ms = self._ms(clock)
            else:
                self.loaded.collate(*inputs)
        scoring = self._scoring(watch)
        return Pass(tower_ms, prefill_ms, {place: in_tower[place] + scoring[place] for place in PLACES})

    def _encode(self, schedule: Schedule) -> tuple[Any, float, Mapping[str, float]]:
        """Features, the tower's time, and what of it was scoring."""
        from visor.vision.encode import taps_of

        seen = taps_of([schedule]), schedule.image_scale, tower_reduction(schedule)
        if seen not in self._encoded:
            with scoring_clock(self.synchronise) as watch:
                vision, clock = timed(lambda: self.loaded.encode([self.sample], *seen), self.synchronise)
            self._encoded[seen] = vision, self._ms(clock), self._scoring(watch)
        return self._encoded[seen]

    def _ms(self, clock: Clock) -> float:
        return clock.cpu_ms if self.device == "cpu" else clock.wall_ms

    def _scoring(self, watch: ScoringClock) -> Mapping[str, float]:
        return watch.cpu_ms_at if self.device == "cpu" else watch.wall_ms_at


@dataclass(frozen=True)
class Share:
    """What choosing tokens took.

    Args:
        scoring_ms: median by place: in the tower, on its features, in the decoder.
        share: of the dense prefill of all layers, round by round.
        flops_share: the same by FLOPs.
        tower: the tower as the method runs it, scoring included, relative to dense.
    """

    method: str
    title: str
    options: dict[str, Any]
    scoring_ms: dict[str, float]
    share: Ratio
    flops_share: float
    tower: Ratio

    @property
    def is_large(self) -> bool:
        """By time. No interval is asked for: of what is near the limit the reader should know."""
        return self.share.median > overhead.LARGE

    def line(self) -> str:
        """For people."""
        places = "".join(f"{self.scoring_ms[place]:>12.2f}" for place in PLACES)
        share = f"{self.share.median:.3%} ({self.share.low:.3%} - {self.share.high:.3%})"
        large = f"  more than {overhead.LARGE:.0%}" if self.is_large else ""
        return f"{self.method:<14}{places}{share:>28}{self.flops_share:>10.3%}{self.tower.median:>8.2f}{large}"


def settings(config: SpeedConfig, rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[SpeedSetting, ...], dict[str, str]]:
    """The methods that can be timed on the layers of `config`, dense first, and why the others cannot.

    Args:
        rows: of `budgets.overhead`, for all layers.
    """
    num_visual, num_text, reasons = config.visual_tokens[0], config.text_tokens, {}
    kept = [SpeedSetting("dense", METHODS.get("dense")(), label="dense")]
    for row in rows:
        if (name := row["method"]) == "dense":
            continue
        try:
            if "reason" in row:
                raise ValueError(row["reason"])
            method = overhead.setting(name, config.geometry, num_visual, num_text)
            if method.needs_config:
                raise ValueError(f"runs on weights trained for it only (config field {method.needs_config!r})")
            scored = price(config.geometry, method.schedule(config.geometry, num_visual), num_text).parts["scoring"]
            if scored != row["scoring_flops"]:
                raise ValueError(f"scores otherwise in {config.geometry.num_layers} layers; choose more --layers")
            kept.append(SpeedSetting(name, method, label=name))
        except ValueError as error:
            reasons[name] = str(error)
    return tuple(kept), reasons


def measure(config: SpeedConfig) -> Iterator[tuple[dict[str, list[Pass]], dict[str, str]]]:
    """After each of `config.timing.min_runs` rounds: the passes of each method so far, and why others refused.

    The dense pass warms up what all share. A rule's own first call is not warmed up: with three rounds the median does
    not see it.
    """
    from evaluations.random_model import RandomModel, build

    say(f"making {config.geometry.name} with random weights on {config.device} ({config.dtype})")
    model = build(config.geometry, config.device, config.dtype, config.attention, config.cross_layers)
    loaded, num_visual = RandomModel(config.geometry, model), config.visual_tokens[0]
    sample = loaded.sample(num_visual, config.text_tokens)
    schedules = {each.id: each.method.schedule(config.geometry, num_visual) for each in config.settings}
    passes: dict[str, list[Pass]] = {name: [] for name in schedules}
    reasons: dict[str, str] = {}
    Round(loaded, sample).run(schedules["dense"])
    with progress("choosing tokens", config.timing.min_runs * len(passes)) as line:
        for number in range(config.timing.min_runs):
            this = Round(loaded, sample)
            for name in turns(list(passes), number):
                try:
                    passes[name].append(this.run(schedules[name]))
                except ValueError as error:
                    reasons[name] = str(error)
                    del passes[name]
                line.advance(1, f"round {number + 1}: {name}")
            yield passes, reasons


def shares(
    passes: Mapping[str, Sequence[Pass]], rows: Sequence[Mapping[str, Any]], layers_per_layer: float
) -> list[Share]:
    """What the passes say.

    Args:
        rows: of `budgets.overhead`, for all layers.
        layers_per_layer: layers of the model by layers that ran.
    """
    dense_prefill = [each.prefill_ms * layers_per_layer for each in passes["dense"]]
    dense_tower = [each.tower_ms for each in passes["dense"]]
    return [
        Share(
            row["method"], row["title"], row["options"],
            {place: median(each.scoring_ms[place] for each in own) for place in PLACES},
            ratio_by_round([sum(each.scoring_ms.values()) for each in own], dense_prefill),
            row["scoring_relative_to_dense"],
            ratio_by_round([each.tower_ms for each in own], dense_tower),
        )
        for row in rows
        if (own := passes.get(row["method"]))
    ]  # fmt: skip


def execute(whole: ModelGeometry, config: SpeedConfig, methods: Sequence[str] | None, out: Path | None) -> int:
    """Measure, and print the table. Returns the exit status.

    Args:
        whole: the model that is spoken of.
        config: what runs of it: its first layers, so far with the dense schedule only.
        methods: names; None for all.
        out: .json file for conditions and raw values.

    Raises:
        ValueError: the request cannot be met.
    """
    if (why := why_not_measured(config)) is not None:
        raise ValueError(f"{why}, and a time cannot be modelled: `python -m budgets.overhead` has the FLOPs")
    layers, dtype, num_visual = config.geometry.num_layers, config.dtype, config.visual_tokens[0]
    rows = overhead.rows(whole, num_visual, config.text_tokens, None, methods)
    kept, reasons = settings(config, rows)

    import torch

    from evaluations.provenance import packages

    threads, started = torch.get_num_threads(), machine()
    torch.set_num_threads(config.threads or threads)
    try:
        for passes, refused in measure(replace(config, settings=kept)):
            table = shares(passes, rows, whole.num_layers / layers)
            dense_ms = median(each.prefill_ms for each in passes["dense"])
            measured = [{**asdict(share), "is_large": share.is_large} for share in table]
            measured += [{"method": name, "reason": reason} for name, reason in (reasons | refused).items()]
            document = {
                "model": whole.name, "layers": layers, "layers_of_model": whole.num_layers,
                "visual_tokens": num_visual, "text_tokens": config.text_tokens, "device": config.device,
                "dtype": dtype, "attention": config.attention, "threads": config.threads,
                "rounds": len(passes["dense"]), "dense_prefill_ms": dense_ms, "out": out and str(out),
                "methods": measured,
            }  # fmt: skip
            if out is not None:  # after every round: a run that is stopped leaves what it has
                raw = {name: [asdict(each) for each in own] for name, own in passes.items()}
                conditions = {"machine": {**started, "end": state()}, "packages": packages()}
                write_json_atomically(out, {**document, **conditions, "passes": raw})
    finally:
        torch.set_num_threads(threads)
    clock = f"processor time of {config.threads} thread(s)" if config.device == "cpu" else "time of the device"
    print(
        f"{whole.name}, {layers} of {whole.num_layers} decoder layers, {num_visual} visual + "
        f"{config.text_tokens} text tokens, batch 1, {dtype}, {config.device}, {clock}, "
        f"{config.timing.min_runs} rounds in turns, load average {started['start']['load_average']}\n"
        f"dense prefill: {dense_ms:.0f} ms, all layers {dense_ms * whole.num_layers / layers:.0f} ms\n\n"
        f"{'method':<14}{'tower, ms':>12}{'features':>12}{'decoder':>12}{'of the dense prefill':>28}{'FLOPs':>10}"
        f"{'tower':>8}"
    )
    for share in table:
        print(share.line())
    for name, reason in (reasons | refused).items():
        print(f"{name:<14}  {reason}")
    print(json.dumps(document))
    return OK
