"""Handwritten numbers from the UCI digits: read a line, or one digit of it (exact match)."""

from __future__ import annotations

from typing import ClassVar

from budgets.registry import TASKS
from evaluations.task import Kind, SyntheticTask


@TASKS.register("digits")
class Digits(SyntheticTask):
    """Up to four lines of handwritten digits that no training image showed."""

    name: ClassVar[str] = "digits"
    title: ClassVar[str] = "Handwritten digits"
    metric: ClassVar[str] = "exact_match"
    version: ClassVar[int] = 3
    kind: ClassVar[Kind] = "fine-grained"
    world: ClassVar[str] = "digits"
