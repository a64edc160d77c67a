"""VTW: withdraw every visual token after some layers; what the text needs of the image it has read by then.

Layers 0..K-1 see everything, the others see text only, with the position ids of the full sequence. The authors choose K
by a small calibration set and report half of the layers (15 or 16 of 32, 20 of 40) for LLaVA-1.5; that is the default.
Nothing is scored. A schedule of SELF and TEXT layers says exactly this: no token is chosen, and no visual key is ever
cached behind layer K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import LayerMode, LayerOp, Schedule, dense
from visor.reduction._arithmetic import check_integer
from visor.reduction.method import Method

if TYPE_CHECKING:
    from budgets.geometry import ModelGeometry


@METHODS.register("vtw")
@dataclass(frozen=True)
class VTW(Method):
    """Option: `layer` (K), the first layer without visual tokens, or None: half of the layers."""

    layer: int | None = None

    title: ClassVar[str] = "VTW"
    paper: ClassVar[str] = "Lin et al., Boosting MLLMs with Visual Tokens Withdrawal for Rapid Inference, AAAI 2025"
    changes_modes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.layer is not None:
            check_integer(self.title, "layer", self.layer, 1, " (otherwise nothing reads the image)")

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        first = max(1, geometry.num_layers // 2) if self.layer is None else self.layer
        if first > geometry.num_layers:
            raise ValueError(f"VTW: layer={first}, but the decoder has {geometry.num_layers} layers")
        if first == geometry.num_layers:
            return dense(geometry.num_layers, num_visual)
        rest = (LayerOp(LayerMode.TEXT),) * (geometry.num_layers - first)
        return Schedule((LayerOp(),) * first + rest, num_visual)

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[VTW]:
        return [replace(self, layer=layer) for layer in range(1, geometry.num_layers + 1)]
