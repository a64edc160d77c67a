"""One registry type for everything that can be extended: methods, tasks, model families.

An extension is a file in the registry's package (or a third party's entry point) that registers an object under a
name with a decorator. Files are imported when a name is first asked for, so listing what exists costs nothing heavy,
and a package is named by a string, so that the registry itself depends on no other room.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any


class UnknownNameError(ValueError):
    """A name that is not registered; the message lists the names that are, nearest first."""


def nearest_first(name: str, known: list[str]) -> list[str]:
    """The known names, the most similar to `name` first."""
    return sorted(known, key=lambda other: (-difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio(), other))


def check_name(kind: str, name: str, known: Sequence[str]) -> None:
    """Refuse a name that does not exist.

    Args:
        kind: what is named, in the singular.

    Raises:
        UnknownNameError: the message lists the names that exist, nearest first.
    """
    if name not in known:
        listed = ", ".join(nearest_first(str(name), list(known))) or "none"
        raise UnknownNameError(f"unknown {kind} {name!r}; the {_plural(kind)} that exist, nearest first: {listed}")


def _plural(kind: str) -> str:
    """ "device of the roofline" to "devices of the roofline", "policy" to "policies", "analysis" to "analyses"."""
    head, of, rest = kind.partition(" of ")
    for ending, several in (("y", "ies"), ("is", "es")):
        if head.endswith(ending):
            return head.removesuffix(ending) + several + of + rest
    return f"{head}s{of}{rest}"


def parts_of(name: str) -> list[str]:
    """The names that "+" joins; a name may itself end in one: "prumerge++fastv" is "prumerge+" and "fastv"."""
    parts: list[str] = []
    for part in name.split("+"):
        if part or not parts:
            parts.append(part)
        else:
            parts[-1] += "+"
    return parts


def _function(named: str) -> Callable[..., Any]:
    """The function that "module:function" names."""
    module, _, function = named.partition(":")
    return getattr(importlib.import_module(module), function)


class Registry:
    """Names to objects of one kind.

    Args:
        kind: what is registered, in the singular, for messages ("method").
        package: dotted name of the package whose modules register objects when imported.
        entry_point_group: group under which other distributions offer modules to import ("visor.methods").
        composer: "module:function" that makes an object of a name such as "a+b" and its parts; None if names do not
            compose.
        schemes: "module:function" by scheme: of a name such as "lmms:chartqa" it makes the object of what stands
            behind the colon. There may be thousands of these, so they are not listed.
    """

    def __init__(
        self,
        kind: str,
        package: str,
        entry_point_group: str,
        composer: str | None = None,
        schemes: Mapping[str, str] | None = None,
    ) -> None:
        self.kind, self.package, self.entry_point_group = kind, package, entry_point_group
        self.composer, self.schemes = composer, dict(schemes or {})
        self._objects: dict[str, Any] = {}
        self._discovered = False

    def register(self, name: str):
        """Decorator that files an object under `name`. Registering another object under a taken name is an error."""

        def file_under_name(obj):
            taken = self._objects.get(name)
            # A module imported twice (reload, `python -m`) defines the same thing again: that is no conflict.
            if taken is not None and (taken.__module__, taken.__qualname__) != (obj.__module__, obj.__qualname__):
                raise ValueError(
                    f"{self.kind} {name!r} is registered twice: by {taken.__module__} and {obj.__module__}"
                )
            self._objects[name] = obj
            return obj

        return file_under_name

    def _discover(self) -> None:
        if self._discovered:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__, self.package + "."):
            if not module.name.rpartition(".")[2].startswith("_"):
                importlib.import_module(module.name)
        for point in entry_points(group=self.entry_point_group):
            point.load()
        self._discovered = True

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._discover()
        return sorted(self._objects)

    def get(self, name: str) -> Any:
        """The object registered under `name`.

        Raises:
            UnknownNameError: no such name; the message lists those that exist, nearest first.
            ValueError: the parts of a composed name do not go together, or its scheme refuses it.
        """
        scheme, colon, rest = name.partition(":")
        if colon and scheme in self.schemes:
            return _function(self.schemes[scheme])(rest)
        self._discover()
        parts = parts_of(name)
        # "fastv+" has one part, itself: a name like any other.
        if self.composer is not None and len(parts) > 1 and name not in self._objects:
            return _function(self.composer)(parts, [self.get(part) for part in parts])
        check_name(self.kind, name, self.names())
        return self._objects[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: str) -> bool:
        """True for all names of a scheme: only `get` looks at what stands behind the colon."""
        return name.partition(":")[0] in self.schemes if ":" in name else name in self.names()


METHODS = Registry("method", "visor.reduction", "visor.methods", composer="visor.reduction._compose:compose")
FAMILIES = Registry("model family", "visor.families", "visor.families")
TASKS = Registry(
    "task",
    "evaluations.tasks",
    "visor.tasks",
    schemes={"lmms": "evaluations.lmms.tasks:task_named", "folder": "evaluations.folder:task_of"},
)
