"""The clock of choosing tokens sees every place where a method looks, on every family."""

import functools

import pytest
from family_processors import load, make_image
from tiny_models import ALL_FAMILIES

from budgets.registry import METHODS
from visor.engine.stopwatch import scoring, scoring_clock
from visor.vision.encode import taps_of

loaded_of = functools.cache(load)


def sample_of(loaded):
    return loaded.prepare(make_image(1, 100, 60), "what is it")


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_what_is_read_of_the_tower_is_the_towers(family):
    loaded = loaded_of(family)
    sample = sample_of(loaded)
    with scoring_clock() as clock:
        loaded.encode([sample], {"salience"})
    assert clock.wall_ms_at["tower"] == clock.wall_ms > 0


@pytest.mark.parametrize("name", ["cdpruner", "prumerge"])
def test_the_text_and_the_count_are_part_of_choosing(name):
    loaded = loaded_of("llava")
    sample = sample_of(loaded)
    method = METHODS.get(name)()
    method = method if method.adaptive else type(method)(keep=4)
    schedules = [method.schedule(loaded.geometry, sample.num_visual)]
    vision = loaded.encode([sample], taps_of(schedules))
    with scoring_clock() as clock:
        schedules = loaded.resolve(vision, schedules)
        loaded.collate([sample], vision, schedules)
    assert clock.num_calls == 2 and clock.wall_ms_at["features"] == clock.wall_ms > 0


def test_outside_a_clock_nothing_is_watched_and_places_are_known():
    with scoring_clock() as clock:
        pass
    with scoring("tower"):
        pass
    assert clock.num_calls == 0
    with pytest.raises(AssertionError):
        scoring("elsewhere")
