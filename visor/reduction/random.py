"""Random: a uniformly random subset of the visual tokens. What a score must beat.

The subset depends on the seed and on the image alone, never on a global generator: neither the order of methods nor
the composition of a batch can change it. Smaller subsets are nested in larger ones.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import after_tower, check_integer
from visor.reduction.method import Method

if TYPE_CHECKING:
    from budgets.geometry import ModelGeometry
    from visor.vision.features import ReducedFeatures, VisionFeatures


def random_subset(seed: int, sample_key: str, num_visual: int, keep: int) -> list[int]:
    """`keep` of `num_visual` indices, ascending; the same for the same seed and key on every machine."""
    digest = hashlib.sha256(f"{seed}:{sample_key}".encode()).digest()
    order = list(range(num_visual))
    random.Random(int.from_bytes(digest, "big")).shuffle(order)
    return sorted(order[:keep])


@METHODS.register("random")
@dataclass(frozen=True)
class Random(Method):
    """Options: `keep` tokens (a sample that has fewer keeps all) and the `seed`."""

    keep: int = 64
    seed: int = 0

    title: ClassVar[str] = "Random"

    def __post_init__(self) -> None:
        check_integer(self.title, "keep", self.keep, 1)
        check_integer(self.title, "seed", self.seed, 0)

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        return after_tower(geometry.num_layers, num_visual, "random", self.keep, {"seed": self.seed})

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[Random]:
        return [replace(self, keep=keep) for keep in range(1, num_visual + 1)]

    def reduce_features(self, vision: VisionFeatures, keep: int) -> ReducedFeatures:
        import torch

        from visor.vision.features import ReducedFeatures

        features_BND = vision.features_BND
        batch, num_visual, width = features_BND.shape
        if len(vision.sample_keys) != batch:
            raise ValueError(f"Random: {batch} samples but {len(vision.sample_keys)} keys to draw their subsets by")
        subsets = [random_subset(self.seed, key, num_visual, min(keep, num_visual)) for key in vision.sample_keys]
        index_BT = torch.tensor(subsets, device=features_BND.device)
        kept_BN = features_BND.new_zeros((batch, num_visual), dtype=torch.bool).scatter(1, index_BT, True)
        return ReducedFeatures(features_BND.gather(1, index_BT[..., None].expand(-1, -1, width)), kept_BN, index_BT)
