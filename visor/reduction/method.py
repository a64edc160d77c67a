"""What a method is: a frozen set of options that yields a Schedule, and the rule that picks the tokens it keeps.

A method file lives in `visor/reduction/`, registers one class and holds no state between samples. `schedule` and
`scoring_flops` are pure arithmetic, so that a method is priced without torch; the tensor rules import torch inside.
docs/adding-a-method.md shows one from beginning to end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from budgets.schedule import Reduction, Schedule
    from visor.engine.context import LayerContext, Selection
    from visor.vision.features import ReducedFeatures, VisionFeatures
    from visor.vision.tower import TowerWalk


class Method(ABC):
    """Base of all methods. Subclasses are frozen dataclasses; their fields are the method's options.

    Class attributes:
        title: name shown in reports, in the authors' spelling.
        paper: reference of the rule, one line.
        trained: True if the method needs weights trained for it (compared apart from training-free methods).
        taps: what it must see of the vision tower: "salience", "keys", ... (`visor.vision.taps.TAPS`).
        stage: where an encoder-side rule acts: "inside" the tower's own blocks, on "tower" features before the
            projector, or on "projected" features.
        reads_text: True if an encoder-side rule looks at the prompt's text (`VisionFeatures.text`).
        reads_embeddings: True if an in-decoder rule looks at what entered layer 0 (`LayerContext.embedded_BND`).
        changes_modes: True if its schedule says which layers see the image (VISOR), instead of which tokens there are.
        needs_config: field of the model's config that says its weights were trained for this method, if any must.
        looks_back: True if an in-decoder rule scores with the layer before, which must then be a SELF layer.
        merges: True if tokens live on in others, so that keeping (nearly) all is not the dense model.
        version: raised when the rule changes, so that records of the earlier one are not taken for its own.
        adaptive: True if how many tokens stay may follow from the image (`resolve`).
    """

    title: ClassVar[str]
    paper: ClassVar[str] = ""
    trained: ClassVar[bool] = False
    taps: ClassVar[frozenset[str]] = frozenset()
    stage: ClassVar[Literal["inside", "tower", "projected"]] = "tower"
    reads_text: ClassVar[bool] = False
    reads_embeddings: ClassVar[bool] = False
    changes_modes: ClassVar[bool] = False
    needs_config: ClassVar[str | None] = None
    looks_back: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    adaptive: ClassVar[bool] = False
    version: ClassVar[int] = 1

    @abstractmethod
    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        """The schedule for a sample of `num_visual` visual tokens (at least 1) on a model of this geometry."""

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[Method]:
        """All settings that a budget may choose from, cheapest first. A method without a dial offers itself only."""
        return [self]

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """FLOPs of deciding which tokens stay, for one sample, beyond the layers themselves."""
        return 0

    def tower_flops(self, geometry: ModelGeometry, schedule: Schedule) -> int | None:
        """FLOPs of the tower on one tile, for a method that acts inside it; None means that it runs whole."""
        return None

    def nominal_visual_tokens(self, geometry: ModelGeometry, num_visual: int) -> Sequence[float]:
        """Visual tokens by layer as the authors' own cost formula takes them; some do not round."""
        return self.schedule(geometry, num_visual).visual_tokens

    def score_tokens(self, context: LayerContext) -> torch.Tensor:
        """In-decoder rule: scores [B, n] of the live tokens; the engine keeps the highest visual ones, in order."""
        raise TypeError(f"{self.title} does not reduce inside the decoder")

    def select_tokens(self, context: LayerContext) -> Selection:
        """In-decoder rule: which live visual tokens stay, `context.keep[b]` of each row. By default the best-scored."""
        from visor.engine.context import best_scored

        return best_scored(self.title, self.score_tokens(context), context)

    def reduce_features(self, vision: VisionFeatures, keep: int) -> ReducedFeatures:
        """Encoder-side rule: [B, N, d] features to [B, keep, d]."""
        raise TypeError(f"{self.title} does not reduce the encoder's output")

    def reduce_in_tower(self, walk: TowerWalk, tiles: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rule inside the tower: tiles [T, 3, H, W] to hidden states [T, P', D] with `keep` patches, and which [T, N]
        of the N patches stand for themselves."""
        raise TypeError(f"{self.title} does not act inside the tower")

    def resolve(self, schedule: Schedule, vision: VisionFeatures) -> Schedule:
        """The schedule with the counts that this image asks for (`adaptive` methods; B = 1)."""
        return schedule

    def options(self) -> dict[str, Any]:
        """The method's options as JSON scalars."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def tower_reduction(schedule: Schedule) -> Reduction | None:
    """The reduction of a schedule that happens inside the tower, so that features must be encoded for it; or None."""
    from budgets.registry import METHODS

    if schedule.encoder is None or METHODS.get(schedule.encoder.method).stage != "inside":
        return None
    return schedule.encoder
