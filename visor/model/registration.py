"""Make transformers' Auto classes know VISOR models, without importing transformers (which takes seconds) to do so.

`import visor` must stay cheap: prices and `--help` need no torch. So where transformers has been imported, the config
is registered at once; where not, at the moment in which transformers' table of configs is imported. The config then
registers the model when one is made (`visor.model.configuration`).
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLE = "transformers.models.auto.configuration_auto"


class _ThenRegister(importlib.abc.Loader):
    """Loads the table as its own loader does, and adds VISOR to it."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module.__spec__.loader = module.__loader__ = self.loader  # as if nobody had looked on
        importlib.import_module("visor.model.configuration")


class _WhenTableIsImported(importlib.abc.MetaPathFinder):
    """Finds the table once, for the import system, and steps aside."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def register() -> None:
    """Register now, or when transformers is imported. Doing it twice does nothing more."""
    if TABLE in sys.modules:
        importlib.import_module("visor.model.configuration")
    elif not any(isinstance(finder, _WhenTableIsImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenTableIsImported())
