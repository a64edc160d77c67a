"""How lists and pairs are written on a command line: types for argparse, whose errors give an example."""

from __future__ import annotations

import argparse
import json
from typing import Any


def names(text: str) -> list[str]:
    """ "a,b" to ["a", "b"]."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str, what: str = "budgets") -> list[float]:
    """ "0.5,0.25" to [0.5, 0.25]."""
    try:
        return [float(part) for part in names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{what} are numbers like 0.5,0.25, got {text!r}") from None


def integers(text: str) -> list[int]:
    """ "729,2916" to [729, 2916]."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole numbers like 729,2916 are expected, got {text!r}") from None


def method_and_model(text: str) -> tuple[str, str]:
    """ "visor=FOLDER" to ("visor", "FOLDER")."""
    method, equals, model = text.partition("=")
    if not (method and equals and model):
        raise argparse.ArgumentTypeError(f"a checkpoint is given as METHOD=MODEL, like visor=my-visor, got {text!r}")
    return method, model


def key_and_value(text: str) -> tuple[str, Any]:
    """ "num_beams=3" to ("num_beams", 3): a value is read as JSON, and as text where it is none."""
    key, equals, value = text.partition("=")
    if not (key.strip() and equals):
        raise argparse.ArgumentTypeError(f"a setting is given as KEY=VALUE, like num_beams=3, got {text!r}")
    try:
        return key.strip(), json.loads(value, parse_constant=lambda name: name)
    except json.JSONDecodeError:
        return key.strip(), value
