"""A number of tokens in every tile, instead of one for the image: how some releases count on LLaVA-NeXT.

With `per_tile=True` a method's `keep` holds in each tile of an image: 128, 64 or 32 in five tiles are the 640, 320 and
160 that VisionZip, VisPruner and FasterVLM report. How many tokens that is in all follows from the image, which may
have fewer tiles, so the number is settled once it is encoded (`Method.resolve`); before, a schedule says the most.
The ends of lines between tiles are no candidates, as in the releases. Deviations from them: padding is cropped before
tokens are chosen (the releases choose among it too), so a tile that shows less than `keep` tokens gives what it has.

Imports torch only where tensors are handled, as the method files do.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from budgets.schedule import Reduction, Schedule
from visor.reduction._arithmetic import after_tower, check_choice

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from visor.reduction.method import Method
    from visor.vision.features import ReducedFeatures, VisionFeatures


def check_per_tile(method: Method) -> None:
    """Check the option `per_tile`: with it the method sees where tokens lie, and its count follows from the image."""
    check_choice(method.title, "per_tile", method.per_tile, (True, False))
    if method.per_tile:  # of this instance; the class, and every other instance of it, counts over the image
        object.__setattr__(method, "taps", method.taps | {"places"})
        object.__setattr__(method, "adaptive", True)


def tower_schedule(
    method: Method, geometry: ModelGeometry, num_visual: int, name: str, params: dict[str, Any]
) -> Schedule:
    """`keep` tokens of the image; or at most `keep` in each of as many tiles as so many tokens can come from."""
    if not method.per_tile:
        return after_tower(geometry.num_layers, num_visual, name, method.keep, params)
    params = {**params, "keep": method.keep, "per_tile": True}
    most = method.keep * geometry.num_tiles(num_visual)
    if method.keep < full_tile(geometry, num_visual) and most >= num_visual:
        most = num_visual - 1  # cropped tiles: whether nothing goes is not known yet
    return after_tower(geometry.num_layers, num_visual, name, most, params)


def full_tile(geometry: ModelGeometry, num_visual: int) -> int:
    """Tokens of a tile that nothing is cropped from."""
    tower = geometry.vision
    return num_visual if tower.image_size is None else min(num_visual, tower.visual_tokens_per_tile)


def most_kept(method: Method, geometry: ModelGeometry, num_visual: int) -> int:
    """The largest `keep` that leaves something out."""
    return full_tile(geometry, num_visual) if method.per_tile else num_visual


def resolved(method: Method, schedule: Schedule, vision: VisionFeatures) -> Schedule:
    """The schedule with the number of tokens that `keep` in each tile of this image are (B = 1)."""
    if not method.per_tile:
        return schedule
    keep = sum(min(method.keep, len(place_N)) for place_N in tiles_of_sample(vision, 0))
    return replace(schedule, encoder=Reduction(schedule.encoder.method, keep, schedule.encoder.params))


def tiles_of_sample(vision: VisionFeatures, sample: int) -> list[torch.Tensor]:
    """The places of the tokens of each tile of a sample, the overview first."""
    from visor.reduction.hired import tiles_of

    tile_N = tiles_of(vision.tap("places")[sample : sample + 1])[0][0]
    return [(tile_N == tile).nonzero()[:, 0] for tile in range(int(tile_N.max()) + 1) if (tile_N == tile).any()]


def reduce_in_tiles(method: Method, vision: VisionFeatures, num_merged: int = 0) -> ReducedFeatures:
    """A method's rule in each tile by itself. Output in the order of the image, then what each tile merged.

    Args:
        num_merged: how many of the `keep` tokens of a tile are merged ones; they come last in it.
    """
    import torch

    from visor.reduction._tokens import kept_mask
    from visor.reduction.hired import tiles_of
    from visor.vision.features import ReducedFeatures

    rule = replace(method, per_tile=False)
    if not tiles_of(vision.tap("places"))[0].any():  # each image is one tile, which may have a CLS
        return rule.reduce_features(vision, method.keep)
    features, places = [], []
    for sample in range(len(vision.features_BND)):
        own, merged = [], []
        for place_N in tiles_of_sample(vision, sample):
            tile = replace(
                vision,
                features_BND=vision.features_BND[sample : sample + 1, place_N],
                taps={name: tap[sample : sample + 1, place_N] for name, tap in vision.taps.items()},
                cls_B1D=None,
                levels=(),
            )
            if len(place_N) <= method.keep:
                own.append((tile.features_BND[0], place_N))
                continue
            left = rule.reduce_features(tile, method.keep)
            found = left.features_BTD[0], place_N[left.places_BT[0]]
            own.append(tuple(x[: method.keep - num_merged] for x in found))
            merged.append(tuple(x[method.keep - num_merged :] for x in found))
        own_features, own_places = (torch.cat(x) for x in zip(*own, strict=True))
        order = own_places.argsort()
        features.append(torch.cat([own_features[order], *(x for x, _ in merged)]))
        places.append(torch.cat([own_places[order], *(x for _, x in merged)]))
    places_BT = torch.stack(places)
    return ReducedFeatures(torch.stack(features), kept_mask(places_BT, vision.num_tokens), places_BT)
