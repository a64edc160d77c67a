"""`python -m visor.analysis --model dense-tiny --suite fine-grained`: three observations on a model, a task at a time.

Text-to-image attention mass and CKA of the visual tokens by layer, over images; and the accuracy that is left when one
layer loses the image, against dense on the same samples. The result is a JSON file in a run folder, beside whatever
`evaluations.run` has put there; the report shows it. A task that is already in the file is not done again.

    <run folder>/analyses/<model>.json
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from budgets.registry import check_name
from evaluations.arguments import names
from evaluations.command import FAILURES, INTERRUPTED, OK, USAGE, say
from evaluations.job import load_model, make_report
from evaluations.records import RecordsError, RunFolder, read_json, write_json_atomically
from evaluations.run_file import card_says_trained
from evaluations.suite import load_suite, suite_names

if TYPE_CHECKING:
    import numpy as np

    from evaluations.config import RunConfig
    from evaluations.progress import Progress

SCHEMA_VERSION = 1
KINDS = ("attention", "cka", "layer-drop")
DEFAULT_LIMIT = 60
NUM_RESAMPLES = 1000


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m visor.analysis",
        description="How a model uses its visual tokens: attention to them, their change over depth, layers without.",
        epilog="Exit status: 0 all done; 1 a task or the report failed, the rest is done; 2 the request cannot be met.",
    )
    add = parser.add_argument
    add("--model", default="dense-tiny", help="shipped model, folder, or owner/name of the Hub (default: %(default)s)")
    add("--suite", default="all", help=f"{', '.join(suite_names())}, or a .yaml file (default: %(default)s)")
    add("--tasks", type=names, metavar="A,B", help="tasks to look at (default: the suite's)")
    add("--data-root", type=Path, metavar="DIR", help="where data sets lie as on the Hub, DIR/<org>/<name>")
    add("--only", type=names, metavar="A,B", default=list(KINDS), help=f"analyses (default: {','.join(KINDS)})")
    add("--limit", type=int, default=DEFAULT_LIMIT, help="samples of each task (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="samples answered together (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:N or mps (default: %(default)s)")
    add("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    add("--attention", default="sdpa", help="sdpa, eager or flash_attention_2 (default: %(default)s)")
    add("--out", type=Path, help="run folder, new or one that evaluations.run has written (default: runs/<suite>)")
    add("--no-report", dest="report", action="store_false", help="leave the report of the run folder as it is")
    return parser


def main(argv: Sequence[str] | None = None, load: Callable[[RunConfig], Any] = load_model) -> int:
    """The command. Returns the exit status."""
    options = vars(make_parser().parse_args(sys.argv[1:] if argv is None else argv))
    only, report = options.pop("only"), options.pop("report")
    try:
        from evaluations.config import RunConfig

        for kind in only:
            check_name("analysis", kind, KINDS)
        config = RunConfig.of(load_suite(options.pop("suite")), **options)
        return analyse(config, only, report, load)
    except ValueError as error:
        say(f"error: {error}")
        return USAGE
    except KeyboardInterrupt:
        say("interrupted; the same command continues where this one stopped")
        return INTERRUPTED


def analysis_path(folder: Path, model: str) -> Path:
    """Where the analyses of a model lie in a run folder."""
    return folder / "analyses" / (re.sub(r"[^A-Za-z0-9_.-]", "_", model.rstrip("/")) + ".json")


def analyse(
    config: RunConfig, only: Sequence[str], report: bool = True, load: Callable[[RunConfig], Any] = load_model
) -> int:
    """Run the analyses and write them down, task by task.

    Raises:
        ValueError: the request cannot be met.
    """
    from evaluations.progress import progress
    from evaluations.task import open_task

    started = time.monotonic()
    say(f"loading {config.model} on {config.device} ({config.dtype}, {config.attention} attention)")
    loaded = load(config)
    folder = RunFolder(config.out)
    path = analysis_path(config.out, config.model)
    document = _document(path, config, loaded, card_says_trained(loaded.card))
    failed: dict[str, str] = {}
    with folder.locked():
        tasks = [(entry.name, open_task(entry.name, config.data_root), entry.limit) for entry in config.tasks]
        jobs = [(name, task, limit, kind) for name, task, limit in tasks for kind in only]
        jobs = [job for job in jobs if not _is_done(document, *job)]
        with progress("analyses", len(jobs)) as line:
            for name, task, limit, kind in jobs:
                try:
                    entry = document["tasks"].setdefault(name, {})
                    entry |= {"title": task.title, "kind": task.kind, "metric": task.metric, "version": task.version}
                    entry[kind] = _ANALYSES[kind](loaded, task, task.samples(limit), config.batch_size, line)
                    entry[kind]["limit"] = limit
                    write_json_atomically(path, document)
                except Exception as error:  # the others go on
                    failed[f"{name}, {kind}"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
                    line.say(f"{kind} on {name} failed: {failed[f'{name}, {kind}']}")
                line.advance(1, f"{name} {kind}")
        report_path = report_error = None
        if report and folder.run_path.exists():
            report_path, report_error = make_report(folder)
    print(
        json.dumps(
            {
                "analyses": str(path),
                "run_folder": str(config.out),
                "report": report_path and str(report_path),
                "report_error": report_error,
                "failed": failed,
                "seconds": round(time.monotonic() - started, 1),
            }
        )
    )
    return FAILURES if failed or report_error else OK


def _document(path: Path, config: RunConfig, loaded: Any, trained: bool | None) -> dict[str, Any]:
    """The file to be continued, or a new one."""
    identity = {
        "schema_version": SCHEMA_VERSION, "model": config.model, "checkpoint_sha256": loaded.checkpoint_sha256,
        "trained": trained, "num_layers": loaded.geometry.num_layers, "device": config.device, "dtype": config.dtype,
        "attention": config.attention,
    }  # fmt: skip
    if not path.exists():
        return {**identity, "tasks": {}}
    earlier = read_json(path)
    differ = [f"{name} was {earlier.get(name)}, now {value}" for name, value in identity.items()
              if earlier.get(name) != value]  # fmt: skip
    if differ:
        raise RecordsError(f"{path} holds other analyses: {'; '.join(differ)}. Delete it or choose another --out")
    return earlier


def _is_done(document: dict[str, Any], name: str, task: Any, limit: int | None, kind: str) -> bool:
    entry = document["tasks"].get(name, {})
    return entry.get("version") == task.version and kind in entry and entry[kind]["limit"] == limit


def _per_image(samples: Sequence[Any]) -> list[Any]:
    """One sample an image: visual tokens stand before the question and never see it."""
    return list({sample.image_id: sample for sample in reversed(samples)}.values())[::-1]


def _each(loaded: Any, samples: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    from evaluations.task import prepare_sample

    for sample in samples:
        prepared = prepare_sample(loaded, sample)
        yield prepared, loaded.encode([prepared])[0]


def _attention(loaded: Any, task: Any, samples: Sequence[Any], batch_size: int, line: Progress) -> dict[str, Any]:
    from visor.analysis.attention import attention_mass

    masses = [attention_mass(loaded, *one) for one in _each(loaded, samples)]
    images = [sample.image_id for sample in samples]
    return {
        "num_samples": len(samples),
        "num_images": len(set(images)),
        **{rows: _curve([getattr(mass, rows) for mass in masses], images) for rows in ("text", "last")},
    }


def _curve(values: Sequence[Sequence[float]], images: Sequence[str]) -> dict[str, list[float]]:
    """Means by layer with their 95 % intervals, from [num_samples, L]."""
    import numpy as np

    from evaluations.statistics import bootstrap_means

    matrix = np.array(values)
    return _with_interval(matrix.mean(0), bootstrap_means(matrix, images, NUM_RESAMPLES))


def _with_interval(estimate: np.ndarray, draws: np.ndarray) -> dict[str, list[float]]:
    import numpy as np

    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    rounded = lambda values: [round(float(value), 6) for value in values]
    return {"mean": rounded(estimate), "low": rounded(low), "high": rounded(high)}


def _cka(loaded: Any, task: Any, samples: Sequence[Any], batch_size: int, line: Progress) -> dict[str, Any]:
    import numpy as np

    from visor.analysis.cka import cka, similarity_to_first

    samples = _per_image(samples)
    images = [similarity_to_first(loaded, *one) for one in _each(loaded, samples)]
    random = np.random.default_rng(0)
    weights = random.multinomial(len(images), np.full(len(images), 1 / len(images)), size=NUM_RESAMPLES)
    draws = np.array([cka(images, drawn) for drawn in weights])
    return {"num_samples": len(samples), "num_images": len(samples), "visual": _with_interval(cka(images), draws)}


def _layer_drop(loaded: Any, task: Any, samples: Sequence[Any], batch_size: int, line: Progress) -> dict[str, Any]:
    import numpy as np

    from budgets.schedule import dense
    from evaluations.batches import make_batches
    from evaluations.statistics import holm, mean_interval, paired_comparison
    from evaluations.task import prepare_sample
    from visor.analysis.layer_drop import without_image_in

    num_layers = loaded.geometry.num_layers
    rules = [lambda num_visual: dense(num_layers, num_visual)]
    rules += [
        lambda num_visual, layer=layer: without_image_in(layer, num_layers, num_visual) for layer in range(num_layers)
    ]
    scores: list[list[float]] = [[] for _ in rules]
    images: list[str] = []
    for batch in make_batches(samples, batch_size):
        prepared = [prepare_sample(loaded, sample) for sample in batch]
        vision = loaded.encode(prepared)
        images += [sample.image_id for sample in batch]
        for column, rule in zip(scores, rules, strict=True):
            schedules = [rule(each.num_visual) for each in prepared]
            answers = loaded.generate(prepared, vision, schedules, task.max_new_tokens)
            if errors := [answer.error for answer in answers if answer.error]:
                raise ValueError(errors[0])
            column += [task.score(s, a.text).score for a, s in zip(answers, batch, strict=True)]
    reference = mean_interval(scores[0], images)
    tests = [paired_comparison([(column, scores[0], images)]) for column in scores[1:]]
    adjusted = holm([test.p_value for test in tests])
    return {
        "num_samples": len(samples),
        "num_images": len(set(images)),
        "dense": {"score": reference.estimate, "low": reference.low, "high": reference.high},
        "layers": [
            {
                "score": float(np.mean(column)), "difference": test.difference, "difference_low": test.low,
                "difference_high": test.high, "p_value_holm": p,
            }
            for column, test, p in zip(scores[1:], tests, adjusted, strict=True)
        ],
    }  # fmt: skip


_ANALYSES = {"attention": _attention, "cka": _cka, "layer-drop": _layer_drop}
