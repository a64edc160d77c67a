"""Charts: values, names and colours of bars (ChartQA-like, relaxed accuracy)."""

from __future__ import annotations

from typing import ClassVar

from budgets.registry import TASKS
from evaluations.task import Kind, SyntheticTask


@TASKS.register("charts")
class Charts(SyntheticTask):
    """Bar charts of up to five bars with printed values."""

    name: ClassVar[str] = "charts"
    title: ClassVar[str] = "Charts"
    metric: ClassVar[str] = "relaxed_accuracy"
    version: ClassVar[int] = 3
    kind: ClassVar[Kind] = "fine-grained"
    world: ClassVar[str] = "charts"
