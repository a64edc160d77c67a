"""What of a suite's data is there: `python -m evaluations.data check paper-hard --data-root DIR`.

Data sets lie in DIR as on the Hub, DIR/<org>/<name>/. What is missing is named with the line that fetches it on a
machine with the network; the folder is then carried over as it is. Needs neither lmms-eval nor the network.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgets.registry import check_name
from evaluations.arguments import names
from evaluations.command import FAILURES, OK, USAGE, say
from evaluations.lmms.benchmarks import BENCHMARKS, Benchmark
from evaluations.suite import load_suite, suite_names


@dataclass(frozen=True)
class Finding:
    """A benchmark's data under a root.

    Args:
        num_questions: rows of the split that is asked; None where it is not complete.
        problems: what is missing or cannot be read.
        fetch: the command that gets it.
    """

    task: str
    folder: Path
    num_questions: int | None
    problems: tuple[str, ...]
    fetch: str


def check(task: str, root: Path) -> Finding:
    """Look at one task's data.

    Args:
        task: "lmms:NAME" or "lmms:NAME:simple".

    Raises:
        UnknownNameError: a task of lmms-eval whose data sets are not known here.
    """
    name = task.removeprefix("lmms:").partition(":")[0]
    check_name("benchmark", name, list(BENCHMARKS))
    benchmark = BENCHMARKS[name]
    folder, problems, counts = root / benchmark.dataset, [], []
    if not folder.is_dir():
        problems.append(f"{folder} does not exist")
    else:
        for configuration, split in benchmark.parts:
            try:
                counts.append(_num_rows(folder, configuration, split))
            except ValueError as error:
                problems.append(str(error))
    return Finding(task, folder, None if problems else counts[0], tuple(problems), _fetch(benchmark, root))


def _fetch(benchmark: Benchmark, root: Path) -> str:
    folder = root / benchmark.dataset
    return f"hf download --repo-type dataset {benchmark.dataset} --local-dir {shlex.quote(str(folder))}"


def _num_rows(folder: Path, configuration: str | None, split: str) -> int:
    """Rows of a split of a data set that lies in a folder.

    Raises:
        ValueError: it is not there, or a file of it is broken.
    """
    import pyarrow.parquet as pq

    files = _files(folder, configuration, split)
    if not files:
        which = f"configuration {configuration}, split {split}" if configuration else f"split {split}"
        raise ValueError(f"{folder} has no parquet file of {which}")
    rows = 0
    for file in files:
        try:
            rows += pq.read_metadata(file).num_rows
        except (OSError, ValueError) as error:  # a broken download, or a pointer of Git LFS
            raise ValueError(f"{file} cannot be read as parquet ({' '.join(str(error).split())[:80]})") from error
        shards = re.search(r"-(\d{5})-of-(\d{5})", file.name)
        if shards and int(shards[2]) != len(files):
            raise ValueError(f"{folder}: {len(files)} of {int(shards[2])} files of the {split} split are there")
    return rows


def _files(folder: Path, configuration: str | None, split: str) -> list[Path]:
    """The files of a split: those that the README names, or those that are called after it."""
    for entry in _configurations(folder):
        if configuration is None or entry.get("config_name") == configuration:
            patterns = [each.get("path") for each in entry.get("data_files", []) if each.get("split") == split]
            flat = [p for each in patterns for p in (each if isinstance(each, list) else [each]) if p]
            if flat:
                return sorted(path for pattern in flat for path in folder.glob(pattern) if path.is_file())
    if configuration is not None:  # `datasets` finds a configuration by the README alone
        return []
    return sorted(folder.rglob(f"{split}-*.parquet"))


def _configurations(folder: Path) -> list[dict[str, Any]]:
    """The `configs` of a data set's card."""
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        head = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
    except (OSError, IndexError, yaml.YAMLError):
        return []
    return list((head or {}).get("configs") or [])


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluations.data",
        description="Which data sets of a suite are there, and how to get those that are not.",
        epilog="Exit status: 0 all there; 1 something is missing; 2 the request cannot be met.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    checking = commands.add_parser("check", help="look through a folder of data sets")
    checking.add_argument("suite", help=f"{', '.join(suite_names())}, or a .yaml file")
    checking.add_argument("--data-root", type=Path, required=True, metavar="DIR", help="holds <org>/<name>/")
    checking.add_argument("--tasks", type=names, metavar="A,B", help="tasks to look for (default: the suite's)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        tasks = options.tasks or [task.name for task in load_suite(options.suite).tasks]
        findings = [check(task, options.data_root) for task in tasks if task.startswith("lmms:")]
    except ValueError as error:
        say(f"error: {error}")
        return USAGE
    if not findings:
        say(f"the tasks of {options.suite} need no data: they are drawn, or come with a package")
    for finding in findings:
        state = f"{finding.num_questions:,} questions" if not finding.problems else "; ".join(finding.problems)
        say(f"{finding.task:28} {state}")
    commands = list(dict.fromkeys(finding.fetch for finding in findings if finding.problems))
    if commands:
        say("\nOn a machine with the network (pip install huggingface_hub; some data sets ask for `hf auth login`):")
        say("\n".join(f"  {command}" for command in commands))
        say(f"then carry {options.data_root} over as it is, for instance with rsync -a.")
    print(json.dumps({
        "data_root": str(options.data_root),
        "present": {finding.task: finding.num_questions for finding in findings if not finding.problems},
        "missing": {finding.task: list(finding.problems) for finding in findings if finding.problems},
        "fetch": commands,
    }))  # fmt: skip
    return FAILURES if commands else OK


if __name__ == "__main__":
    sys.exit(main())
