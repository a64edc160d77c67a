"""What the method files share: how counts become a schedule, and how options are checked. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from budgets.schedule import LayerOp, Positions, Reduction, Schedule, dense

if TYPE_CHECKING:
    from budgets.geometry import ModelGeometry


def check_integer(title: str, option: str, value: Any, least: int, why: str = "") -> None:
    """Refuse anything but an integer of at least `least`. `True` is an int to Python, not to us."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{title}: {option} must be an integer of at least {least}{why}, got {value!r}")


def check_fraction(title: str, option: str, value: Any, *, low: float, high: float, includes_high: bool) -> None:
    """Refuse anything but a number in [low, high) or, if `includes_high`, in [low, high]."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (low <= value <= high if includes_high else low <= value < high):
        bracket = "]" if includes_high else ")"
        raise ValueError(f"{title}: {option} must be a number in [{low:g}, {high:g}{bracket}, got {value!r}")


def check_choice(title: str, option: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse anything but one of the choices."""
    if value not in choices:
        raise ValueError(f"{title}: {option} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def tower_passes(geometry: ModelGeometry, num_visual: int) -> tuple[int, int, int]:
    """What a score in the tower costs by: tiles, tokens of a tile, and query rows (the CLS row, or all of them)."""
    num_tokens = geometry.tower_tokens(num_visual)
    cls_scores = geometry.vision.num_prefix_tokens and not geometry.vision.prefix_in_output
    return geometry.num_tiles(num_visual), num_tokens, 1 if cls_scores else num_tokens


def salience_flops(geometry: ModelGeometry, num_visual: int) -> int:
    """q.k of the scored rows in one tower block: the CLS row, or all rows where there is no CLS."""
    tiles, num_tokens, num_rows = tower_passes(geometry, num_visual)
    return tiles * 2 * num_rows * num_tokens * geometry.vision.hidden_size


def feature_blocks(title: str, geometry: ModelGeometry) -> int:
    """Blocks of the tower that lead to the features, for a method that acts inside them.

    Raises:
        ValueError: such a method does not run on this tower.
    """
    tower = geometry.vision
    if tower is None or tower.packs_tiles or tower.image_size is None or tower.patches_per_token > 1:
        raise ValueError(
            f"{title} acts inside the tower and dissolves its grid of tokens, which {geometry.name} still needs: it "
            "packs tiles, merges neighbours, or attends in windows; use a method that acts after the tower"
        )
    return tower.feature_blocks or tower.num_layers


def feature_width(geometry: ModelGeometry) -> int:
    """Width of the features that an encoder-side rule of stage "tower" sees: projected ones where tiles are packed."""
    return geometry.hidden_size if geometry.vision.packs_tiles else geometry.vision.hidden_size


def is_reduced_by(schedule: Schedule, name: str) -> bool:
    """True if this encoder-side method is in the schedule."""
    return schedule.encoder is not None and schedule.encoder.method == name


def after_tower(
    num_layers: int,
    num_visual: int,
    name: str,
    keep: int,
    params: Mapping[str, Any] | None = None,
    image_scale: float = 1.0,
) -> Schedule:
    """`keep` tokens enter layer 0. Keeping everything *is* the dense schedule: nothing is scored, nothing reordered.

    `params` holds only what changes the rule, never the count: samples that differ in counts may share a batch.
    """
    if keep >= num_visual:
        return dense(num_layers, num_visual)
    reduction = Reduction(name, keep, tuple(sorted((params or {}).items())))
    return Schedule((LayerOp(),) * num_layers, num_visual, encoder=reduction, image_scale=image_scale)


def inside_decoder(
    num_layers: int,
    num_visual: int,
    name: str,
    keep_at_layer: Mapping[int, int],
    positions: Positions,
    params: Mapping[str, Any] | None = None,
) -> Schedule:
    """Before each layer of `keep_at_layer` that many tokens stay. A step that drops nothing is left out."""
    layers, live = [LayerOp()] * num_layers, num_visual
    for layer in sorted(keep_at_layer):
        if keep_at_layer[layer] < live:
            live = keep_at_layer[layer]
            layers[layer] = LayerOp(reduce=Reduction(name, live, tuple(sorted((params or {}).items()))))
    if live == num_visual:
        return dense(num_layers, num_visual)
    return Schedule(tuple(layers), num_visual, positions=positions)


def square_side(title: str, num_visual: int) -> int:
    """Side length of the token grid of one square tile."""
    side = math.isqrt(num_visual)
    if side < 1 or side * side != num_visual:
        raise ValueError(
            f"{title} needs the visual tokens of one square tile, and {num_visual} is not the square of an integer: "
            "feed the image as a single tile, or use a method that keeps a number of tokens"
        )
    return side
