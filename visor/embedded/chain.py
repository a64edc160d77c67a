"""All stages of an embedded model, one after the other: `python -m visor.embedded.chain --target visor`.

    dense-tiny -> blocks -> everything -> search -> universal -> labels -> router -> visor-tiny
    dense-tiny -> m3 -> m3-tiny

Each stage has its folder in --out; what is done is not repeated, what was interrupted continues. Two processes:
`torchrun --nproc-per-node 2 -m visor.embedded.chain --target visor --threads 1`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from visor.training.recipe import TRAINED, Recipe, load

CHAINS = {"visor": ("blocks", "everything", "search", "universal", "labels", "router"), "m3": ("m3",)}


def recipes_of(target: str, prefix: str = "tiny-", changes: Mapping[str, Sequence[str]] | None = None) -> list[Recipe]:
    """The recipes of a target's stages.

    Args:
        prefix: of the recipe files' names.
        changes: by stage, `key=value` changes.

    Raises:
        ValueError: no such target or stage.
    """
    if target not in CHAINS:
        raise ValueError(f"unknown target {target!r}; expected one of {', '.join(CHAINS)}")
    changes = changes or {}
    if unknown := sorted(set(changes) - set(CHAINS[target])):
        raise ValueError(f"{target} has no stages {unknown}; its stages are {', '.join(CHAINS[target])}")
    return [load(f"{prefix}{stage}", changes.get(stage, ())) for stage in CHAINS[target]]


def scaled(recipe: Recipe, share: float) -> Recipe:
    """The recipe with `share` of its steps, or of its examples; never none."""
    if share == 1.0:
        return recipe
    if recipe.stage in TRAINED:
        steps = max(1, round(recipe.optimisation.steps * share))
        warmup = max(1, round(recipe.optimisation.warmup * min(1.0, share)))
        return replace(recipe, optimisation=replace(recipe.optimisation, steps=steps, warmup=warmup))
    examples = max(recipe.exploration.batch_size, round(recipe.exploration.num_examples * share))
    return replace(recipe, exploration=replace(recipe.exploration, num_examples=examples))


def run_chain(
    target: str,
    base: str | Path,
    out: Path,
    share: float = 1.0,
    changes: Mapping[str, Sequence[str]] | None = None,
    last: str | None = None,
    prefix: str = "tiny-",
) -> dict[str, Any]:
    """Run or continue all stages of a target.

    Args:
        base: the dense model: a folder, or the name of a shipped model.
        out: gets one folder a stage.
        share: of the recipes' steps and examples, for a trial.
        changes: by stage, `key=value` changes of its recipe.
        last: stage to stop behind; default: the last one.
        prefix: of the recipe files' names.

    Returns:
        What the last stage says; `["model"]` is the folder of its model, with float32 weights.
    """
    from visor.training.run import run_stage

    recipes = [scaled(recipe, share) for recipe in recipes_of(target, prefix, changes)]
    if last is not None and last not in CHAINS[target]:
        raise ValueError(f"{target} has no stage {last!r}; its stages are {', '.join(CHAINS[target])}")
    model, document, labels = base, {}, None
    for recipe in recipes:
        folder = out / recipe.stage
        folder.mkdir(parents=True, exist_ok=True)
        document = run_stage(recipe, model, folder, labels)
        if recipe.stage == "labels":
            labels = folder
        else:
            model = document["model"]
        if recipe.stage == last:
            break
    return document


def main(arguments: list[str] | None = None) -> int:
    """The command; the last line on stdout is one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m visor.embedded.chain", description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=CHAINS, required=True)
    parser.add_argument("--base", default="dense-tiny", help="the dense model; default: the shipped dense-tiny")
    parser.add_argument("--out", type=Path, help="default: runs/<target>-tiny")
    parser.add_argument("--publish", type=Path, help="write the finished model there, in bf16, with its card")
    parser.add_argument("--last", help="stage to stop behind")
    parser.add_argument("--share", type=float, default=1.0, help="of the recipes' steps and examples, for a trial")
    parser.add_argument("--set", action="append", default=[], metavar="STAGE.KEY=VALUE", dest="changes",
                        help="change a recipe, such as universal.optimisation.steps=2000")  # fmt: skip
    parser.add_argument("--threads", type=int, help="of each process")
    options = parser.parse_args(arguments)
    out = options.out or Path("runs") / f"{options.target}-tiny"
    changes: dict[str, list[str]] = {}
    try:
        for change in options.changes:
            stage, dot, rest = change.partition(".")
            if not dot:
                raise ValueError(f"--set takes STAGE.KEY=VALUE, got {change!r}")
            changes.setdefault(stage, []).append(rest)
        if options.threads:
            import torch

            torch.set_num_threads(options.threads)
        document = run_chain(options.target, options.base, out, options.share, changes, options.last)
        if int(os.environ.get("RANK", "0")) == 0 and options.publish is not None:
            from visor.training.publish import publish

            publish(out, Path(document["model"]), options.publish, Path(options.base).name)
            document["published"] = str(options.publish)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
