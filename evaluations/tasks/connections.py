"""Connections: follow a line from one letter to another (multi-hop, exact match)."""

from __future__ import annotations

from typing import ClassVar

from budgets.registry import TASKS
from evaluations.task import Kind, SyntheticTask


@TASKS.register("connections")
class Connections(SyntheticTask):
    """Up to five coloured lines between two columns of letters."""

    name: ClassVar[str] = "connections"
    title: ClassVar[str] = "Connections"
    metric: ClassVar[str] = "exact_match"
    version: ClassVar[int] = 3
    kind: ClassVar[Kind] = "reasoning"
    world: ClassVar[str] = "connections"
