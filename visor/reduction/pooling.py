"""Average pooling: the token grid averaged to a smaller one. `pooling` is training-free, `m3` runs on weights trained
for it (Matryoshka Multimodal Models: one model, the mean of the losses over all scales); the first is the control of
the second.

A tile of S x S tokens becomes side x side. An image of several packed tiles keeps the same share (side / S)^2 of its N
tokens, a number that does not depend on how the tiles were packed: the overview gets its part of them, the packed rows
the rest, each token the mean of a window (rows and columns cut as evenly as the number allows), each pooled row ended
by the end of a line where the family has one. An image of dynamic resolution keeps the share that `side` is of LLaVA's
grid, (side / 24)^2, its own grid cut in the same way.

Shapes: B samples, N visual tokens, T after pooling, E feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import after_tower, check_integer, square_side
from visor.reduction.method import Method

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from visor.vision.features import ReducedFeatures, VisionFeatures


DYNAMIC_SIDE = 24


@METHODS.register("pooling")
@dataclass(frozen=True)
class Pooling(Method):
    """Option: `side`, the side of the grid that is left of a tile (never more than there is)."""

    side: int = 6

    name: ClassVar[str] = "pooling"
    title: ClassVar[str] = "Average pooling"
    stage: ClassVar[str] = "projected"
    taps: ClassVar[frozenset[str]] = frozenset({"places"})
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer(self.title, "side", self.side, 1)

    def full_side(self, geometry: ModelGeometry, num_visual: int) -> int:
        """Side of a tile's grid."""
        if geometry.vision is not None and geometry.vision.image_size is None:
            return DYNAMIC_SIDE
        if geometry.vision is not None and geometry.vision.packs_tiles:
            return square_side(self.title, geometry.vision.visual_tokens_per_tile)
        return square_side(self.title, num_visual)

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        full = self.full_side(geometry, num_visual)
        side = min(self.side, full)
        keep = max(1, round(num_visual * side**2 / full**2))
        return after_tower(geometry.num_layers, num_visual, self.name, keep)

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[Pooling]:
        return [replace(self, side=side) for side in range(1, self.full_side(geometry, num_visual) + 1)]

    def reduce_features(self, vision: VisionFeatures, keep: int) -> ReducedFeatures:
        import torch

        from visor.vision.features import ReducedFeatures

        batch, num_visual, width = vision.features_BND.shape
        # Every token lives on in a mean: there is no kept set to show.
        if vision.grid is None and "places" in vision.taps:
            rows = zip(vision.features_BND.unbind(), vision.tap("places").unbind(), strict=True)
            return ReducedFeatures(torch.stack([pool_packed(*row, keep) for row in rows]), None)
        side = isqrt(keep)
        if vision.grid is not None and (vision.grid[0] != vision.grid[1] or side * side != keep):
            rows = [strips(row_NE, vision.grid[0], keep) for row_NE in vision.features_BND.unbind()]
            places_T = torch.tensor(strip_places(*vision.grid, keep), device=rows[0].device)
            return ReducedFeatures(torch.stack(rows), None, places_T.expand(batch, -1))
        if vision.grid is None or side > min(vision.grid):
            raise ValueError(f"{self.title}: cannot average a token grid of {vision.grid} to {keep} tokens in a square")
        grid_BERC = vision.features_BND.transpose(1, 2).reshape(batch, width, *vision.grid)
        pooled_BERC = torch.nn.functional.adaptive_avg_pool2d(grid_BERC, side)
        # A mean stands in the middle of its window.
        rows_R, columns_C = (
            torch.tensor([(2 * i + 1) * length // (2 * side) for i in range(side)], device=grid_BERC.device)
            for length in vision.grid
        )
        places_T = (rows_R[:, None] * vision.grid[1] + columns_C).flatten()
        return ReducedFeatures(pooled_BERC.flatten(2).transpose(1, 2), None, places_T.expand(batch, -1))


@METHODS.register("m3")
@dataclass(frozen=True)
class M3(Pooling):
    """Option: as of average pooling. Runs on models trained over several sides, and on those sides only: the model's
    config names them in `m3_sides`."""

    name: ClassVar[str] = "m3"
    title: ClassVar[str] = "M3"
    paper: ClassVar[str] = "Cai et al., Matryoshka Multimodal Models, ICLR 2025"
    trained: ClassVar[bool] = True
    needs_config: ClassVar[str | None] = "m3_sides"

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        if geometry.trained_sides and self.side not in geometry.trained_sides:
            sides = ", ".join(map(str, sorted(geometry.trained_sides)))
            raise ValueError(
                f"{self.title}: {geometry.name} was trained on grids of the sides {sides}, not {self.side}"
            )
        return super().schedule(geometry, num_visual)

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[Pooling]:
        trained = sorted(side for side in geometry.trained_sides if side <= self.full_side(geometry, num_visual))
        return [replace(self, side=side) for side in trained] or super().settings(geometry, num_visual)


def pool_packed(features_NE: torch.Tensor, places_N3: torch.Tensor, keep: int) -> torch.Tensor:
    """One image of packed tiles to `keep` tokens [T, E], in reading order.

    Its tokens are the overview's, and those of the parts: row by row, each row ended by a token that stands for no
    patch, or, without such ends, tile by tile.
    """
    import torch

    kind_N = places_N3[:, 0].round().long()
    is_overview, is_end = kind_N == 0, kind_N < 0
    num_overview, num_parts, num_rows = (int(each.sum()) for each in (is_overview, kind_N == 1, is_end))
    if num_parts == 0:  # one tile, perhaps closed by one end of a line
        return strips(features_NE[is_overview], isqrt(num_overview), keep)
    share = min(max(1, round(keep * num_overview / len(features_NE))), num_overview, max(1, keep - 1))
    if keep == 1:
        return features_NE[~is_end].mean(0, keepdim=True)
    overview_TE = strips(features_NE[is_overview], isqrt(num_overview), share)
    left, parts_ME = keep - share, features_NE[kind_N == 1]
    if num_rows:
        end_E = features_NE[is_end][0]
        return torch.cat([overview_TE, strips(parts_ME, num_rows, left, end_E)])
    num_tiles = num_parts // num_overview
    each = [left * (tile + 1) // num_tiles - left * tile // num_tiles for tile in range(num_tiles)]
    tiles = parts_ME.chunk(num_tiles)
    pooled = [strips(tile, isqrt(num_overview), count) for tile, count in zip(tiles, each, strict=True) if count]
    order = [*pooled, overview_TE] if bool(is_overview[-1]) else [overview_TE, *pooled]
    return torch.cat(order)


def strips(features_ME: torch.Tensor, num_rows: int, keep: int, end_E: torch.Tensor | None = None) -> torch.Tensor:
    """A grid of `num_rows` rows to `keep` tokens: strips of rows, each cut into as many windows as its share.

    Args:
        end_E: a token that ends each strip and is counted; left out where strips would hold nothing else.
    """
    import torch

    num_columns = len(features_ME) // num_rows
    grid_RCE = features_ME.view(num_rows, num_columns, -1)
    rows = []
    for low, high, count, is_ended in cut(num_rows, num_columns, keep, end_E is not None):
        strip_EC = grid_RCE[low:high].mean(0).T
        pooled_CE = torch.nn.functional.adaptive_avg_pool1d(strip_EC[None], count)[0].T
        rows.append(torch.cat([pooled_CE, end_E[None]]) if is_ended else pooled_CE)
    return torch.cat(rows)


def cut(num_rows: int, num_columns: int, keep: int, has_ends: bool = False) -> list[tuple[int, int, int, bool]]:
    """Strips of rows that hold `keep` tokens: first row, the row behind the last, windows, and if an end is counted."""
    ends = int(has_ends and keep >= 2)
    num_strips = max(1, min(num_rows, round((keep * num_rows / num_columns) ** 0.5), keep // (1 + ends)))
    while num_strips < num_rows and keep > num_strips * (num_columns + ends):
        num_strips += 1
    edge = lambda strip: strip * num_rows // num_strips
    share = lambda strip: keep * (strip + 1) // num_strips - keep * strip // num_strips - ends
    return [(edge(strip), edge(strip + 1), share(strip), bool(ends)) for strip in range(num_strips)]


def strip_places(num_rows: int, num_columns: int, keep: int) -> list[int]:
    """For each window of `cut` a token of the grid in its middle; all different."""
    middles = lambda count: [(2 * i + 1) * num_columns // (2 * count) for i in range(count)]
    strips_of = cut(num_rows, num_columns, keep)
    return [(low + high) // 2 * num_columns + x for low, high, count, _ in strips_of for x in middles(count)]
