"""A YAML document becomes a dataclass, or a message that says which of its keys is wrong and which was meant.

Pydantic checks types and keys against the dataclass's own fields, nested ones included; the dataclass's own checks
(`__post_init__`) run as always. A class that is read this way sets `__pydantic_config__ = STRICT_KEYS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from budgets.registry import nearest_first

STRICT_KEYS = {"extra": "forbid"}
T = TypeVar("T")


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: it cannot be read, with the file's name.
    """
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {error}") from None


def as_dataclass(kind: type[T], data: Any, where: str) -> T:
    """Data as an object of a dataclass.

    Args:
        where: what the message begins with: a file's name.

    Raises:
        ValueError: all that is wrong, with the places of the keys; for an unknown one the known ones, nearest first.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        problems = "; ".join(_problem(kind, each) for each in error.errors(include_url=False))
        raise ValueError(f"{where}: {problems}") from None


def _problem(kind: type, error: dict[str, Any]) -> str:
    place = ".".join(map(str, error["loc"]))
    if error["type"] == "unexpected_keyword_argument":
        known = nearest_first(str(error["loc"][-1]), _keys_at(kind, error["loc"][:-1]))
        return f"unknown key {place!r}; the keys that exist there, nearest first: {', '.join(known)}"
    if error["type"] in ("missing", "missing_argument"):
        return f"the key {place!r} is missing"
    if error["type"] == "value_error":  # a check of the class itself says all that there is to say
        return str(error["ctx"]["error"])
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{place}: {message}, got {error['input']!r}" if place else f"{message}, got {error['input']!r}"


def _keys_at(kind: Any, path: Sequence[str | int]) -> list[str]:
    """Names of the fields of the dataclass at a place inside another."""
    for step in path:
        if isinstance(step, str) and is_dataclass(kind):
            kind = get_type_hints(kind)[step]
        elif isinstance(step, int):
            kind = get_args(kind)[0]
    return [field.name for field in fields(kind)] if is_dataclass(kind) else []
