"""A YAML file becomes a frozen dataclass of options, with further dataclasses in it, checked before anything is loaded.

An option is a field of a dataclass. An unknown one is an error that names its neighbours at any depth; a value of
another type than its field's is an error that says what was expected; `key=value` changes one entry. Earlier names of
options are read as what they are called today (`visor.training.old_names`).
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from budgets.registry import nearest_first
from visor.training.old_names import OPTIONS, rename_options

T = TypeVar("T")
TYPES = {int: "an integer", float: "a number", str: "text", bool: "true or false", Mapping: "a mapping"}


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
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of options, got {type(values).__name__}")
    try:
        values = rename_options(values)
        for change in changes:
            _change(values, change)
        return build(cls, rename_options(values))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def build(cls: type[T], values: Mapping[str, Any], place: str = "") -> T:
    """A dataclass from nested mappings.

    Args:
        place: what stands before the options' names in messages, such as "optimisation.".

    Raises:
        ValueError: an unknown option, or a value that does not fit.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{place.rstrip('.')} must be a mapping, got {values!r}")
    known, hints, made = [each.name for each in fields(cls)], get_type_hints(cls), {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown option {place}{name}; nearest first: {', '.join(_near(cls, str(name), place))}")
        if is_dataclass(hints[name]):
            made[name] = build(hints[name], value, f"{place}{name}.")
        else:
            made[name] = _value(value, hints[name], f"{place}{name}")
    try:
        return cls(**made)
    except TypeError as error:  # an option without a default is missing
        raise ValueError(f"{place or 'recipe: '}{error}") from error


def build_known(cls: type[T], values: Mapping[str, Any]) -> T:
    """As `build`, from what an earlier version wrote.

    Options that came later have their defaults, and those that are gone are left out.
    """
    return build(cls, _known(cls, rename_options(values)))


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


def _value(value: Any, hint: Any, name: str) -> Any:
    """A value as its field holds it.

    Raises:
        ValueError: it is of another type.
    """
    if isinstance(value, list):
        value = tuple(value)
    elif isinstance(value, str) and _allows(hint, float):  # YAML 1.1 reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            pass
    if not _fits(value, hint):
        raise ValueError(f"{name} must be {_described(hint)}, got {value!r}")
    return value


def _allows(hint: Any, kind: type) -> bool:
    return hint is kind or (get_origin(hint) in (Union, types.UnionType) and kind in get_args(hint))


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is tuple:  # options know lists of one type only: tuple[X, ...]
        return isinstance(value, tuple) and all(_fits(each, arguments[0]) for each in value)
    if isinstance(value, bool):  # which Python takes for an integer
        return hint is bool
    return isinstance(value, (int, float) if hint is float else origin or hint)


def _described(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(each) for each in arguments)
    if origin is tuple:
        return f"a list, each entry {_described(arguments[0])}"
    return "null" if hint is type(None) else TYPES.get(origin or hint, str(hint))


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
