"""`make bench`: every promise about speed as one ratio with its target, from one interleaved run on this machine.

All figures are processor time of one thread, so that other work on the machine counts as little as it can, and all
things compared are run in turns. A ratio is the median over the rounds with its 95 % interval; a target is missed if
the whole interval is on the wrong side of it. Exit status 1 if any is missed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from budgets.costs import price
from budgets.geometry import ModelGeometry
from budgets.presets import load
from budgets.registry import METHODS
from budgets.schedule import LayerMode, Schedule, dense
from evaluations.arguments import integers
from evaluations.machine import machine, state
from evaluations.noise import Ratio, ratio_by_round, turns
from evaluations.records import write_json_atomically

GROUPS = ("prefill", "decode", "harness", "questions", "sweep")
NUM_TEXT = 64
NUM_STEPS = 4  # of decode a measurement; a single one is a tenth of a second
# Short measurements, of half a second and of two, are repeated in each round: they are at the mercy of other work.
DECODE_REPEATS, HARNESS_REPEATS = 8, 3
NUM_QUESTIONS = 200
# A sweep of 12 cells: three methods at two budgets on two tasks.
SWEEP_TASKS, SWEEP_METHODS, SWEEP_BUDGETS = ("easy_vqa", "digits"), ("fastv", "visionzip", "random"), ("0.5", "0.25")


@dataclass(frozen=True)
class Promise:
    """A ratio and what it may be.

    Args:
        at_most: True if the target is a ceiling, False if it is a floor.
    """

    name: str
    ratio: Ratio
    target: float
    at_most: bool

    @property
    def is_missed(self) -> bool:
        """By more than its noise."""
        return self.ratio.low > self.target if self.at_most else self.ratio.high < self.target

    @property
    def verdict(self) -> str:
        """ "met", "MISSED" (by more than its noise) or "within noise"."""
        met = self.ratio.median <= self.target if self.at_most else self.ratio.median >= self.target
        return "MISSED" if self.is_missed else "met" if met else "within noise"

    def line(self) -> str:
        """For people."""
        sign = "<=" if self.at_most else ">="
        ratio = (
            f"{self.ratio.median:7.3f}   ({self.ratio.low:.3f} - {self.ratio.high:.3f}, {self.ratio.num_rounds} rounds)"
        )
        return f"{self.name:<58}{ratio:<40}{sign} {self.target:<6g} {self.verdict}"


Measured = tuple[list[Promise], dict[str, list[float]]]
"""What came of the promises, and the raw processor seconds by what ran."""


def interleaved(items: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each item in every round; a different one begins each round. Nothing is warmed up here."""
    names, seconds = list(items), {name: [] for name in items}
    for number in range(rounds):
        for name in turns(names, number):
            started = time.process_time()
            items[name]()
            seconds[name].append(time.process_time() - started)
            print(f"  round {number + 1} of {rounds}: {name}: {seconds[name][-1]:.3f} s", file=sys.stderr, flush=True)
    return seconds


# --- the engine against transformers, and against its own FLOPs -----------------------------------------------------


