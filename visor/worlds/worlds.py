"""The worlds by name, and a scene of one of them by index."""

from __future__ import annotations

from visor.worlds import charts, connections, digits, easy_vqa, forms, glyphs, pages, scenes
from visor.worlds.world import Draw, Scene, generator

WORLDS: dict[str, Draw] = {
    module.__name__.rpartition(".")[2]: module.draw
    for module in (easy_vqa, scenes, digits, forms, charts, glyphs, connections, pages)
}


def scene(world: str, split: str, index: int, size: float = 1.0, seed: int = 0) -> Scene:
    """Scene number `index` of a split; the same arguments give the same pixels and questions."""
    if world not in WORLDS:
        raise ValueError(f"unknown world {world!r}; expected one of {', '.join(WORLDS)}")
    return WORLDS[world](generator(world, split, index, seed), split, size)
