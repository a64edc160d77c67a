"""Scenes: colour, shape and presence of large objects (VQA accuracy). Their number is a task of its own, `counting`."""

from __future__ import annotations

from typing import ClassVar

from budgets.registry import TASKS
from evaluations.task import Kind, SyntheticTask


@TASKS.register("scenes")
class Scenes(SyntheticTask):
    """Up to four large coloured shapes."""

    name: ClassVar[str] = "scenes"
    title: ClassVar[str] = "Scenes"
    metric: ClassVar[str] = "vqa_accuracy"
    version: ClassVar[int] = 4
    kind: ClassVar[Kind] = "coarse"
    world: ClassVar[str] = "scenes"
    skills: ClassVar[frozenset[str]] = frozenset({"scenes/color", "scenes/shape", "scenes/present"})
