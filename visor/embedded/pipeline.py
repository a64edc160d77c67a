"""All stages up to one, each in its own folder: what is done is not repeated, what was interrupted continues.

The folder of a run has one folder a stage, and the finished models `dense-tiny`, `visor-tiny` and `m3-tiny` in bfloat16
with their cards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visor.embedded.recipes import BASE_STAGES, M3_STAGES, VISOR_STAGES, recipe_of, scaled, stages_before
from visor.training.run_folder import finished

PUBLISHED = {VISOR_STAGES[-1]: "visor-tiny", M3_STAGES[-1]: "m3-tiny"}
"""Stages that end in a model of their own."""


def run_stages(
    last: str,
    out: Path,
    base: str | Path | None = None,
    share: float = 1.0,
    changes: Mapping[str, Sequence[str]] | None = None,
    only: bool = False,
) -> dict[str, Any]:
    """Run or continue all stages up to `last`.

    Args:
        out: folder of the run.
        base: a dense model to begin with: a folder, or the name of a shipped model. None trains one.
        share: of the recipes' steps and examples, for a trial.
        changes: by stage, `key=value` changes of its recipe.
        only: run `last` alone; earlier stages must be finished.

    Returns:
        What the last stage says. Of a stage behind the base, `["model"]` is the folder of its model, with float32
        weights.

    Raises:
        ValueError: a recipe or a model that do not fit, or with `only` an earlier stage that is not finished.
    """
    from visor.embedded.base_model import run_base_stage
    from visor.embedded.scene_tokens import SceneTokens
    from visor.training.runner import run_stage

    changes = changes or {}
    names = (*stages_before(last, base is not None), last)
    # All recipes are read before the first one runs: a mistake in the last shows at once.
    recipes = {name: scaled(recipe_of(name, changes.get(name, ())), share) for name in names}
    model, labels, document = base, None, {}
    for name in names:
        folder = out / name
        if name in BASE_STAGES:
            if name == last or not only:
                document = run_base_stage(recipes[name], out)
            continue
        if model is None:
            model = exported(out)
        if only and name != last:
            if (document := finished(folder)) is None:
                raise ValueError(f"the stage {name!r} is not finished in {folder}; run the stage that writes it first")
        else:
            document = run_stage(recipes[name], model, folder, labels, targets_for=SceneTokens)
        if name == "labels":
            labels = folder
        else:
            model = document["model"]
    return document


def exported(out: Path) -> Path:
    """The dense model of a run, written once."""
    from visor.embedded.export import export
    from visor.training.processes import Processes

    processes, folder = Processes(), out / "dense-tiny"
    if processes.is_main and not (folder / "config.json").exists():
        export(out, folder)
    processes.wait()
    return folder


def published(last: str, out: Path, base: str | Path | None, document: Mapping[str, Any]) -> str:
    """Write what a run up to `last` has made, where it is a model that ships; where it is."""
    from visor.embedded.publish import publish
    from visor.training.processes import Processes

    if last == "dense":
        return str(exported(out))
    if last not in PUBLISHED:
        return str(document.get("model", out / last))
    processes, folder = Processes(), out / PUBLISHED[last]
    if processes.is_main:
        publish(out, Path(document["model"]), folder, Path(base or "dense-tiny").name)
    processes.wait()
    return str(folder)