def visor_schedules(geometry: ModelGeometry, num_visual: int) -> dict[str, tuple[Schedule, float]]:
    """The two schedules that are held to their FLOPs, with the share of their causal saving that is promised."""
    slots = max(1, geometry.num_layers // 3)
    make = lambda count: METHODS.get("visor")(self_layers=count).schedule(geometry, num_visual)
    return {f"{slots} CROSS + 2 SELF": (make(2), 0.85), f"{slots} CROSS + 0 SELF": (make(0), 0.75)}


def causal_saving(geometry: ModelGeometry, schedule: Schedule) -> float:
    """Decoder prefill FLOPs of dense by those of a schedule, attention counted causally."""
    full = price(geometry, dense(geometry.num_layers, schedule.source_visual), NUM_TEXT)
    return full.decoder_prefill_causal / price(geometry, schedule, NUM_TEXT).decoder_prefill_causal


class Engine:
    """The decoder of a real geometry with random weights, as transformers runs it and as the engine does."""

    def __init__(self, geometry: ModelGeometry, dtype: str) -> None:
        from evaluations.random_model import build

        cross = visor_schedules(geometry, 1)[f"{max(1, geometry.num_layers // 3)} CROSS + 2 SELF"][0]
        self.geometry = geometry
        self.model = build(geometry, "cpu", dtype, cross_layers=cross.layers_in(LayerMode.CROSS))
        self.decoder = self.model.get_decoder()
        self._prompts: dict[int, Any] = {}

    def prompt(self, num_visual: int) -> Any:
        """Embeddings of a prompt, and which are visual; made once, as they are no part of what is measured."""
        from evaluations.random_model import prompt_embeddings

        if num_visual not in self._prompts:
            self._prompts[num_visual] = prompt_embeddings(self.model, num_visual, NUM_TEXT)
        return self._prompts[num_visual]

    def prefill(self, schedule: Schedule | None, num_visual: int) -> Any:
        """Run a prompt; None is transformers' own forward. Returns the cache."""
        import torch

        from visor.engine.compat import cache_of
        from visor.engine.decoder import running

        embeddings, visual = self.prompt(num_visual)
        with torch.inference_mode():
            if schedule is None:
                return cache_of(self.decoder(inputs_embeds=embeddings, use_cache=True))
            with running(self.model, schedule, visual=visual):
                return cache_of(self.decoder(inputs_embeds=embeddings, use_cache=True))

    def decode(self, cache: Any, schedule: Schedule | None) -> None:
        """A few tokens after a prompt; the cache is left as it was."""
        import torch

        from visor.engine.compat import CACHE
        from visor.engine.decoder import running

        weight = next(self.decoder.layers.parameters())
        token = torch.ones(1, 1, self.geometry.hidden_size, dtype=weight.dtype)
        step = lambda: self.decoder(inputs_embeds=token, use_cache=True, **{CACHE: cache})
        with torch.inference_mode():
            for _ in range(NUM_STEPS):
                if schedule is None:
                    step()
                else:
                    with running(self.model, schedule):
                        step()
            cache.crop(-NUM_STEPS)


def bench_engine(engine: Engine, visual_tokens: Sequence[int], groups: Sequence[str], rounds: int) -> Measured:
    """The dense schedule against transformers, VISOR against its causal FLOPs."""
    geometry, promises, seconds = engine.geometry, [], {}
    for schedule in (None, dense(geometry.num_layers, 1), *(each for each, _ in visor_schedules(geometry, 1).values())):
        engine.prefill(schedule, 1)  # warms up
    if "prefill" in groups:
        promises, seconds = _bench_prefill(engine, visual_tokens, rounds)
    if "decode" in groups:
        found, raw = _bench_decode(engine, min(visual_tokens), rounds * DECODE_REPEATS)
        promises, seconds = promises + found, seconds | raw
    return promises, seconds


def _bench_prefill(engine: Engine, visual_tokens: Sequence[int], rounds: int) -> Measured:
    geometry, items = engine.geometry, {}
    for n in visual_tokens:
        engine.prompt(n)
        items[f"transformers prefill, {n}"] = partial(engine.prefill, None, n)
        items[f"dense prefill, {n}"] = partial(engine.prefill, dense(geometry.num_layers, n), n)
        for name, (schedule, _) in visor_schedules(geometry, n).items():
            items[f"{name} prefill, {n}"] = partial(engine.prefill, schedule, n)
    seconds, promises = interleaved(items, rounds), []
    for n in visual_tokens:
        reference = seconds[f"transformers prefill, {n}"]
        ratio = ratio_by_round(seconds[f"dense prefill, {n}"], reference)
        promises.append(Promise(f"dense prefill / transformers, {n} visual tokens", ratio, 1.02, True))
        for name, (schedule, target) in visor_schedules(geometry, n).items():
            saving = causal_saving(geometry, schedule)
            followed = [s * saving for s in seconds[f"{name} prefill, {n}"]]
            title = f"{name}: speed-up / causal saving x{saving:.1f}, {n}"
            promises.append(Promise(title, ratio_by_round(reference, followed), target, False))
    return promises, seconds


def _bench_decode(engine: Engine, num_visual: int, rounds: int) -> Measured:
    items = {}
    for name, schedule in (("transformers", None), ("dense", dense(engine.geometry.num_layers, num_visual))):
        cache = engine.prefill(schedule, num_visual)
        items[f"{name} decode, {num_visual}"] = partial(engine.decode, cache, schedule)
    seconds = interleaved(items, rounds)
    ratio = ratio_by_round(seconds[f"dense decode, {num_visual}"], seconds[f"transformers decode, {num_visual}"])
    return [Promise(f"dense decode / transformers, {num_visual} visual tokens", ratio, 1.02, True)], seconds


# --- the harness ----------------------------------------------------------------------------------------------------


@contextmanager
def one_cell(model: str, limit: int) -> Iterator[tuple[Any, Any, Callable[[], None]]]:
    """A model, its first easy-VQA questions planned in batches of 16, and the sweep that answers them anew."""
    from budgets.registry import TASKS
    from evaluations.batches import plan_task
    from evaluations.cells import make_plan
    from evaluations.config import RunConfig
    from evaluations.features import FeatureCache
    from evaluations.models import Models
    from evaluations.progress import Progress
    from evaluations.records import RunFolder
    from evaluations.settings import Planner
    from evaluations.suite import load_suite
    from evaluations.sweep import Sweep
    from visor.inference import LoadedModel

    loaded = LoadedModel.load(model)
    models = Models(loaded)
    task = TASKS.get("easy_vqa")()
    planned = plan_task("easy_vqa", task, task.samples(limit), 16, loaded)
    with tempfile.TemporaryDirectory() as scratch:
        config = RunConfig.of(load_suite("smoke"), tasks=["easy_vqa"], methods=["dense"], model=model,
                              out=Path(scratch) / "run")  # fmt: skip
        planner = Planner.of(models, config.dtype)
        plan = make_plan(config, [planned], planner, models)
        turn = iter(range(1 << 30))

        def sweep() -> None:
            folder = RunFolder(Path(scratch) / f"run{next(turn)}")
            job = Sweep(models, plan, planner, folder, "smoke", FeatureCache())
            job.run(job.pending(), Progress("bench", limit, 0, None))

        yield loaded, planned, sweep


def bench_harness(model: str, limit: int, rounds: int) -> Measured:
    """A sweep of one cell at batch 16 against a bare loop over the same batches."""
    with one_cell(model, limit) as (loaded, planned, sweep):

        def bare() -> None:
            for batch in planned.batches:
                prepared = [loaded.prepare(sample.image, sample.question) for sample in batch]
                schedules = [dense(loaded.geometry.num_layers, each.num_visual) for each in prepared]
                loaded.generate(prepared, loaded.encode(prepared), schedules, planned.task.max_new_tokens)

        bare()  # warms up both
        seconds = interleaved({"bare loop": bare, "sweep of one cell": sweep}, rounds)
    ratio = ratio_by_round(seconds["sweep of one cell"], seconds["bare loop"])
    return [Promise("harness / bare generate loop, batch 16", ratio, 1.03, True)], seconds


def bench_questions(model: str, rounds: int, num: int = NUM_QUESTIONS) -> Measured:
    """Our path at its default batch size against lmms-eval's `llava_hf` adapter at its own, a question at a time.

    Without lmms-eval (or decord, which that adapter imports) against what it does inside: transformers' generate().
    """
    from visor.inference import checkpoint

    with one_cell(model, num) as (loaded, planned, sweep):
        folder = checkpoint.resolve(model)
        if find_spec("lmms_eval") and find_spec("decord"):
            rival, one_by_one = "llava_hf", _llava_hf(folder, planned)
        else:
            rival, one_by_one = "transformers", _generate_loop(folder, planned, loaded.processor)
        names = f"{rival}, {num} questions one by one", f"sweep of {num} questions"
        seconds = interleaved({names[0]: one_by_one, names[1]: sweep}, rounds)
    ratio = ratio_by_round(seconds[names[1]], seconds[names[0]])
    return [Promise(f"{num} questions, batch 16 / {rival} one by one", ratio, 0.5, True)], seconds


def _generate_loop(folder: Path, planned: Any, processor: Any) -> Callable[[], None]:
    import torch
    from transformers import AutoModelForImageTextToText

    plain = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True).eval()

    def one_by_one() -> None:
        for sample in planned.samples:
            parts = [{"type": "image", "image": sample.image}, {"type": "text", "text": sample.question}]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
            with torch.inference_mode():
                ids = plain.generate(**inputs, max_new_tokens=planned.task.max_new_tokens, do_sample=False)
            processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return one_by_one


