"""docs/adding-a-method.md, followed from outside the tree: a package with an entry point, found by its name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "adding-a-method.md"

PROGRAM = """
import json, sys
sys.path.insert(0, {tests!r})
from samples import loaded, samples
from budgets.match import fit
from budgets.registry import METHODS

assert "longest" in METHODS
model, answers = loaded("llava"), {{}}
for name in ("longest", "longest+fastv"):
    method, schedules, prepared = METHODS.get(name)(), [], samples("llava")[:3]
    for sample in prepared:
        fitted = fit(method, model.geometry, sample.num_visual, sample.num_text, 0.75)
        schedules.append(fitted.schedule(model.geometry, sample.num_visual))
    vision = model.encode(prepared, method.taps)
    answers[name] = [answer.kept for answer in model.generate(prepared, vision, schedules, 2)]
row = vision[0].features_BND[0].norm(dim=-1)
kept = answers["longest"][0]
dropped = [float(row[i]) for i in range(16) if not kept[i]]
assert 0 < sum(kept) < 16 and max(dropped) <= min(float(row[i]) for i in range(16) if kept[i])
print(json.dumps(sorted(name for name in METHODS.names() if name in ("longest", "fastv"))))
"""


def blocks(language: str) -> list[str]:
    """The code blocks of the guide in a language."""
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def install(folder: Path) -> None:
    """What `pip install` leaves of a distribution with the guide's module and entry point."""
    (folder / "longest.py").write_text(blocks("python")[0])
    information = folder / "longest-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: longest\nVersion: 1.0\n")
    (group, name, value) = re.search(r'entry-points\."(.+)"\]\n(\w+) = "(\w+)"', blocks("toml")[0]).groups()
    (information / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")


def test_the_guide_works_from_outside_the_tree(tmp_path):
    install(tmp_path)
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{program}"
    root = GUIDE.parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == '["fastv", "longest"]'


def test_the_guide_is_one_page_and_names_what_exists():
    from visor.reduction.method import Method
    from visor.vision.features import VisionFeatures

    text = GUIDE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 100
    for attribute in ("taps", "reads_text", "merges", "stage", "changes_modes", "trained", "needs_config"):
        assert attribute in text and hasattr(Method, attribute)
    for rule in ("reduce_features", "score_tokens", "select_tokens", "reduce_in_tower", "tower_flops", "scoring_flops"):
        assert rule in text and callable(getattr(Method, rule))
    assert "text" in VisionFeatures.__dataclass_fields__
