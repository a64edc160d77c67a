"""One stage of VISOR's training: `python -m visor.training.run --recipe universal --model BASE --out DIR`.

BASE is a model folder, the name of a shipped model, or a Hub id; the first stage makes a VISOR model of a base. The
same command continues what was interrupted, and does nothing if it is done. Several processes:
`torchrun --nproc-per-node 2 -m visor.training.run ...`, or `accelerate launch`. DIR holds `model/` (or the labels),
`log.jsonl`, `skipped.jsonl` and `recipe.json`. The last line on stdout is one JSON document. The small models that ship
have a command of their own, `python -m visor.embedded.train`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from visor.training.recipe import load


def main(arguments: list[str] | None = None) -> int:
    """The command; the last line on stdout is one JSON document."""
    parser = argparse.ArgumentParser(
        prog="python -m visor.training.run", description=__doc__.splitlines()[0], epilog=__doc__.partition("\n")[2]
    )
    parser.add_argument("--recipe", required=True, help="YAML file, or the name of one in visor/training/recipes")
    parser.add_argument("--model", required=True, help="model to train: folder, shipped name, or Hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder of model, checkpoint and logs")
    parser.add_argument("--labels", type=Path, help="stage router: folder of the stage labels")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
                        help="change an entry of the recipe, such as optimisation.steps=100")  # fmt: skip
    parser.add_argument("--threads", type=int, help="of each process")
    parser.add_argument("--stop-after", type=int, help="stop at this step, as if interrupted there")
    options = parser.parse_args(arguments)
    try:
        recipe = load(options.recipe, options.changes)

        import torch

        from visor.training.runner import run_stage

        if options.threads:
            torch.set_num_threads(options.threads)
        document = run_stage(recipe, options.model, options.out, options.labels, options.stop_after)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
