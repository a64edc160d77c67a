"""The registry: discovery by file and by entry point, near names, and no silent overwriting."""

import sys
import types

import pytest

from budgets import registry as module
from budgets.registry import FAMILIES, METHODS, TASKS, Registry, UnknownNameError, nearest_first


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package on disk with two registering files and a private one."""
    folder = tmp_path / "toy_methods"
    folder.mkdir()
    (folder / "__init__.py").write_text("from budgets.registry import Registry\n")
    for name in ("slow", "fast"):
        (folder / f"{name}.py").write_text(
            f"import registries\n@registries.TOYS.register({name!r})\nclass {name.title()}:\n    pass\n"
        )
    (folder / "_helper.py").write_text("raise ImportError('private files are not imported')\n")
    toys = Registry("toy", "toy_methods", "tests.toys")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "registries", types.SimpleNamespace(TOYS=toys))
    yield toys
    for name in [name for name in sys.modules if name.startswith("toy_methods")]:
        del sys.modules[name]


def test_files_are_found_when_a_name_is_asked_for(package):
    assert "toy_methods" not in sys.modules
    assert package.names() == list(package) == ["fast", "slow"]
    assert package.get("fast").__name__ == "Fast"
    assert "slow" in package and "medium" not in package


def test_unknown_names_answer_with_the_nearest_first(package):
    with pytest.raises(UnknownNameError, match="unknown toy 'slwo'.*nearest first: slow, fast"):
        package.get("slwo")
    assert issubclass(UnknownNameError, ValueError)


@pytest.mark.parametrize("name", ["fastv+", "+", "fastv+visor+", "+fastv"])
def test_a_plus_with_nothing_beside_it_is_an_unknown_name(name):
    with pytest.raises(UnknownNameError, match="unknown method '.*'; the methods that exist, nearest first"):
        METHODS.get(name)


def test_nearest_first_ignores_case_and_breaks_ties_by_name():
    assert nearest_first("FASTV", ["visionzip", "fastv", "dense"])[0] == "fastv"
    assert nearest_first("q", ["b", "a"]) == ["a", "b"]


def test_third_parties_come_in_by_entry_point(package, monkeypatch):
    class Point:
        def load(self):
            package.register("theirs")(type("Theirs", (), {}))

    asked = []
    monkeypatch.setattr(module, "entry_points", lambda group: asked.append(group) or [Point()])
    assert package.names() == ["fast", "slow", "theirs"] and asked == ["tests.toys"]


def test_a_taken_name_is_an_error_but_a_reload_is_not():
    registry = Registry("toy", "budgets", "tests.toys")
    first = type("Same", (), {"__module__": "a"})
    again = type("Same", (), {"__module__": "a"})
    other = type("Other", (), {"__module__": "b"})
    assert registry.register("name")(first) is first
    registry.register("name")(again)
    with pytest.raises(ValueError, match="'name' is registered twice: by a and b"):
        registry.register("name")(other)


def test_the_projects_registries_name_their_packages():
    assert {r.package for r in (METHODS, FAMILIES, TASKS)} == {"visor.reduction", "visor.families", "evaluations.tasks"}
    assert {"llava", "llava_onevision"} <= set(FAMILIES.names())
    assert {"dense", "fastv"} <= set(METHODS.names())


def test_a_scheme_makes_what_stands_behind_its_colon():
    made = Registry("thing", "budgets", "no.such.group", schemes={"file": "pathlib:Path"})
    assert str(made.get("file:a:b")) == "a:b" and "file:anything" in made
    assert "other:a" not in made
    with pytest.raises(UnknownNameError):
        made.get("other:a")
