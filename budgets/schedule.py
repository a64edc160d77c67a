"""A schedule: what each decoder layer does, and how many visual tokens it does it to. Data only.

Every efficiency method is such a schedule. The engine (`visor.engine.decoder`) executes it, the accountant
(`budgets.costs`) prices it. A schedule is made for one sample's number of visual tokens, so every count in it is an
integer known before the forward pass.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Literal

Positions = Literal["kept", "contiguous"]


class LayerMode(str, Enum):
    """Who runs a decoder layer (VISOR, arXiv 2603.23495)."""

    TEXT = "text"  # text attends to text; visual tokens stand still
    CROSS = "cross"  # as TEXT, preceded by cross-attention from text to the standing visual tokens
    SELF = "self"  # the original layer over the whole sequence; visual tokens are updated


@dataclass(frozen=True)
class Reduction:
    """One step that leaves fewer visual tokens.

    Args:
        method: registered method that decides which tokens stay (or what they are merged into).
        keep: number of visual tokens after the step, at least 1.
        params: the method's own options, as sorted (name, value) pairs; values are JSON scalars.
    """

    method: str
    keep: int
    params: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.keep, int) or self.keep < 1:
            raise ValueError(
                f"a reduction keeps at least 1 visual token, as an integer; {self.method!r} got keep={self.keep!r}"
            )
        if tuple(sorted(self.params)) != self.params:
            raise ValueError(f"params of {self.method!r} must be sorted by name, got {self.params}")


@dataclass(frozen=True)
class LayerOp:
    """What one decoder layer does. `reduce`, if any, acts on the visual tokens *entering* the layer."""

    mode: LayerMode = LayerMode.SELF
    reduce: Reduction | None = None


@dataclass(frozen=True)
class Schedule:
    """What happens to one sample between the image and the language-model head.

    Args:
        layers: one operation a decoder layer, in order.
        source_visual: visual tokens that the family's tower and projector yield for this sample at full size (N).
        encoder: reduction between tower and decoder, or None. Its `keep` tokens enter layer 0.
        image_scale: side length of the image given to the tower relative to the original; 1.0 is untouched.
        positions: what an *in-decoder* reduction does with position ids: "kept" as in the full sequence, or
            renumbered "contiguous". An encoder-side reduction is always contiguous: the prompt is just shorter.
    """

    layers: tuple[LayerOp, ...]
    source_visual: int
    encoder: Reduction | None = None
    image_scale: float = 1.0
    positions: Positions = "kept"

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a schedule needs at least one layer")
        if self.source_visual < 0:
            raise ValueError(f"source_visual must be >= 0, got {self.source_visual}")
        if self.positions not in ("kept", "contiguous"):
            raise ValueError(f"positions must be 'kept' or 'contiguous', got {self.positions!r}")
        if not 0 < self.image_scale <= 1:
            raise ValueError(f"image_scale must be in (0, 1], got {self.image_scale}")
        live = self.source_visual
        for place, reduction in [
            ("encoder", self.encoder),
            *((f"layer {i}", op.reduce) for i, op in enumerate(self.layers)),
        ]:
            if reduction is None:
                continue
            if reduction.keep > live:
                raise ValueError(f"{place}: {reduction.method!r} would keep {reduction.keep} of {live} visual tokens")
            live = reduction.keep

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def decoder_visual(self) -> int:
        """Visual tokens that enter decoder layer 0."""
        return self.encoder.keep if self.encoder else self.source_visual

    @property
    def visual_tokens(self) -> tuple[int, ...]:
        """Live visual tokens at each layer, after its reduction. They stand still in TEXT and CROSS layers."""
        live, counts = self.decoder_visual, []
        for op in self.layers:
            live = op.reduce.keep if op.reduce else live
            counts.append(live)
        return tuple(counts)

    @property
    def is_dense(self) -> bool:
        """True if this is the unmodified model."""
        return self.encoder is None and self.image_scale == 1.0 and self.is_dense_inside

    @property
    def is_dense_inside(self) -> bool:
        """True if the decoder runs every layer on all tokens that enter it."""
        return all(op == LayerOp() for op in self.layers)

    @property
    def structure(self) -> tuple:
        """What must be equal for samples to share a batch: everything but the counts."""
        strip = lambda r: r and (r.method, r.params)
        return (
            tuple((op.mode, strip(op.reduce)) for op in self.layers),
            strip(self.encoder),
            self.image_scale,
            self.positions,
        )

    def layers_in(self, mode: LayerMode) -> tuple[int, ...]:
        """Indices of the layers that run in `mode`."""
        return tuple(i for i, op in enumerate(self.layers) if op.mode is mode)

    def to_json(self) -> str:
        """Canonical JSON: equal schedules give equal strings."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """The inverse of `to_json`."""
        data = json.loads(text)
        reduction = lambda r: r and Reduction(r["method"], r["keep"], tuple((k, v) for k, v in r["params"]))
        data["layers"] = tuple(LayerOp(LayerMode(op["mode"]), reduction(op["reduce"])) for op in data["layers"])
        data["encoder"] = reduction(data["encoder"])
        return cls(**data)


def dense(num_layers: int, num_visual: int) -> Schedule:
    """The schedule of the unmodified model."""
    return Schedule((LayerOp(),) * num_layers, num_visual)
