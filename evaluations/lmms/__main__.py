"""Our tasks for lmms-eval: `python -m evaluations.lmms export DIR --tasks easy_vqa`, then `--include_path DIR`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluations.arguments import names
from evaluations.command import OK, USAGE, say


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m evaluations.lmms", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write our tasks as a folder for lmms-eval's --include_path")
    export.add_argument("folder", type=Path)
    export.add_argument("--tasks", type=names, default=["easy_vqa"], metavar="A,B", help="default: easy_vqa")
    export.add_argument("--limit", type=int, help="samples of each task (default: all that it has)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        from evaluations.lmms.exported import export

        written = [export(name, options.folder, options.limit) for name in options.tasks]
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return USAGE
    tasks = [path.stem for path in written]
    say(f"python -m lmms_eval eval --model visor --model_args pretrained=dense-tiny --tasks {','.join(tasks)} "
        f"--include_path {options.folder}")  # fmt: skip
    print(json.dumps({"include_path": str(options.folder), "tasks": tasks}))
    return OK


if __name__ == "__main__":
    sys.exit(main())
