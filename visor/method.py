"""What a method is: a frozen set of options that yields a Schedule, and the rule that picks the tokens it keeps.

A method file lives in `visor/reduction/`, registers one class and holds no state between samples. `schedule` and
`scoring_flops` are pure arithmetic, so that a method is priced without torch; the tensor rules import torch inside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from budgets.schedule import Schedule
    from visor.decoder import LayerContext
    from visor.vision import ReducedFeatures, VisionFeatures


class Method(ABC):
    """Base of all methods. Subclasses are frozen dataclasses; their fields are the method's options.

    Class attributes:
        title: name shown in reports, in the authors' spelling.
        paper: reference of the rule, one line.
        trained: True if the method needs weights trained for it (compared apart from training-free methods).
        taps: what it must see of the vision tower: "salience", "keys" (`visor.vision.TAPS`).
        stage: where an encoder-side rule acts: on tower features before the projector, or on projected features.
    """

    title: ClassVar[str]
    paper: ClassVar[str] = ""
    trained: ClassVar[bool] = False
    taps: ClassVar[frozenset[str]] = frozenset()
    stage: ClassVar[Literal["tower", "projected"]] = "tower"

    @abstractmethod
    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        """The schedule for a sample of `num_visual` visual tokens (at least 1) on a model of this geometry."""

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[Method]:
        """All settings that a budget may choose from, cheapest first. A method without a dial offers itself only."""
        return [self]

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """FLOPs of deciding which tokens stay, for one sample, beyond the layers themselves."""
        return 0

    def nominal_visual_tokens(self, geometry: ModelGeometry, num_visual: int) -> Sequence[float]:
        """Visual tokens by layer as the authors' own cost formula takes them; some do not round."""
        return self.schedule(geometry, num_visual).visual_tokens

    def score_tokens(self, context: LayerContext) -> torch.Tensor:
        """In-decoder rule: scores [B, n] of the live tokens; the engine keeps the highest visual ones, in order."""
        raise TypeError(f"{self.title} does not reduce inside the decoder")

    def reduce_features(self, vision: VisionFeatures, keep: int) -> ReducedFeatures:
        """Encoder-side rule: [B, N, d] features to [B, keep, d]."""
        raise TypeError(f"{self.title} does not reduce the encoder's output")

    def options(self) -> dict[str, Any]:
        """The method's options as JSON scalars."""
        return {field.name: getattr(self, field.name) for field in fields(self)}
