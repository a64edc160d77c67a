"""Train the embedded models: `python -m visor.training.tiny --stage dense`.

Stages of `dense`: `decoder` (symbolic scenes) and `tower` (patch labels) know nothing of each other and may run side by
side; `align` fits the projector between them; `dense` trains everything on pixels. `--stage dense` runs what is
missing of all four, and continues whatever was interrupted.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

STAGES = ("decoder", "tower", "align", "dense")


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run the stages, print where the checkpoints are."""
    parser = argparse.ArgumentParser(prog="python -m visor.training.tiny", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--only", action="store_true", help="run this stage alone; earlier ones must be finished")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder of checkpoints and logs")
    parser.add_argument("--steps", type=int, help="steps of the last stage, instead of the recipe's")
    parser.add_argument("--rate", type=float, help="peak learning rate of the last stage, instead of the recipe's")
    parser.add_argument(
        "--hold-embeddings",
        action="store_true",
        help="stage decoder: leave the embeddings of words and patches as they are, so that align may run beside it",
    )
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    options = parser.parse_args(arguments)

    import torch

    from visor.training import stages
    from visor.training.parallel import Group
    from visor.training.tiny_model import TinyArchitecture
    from visor.training.tiny_recipes import RECIPES
    from visor.training.trainer import load_weights, train

    torch.set_num_threads(options.threads)
    model = stages.TinyModel(TinyArchitecture())
    makers = {
        "decoder": stages.DecoderStage,
        "tower": stages.TowerStage,
        "align": stages.AlignStage,
        "dense": stages.DenseStage,
    }
    for name in STAGES[: STAGES.index(options.stage) + 1]:
        if options.only and name != options.stage and options.stage in ("decoder", "tower"):
            continue
        stage, recipe, path = makers[name](model), RECIPES[name], options.out / f"{name}.pt"
        if name == options.stage:
            changed = {"steps": options.steps, "peak_rate": options.rate}
            recipe = recipe.__class__(**{**vars(recipe), **{k: v for k, v in changed.items() if v is not None}})
        elif options.only:
            try:
                load_weights(path, stage.module)
            except ValueError as error:
                parser.error(str(error))
            continue
        if name == "decoder" and options.hold_embeddings:
            stage.hold_embeddings()
        train(stage, recipe, options.out)
    if Group().rank == 0:
        print(json.dumps({"checkpoint": str(options.out / f"{options.stage}.pt")}))


if __name__ == "__main__":
    main()
