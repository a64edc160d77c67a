"""Forms: read a value by its field name (DocVQA-like, ANLS)."""

from __future__ import annotations

from typing import ClassVar

from budgets.registry import TASKS
from evaluations.task import Kind, SyntheticTask


@TASKS.register("forms")
class Forms(SyntheticTask):
    """Printed forms of up to seven fields."""

    name: ClassVar[str] = "forms"
    title: ClassVar[str] = "Forms"
    metric: ClassVar[str] = "anls"
    kind: ClassVar[Kind] = "fine-grained"
    world: ClassVar[str] = "forms"
