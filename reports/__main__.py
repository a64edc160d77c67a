"""`python -m reports RUN_FOLDER`: (re)build a run folder's report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0, or 2 with a message if the folder cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m reports", description="Build report.html and its tables from a run folder."
    )
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="a folder written by python -m evaluations.run")
    options = parser.parse_args(arguments)
    from reports.build import build  # after parsing: matplotlib and pandas take a second

    try:
        path = build(options.folder)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_bytes = path.stat().st_size
    print(f"{path}: {num_bytes / 1e6:.2f} MB")
    names = ("results.json", "cells.csv", "samples.parquet", "figures", "timings.csv")
    files = {name: str(path.parent / name) for name in names if (path.parent / name).exists()}
    print(json.dumps({"report": str(path), "bytes": num_bytes, **files}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
