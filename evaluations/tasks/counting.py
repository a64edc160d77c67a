"""Counting: the number of large objects in a scene (exact match).

Not a coarse task, although the objects are large: a model adds up what it sees over the visual tokens, so that with
fewer tokens it says a smaller number.
"""

from __future__ import annotations

from typing import ClassVar

from budgets.registry import TASKS
from evaluations.task import Kind, SyntheticTask


@TASKS.register("counting")
class Counting(SyntheticTask):
    """One to four large coloured shapes."""

    name: ClassVar[str] = "counting"
    title: ClassVar[str] = "Counting"
    metric: ClassVar[str] = "exact_match"
    version: ClassVar[int] = 2
    kind: ClassVar[Kind] = "reasoning"
    world: ClassVar[str] = "scenes"
    skills: ClassVar[frozenset[str]] = frozenset({"scenes/count"})
