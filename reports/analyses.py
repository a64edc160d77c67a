"""Analyses of a model in a run folder (`python -m visor.analysis`): read, checked, and nothing else.

The files are `analyses/<model>.json`; `evaluations.analyses` writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluations.records import RecordsError, read_json

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ModelAnalyses:
    """How one model uses its visual tokens, by task.

    Args:
        tasks: by name: title, kind, and by analysis ("attention", "cka", "layer-drop") its figures by layer.
    """

    model: str
    trained: bool | None
    num_layers: int
    tasks: dict[str, dict[str, Any]]

    def having(self, kind: str) -> list[tuple[str, dict[str, Any]]]:
        """(title, figures) of the tasks that have an analysis."""
        return [(task["title"], task[kind]) for task in self.tasks.values() if kind in task]


def load_analyses(folder: Path) -> list[ModelAnalyses]:
    """All analyses of a run folder, by name.

    Raises:
        RecordsError: a file is broken or of another schema.
    """
    analyses = []
    for path in sorted((folder / "analyses").glob("*.json")):
        data = read_json(path)
        if data.get("schema_version") != SCHEMA_VERSION:
            raise RecordsError(f"{path} has schema {data.get('schema_version')}; this code reads {SCHEMA_VERSION}")
        analyses.append(ModelAnalyses(data["model"], data.get("trained"), data["num_layers"], data["tasks"]))
    return analyses
