"""Two or three methods at once, named `visionzip+fastv`, `visor+visionzip`, ...: one combinator for all of them.

At most one part acts on the encoder's side, at most one drops tokens inside the decoder, and at most one (VISOR) says
which layers see the image; so every part finds exactly what it finds alone, only fewer tokens. The order of the names
does not matter. The encoder's part comes first in the data, and the others are made for as many tokens as it leaves.

In-decoder rules that score with the attention of the layer before need a SELF layer there: on VISOR's layers their
reduction moves behind the next SELF layer. The dial is that of the encoder-side part, else of the in-decoder part;
VISOR's layers stay as they are named (`visor_self_layers`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from budgets.schedule import LayerMode, LayerOp, Schedule
from visor.reduction.method import Method

if TYPE_CHECKING:
    from budgets.geometry import ModelGeometry


def role(method: type[Method]) -> str:
    """What a method decides: the "encoder" side's tokens, the "decoder"'s tokens, or the layers' "modes"."""
    if method.changes_modes:
        return "modes"
    if overrides(method, "score_tokens") or overrides(method, "select_tokens"):
        return "decoder"
    return "encoder"


def overrides(method: type[Method], name: str) -> bool:
    """True if the class has its own version of a rule."""
    return getattr(method, name) is not getattr(Method, name)


def option_name(part: str, option: str) -> str:
    """How an option of a part is called in the whole: "fastv_drop", "prumerge_plus_keep"."""
    return f"{part.replace('+', '_plus').replace('-', '_')}_{option}"


class Composite(Method):
    """Base of composed methods: options are those of the parts, each behind its part's name ("fastv_drop")."""

    part_classes: ClassVar[dict[str, type[Method]]] = {}
    roles: ClassVar[dict[str, str]] = {}

    def __reduce__(self) -> tuple:
        return rebuild, ("+".join(self.part_classes), self.options())

    def __post_init__(self) -> None:
        self.parts()  # every part checks its own options

    def parts(self) -> dict[str, Method]:
        """The parts, by role."""
        made = {}
        for name, cls in self.part_classes.items():
            made[self.roles[name]] = cls(**{f.name: getattr(self, option_name(name, f.name)) for f in fields(cls)})
        return made

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        parts = self.parts()
        encoder = parts.get("encoder")
        if getattr(encoder, "keep", 1) is None or getattr(encoder, "per_tile", False):
            raise ValueError(
                f"{self.title}: a number of tokens that follows from the image cannot be composed; give keep, without "
                "per_tile"
            )
        before = parts["encoder"].schedule(geometry, num_visual) if "encoder" in parts else None
        left = before.decoder_visual if before else num_visual
        inner = parts["decoder"].schedule(geometry, left) if "decoder" in parts else None
        modes = parts["modes"].schedule(geometry, left) if "modes" in parts else None
        if modes is not None and modes.encoder is not None:
            raise ValueError(f"{self.title}: {parts['modes'].title} already reduces the tokens before the decoder")
        ops = [LayerOp()] * geometry.num_layers if modes is None else list(modes.layers)
        for layer, op in enumerate(inner.layers if inner else ()):
            if op.reduce is not None:
                place = self.place(layer, ops, parts["decoder"])
                ops[place] = replace(ops[place], reduce=op.reduce)
        return Schedule(
            tuple(ops),
            num_visual,
            encoder=before.encoder if before else None,
            image_scale=before.image_scale if before else 1.0,
            positions=inner.positions if inner else "kept",
        )

    def place(self, layer: int, ops: Sequence[LayerOp], method: Method) -> int:
        """Where a reduction meant for `layer` can stand: at it, or behind the next SELF layer that has it to itself."""
        if not method.looks_back:
            return layer
        for later in range(layer, len(ops)):
            if ops[later - 1].mode is LayerMode.SELF and ops[later].reduce is None:
                return later
        raise ValueError(
            f"{method.title} scores with the attention of the layer before, which must be a SELF layer; from layer "
            f"{layer - 1} on there is none left (modes: {' '.join(op.mode.value for op in ops)}): name more SELF "
            "layers, or use a method that does not look back"
        )

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[Composite]:
        parts = self.parts()
        dial = next(each for each in ("encoder", "decoder", "modes") if each in parts)
        name = next(name for name, its_role in self.roles.items() if its_role == dial)
        return [
            replace(self, **{option_name(name, option): value for option, value in setting.options().items()})
            for setting in parts[dial].settings(geometry, num_visual)
        ]


@cache
def _compose(names: tuple[str, ...], classes: tuple[type[Method], ...]) -> type[Composite]:
    roles = {name: role(cls) for name, cls in zip(names, classes, strict=True)}
    for name, its_role in roles.items():
        rival = next((other for other, same in roles.items() if same == its_role and other != name), None)
        if name == "dense":
            raise ValueError(f"{'+'.join(names)}: dense has nothing to add to another method")
        if name == "blind":
            raise ValueError(f"{'+'.join(names)}: blind sees no visual token, so there is none for another to choose")
        if rival is not None:
            what = {"encoder": "both act on the encoder's side", "decoder": "both drop tokens inside the decoder",
                    "modes": "both say which layers see the image"}[its_role]  # fmt: skip
            raise ValueError(
                f"{'+'.join(names)}: {name} and {rival} do not go together, {what}; combine an encoder-side method "
                "with an in-decoder one, or either with visor"
            )
    of_encoder = next((cls for cls in classes if role(cls) == "encoder"), None)
    options = [
        (option_name(name, each.name), each.type, field(default=each.default))
        for name, cls in zip(names, classes, strict=True)
        for each in fields(cls)
    ]
    attributes = {
        "title": " + ".join(cls.title for cls in classes),
        "paper": "; ".join(cls.paper for cls in classes if cls.paper),
        "trained": any(cls.trained for cls in classes),
        "taps": frozenset().union(*(cls.taps for cls in classes)),
        "stage": of_encoder.stage if of_encoder else "tower",
        "version": sum(cls.version - 1 for cls in classes) + 1,
        "merges": any(cls.merges for cls in classes),
        "needs_config": next((cls.needs_config for cls in classes if cls.needs_config), None),
        "part_classes": dict(zip(names, classes, strict=True)),
        "roles": roles,
        "__module__": __name__,
    }
    return make_dataclass("+".join(names), options, bases=(Composite,), namespace=attributes, frozen=True)


def compose(names: Sequence[str], classes: Sequence[type[Method]]) -> type[Composite]:
    """The class of a method composed of registered ones.

    Raises:
        ValueError: a part named twice, or parts that decide the same thing.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"method {'+'.join(names)!r}: a part is named twice; each part acts once")
    return _compose(tuple(names), tuple(classes))


def rebuild(name: str, options: dict[str, Any]) -> Composite:
    """A composed method from its name and options (pickle finds no class of that name)."""
    from budgets.registry import METHODS

    return METHODS.get(name)(**options)
