"""Which cells of the image a drawn thing covers: a large shape is to be seen in each of its patches, not in one alone.

With labels at centres only, the tower learned to gather a shape in its central patch, and a reduction that dropped
that one patch lost the shape; real towers say "red circle" all over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image, ImageDraw

from visor.worlds.world import IMAGE_SIZE

CELL = 12  # side length in pixels: a patch of the embedded models
SHARE = 0.4  # of a cell that a thing must fill to cover it; narrow bars fill no more
EVERY = 3  # of the covered cells, the share that carries facts: enough to be redundant, few beside the characters'


def covered_cells(mask: np.ndarray) -> Iterator[tuple[float, float, bool]]:
    """(x, y) centres of the cells that a boolean [H, W] mask covers, and whether each is to carry facts."""
    num_cells = IMAGE_SIZE // CELL
    share = mask.reshape(num_cells, CELL, num_cells, CELL).mean((1, 3))
    for row, column in np.argwhere(share >= SHARE).tolist():
        yield (column + 0.5) * CELL, (row + 0.5) * CELL, (row + column) % EVERY == 0


def mask_of(paint: Callable[[ImageDraw.ImageDraw], None]) -> np.ndarray:
    """Boolean [H, W] mask of what `paint` draws with `fill=1`."""
    image = Image.new("1", (IMAGE_SIZE, IMAGE_SIZE))
    paint(ImageDraw.Draw(image))
    return np.asarray(image)
