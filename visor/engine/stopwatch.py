"""Time spent on choosing tokens, apart from running them: off by default, switched on around what is to be measured.

    with scoring_clock(synchronise) as clock:
        loaded.prefill(...)
    clock.wall_ms, clock.cpu_ms

What reads the tower, an encoder-side rule and each in-decoder rule report here, each under its place. The clock waits
for the device before and after each of them, so a measured pass is slower than an unmeasured one: time a prefill and
its scoring in runs apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field

PLACES = ("tower", "features", "decoder")
"""Inside the tower (or on what it read there), on its output, and between decoder layers."""


@dataclass
class ScoringClock:
    """What choosing tokens has taken so far, in milliseconds, by place (`PLACES`); `num_calls` counts the pieces."""

    synchronise: Callable[[], None]
    wall_ms_at: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PLACES, 0.0))
    cpu_ms_at: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PLACES, 0.0))
    num_calls: int = 0

    @property
    def wall_ms(self) -> float:
        """At all places."""
        return sum(self.wall_ms_at.values())

    @property
    def cpu_ms(self) -> float:
        """At all places."""
        return sum(self.cpu_ms_at.values())


_CLOCK: ContextVar[ScoringClock | None] = ContextVar("scoring clock", default=None)


@contextmanager
def scoring_clock(synchronise: Callable[[], None] = lambda: None) -> Iterator[ScoringClock]:
    """Within it, every `scoring(place)` block adds to the clock. `synchronise` waits for the device."""
    clock = ScoringClock(synchronise)
    token = _CLOCK.set(clock)
    try:
        yield clock
    finally:
        _CLOCK.reset(token)


def scoring(place: str) -> AbstractContextManager[None]:
    """Work that decides which tokens stay, at one of `PLACES`. Blocks do not nest."""
    assert place in PLACES, place
    clock = _CLOCK.get()
    return nullcontext() if clock is None else _watched(clock, place)


@contextmanager
def _watched(clock: ScoringClock, place: str) -> Iterator[None]:
    clock.synchronise()  # what was launched before must not count here
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    clock.synchronise()
    clock.wall_ms_at[place] += (time.perf_counter() - wall) * 1e3
    clock.cpu_ms_at[place] += (time.process_time() - cpu) * 1e3
    clock.num_calls += 1