def _llava_hf(folder: Path, planned: Any) -> Callable[[], None]:
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.simple.llava_hf import LlavaHf

    adapter = LlavaHf(str(folder), device="cpu", device_map="cpu", dtype="float32")
    adapter.task_dict = {"questions": {"test": planned.samples}}
    options = {"max_new_tokens": planned.task.max_new_tokens, "do_sample": False, "temperature": 0, "until": []}
    requests = [
        Instance(
            "generate_until",
            (sample.question, dict(options), lambda each: [each.image], place, "questions", "test"),
            0,
            {"task": "questions", "doc_id": place, "repeats": 1},
        )
        for place, sample in enumerate(planned.samples)
    ]
    return lambda: adapter.generate_until(requests)


def child_seconds(arguments: Sequence[str]) -> float:
    """Processor time of one run of the main job in a process of its own.

    Raises:
        RuntimeError: the run failed; the message has the end of what it said.
    """
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = used()
    command = [sys.executable, "-m", "evaluations.run", *arguments, "--no-timing", "--no-report"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr[-500:]}")
    return used() - before


def bench_sweep(
    model: str, limit: int, rounds: int, spent: Callable[[Sequence[str]], float] = child_seconds
) -> Measured:
    """One sweep of 12 cells against 12 runs of one cell each, as somebody at a prompt would start them."""
    names = ("12 runs", "sweep of 12 cells")
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def run(folder: Path, tasks: Sequence[str], methods: Sequence[str], budgets: Sequence[str]) -> float:
        asked = ["--tasks", ",".join(tasks), "--methods", ",".join(methods), "--budgets", ",".join(budgets)]
        common = ["--suite", "smoke", "--model", model, "--limit", str(limit)]
        return spent([*common, *asked, "--out", str(folder / "-".join([*tasks, *methods, *budgets]))])

    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            with tempfile.TemporaryDirectory() as scratch:
                whole = (SWEEP_TASKS, SWEEP_METHODS, SWEEP_BUDGETS)
                pieces = [[[part] for part in cell] for cell in product(*whole)] if name == "12 runs" else [whole]
                seconds[name].append(sum(run(Path(scratch), *piece) for piece in pieces))
            print(f"  round {number + 1} of {rounds}: {name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    ratio = ratio_by_round(seconds["sweep of 12 cells"], seconds["12 runs"])
    return [Promise("sweep of 12 cells / 12 separate runs", ratio, 0.5, True)], seconds


# --- the command ----------------------------------------------------------------------------------------------------


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluations.bench",
        description="Every promise about speed as a ratio with its target, measured in turns on this machine.",
        epilog="Exit status 1 if a target is missed by more than its noise. The last line on stdout is JSON.",
    )
    add = parser.add_argument
    add("--only", default=",".join(GROUPS), metavar="A,B", help=f"of {', '.join(GROUPS)} (default: all)")
    add("--geometry", default="llava-onevision-0.5b", help="of the engine's part (default: %(default)s)")
    add("--dtype", default="float32", help="of the engine's part (default: %(default)s)")
    add("--visual-tokens", type=integers, default="729,2916", metavar="N,N",
        help="of the engine's part (default: %(default)s)")  # fmt: skip
    add("--model", default="dense-tiny", help="of the harness's part (default: %(default)s)")
    add("--limit", type=int, default=64, help="samples of the harness's part (default: %(default)s)")
    add("--rounds", type=int, default=5, help="default: %(default)s")
    add("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    add("--out", type=Path, help="write conditions, raw values and ratios to this .json file")
    return parser


def execute(options: argparse.Namespace) -> int:
    """Measure what was asked for. Returns the exit status.

    Raises:
        ValueError: the request cannot be met.
    """
    groups = [name.strip() for name in options.only.split(",") if name.strip()]
    if not groups or not set(groups) <= set(GROUPS):
        raise ValueError(f"--only takes some of {', '.join(GROUPS)}, got {options.only!r}")
    if min(options.rounds, options.limit, options.threads, *options.visual_tokens) < 1:
        raise ValueError("--rounds, --limit, --threads and --visual-tokens must be at least 1")
    import torch

    from evaluations.provenance import packages

    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    started, promises, seconds = machine(), [], {}
    try:
        parts = []
        if {"prefill", "decode"} & set(groups):
            engine = Engine(load(options.geometry), options.dtype)
            parts.append(lambda: bench_engine(engine, options.visual_tokens, groups, options.rounds))
        if "harness" in groups:
            parts.append(lambda: bench_harness(options.model, options.limit, options.rounds * HARNESS_REPEATS))
        if "questions" in groups:
            parts.append(lambda: bench_questions(options.model, options.rounds))
        if "sweep" in groups:
            parts.append(lambda: bench_sweep(options.model, min(16, options.limit), max(1, options.rounds // 2)))
        for part in parts:
            found, raw = part()
            promises += found
            seconds |= raw
    finally:
        torch.set_num_threads(threads)
    print(f"processor time of {options.threads} thread(s), in turns; load average {started['start']['load_average']}")
    for promise in promises:
        print(promise.line())
    missed = [promise.name for promise in promises if promise.is_missed]
    document = {
        "created": datetime.now(timezone.utc).isoformat(), "packages": packages(),
        "machine": {**started, "end": state()}, "missed": missed,
        "options": {name: ",".join(map(str, value)) if isinstance(value, list) else str(value)
                    for name, value in vars(options).items() if value is not None},
        "promises": [{**asdict(promise), "verdict": promise.verdict} for promise in promises],
        "processor_seconds": seconds,
    }  # fmt: skip
    if options.out is not None:
        write_json_atomically(options.out, document)
    print(json.dumps({"missed": missed, "out": options.out and str(options.out),
                      "ratios": {promise.name: promise.ratio.median for promise in promises}}))  # fmt: skip
    return 1 if missed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    try:
        return execute(make_parser().parse_args(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
