"""Train the small models from nothing: `python -m visor.embedded.train --stage all`.

The stages are `decoder`, `tower`, `align`, `dense` (dense-tiny), then `blocks`, `everything`, `search`, `universal`,
`labels`, `router` (visor-tiny), or `m3` (m3-tiny); `visor` is all up to `router`, `all` is all. A stage runs what is
missing of those before it, and continues whatever was interrupted. Each has its folder in --out. Two processes:
`torchrun --nproc-per-node 2 -m visor.embedded.train --stage dense --threads 1`. The last line on stdout is one JSON
document: by stage, where the model is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from visor.embedded.recipes import STAGES, TARGETS, changes_by_stage


def main(arguments: list[str] | None = None) -> int:
    """The command; the last line on stdout is one JSON document."""
    parser = argparse.ArgumentParser(
        prog="python -m visor.embedded.train", description=__doc__.splitlines()[0], epilog=__doc__.partition("\n")[2]
    )
    parser.add_argument("--stage", choices=(*STAGES, *TARGETS), required=True)
    parser.add_argument("--only", action="store_true", help="run this stage alone; earlier ones must be finished")
    parser.add_argument("--base", help="a dense model to begin with, such as dense-tiny; default: train one")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder of the run")
    parser.add_argument("--share", type=float, default=1.0, help="of the recipes' steps and examples, for a trial")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.KEY=VALUE", dest="changes",
                        help="change a recipe, such as universal.optimisation.steps=2000")  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    options = parser.parse_args(arguments)
    try:
        changes = changes_by_stage(options.changes)

        import torch

        from visor.embedded.pipeline import published, run_stages

        torch.set_num_threads(options.threads)
        written = {}
        for last in TARGETS.get(options.stage, (options.stage,)):
            document = run_stages(last, options.out, options.base, options.share, changes, options.only)
            written[last] = published(last, options.out, options.base, document)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(written))
    return 0


if __name__ == "__main__":
    sys.exit(main())
