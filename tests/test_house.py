"""The rooms of the project and the arrows between them: imports go down the floors, and no two files import each other.

All imports are read from the source, those inside functions too. An import under TYPE_CHECKING counts as well: it is
what a reader must follow.
"""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = {
    "visor": 0,  # what the package itself and its helper for lazy names are
    "budgets": 1, "visor.worlds": 1,
    "visor.engine": 2,
    "visor.vision": 3,
    "visor.reduction": 4, "visor.families": 4,
    "visor.model": 5,
    "visor.inference": 6,
    "visor.training": 7, "visor.analysis": 7, "visor.convert": 7,
    "evaluations": 8, "visor.embedded": 8,
    "reports": 9,
}  # fmt: skip

CONTRACTS = {"visor.reduction.method", "visor.families.base"}
"""May be imported by all of `visor/` and above; `budgets/` names them in annotations only."""

EXCEPTIONS = {
    ("visor", "budgets"),  # which refuses an old Python
    ("visor", "visor.model.registration"),  # `import visor` makes VISOR models known to transformers
    ("evaluations.job", "reports.build"),  # the last step of a run, imported when it is reached
    ("evaluations.speed_job", "reports.speed"),  # likewise
    ("visor.analysis.__main__", "evaluations.analyses"),  # the command hands over to the harness
}


def _modules() -> dict[str, Path]:
    found = {}
    for package in ("budgets", "visor", "evaluations", "reports"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def imports_of(name: str) -> Iterator[tuple[str, str]]:
    """What a module imports, standard library and packages included, each with "module", "function" or "annotation"."""

    def visit(node: ast.AST, where: str) -> Iterator[tuple[str, str]]:
        for child in ast.iter_child_nodes(node):
            inner = where
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) and where == "module":
                inner = "function"
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = "annotation"
            if isinstance(child, ast.Import):
                yield from ((alias.name, where) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name} has a relative import in line {child.lineno}"
                for alias in child.names:
                    full = f"{child.module}.{alias.name}"
                    yield (full if full in MODULES else child.module), where
            yield from visit(child, inner)

    return visit(ast.parse(MODULES[name].read_text(encoding="utf-8")), "module")


IMPORTS = {name: list(imports_of(name)) for name in MODULES}
ARROWS = {(name, to, where) for name, own in IMPORTS.items() for to, where in own if to in MODULES and to != name}


def room_of(module: str) -> str:
    """The room that a module is in."""
    parts = module.split(".")
    two = ".".join(parts[:2])
    return parts[0] if parts[0] != "visor" or two not in FLOORS else two


def test_every_module_has_a_room():
    unknown = {name for name in MODULES if room_of(name) == "visor"} - {"visor", "visor._lazy"}
    assert not unknown, f"which room are these in? {sorted(unknown)}"
    assert {room_of(name) for name in MODULES} == set(FLOORS)


def test_arrows_point_down():
    upwards = {
        (name, to)
        for name, to, where in ARROWS
        if (a := room_of(name)) != (b := room_of(to))
        and FLOORS[b] >= FLOORS[a]
        and not (to in CONTRACTS and (name.startswith("visor") or where == "annotation"))
    }
    assert upwards == EXCEPTIONS  # an exception that is no longer needed goes, too


def test_the_report_is_the_last_step():
    """Where the harness imports the report, it does so inside a function, and that is one for the whole run."""
    assert all(where == "function" for name, to, where in ARROWS if room_of(to) == "reports" != room_of(name))


def test_engine_and_vision_know_the_contracts_only():
    for name, to, _ in ARROWS:
        if room_of(name) in ("visor.engine", "visor.vision") and room_of(to) in ("visor.reduction", "visor.families"):
            assert to in CONTRACTS, f"{name} imports {to}"


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("budgets", {"torch", "transformers", "visor", "evaluations", "reports"}),
        ("reports", {"torch", "transformers", "visor"}),  # but for how an image is opened: see below
        ("visor.worlds", {"torch", "transformers"}),
    ],
)
def test_what_stays_out(room, forbidden):
    found = {
        (name, to)
        for name, own in IMPORTS.items()
        for to, where in own
        if room_of(name) == room
        and to.partition(".")[0] in forbidden
        and room_of(to) != room
        and not (to in CONTRACTS and where == "annotation")
    }
    assert found - {("reports.explorer", "visor.vision.image")} == set()


def circles(arrows: set[tuple[str, str]]) -> set[frozenset[str]]:
    """Groups of modules that import each other, directly or through others."""
    follows: dict[str, set[str]] = {}
    for name, to in arrows:
        follows.setdefault(name, set()).add(to)

    def reached(start: str) -> set[str]:
        seen, rest = set(), [start]
        while rest:
            new = follows.get(rest.pop(), set()) - seen
            seen |= new
            rest += new
        return seen

    reach = {name: reached(name) for name in follows}
    return {frozenset(to for to in own if name in reach.get(to, ())) for name, own in reach.items() if name in own}


def test_no_circles():
    assert not circles({(name, to) for name, to, where in ARROWS if where == "module"})
    # Nor of imports that are put off, so that no file can only be understood together with one that needs it.
    arrows = {(name, to) for name, to, _ in ARROWS}
    assert not circles(arrows)
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")}) == {frozenset("abc")}


def test_rooms_say_what_they_are_for_and_cost_nothing():
    """Importing every room imports no torch; what a room hands on is there."""
    rooms = [name for name in FLOORS if MODULES[name].name == "__init__.py"]
    code = f"import importlib, sys\nfor r in {rooms}: importlib.import_module(r)\nsys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    for name in rooms:
        room = importlib.import_module(name)
        assert len((room.__doc__ or "").splitlines()) >= 4, name
        for handed_on in getattr(room, "__all__", ()):
            assert getattr(room, handed_on) is not None
    with pytest.raises(AttributeError, match="module 'visor.engine' has no attribute 'runing'"):
        importlib.import_module("visor.engine").runing  # noqa: B018


def test_the_readme_shows_every_room():
    """The picture of the rooms has all that there are, and none that there is not."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## The house")[2].partition("\n## ")[0]
    named = set(re.findall(r"\b((?:visor/)?\w+)(?:/|\.py)(?=\s)", section))
    assert named == {room.replace(".", "/") for room in FLOORS if room != "visor"}
