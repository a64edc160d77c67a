"""Every module, name and path of this project that a document, a card, a recipe, a docstring or a comment names exists.

A rename that leaves an old name behind fails here, whoever made it.
"""

import ast
import io
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

from budgets import registry

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("budgets", "visor", "evaluations", "reports")
FOLDERS = (*PACKAGES, "docs", "tests", "benchmarks")
DOTTED = re.compile(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.[A-Za-z_]\w*)+")
SLASHED = re.compile(rf"(?<![\w./<>-])(?:{'|'.join(FOLDERS)})/[\w.*/-]*[\w/*]")
LINK = re.compile(r"\]\(([^)\s]+)\)")
ENTRY_POINTS = {each.entry_point_group for each in vars(registry).values() if isinstance(each, registry.Registry)}

DOCUMENTS = sorted(
    path
    for pattern in (
        "*.md",
        "docs/*.md",
        "benchmarks/**/*.md",
        "visor/**/*.md",
        "visor/**/*.yaml",
        "evaluations/**/*.yaml",
    )
    for path in ROOT.glob(pattern)
)
SOURCES = sorted(path for folder in (*PACKAGES, "tests") for path in (ROOT / folder).rglob("*.py"))


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def names_in(path: Path) -> frozenset[str]:
    """Names that a module has: classes and functions, what is assigned in them or in it, and what it imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
    return frozenset(found)


def exists(dotted: str) -> bool:
    """True for a package, a module, or a module with names that it has behind it."""
    path, parts = ROOT, dotted.split(".")
    while parts and (path / parts[0] / "__init__.py").is_file():  # a folder of data may stand beside a module
        path /= parts.pop(0)
    if parts and (path / f"{parts[0]}.py").is_file():
        module = path / f"{parts.pop(0)}.py"
    else:
        module = path / "__init__.py"
    handed_on = re.findall(r'"(\w+)"', module.read_text(encoding="utf-8")) if module.name == "__init__.py" else ()
    return module.is_file() and all(part in names_in(module) or part in handed_on for part in parts)


def wrong(text: str) -> list[str]:
    """What a text names and is not there."""
    dotted = {name for name in DOTTED.findall(text) if name not in ENTRY_POINTS and not exists(name)}
    slashed = {name for name in SLASHED.findall(text) if not any(ROOT.glob(name.rstrip("/")))}
    return sorted(dotted | slashed)


def words(source: str) -> str:
    """Strings and comments of a Python file."""
    kinds = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return "\n".join(token.string for token in tokens if token.type in kinds)


@pytest.mark.parametrize("path", DOCUMENTS, ids=shown)
def test_documents_name_what_is_there(path):
    assert not wrong(path.read_text(encoding="utf-8"))


def test_docstrings_and_comments_name_what_is_there():
    found = {shown(path): wrong(words(path.read_text(encoding="utf-8"))) for path in SOURCES if path != Path(__file__)}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.suffix == ".md"], ids=shown)
def test_links_lead_somewhere(path):
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        document = (path.parent / name).resolve() if name else path
        assert document.exists(), f"{target} in {shown(path)}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target} in {shown(path)}: the headings are {sorted(slugs)}"


def test_a_wrong_name_is_found():
    text = "see `visor.shortening.shorten`, `visor.engine.running`, visor/several.py and visor/vision/multi_image.py"
    assert wrong(text) == ["visor.shortening.shorten", "visor/several.py"]
    assert not wrong("`visor.vision.taps.TAPS`, `visor.model.configuration.VisorConfig`, visor/families/<family>.py")
