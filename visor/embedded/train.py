"""Train the embedded models from nothing: `python -m visor.embedded.train --stage all`.

`dense` is four stages: `decoder` (symbolic scenes) and `tower` (patch labels) know nothing of each other and may run
side by side; `align` fits the projector between them; `dense` trains everything on pixels. `visor` and `m3` go on from
the dense model (`visor.embedded.chain`). A stage runs what is missing of those before it, and continues whatever was
interrupted.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

STAGES = ("decoder", "tower", "align", "dense")
TARGETS = {"visor": ("visor",), "m3": ("m3",), "all": ("visor", "m3")}


def train_dense(options: argparse.Namespace) -> None:
    """Run the stages of the dense model up to `options.stage`."""
    import torch

    from visor.embedded import stages
    from visor.embedded.architecture import TinyArchitecture
    from visor.embedded.recipes import RECIPES
    from visor.embedded.trainer import load_weights, train

    torch.set_num_threads(options.threads)
    model = stages.TinyModel(TinyArchitecture())
    makers = {
        "decoder": stages.DecoderStage,
        "tower": stages.TowerStage,
        "align": stages.AlignStage,
        "dense": stages.DenseStage,
    }
    last = options.stage if options.stage in STAGES else STAGES[-1]
    # The first two need nothing of each other, and a begun dense stage has all parts in its own checkpoint.
    alone = last in ("decoder", "tower") or (last == "dense" and (options.out / "dense.pt").exists())
    for name in STAGES[: STAGES.index(last) + 1]:
        if options.only and name != last and alone:
            continue
        stage, recipe, path = makers[name](model), RECIPES[name], options.out / f"{name}.pt"
        recipe = replace(recipe, steps=max(1, round(recipe.steps * options.share)))
        if options.only and name != last:
            load_weights(path, stage.module)
            continue
        if name == options.stage:
            changed = {"steps": options.steps, "peak_rate": options.rate}
            recipe = replace(recipe, **{k: v for k, v in changed.items() if v is not None})
        if name == "decoder" and options.hold_embeddings:
            stage.hold_embeddings()
        train(stage, recipe, options.out)


def train_from_dense(target: str, options: argparse.Namespace) -> Path:
    """From the dense model of this run to a finished `visor` or `m3`; returns the folder of the published model."""
    from visor.embedded.chain import run_chain
    from visor.embedded.export import export
    from visor.embedded.parallel import Group
    from visor.training.publish import publish

    group, base, published = Group(), options.out / "dense-tiny", options.out / f"{target}-tiny"
    if group.rank == 0 and not (base / "config.json").exists():
        export(options.out, base)
    group.wait()
    document = run_chain(target, base, options.out / target, options.share)
    if group.rank == 0:
        publish(options.out / target, Path(document["model"]), published, base.name)
    return published


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, run the stages, print where the checkpoints are."""
    parser = argparse.ArgumentParser(prog="python -m visor.embedded.train", description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=(*STAGES, *TARGETS), required=True)
    parser.add_argument("--only", action="store_true", help="run this stage alone; earlier ones must be finished")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="folder of checkpoints and logs")
    parser.add_argument("--steps", type=int, help="steps of the last stage, instead of the recipe's")
    parser.add_argument("--rate", type=float, help="peak learning rate of the last stage, instead of the recipe's")
    parser.add_argument("--share", type=float, default=1.0, help="of all steps and examples, for a trial")
    parser.add_argument(
        "--hold-embeddings",
        action="store_true",
        help="stage decoder: leave the embeddings of words and patches as they are, so that align may run beside it",
    )
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    options = parser.parse_args(arguments)
    if options.stage in TARGETS and (options.steps is not None or options.rate is not None or options.only):
        parser.error(f"--steps, --rate and --only are for the stages {', '.join(STAGES)}; use --share, or "
                     "python -m visor.embedded.chain --set")  # fmt: skip

    from visor.embedded.parallel import Group

    try:
        train_dense(options)
    except ValueError as error:
        parser.error(str(error))
    written = {"checkpoint": str(options.out / f"{options.stage}.pt")}
    if options.stage in TARGETS:
        written = {target: str(train_from_dense(target, options)) for target in TARGETS[options.stage]}
    if Group().rank == 0:
        print(json.dumps(written))


if __name__ == "__main__":
    main()
