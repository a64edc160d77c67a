"""Look at a task: `python -m evaluations.tasks show forms --num 8 --out examples`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from budgets.registry import TASKS, UnknownNameError
from evaluations.task import open_task


def show(name: str, num: int, folder: Path, data_root: Path | None = None) -> list[Path]:
    """Write the images of a task's first `num` images, each beside a text file with its questions and references."""
    task = open_task(name, data_root)
    by_image: dict[str, list] = {}
    for sample in task.samples():
        if sample.image_id not in by_image and len(by_image) == num:
            break
        by_image.setdefault(sample.image_id, []).append(sample)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, samples in enumerate(by_image.values()):
        path = folder / f"{name.rpartition(':')[2].rpartition('/')[2]}-{number:02d}.png"
        samples[0].image.save(path)
        lines = [f"{s.question}\t{' | '.join(s.references)}" for s in samples]
        path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
        print(path, *(f"\n    {line}" for line in lines), sep="", file=sys.stderr)
        written.append(path)
    return written


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m evaluations.tasks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="names and titles of all tasks")
    showing = commands.add_parser("show", help="write example images with their questions")
    showing.add_argument("task")
    showing.add_argument("--num", type=int, default=8, help="number of images")
    showing.add_argument("--out", type=Path, default=Path("examples"))
    showing.add_argument("--data-root", type=Path, help="where data sets lie as on the Hub, DIR/<org>/<name>")
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            print(json.dumps({name: TASKS.get(name).title for name in TASKS}))
            return 0
        if options.num < 1:
            raise ValueError(f"--num must be at least 1, got {options.num}")
        written = show(options.task, options.num, options.out, options.data_root)
    except (UnknownNameError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"folder": str(options.out), "images": [str(path) for path in written]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
