"""Training VISOR, and its rival M3, on any base: recipes, data, the one training loop, search, labels, router.

The command is `python -m visor.training.run`. Imported by `visor.embedded` and by scripts; imports `visor.model` and
what lies below it. It knows no tokenizer's vocabulary: whoever has scenes with ground truth hands in an object that
puts it into token ids (`visor.training.auxiliary.scene_targets`).
"""

from typing import Any

from visor.training.recipe import Recipe, load

__all__ = ["Recipe", "load", "run_stage"]


def __getattr__(name: str) -> Any:
    if name == "run_stage":  # which brings torch
        from visor.training.runner import run_stage

        return run_stage
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
