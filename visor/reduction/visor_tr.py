"""VISOR-TR: VISOR on top of token reduction. The visual tokens are pooled 2x or 4x before the decoder.

The savings multiply: pooling shortens what CROSS layers read and SELF layers rework. VISOR on another reduction is
named by both ("visor+visionzip", "visor+vispruner").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction.pooling_by import PoolingBy
from visor.reduction.visor import Visor

if TYPE_CHECKING:
    from budgets.geometry import ModelGeometry


class VisorTR(Visor):
    """Options and dial of VISOR; `factor` says how many times fewer visual tokens enter the decoder."""

    factor: ClassVar[int]
    taps: ClassVar[frozenset[str]] = PoolingBy.taps
    merges: ClassVar[bool] = True

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        before = PoolingBy(self.factor).schedule(geometry, num_visual)
        return replace(before, layers=super().schedule(geometry, before.decoder_visual).layers)


@METHODS.register("visor_tr2")
@dataclass(frozen=True)
class VisorTR2(VisorTR):
    """VISOR with half the visual tokens."""

    factor: ClassVar[int] = 2
    title: ClassVar[str] = "VISOR-TR 2x"


@METHODS.register("visor_tr4")
@dataclass(frozen=True)
class VisorTR4(VisorTR):
    """VISOR with a quarter of the visual tokens."""

    factor: ClassVar[int] = 4
    title: ClassVar[str] = "VISOR-TR 4x"
