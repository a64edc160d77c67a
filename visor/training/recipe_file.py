"""A YAML file becomes a frozen dataclass of options, with further dataclasses in it, checked before anything is loaded.

An option is a field of a dataclass; pydantic checks its type (`budgets.documents`). Ours is what recipes need beyond
that: an unknown option is an error that names its neighbours at any depth, `key=value` changes one entry, and earlier
names of options are read as what they are called today (`visor.training.old_names`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

from budgets.documents import as_dataclass, read_yaml
from budgets.registry import nearest_first
from visor.training.old_names import OPTIONS, rename_options

T = TypeVar("T")


def load_options(cls: type[T], path: str | Path, folder: Path, changes: Sequence[str] = ()) -> T:
    """A dataclass from a YAML file, or from one of `folder` by its name without `.yaml`, with `key=value` changes.

    Raises:
        ValueError: no such file, no valid YAML, or options that do not exist or do not fit.
    """
    path = Path(path)
    if not path.is_file() and (folder / f"{path}.yaml").is_file():
        path = folder / f"{path}.yaml"
    if not path.is_file():
        known = sorted(each.stem for each in folder.glob("*.yaml"))
        raise ValueError(f"no recipe at {path}; those that ship: {', '.join(nearest_first(path.stem, known))}")
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of options, got {type(values).__name__}")
    try:
        values = rename_options(values)
        for change in changes:
            _change(values, change)
        values = rename_options(values)
        _check_names(cls, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return as_dataclass(cls, values, str(path))


def build_known(cls: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass from what an earlier version wrote.

    Options that came later have their defaults, and those that are gone are left out.
    """
    return as_dataclass(cls, _known(cls, rename_options(values)), cls.__name__)


def _change(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set takes key=value, such as optimisation.steps=100; got {change!r}")
    *above, last = OPTIONS.get(key.strip(), key.strip()).split(".")
    for name in above:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {change}: {name} has no options below it")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {change}: {text!r} is no valid YAML value: {error}") from error


def _check_names(cls: type, values: Any, place: str = "") -> None:
    """Refuse unknown options, at any depth.

    Args:
        place: what stands before the options' names, such as "optimisation.".

    Raises:
        ValueError: there is one; the message lists its neighbours. Or a part that is no mapping.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{place.rstrip('.')} must be a mapping, got {values!r}")
    hints = get_type_hints(cls)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"unknown option {place}{name}; nearest first: {', '.join(_near(cls, str(name), place))}")
        if is_dataclass(hints[name]):
            _check_names(hints[name], value, f"{place}{name}.")


def _known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of options that a dataclass has, at any depth."""
    hints = get_type_hints(cls)
    return {
        name: _known(hints[name], value) if is_dataclass(hints[name]) else value
        for name, value in values.items()
        if name in hints
    }


def _near(cls: type, name: str, place: str) -> list[str]:
    """The options of a dataclass, those of dataclasses in it included, by how near their own name is to `name`."""
    paths: dict[str, list[str]] = {}
    for path in _paths(cls, place):
        paths.setdefault(path.rpartition(".")[2], []).append(path)
    return [path for last in nearest_first(name, list(paths)) for path in paths[last]]


def _paths(cls: type, place: str) -> list[str]:
    hints, paths = get_type_hints(cls), []
    for each in fields(cls):
        paths.append(f"{place}{each.name}")
        if is_dataclass(hints[each.name]):
            paths += _paths(hints[each.name], f"{place}{each.name}.")
    return paths
