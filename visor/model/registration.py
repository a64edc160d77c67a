"""Transformers' Auto classes come to know VISOR models, without importing transformers (which takes seconds) to do so.

`import visor` must stay cheap: prices and `--help` need no torch. So each step waits for the import that makes it
possible. When transformers' table of configs has been imported, the config is; when the config's module has been
imported, the config is registered; and when the first config is made, the model is. This file alone knows both.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLE = "transformers.models.auto.configuration_auto"
CONFIGURATION = "visor.model.configuration"


class _LoaderWithStep(importlib.abc.Loader):
    """Loads a module as its own loader does, and takes a step afterwards."""

    def __init__(self, loader: Any, step: Callable[[], Any]) -> None:
        self.loader, self.step = loader, step

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module.__spec__.loader = module.__loader__ = self.loader  # the module looks as if it had been imported plainly
        self.step()


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module once, for the import system, and then steps aside."""

    def __init__(self, name: str, step: Callable[[], Any]) -> None:
        self.name, self.step = name, step

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderWithStep(spec.loader, self.step)
        return spec


def _after_import(name: str, step: Callable[[], Any]) -> None:
    """Take a step now if the module has been imported, or else as soon as it is."""
    if name in sys.modules:
        step()
    elif not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, step))


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from visor.model.configuration import VisorConfig

    AutoConfig.register(VisorConfig.model_type, VisorConfig, exist_ok=True)
    VisorConfig.before_use = _register_model


def _register_model() -> None:
    """For the first config that is made: only then transformers is sure to have been imported to its end."""
    from transformers import AutoModelForImageTextToText

    from visor.model.configuration import VisorConfig
    from visor.model.modeling import VisorForConditionalGeneration

    AutoModelForImageTextToText.register(VisorConfig, VisorForConditionalGeneration, exist_ok=True)
    VisorConfig.before_use = None


def register() -> None:
    """Take the steps that are possible, and leave the others to the imports that they wait for. Twice is as once."""
    _after_import(CONFIGURATION, _register_config)
    _after_import(TABLE, lambda: importlib.import_module(CONFIGURATION))
