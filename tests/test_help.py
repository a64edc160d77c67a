"""Every command says at once what it can do: its --help imports neither torch nor transformers."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "pandas", "matplotlib", "scipy", "pyarrow")
MAINS = [
    path.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__main__").replace("/", ".")
    for room in ("budgets", "evaluations", "reports", "visor")
    for path in sorted((ROOT / room).rglob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8") or path.name == "__main__.py"
]


def test_all_commands_are_found():
    known = {"evaluations.run", "evaluations.tasks", "visor.training.run", "visor.analysis", "budgets.cost", "reports"}
    assert known <= set(MAINS)


@pytest.mark.parametrize("module", MAINS)
def test_help_imports_nothing_heavy(module):
    code = (
        "import runpy, sys; sys.argv = ['command', '--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert end.code in (0, None), end.code\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout and done.stderr.splitlines()[-1] == "[]"
