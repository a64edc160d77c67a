"""Vision features are computed once an image for the whole sweep: a least-recently-used cache bounded in bytes.

Every method of a sweep looks at the same images through the same tower, so the tower's output is kept and shared. A key
holds all that can change it. The timing pass never goes through here.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

DEFAULT_CAPACITY_BYTES = 1 << 30


@dataclass(frozen=True)
class FeatureKey:
    """What determines the features of one image.

    Args:
        tower_sha256: content of the weights of the vision tower (and projector).
        dtype: number format of the tower.
        image_scale: scale of the image given to the tower, 1.0 is untouched.
        image_key: hash of the pixels.
        inside: what a method that acts inside the tower left out or merged; empty for the tower's own features.
        group: the images encoded in the same call. Rounding in a matrix product may depend on the size of the batch;
            with the batch in the key, a continued run takes bit-equal features, not merely some of the same image.
    """

    tower_sha256: str
    dtype: str
    image_scale: float
    image_key: str
    inside: str = ""
    group: str = ""


def num_bytes(value: Any) -> int:
    """Memory held by the tensors in a value: what says so itself, tensors, dataclasses, mappings and sequences."""
    if isinstance(getattr(value, "num_bytes", None), int):
        return value.num_bytes
    if hasattr(value, "element_size"):
        return value.numel() * value.element_size()
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    if is_dataclass(value):
        return sum(num_bytes(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, dict):
        return sum(map(num_bytes, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(num_bytes, value))
    return 0


class FeatureCache:
    """Least-recently-used cache bounded in bytes, not in entries: images differ in their number of tokens.

    Args:
        capacity_bytes: most memory to hold. A value that is larger on its own is not kept.
    """

    def __init__(self, capacity_bytes: int = DEFAULT_CAPACITY_BYTES) -> None:
        if capacity_bytes < 0:
            raise ValueError(f"capacity_bytes must be >= 0, got {capacity_bytes}")
        self.capacity_bytes = capacity_bytes
        self.held_bytes = self.hits = self.misses = self.evictions = 0
        self._values: OrderedDict[FeatureKey, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: FeatureKey) -> bool:
        """Without counting as a look-up."""
        return key in self._values

    def get(self, key: FeatureKey) -> Any | None:
        """The features, or None. Counts as a hit or a miss."""
        if key not in self._values:
            self.misses += 1
            return None
        self.hits += 1
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: FeatureKey, value: Any) -> None:
        """Keep features, at the cost of those unused for longest."""
        if key in self._values:
            self.held_bytes -= self._values.pop(key)[1]
        size = num_bytes(value)
        if size > self.capacity_bytes:
            return
        while self.held_bytes + size > self.capacity_bytes:
            self.held_bytes -= self._values.popitem(last=False)[1][1]
            self.evictions += 1
        self._values[key] = (value, size)
        self.held_bytes += size

    @property
    def hit_rate(self) -> float | None:
        """Share of look-ups answered, or None before the first."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else None

    def summary(self) -> str:
        """One line for people."""
        if self.hit_rate is None:
            return "vision features: none were needed"
        held, capacity = self.held_bytes / 2**20, self.capacity_bytes / 2**20
        return (
            f"vision features: {self.hit_rate:.1%} of {self.hits + self.misses:,} look-ups came from the cache, which "
            f"holds {held:,.0f} of {capacity:,.0f} MiB; {self.evictions:,} evicted"
        )
