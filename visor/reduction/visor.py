"""VISOR: keep every visual token, make the interaction sparse.

Most layers run text only; evenly spaced CROSS layers let the text read the standing visual tokens; a few SELF layers
rework them. The largest configuration has L/3 of each; a budget is a number of SELF layers, taken evenly from those
slots. A CROSS layer comes first, so that a router before the first slot looks at a text that has read the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import LayerMode, LayerOp, Schedule
from visor.reduction.method import Method

if TYPE_CHECKING:
    from budgets.geometry import ModelGeometry, VisorGeometry


@METHODS.register("visor")
@dataclass(frozen=True)
class Visor(Method):
    """Options `self_layers` and `cross_layers`: None (L/3 layers), a number of layers (evenly spaced), or the layers
    themselves, comma-separated ("3,9"; "" is none). A model without trained cross-attention blocks is refused when
    it is to run; a schedule can be priced for any.

    On a trained VISOR model, None is the model's own default, a number of SELF layers its first configuration of that
    many, and named SELF layers must be slots."""

    self_layers: int | str | None = None
    cross_layers: int | str | None = None

    title: ClassVar[str] = "VISOR"
    paper: ClassVar[str] = "Bulat et al., VISion On Request, CVPR 2026, arXiv 2603.23495"
    trained: ClassVar[bool] = True
    changes_modes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option in ("self_layers", "cross_layers"):
            value = getattr(self, option)
            if isinstance(value, str):
                layers = parse_layers(option, value)
                if list(layers) != sorted(set(layers)) or min(layers, default=0) < 0:
                    raise ValueError(f"VISOR: {option} must name different layers in ascending order, got {value!r}")
            elif value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(
                    f"VISOR: {option} must be a number of layers, layers like '3,9', or None, got {value!r}"
                )
        if isinstance(self.self_layers, str) and isinstance(self.cross_layers, str):
            check_apart(parse_layers("self_layers", self.self_layers), parse_layers("cross_layers", self.cross_layers))

    def layers(self, geometry: ModelGeometry) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The SELF and the CROSS layers in this model's decoder."""
        num_layers, own = geometry.num_layers, geometry.visor
        self_slots, cross_slots = (own.slots, own.cross_layers) if own else default_layers(num_layers)
        self_layers = choose_own(self.self_layers, own) if own else choose("self_layers", self.self_layers, self_slots)
        cross_layers = choose("cross_layers", self.cross_layers, cross_slots)
        for option, layers in (("self_layers", self_layers), ("cross_layers", cross_layers)):
            if layers and layers[-1] >= num_layers:
                last = num_layers - 1
                raise ValueError(f"VISOR: {option} names layer {layers[-1]}, but the decoder's layers are 0 to {last}")
        check_apart(self_layers, cross_layers)
        return self_layers, cross_layers

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        self_layers, cross_layers = self.layers(geometry)
        ops = [LayerOp(LayerMode.TEXT)] * geometry.num_layers
        for mode, layers in ((LayerMode.SELF, self_layers), (LayerMode.CROSS, cross_layers)):
            for layer in layers:
                ops[layer] = LayerOp(mode)
        return Schedule(tuple(ops), num_visual)

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[Visor]:
        """The dial is the number of SELF layers: none, up to the L/3 slots or the layers that were named.

        On a trained VISOR model: its configurations.
        """
        if geometry.visor is not None and self.self_layers is None:
            subsets = geometry.visor.configurations
            return [replace(self, self_layers=",".join(map(str, subset))) for subset in subsets]
        if isinstance(self.self_layers, str):
            named = list(parse_layers("self_layers", self.self_layers))
            subsets = [choose("self_layers", count, named) for count in range(len(named) + 1)]
            return [replace(self, self_layers=",".join(map(str, subset))) for subset in subsets]
        return [replace(self, self_layers=count) for count in range(max(1, geometry.num_layers // 3) + 1)]


def default_layers(num_layers: int) -> tuple[list[int], list[int]]:
    """(SELF slots, CROSS layers), L/3 of each: with L = 24 the layers 1, 4, ... and 0, 3, ..."""
    count = max(1, num_layers // 3)
    # CROSS at the start of each stretch of three layers, SELF in its middle.
    cross_slots = [slot * num_layers // count for slot in range(count)]
    return [(2 * slot + 1) * num_layers // (2 * count) for slot in range(count)], cross_slots


def parse_layers(option: str, text: str) -> tuple[int, ...]:
    """ "3,9" to (3, 9)."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"VISOR: {option} must be layer numbers like '3,9', got {text!r}") from error


def choose_own(wanted: int | str | None, own: VisorGeometry) -> tuple[int, ...]:
    """The SELF layers of a trained model's configuration."""
    if wanted is None:
        return own.configurations[own.default]
    if isinstance(wanted, str):
        named = parse_layers("self_layers", wanted)
        if no_slots := sorted(set(named) - set(own.slots)):
            raise ValueError(f"VISOR: self_layers names {no_slots}, but this model's slots are {list(own.slots)}")
        return named
    fitting = [subset for subset in own.configurations if len(subset) == wanted]
    if not fitting:
        numbers = sorted({len(subset) for subset in own.configurations})
        raise ValueError(f"VISOR: this model has no configuration of {wanted} SELF layers; it has some of {numbers}")
    return fitting[0]


def choose(option: str, wanted: int | str | None, slots: Sequence[int]) -> tuple[int, ...]:
    """All slots (None), the named layers (text), or a number of slots, spread evenly."""
    if wanted is None:
        return tuple(slots)
    if isinstance(wanted, str):
        return parse_layers(option, wanted)
    if wanted > len(slots):
        slots_text = ",".join(map(str, slots))
        raise ValueError(
            f"VISOR: {option}={wanted}, but there are {len(slots)} slots ({slots_text}); name layers to use more"
        )
    return tuple(slots[(2 * i + 1) * len(slots) // (2 * wanted)] for i in range(wanted))


def check_apart(self_layers: Sequence[int], cross_layers: Sequence[int]) -> None:
    """A layer has one mode."""
    both = sorted(set(self_layers) & set(cross_layers))
    if both:
        raise ValueError(f"VISOR: a layer is either SELF or CROSS, but {both} are in both lists")
