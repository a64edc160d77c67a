"""One stage of the dense base model from its recipe to a finished folder, and the weights that stages hand on.

A stage's `state.pt` names parameters as `TinyModel` does, so the next stage loads those of all stages before it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from visor.embedded.architecture import TinyArchitecture
from visor.embedded.model import TinyModel
from visor.embedded.recipes import BASE_STAGES, BaseRecipe, stages_before
from visor.embedded.stages import STAGES
from visor.training.optimise import STATE, Training, without_optimizer
from visor.training.processes import Processes
from visor.training.run_folder import finished, remember, write_json


def load_weights(folder: Path, model: TinyModel) -> None:
    """The weights of a finished or running stage, averaged if it keeps an average; the others stay as they are.

    Raises:
        ValueError: there are none.
    """
    if not (folder / STATE).exists():
        raise ValueError(f"no weights in {folder}; run the stage that writes it first ({folder.name})")
    state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in (state["average"] or state["parameters"]).items():
            own[name].copy_(value)


def run_base_stage(
    recipe: BaseRecipe, out: Path, architecture: TinyArchitecture | None = None, stop_after: int | None = None
) -> dict[str, Any]:
    """Run or continue a stage. Returns what its `done.json` says.

    Args:
        out: folder of the run; has one folder a stage, those of earlier stages with their weights.
        architecture: sizes; those of `dense-tiny` if there are none.
        stop_after: stop at this step as if interrupted there.

    Raises:
        ValueError: an earlier stage has not run, or this one was begun with another recipe.
    """
    folder, processes = out / recipe.stage, Processes(recipe.optimisation.precision)
    remember(recipe, folder, processes.is_main)
    if (document := finished(folder, recipe.optimisation.steps)) is not None:
        return document
    processes.wait()
    model = TinyModel(architecture or TinyArchitecture())
    # A begun dense stage trains all that counts, and has it in its own state.
    if not (recipe.stage == "dense" and (folder / STATE).exists()):
        for earlier in stages_before(recipe.stage, has_base=False):
            load_weights(out / earlier, model)
    options = replace(recipe.optimisation, seed=recipe.seed)
    training = Training(STAGES[recipe.stage](model, recipe, processes), options, folder, processes, recipe.tensorboard)
    training.run(stop_after)
    if training.step < options.steps:
        return {"stage": recipe.stage, "stopped": stop_after, "out": str(folder)}
    document = {"stage": recipe.stage, **training.summary()}
    if processes.is_main:
        write_json(folder / "done.json", document)
    processes.wait()
    return document


def pack(run: Path, out: Path) -> list[str]:
    """Write what training needs to go on elsewhere, without the optimisers' state. Returns the stages packed.

    Raises:
        ValueError: the run has no stage of the base model.
    """
    packed = [stage for stage in BASE_STAGES if (run / stage / STATE).exists()]
    if not packed:
        raise ValueError(f"no stage of the base model in {run}")
    for stage in packed:
        without_optimizer(run / stage / STATE, out / stage / STATE)
        for name in ("recipe.json", "log.jsonl", "done.json"):
            if (run / stage / name).exists():
                (out / stage / name).write_bytes((run / stage / name).read_bytes())
    return packed
