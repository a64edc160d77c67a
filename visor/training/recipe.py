"""The recipe of one stage: a YAML file, checked before anything is loaded.

    stage: universal
    data: [{worlds: [forms, charts]}, {llava: rows.json, images: folder}]
    train: [cross, decoder, projector]
    optimisation: {steps: 1000, batch_size: 128}

`--set optimisation.steps=100` changes one entry. Every option is a field of a dataclass below or beside what it
configures; an unknown one is an error that names its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from budgets.registry import nearest_first
from visor.training.optimisation import Optimisation

RECIPES = Path(__file__).resolve().parent / "recipes"
STAGES = ("blocks", "everything", "search", "universal", "labels", "router", "m3")
TRAINED = ("blocks", "everything", "universal", "m3")  # stages of gradient steps on the whole model


@dataclass(frozen=True)
class Conversion:
    """How a base becomes a VISOR model, where the stage is given a base.

    Args:
        cross_layers, self_layers: by default L/3 of each, evenly spaced.
        cross_kernel, visual_source: see `VisorConfig`.
        blocks: how the new blocks start, but for their output projection, which starts at zero: "copy" of the query,
            key, value and norm weights of the layer they stand at, which attends to the image already; "fan_in", N(0,
            1 / inputs); or "config", N(0, initializer_range), meant for widths above 1,000.
    """

    cross_layers: tuple[int, ...] | None = None
    self_layers: tuple[int, ...] | None = None
    cross_kernel: int = 7
    visual_source: str = "latest"
    blocks: str = "copy"

    def __post_init__(self) -> None:
        if self.blocks not in ("copy", "fan_in", "config"):
            raise ValueError(f"conversion.blocks must be copy, fan_in or config, got {self.blocks!r}")


@dataclass(frozen=True)
class Encoding:
    """See `visor.training.encoding.Encoder`."""

    max_text_tokens: int = 2048
    hint_tokens: int = 0


@dataclass(frozen=True)
class Pooling:
    """Averaged token grids: VISOR-TR on a share of the steps, or the scales of M3.

    Args:
        factors: VISOR: how many times fewer tokens (`visor.reduction.pooling_by`).
        share: VISOR: share of the steps on one of the `factors`.
        weights: VISOR: how often each of the `factors` is drawn, beside the others; empty is equally often.
        sides: M3: of the grids that are its scales.
        at_once: M3: scales a step, drawn at random; None is all.
        written_share: share of the steps that ask for nothing but words in windows
            (`visor.training.auxiliary.window_words`).
    """

    factors: tuple[int, ...] = ()
    share: float = 0.0
    weights: tuple[float, ...] = ()
    sides: tuple[int, ...] = ()
    at_once: int | None = None
    written_share: float = 0.0

    def __post_init__(self) -> None:
        from visor.reduction.pooling_by import FACTORS
        from visor.training.objectives import check_sides

        check_sides("pooling.sides", self.sides)
        if not set(self.factors) <= set(FACTORS) or len(set(self.factors)) != len(self.factors):
            raise ValueError(f"pooling.factors must list different ones of {sorted(FACTORS)}, got {list(self.factors)}")
        for name in ("share", "written_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"pooling.{name} must be between 0 and 1, got {getattr(self, name)!r}")
        if self.share and not self.factors:
            raise ValueError("pooling.share needs pooling.factors, such as [2, 4]")


@dataclass(frozen=True)
class Exploration:
    """Search and labels.

    Args:
        num_examples: images evaluated.
        batch_size: of them at once.
        score: "exact" (the whole answer as greedy decoding would say it) or "likelihood".
        longest, margin: of the short list (`budgets.search.shortlist`).
        reach: share of the full score that a label has to reach.
        first_position: where in the stream the examples begin, so that labels need not be of trained examples.
        precision: "bf16" or "fp32".
    """

    num_examples: int = 1024
    batch_size: int = 16
    score: str = "exact"
    longest: int | None = None
    margin: float = 0.0
    reach: float = 0.99
    first_position: int = 0
    precision: str = "bf16"

    def __post_init__(self) -> None:
        if self.num_examples < 1 or self.batch_size < 1:
            raise ValueError(
                f"num_examples and batch_size must be positive, got {self.num_examples}, {self.batch_size}"
            )
        if not 0 < self.reach <= 1:
            raise ValueError(f"reach must be in (0, 1], got {self.reach}")


@dataclass(frozen=True)
class RouterShape:
    """See `VisorConfig.router`."""

    hidden_size: int = 128
    inputs: tuple[str, ...] = ("last", "text", "visual")


@dataclass(frozen=True)
class RouterFit:
    """How the router is trained (`visor.training.fit_router`).

    Args:
        epochs, batch_size, rate, weight_decay: of AdamW with a cosine to zero.
        held_out: share of the images kept apart, to choose the best epoch and to report on.
        reach: see `visor.training.labels.Labels.labels_N`.
        cost_weights: lambdas of the reported curve.
    """

    epochs: int = 30
    batch_size: int = 256
    rate: float = 1e-3
    weight_decay: float = 0.05
    held_out: float = 0.15
    reach: float = 0.99
    seed: int = 0
    cost_weights: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.rate > 0:
            raise ValueError(
                f"epochs, batch_size and rate must be positive, got {self.epochs}, {self.batch_size}, {self.rate}"
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be a share between 0 and 1, got {self.held_out}")


@dataclass(frozen=True)
class Recipe:
    """One stage.

    Args:
        stage: one of `STAGES`.
        data: sources (`visor.training.data.sources_of`); a search needs a validation split here.
        train: parts that are updated: cross, decoder, projector, tower.
        seed: of data order and of all random choices.
        tensorboard: write a TensorBoard log too.
        configuration_weights: stage universal: how often each viable configuration is drawn, from the one without SELF
            layers on; the last weight holds for all that follow, and empty is equally often.
    """

    stage: str
    data: tuple[Mapping[str, Any], ...] = ()
    train: tuple[str, ...] = ()
    seed: int = 0
    tensorboard: bool = False
    conversion: Conversion = field(default_factory=Conversion)
    encoding: Encoding = field(default_factory=Encoding)
    optimisation: Optimisation = field(default_factory=lambda: Optimisation(steps=1000))
    configuration_weights: tuple[float, ...] = ()
    pooling: Pooling = field(default_factory=Pooling)
    exploration: Exploration = field(default_factory=Exploration)
    router: RouterShape = field(default_factory=RouterShape)
    router_fit: RouterFit = field(default_factory=RouterFit)

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(
                f"unknown stage {self.stage!r}; nearest first: {', '.join(nearest_first(self.stage, STAGES))}"
            )
        if self.stage != "router" and not self.data:
            raise ValueError(f"the stage {self.stage!r} needs data: a list of worlds, llava or dataset entries")
        if self.stage in TRAINED and not self.train:
            raise ValueError(f"the stage {self.stage!r} needs train: the parts to update, such as [cross]")
        if self.stage == "m3" and not self.pooling.sides:
            raise ValueError("the stage 'm3' needs pooling.sides: the scales to average over, such as [12, 6, 3, 1]")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """From what `to_dict` gave, here or in an earlier version.

        Options that came later have their defaults, and those that are gone are left out.
        """
        return _build(cls, _known(cls, values), "")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def load(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """A recipe from a YAML file (or the name of one that ships), with `key=value` changes.

    Raises:
        ValueError: no such file, no valid YAML, or options that do not exist or do not fit.
    """
    path = Path(path)
    if not path.is_file() and (RECIPES / f"{path}.yaml").is_file():
        path = RECIPES / f"{path}.yaml"
    if not path.is_file():
        known = sorted(each.stem for each in RECIPES.glob("*.yaml"))
        raise ValueError(f"no recipe at {path}; those that ship: {', '.join(nearest_first(path.stem, known))}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping with a stage and its options")
    for change in changes:
        _change(values, change)
    try:
        return _build(Recipe, values, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _change(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set takes key=value, such as optimisation.steps=100; got {change!r}")
    *above, last = key.strip().split(".")
    for name in above:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {change}: {name} has no options below it")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"--set {change}: {text!r} is no valid YAML value: {error}") from error


def _build(cls: type, values: Mapping[str, Any], place: str) -> Any:
    if not isinstance(values, Mapping):
        raise ValueError(f"{place.rstrip('.')} must be a mapping, got {values!r}")
    known, hints = [each.name for each in fields(cls)], get_type_hints(cls)
    made = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown option {place}{name}; nearest first: {', '.join(_near(cls, str(name), place))}")
        if is_dataclass(hints[name]):
            value = _build(hints[name], value, f"{place}{name}.")
        elif isinstance(value, list):
            value = tuple(value)
        elif isinstance(value, str) and "float" in str(hints[name]):  # YAML 1.1 reads 1e-3 as text
            try:
                value = float(value)
            except ValueError:
                raise ValueError(f"{place}{name} must be a number, got {value!r}") from None
        made[name] = value
    try:
        return cls(**made)
    except TypeError as error:
        raise ValueError(f"{place or 'recipe: '}{error}") from error


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
