"""Scenes: colour, shape, presence and number of large objects (VQA accuracy)."""

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
    version: ClassVar[int] = 2
    kind: ClassVar[Kind] = "coarse"
    world: ClassVar[str] = "scenes"
