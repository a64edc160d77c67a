"""What a checkpoint says of its own training: on what, for how many steps, from which base.

A shipped model carries `training_facts.md` (JSON; the name keeps it out of the hash of what can change an answer), and
its card a section "Data". Any other model may say it in one line of its card's front matter: `training: 3 epochs of
LLaVA-665k`. What is not said is not guessed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FACTS = "training_facts.md"


def read_training(folder: Path | None, card: str | None) -> dict[str, Any] | None:
    """The facts of a checkpoint, as run.json records them; None where nothing is stated.

    Returns:
        stated: the line of the card's front matter, or None.
        data: the first sentence of the card's section "Data", or None.
        base, base_steps: the model that the training began with, and how many steps it had seen then; or None.
        stages: name, steps, examples and seconds of each stage that took steps, in their order.
    """
    path = folder / FACTS if folder is not None else None
    facts: Any = None
    if path is not None and path.is_file():
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # prose under the same name, of other tools: no facts that could be counted
            facts = None
    facts = facts if isinstance(facts, Mapping) else {}
    found = {
        "stated": _front_matter(card or "").get("training"),
        "data": _data(card or ""),
        "base": facts.get("base"),
        "base_steps": facts.get("base_steps"),
        "stages": _stages(facts.get("stages") or []),
    }
    return found if found["stated"] or found["data"] or found["stages"] else None


def _stages(stages: Any) -> list[dict[str, Any]]:
    """Of a list of stages that name themselves, or a mapping by name."""
    named = [(name, one) for name, one in stages.items()] if isinstance(stages, Mapping) else [
        (one.get("name") or one.get("stage"), one) for one in stages]  # fmt: skip
    return [
        {
            "name": name,
            "steps": one["steps"],
            "examples": one.get("examples", one.get("scenes")),
            "seconds": one.get("seconds"),
        }
        for name, one in named
        if "steps" in one  # a search or the labels of a router take none
    ]


def _front_matter(card: str) -> dict[str, str]:
    """The lines `name: value` between the two `---` at the head of a card."""
    match = re.match(r"---\n(.*?)\n---(?:\n|$)", card, re.DOTALL)
    lines = [line.partition(":") for line in (match[1] if match else "").splitlines()]
    return {name.strip().lower(): value.strip() for name, _, value in lines if value.strip()}


def _data(card: str) -> str | None:
    match = re.search(r"^##+ +(?:training )?data *\n+(.+?)(?:\n\s*\n|\n#|\Z)", card, re.DOTALL | re.IGNORECASE | re.M)
    if match is None:
        return None
    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(match[1].replace("`", "").split()))[0]
