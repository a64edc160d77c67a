"""What lmms-eval is told of us: entry point `lmms_eval.models` -> `visor`, read on every start, so without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> ModelManifest:
    """`--model visor`: conversations, or with `--force_simple` one text behind all images."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = "evaluations.lmms.model"
    return ModelManifest("visor", simple_class_path=f"{module}.SimpleVisor", chat_class_path=f"{module}.Visor")
