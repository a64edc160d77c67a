"""Earlier names of options and weights: recipes, `recipe.json` and `state.pt` of older runs can still be read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

OPTIONS = {
    "optimisation.facts_weight": "optimisation.fact_supervision_weight",
    "optimisation.looks_weight": "optimisation.attention_supervision_weight",
    "pooling.written_share": "pooling.window_words_share",
}
"""Options of recipes: earlier name, name."""

HEADS = {"facts.": "visual_facts.", "asked.": "question_facts.", "written.": "window_words."}
"""Prefixes of parameters in `state.pt`: the heads of the auxiliary losses, earlier name, name."""


def rename_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a recipe under their names of today.

    Raises:
        ValueError: an option is given under both of its names.
    """
    renamed = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    for earlier, name in OPTIONS.items():
        (part, old), (_, new) = earlier.split("."), name.split(".")
        options = renamed.get(part)
        if isinstance(options, dict) and old in options:
            if new in options:
                raise ValueError(f"{earlier} is an earlier name of {name}; give one of them")
            options[new] = options.pop(old)
    return renamed


def rename_parameters(parameters: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Parameters under their names of today, in the same order: an optimiser's state goes by it.

    Args:
        known: names that the stage has. They stay as they are: what is one stage's earlier name is another's own.
    """
    return {name if name in known else _renamed(name): value for name, value in parameters.items()}


def _renamed(parameter: str) -> str:
    for earlier, name in HEADS.items():
        if parameter.startswith(earlier):
            return name + parameter.removeprefix(earlier)
    return parameter
