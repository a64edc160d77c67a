"""The tests that tell, on several releases of transformers: `make compat`, or `python tests/compat.py 5.18.0 5.24.0`.

Each release gets a virtual environment of its own under .venv-compat, made from the lock with that one package changed,
and is run with warnings as errors. The exit status is 1 if a release failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("5.18.0", "5.20.2", "5.22.2", "5.23.0", "5.24.0")


@dataclass(frozen=True)
class Outcome:
    """What the tests said under one release."""

    version: str
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problem: str = ""

    @property
    def good(self) -> bool:
        """True if tests ran and none failed."""
        return not self.problem and self.passed > 0 and self.failed == 0


def environment(folder: Path, version: str, torch: str) -> Path:
    """The Python of a virtual environment with this release, made if it is not there."""
    python, done = folder / "bin" / "python", folder / ".done"
    lock = ROOT / "requirements" / "lock.txt"
    wanted = f"{torch}\n{lock.read_text(encoding='utf-8')}"
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return python
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    others = folder / "lock.txt"
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    install = lambda *what: subprocess.run([*pip, *what], check=True, cwd=folder)  # not here: pip would read egg-infos
    # pip chooses the tokenizers and the hub that this release asks for
    loose = re.compile(r"(transformers|tokenizers|huggingface[-_]hub)==")
    lines = lock.read_text(encoding="utf-8").splitlines(True)
    others.write_text("".join(line for line in lines if not loose.match(line)), encoding="utf-8")
    if torch:
        install("--constraint", str(others), *torch.split())
    install("--requirement", str(others), f"transformers=={version}")
    install("--no-deps", "--editable", str(ROOT))
    done.write_text(wanted, encoding="utf-8")
    return python


def run(version: str, venvs: Path, torch: str, arguments: list[str]) -> Outcome:
    """The marked tests under one release."""
    folder = venvs / version
    try:
        python = environment(folder, version, torch)
    except subprocess.CalledProcessError as error:
        return Outcome(version, problem=f"could not be installed: {error.cmd[-1]} ({error.returncode})")
    results, started = folder / "results.xml", time.monotonic()
    results.unlink(missing_ok=True)
    words = [str(python), "-m", "pytest", "-q", "-m", "compat", f"--junitxml={results}", *arguments]
    status = subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode
    if not results.exists():
        return Outcome(version, problem=f"pytest ended with {status} and no results")
    return outcome(version, results.read_text(encoding="utf-8"), status, time.monotonic() - started)


def outcome(version: str, junit: str, status: int, seconds: float) -> Outcome:
    """From pytest's results, and its exit status: it may fail without a failed test."""
    (suite,) = ElementTree.fromstring(junit).iter("testsuite")
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    problem = f"pytest ended with {status}" if status and not failed else ""
    return Outcome(version, count["tests"] - failed - count["skipped"], failed, count["skipped"], seconds, problem)


def table(outcomes: list[Outcome]) -> str:
    """One line a release."""
    lines = [f"{'transformers':<14}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}  "]
    lines += [
        f"{o.version:<14}{o.passed:>8}{o.failed:>8}{o.skipped:>9}{o.seconds:>9.0f}  "
        f"{o.problem or ('passed' if o.good else 'FAILED')}"
        for o in outcomes
    ]
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    """The command. Returns 0 if all releases passed."""
    parser = argparse.ArgumentParser(prog="python tests/compat.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("versions", nargs="*", default=VERSIONS, help=f"releases (default: {' '.join(VERSIONS)})")
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip installs torch by (default: %(default)s)")
    parser.add_argument("--venvs", type=Path, default=ROOT / ".venv-compat", help="folder (default: .venv-compat)")
    parser.add_argument("--pytest", default="", help="arguments for pytest, such as `-x`")
    options = parser.parse_args()
    outcomes = []
    for version in options.versions:
        print(f"== transformers {version}", flush=True)
        outcomes.append(run(version, options.venvs.resolve(), options.torch, options.pytest.split()))
    print(table(outcomes))
    return 0 if all(each.good for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
