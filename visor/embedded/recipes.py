"""How long and how fast each stage of the embedded models is trained."""

from __future__ import annotations

from visor.embedded.trainer import Recipe

RECIPES = {
    "decoder": Recipe(steps=5600, batch_size=32, peak_rate=1e-3, decay=0.5),
    "tower": Recipe(steps=17000, batch_size=16, peak_rate=1.5e-3, decay=0.3),
    "align": Recipe(steps=6000, batch_size=16, peak_rate=1.5e-3, decay=0.5),
    "dense": Recipe(steps=3400, batch_size=16, peak_rate=4e-4, decay=0.4),
}
