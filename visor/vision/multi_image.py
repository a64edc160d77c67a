"""Multi-image prompts: each image is encoded and reduced on its own, and their tokens follow in order.

A schedule gives one number of tokens for all visual tokens of the prompt; the images share it in proportion to their
own numbers. So a method for one image works for several, and every image keeps at least one token. In the decoder there
is no difference: visual tokens of all images compete for the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from budgets.schedule import Reduction
from visor.vision.features import ReducedFeatures, VisionFeatures


@dataclass(frozen=True)
class MultiImageFeatures:
    """The vision features of the images of one prompt, in order."""

    images: tuple[VisionFeatures, ...]

    @property
    def num_tokens(self) -> int:
        """Visual tokens of all images."""
        return sum(image.num_tokens for image in self.images)

    @property
    def grid(self) -> None:
        """There is no one grid of several images."""
        return None

    @property
    def num_bytes(self) -> int:
        """Memory of all images' tensors."""
        return sum(image.num_bytes for image in self.images)

    @property
    def image_scale(self) -> float:
        """The scale at which all were encoded."""
        return self.images[0].image_scale

    @property
    def inside(self) -> Reduction | None:
        """The reduction inside the tower that all went through."""
        return self.images[0].inside

    def to(self, device: torch.device | str) -> MultiImageFeatures:
        """The same on another device."""
        return MultiImageFeatures(tuple(image.to(device) for image in self.images))


def images_of(row: VisionFeatures | MultiImageFeatures) -> tuple[VisionFeatures, ...]:
    """The images of a sample, one or several."""
    return row.images if isinstance(row, MultiImageFeatures) else (row,)


def share_tokens(keep: int, counts: Sequence[int]) -> list[int]:
    """`keep` tokens shared among images of `counts` tokens: in proportion, at least one each, what rounding leaves to
    the largest remainders.

    Raises:
        ValueError: fewer tokens than images.
    """
    if keep < len(counts):
        raise ValueError(f"{keep} visual tokens cannot be shared among {len(counts)} images: give a larger budget")
    exact = [keep * count / sum(counts) for count in counts]
    shares = [max(1, int(each)) for each in exact]
    order = sorted(range(len(counts)), key=lambda i: (shares[i] - exact[i], i))
    step = 1 if sum(shares) < keep else -1
    while sum(shares) != keep:
        for i in order if step > 0 else reversed(order):
            if sum(shares) != keep and (shares[i] < counts[i] if step > 0 else shares[i] > 1):
                shares[i] += step
    return shares


def reductions_by_image(reduction: Reduction | None, counts: Sequence[int]) -> list[Reduction | None]:
    """The reduction of each image of a sample."""
    if reduction is None or len(counts) == 1:
        return [reduction] * len(counts)
    return [replace(reduction, keep=keep) for keep in share_tokens(reduction.keep, counts)]


def concatenate(images: Sequence[ReducedFeatures], counts: Sequence[int]) -> ReducedFeatures:
    """The reduced images (B = 1) of a sample as one. Each token's place counts through all images.

    Args:
        counts: visual tokens of each image before reduction.
    """
    if len(images) == 1:
        return images[0]
    before = [sum(counts[:i]) for i in range(len(counts))]
    kept = [image.kept_BN for image in images]
    places = [None if image.places_BT is None else image.places_BT + b for image, b in zip(images, before, strict=True)]
    levels = zip(*(image.levels for image in images), strict=True)
    return ReducedFeatures(
        torch.cat([image.features_BTD for image in images], dim=1),
        None if any(each is None for each in kept) else torch.cat(kept, dim=1),
        None if any(each is None for each in places) else torch.cat(places, dim=1),
        tuple(torch.cat(level, dim=1) for level in levels),
    )


def tokens_left_by_image(
    row: VisionFeatures | MultiImageFeatures, reduced: ReducedFeatures, num_slots: int
) -> list[tuple[int, int, list[int] | None]]:
    """For each image of a sample: its image tokens in the full prompt, what is left, and in whose places that stands.

    Args:
        num_slots: image tokens of the full prompt.

    Raises:
        ValueError: several images that were encoded with fewer tokens than the prompt has for them.
    """
    images, places = images_of(row), None if reduced.places_BT is None else reduced.places_BT[0].tolist()
    num_left = reduced.features_BTD.shape[1]
    if len(images) == 1:
        return [(num_slots, num_left, places)]
    counts = [image.num_tokens for image in images]
    if sum(counts) != num_slots:
        raise ValueError(
            f"{len(images)} images in a prompt: a method that shrinks the image, or acts inside the tower, takes one"
        )
    shares = share_tokens(num_left, counts) if num_left < num_slots else counts
    result, before, start = [], 0, 0
    for count, share in zip(counts, shares, strict=True):
        own = None if places is None else [place - before for place in places[start : start + share]]
        result.append((count, share, own))
        before, start = before + count, start + share
    return result
