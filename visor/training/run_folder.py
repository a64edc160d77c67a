"""The folder of a stage: the recipe that began it, and the document that says that it is done."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

MAY_CHANGE = ("steps", "log_every", "save_every", "workers", "micro_batch", "max_skipped")
"""Options of the optimisation that a run may continue with other values of. Another `steps` is another learning rate
schedule from there on; the rest changes no weight."""


class AnyRecipe(Protocol):
    """A recipe of any kind of stage."""

    stage: str

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> AnyRecipe: ...

    def to_dict(self) -> dict[str, Any]: ...


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, path)


def remember(recipe: AnyRecipe, folder: Path, is_main: bool, not_read: tuple[str, ...] = ()) -> None:
    """Refuse to continue a run with another recipe; note the recipe of a new one.

    Args:
        not_read: parts of the recipe that its stage has no use for: they may be anything when it is continued.

    Raises:
        ValueError: the folder was begun with another recipe.
    """
    path, own = folder / "recipe.json", json.loads(json.dumps(recipe.to_dict()))
    if path.exists():
        before = json.loads(json.dumps(type(recipe).from_dict(json.loads(path.read_text())).to_dict()))
        old, new = (_binding(values, not_read) for values in (before, own))
        if old != new:
            changed = [name for name in new if old.get(name) != new[name]]
            raise ValueError(
                f"{folder} was begun with another recipe (different: {', '.join(changed)}); give another --out, or "
                "delete the folder to start anew"
            )
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, own)


def finished(folder: Path, steps: int | None = None) -> dict[str, Any] | None:
    """What a finished stage says of itself; None if it is not finished.

    Args:
        steps: of the recipe; a stage that ended after fewer is to go on.
    """
    path = folder / "done.json"
    if not path.exists():
        return None
    document = json.loads(path.read_text())
    return document if steps is None or document["steps"] >= steps else None


def _binding(recipe: dict[str, Any], not_read: tuple[str, ...]) -> dict[str, Any]:
    optimisation = {name: value for name, value in recipe["optimisation"].items() if name not in MAY_CHANGE}
    return {**recipe, "tensorboard": None, "optimisation": optimisation, **dict.fromkeys(not_read)}
