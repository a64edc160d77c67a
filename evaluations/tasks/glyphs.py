"""Glyph grids: read a character or a row by its position (OCR, exact match)."""

from __future__ import annotations

from typing import ClassVar

from budgets.registry import TASKS
from evaluations.task import Kind, SyntheticTask


@TASKS.register("glyphs")
class Glyphs(SyntheticTask):
    """Grids of up to six rows of five characters."""

    name: ClassVar[str] = "glyphs"
    title: ClassVar[str] = "Glyph grids"
    metric: ClassVar[str] = "exact_match"
    kind: ClassVar[Kind] = "fine-grained"
    world: ClassVar[str] = "glyphs"
