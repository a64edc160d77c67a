"""Which world to draw next, and how large: things grow as accuracy passes a mark, not by the clock."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

MEMORY = 300  # questions over which running accuracy is averaged


@dataclass
class Progress:
    """Standing of one world: `size` of its scenes in [0, 1] and running accuracy at that size."""

    size: float = 0.0
    accuracy: float = 0.0
    seen_at_size: int = 0


@dataclass(frozen=True)
class CurriculumOptions:
    """How worlds join and their scenes grow.

    Args:
        worlds: names, in the order in which they join; later ones wait until the earlier ones are under way.
        unlocked: how many of them take part from the start.
        full_size: all take part from the start, at full size.
        grow_at: accuracy at which a world's scenes grow.
        step: by how much.
        smaller: share of scenes drawn smaller than their world's size.
        emphasis: factors on how often a world is drawn.
        join_at: accuracy that every unlocked world needs (at size >= `join_size`) before the next one joins.
    """

    worlds: tuple[str, ...] = ()
    unlocked: int = 1
    full_size: bool = False
    grow_at: float = 0.9
    step: float = 0.15
    smaller: float = 0.2
    emphasis: Mapping[str, float] = field(default_factory=dict)
    join_at: float = 0.8
    join_size: float = 0.3

    def __post_init__(self) -> None:
        from visor.worlds.worlds import WORLDS

        if not self.worlds or (unknown := [name for name in self.worlds if name not in WORLDS]):
            wrong = f"unknown: {', '.join(unknown)}" if self.worlds else "it is empty"
            raise ValueError(f"curriculum.worlds must list some of {', '.join(WORLDS)}; {wrong}")
        if not 1 <= self.unlocked <= len(self.worlds):
            raise ValueError(f"curriculum.unlocked must be 1 to {len(self.worlds)} (the worlds), got {self.unlocked}")


class Curriculum:
    """Which worlds take part, and how each of them stands."""

    def __init__(self, options: CurriculumOptions) -> None:
        self.options, self.order = options, options.worlds
        self.unlocked = len(self.order) if options.full_size else options.unlocked
        self.worlds = {name: Progress(size=float(options.full_size)) for name in self.order}

    def draw(self, rng: np.random.Generator) -> tuple[str, float]:
        """A world, the weaker the likelier, and the size of its scene."""
        names = self.order[: self.unlocked]
        weights = np.array(
            [self.options.emphasis.get(n, 1.0) * max(0.08, 1.02 - self.worlds[n].accuracy) for n in names]
        )
        name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
        size = self.worlds[name].size
        return name, size if rng.random() >= self.options.smaller else float(rng.uniform(0, size))

    def note(self, world: str, right: list[bool]) -> None:
        """Take in the results of one scene's questions; grow or unlock."""
        progress = self.worlds[world]
        for ok in right:
            progress.seen_at_size += 1
            rate = max(1 / MEMORY, 1 / progress.seen_at_size)
            progress.accuracy += rate * (ok - progress.accuracy)
        if progress.accuracy >= self.options.grow_at and progress.seen_at_size >= MEMORY // 2 and progress.size < 1:
            progress.size = min(1.0, round(progress.size + self.options.step, 3))
            progress.seen_at_size = 0
        if self.unlocked < len(self.order) and all(
            self.worlds[n].accuracy >= self.options.join_at and self.worlds[n].size >= self.options.join_size
            for n in self.order[: self.unlocked]
        ):
            self.unlocked += 1

    def state(self) -> dict:
        """What a checkpoint needs."""
        return {"unlocked": self.unlocked, "worlds": {n: vars(p).copy() for n, p in self.worlds.items()}}

    def load(self, state: dict) -> None:
        """Continue from `state`."""
        self.unlocked = state["unlocked"]
        for name, values in state["worlds"].items():
            self.worlds[name] = Progress(**values)

    def __str__(self) -> str:
        return " ".join(
            f"{n} {self.worlds[n].size:.1f}:{self.worlds[n].accuracy:.0%}" for n in self.order[: self.unlocked]
        )
