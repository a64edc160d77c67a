"""The checkpoints of a run: the base, and those of methods that need weights trained for them.

Training-free methods run on the base. A trained method brings a checkpoint of the same base: the one the user names, or
the shipped one (`dense-tiny` -> `visor-tiny`, `m3-tiny`: the method's name in the place of "dense"). Without either it
runs on the base itself, which refuses it with a reason unless it was trained for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from budgets.registry import METHODS, parts_of
from visor.inference.checkpoint import embedded_names

if TYPE_CHECKING:
    from evaluations.config import RunConfig
    from visor.reduction.method import Method


def checkpoint_for(method: str, config: RunConfig) -> str:
    """Name of the checkpoint that a method runs on; "" is the base of the run."""
    named = dict(config.checkpoints)
    for part in parts_of(method):
        cls = METHODS.get(part)
        stem = "visor" if cls.changes_modes and cls.trained else part  # VISOR-TR is VISOR's weights on fewer tokens
        if part in named or stem in named:
            return named.get(part) or named[stem]
        candidate = re.sub(r"^dense(?=-|$)", stem, config.model)
        if cls.trained and candidate != config.model and candidate in embedded_names():
            return candidate
    return ""


@dataclass(frozen=True)
class Models:
    """Loaded checkpoints (`visor.inference.loaded_model.LoadedModel`).

    Args:
        base: what dense and the training-free methods run on.
        others: by name, those of trained methods.
        by_method: the name of the checkpoint of each method that has one.
    """

    base: Any
    others: Mapping[str, Any] = field(default_factory=dict)
    by_method: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, config: RunConfig, load: Callable[[RunConfig], Any]) -> Models:
        """All that the methods of a run need.

        Args:
            load: loads `config.model`.

        Raises:
            ValueError: one cannot be loaded, or is not of the same base.
        """
        base = load(config)
        by_method = {method: name for method in config.methods if (name := checkpoint_for(method, config))}
        others = {}
        for name in dict.fromkeys(by_method.values()):
            others[name] = load(replace(config, model=name, checkpoints=()))
            _check_same_base(base, others[name], name)
        return cls(base, others, by_method)

    def __getitem__(self, name: str) -> Any:
        """By name; "" is the base."""
        return self.others[name] if name else self.base

    @property
    def all(self) -> tuple[Any, ...]:
        """The base and the others."""
        return self.base, *self.others.values()


def _check_same_base(base: Any, other: Any, name: str) -> None:
    """The sizes that a comparison at equal cost needs to be equal."""
    for size in ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "vocab_size"):
        mine, its = getattr(base.geometry, size), getattr(other.geometry, size)
        if mine != its:
            raise ValueError(
                f"checkpoint {name!r} is of another base than {base.geometry.name!r}: its {size} is {its}, not {mine}; "
                "compare a method with the base that it was trained from"
            )


def tower_key(loaded: Any) -> str:
    """What tells vision features of different checkpoints apart: fine-tuning often leaves the tower as it was."""
    return getattr(loaded, "tower_sha256", None) or loaded.checkpoint_sha256


def configurations_of(method: Method, loaded: Any) -> tuple[Method, ...]:
    """The viable configurations of a VISOR checkpoint as settings of `method`, cheapest first.

    Empty where the method has no layers to choose, or the checkpoint no configurations.
    """
    trained = loaded.geometry.visor
    option = next((f.name for f in fields(method) if re.fullmatch(r"(.*_)?self_layers", f.name)), None)
    if trained is None or option is None:
        return ()
    reduction = getattr(getattr(loaded.model, "config", None), "reduction", None)
    if (
        type(method) is METHODS.get("visor") and reduction
    ):  # trained on fewer visual tokens: every configuration has them
        option = "visor_self_layers"
        params = {f"{reduction['method']}_{name}": value for name, value in reduction.get("params", {}).items()}
        method = METHODS.get(f"visor+{reduction['method']}")(**params)
    cross = option.replace("self_layers", "cross_layers")
    text = lambda layers: ",".join(map(str, layers))
    return tuple(
        replace(method, **{option: text(subset), cross: text(trained.cross_layers)})
        for subset in trained.configurations
    )
