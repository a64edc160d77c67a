"""The command line: what it refuses, how it says so, and that it does so before it loads anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from budgets.registry import METHODS, TASKS
from evaluations.run import main
from evaluations.suite import SUITES_FOLDER, SuiteError, load_suite, suite_names

ROOT = Path(__file__).parents[2]


def command(*arguments):
    """A process of its own: (status, stdout, stderr, what was imported)."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, *sys.path]))}
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "evaluations.run", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    told, imports = [], set()
    for line in result.stderr.splitlines():
        if line.startswith("import time:"):
            imports.add(line.rpartition("|")[2].strip())
        else:
            told.append(line)
    return result.returncode, result.stdout, "\n".join(told), imports


def test_help_answers_at_once():
    status, out, _, imported = command("--help")
    assert status == 0 and "--budgets" in out and "fine-grained" in out
    assert not imported & {"torch", "transformers", "numpy", "pandas", "PIL"}


def test_names_are_checked_before_anything_is_loaded():
    status, out, message, imported = command("--model", "dense-tony")
    assert status == 2 and out == "" and "Traceback" not in message
    assert "unknown model 'dense-tony'; the models that ship with the project, nearest first:" in message
    assert not imported & {"torch", "transformers", "pandas"}


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--suite", "fine-graned"], "the suites that exist, nearest first: fine-grained,"),
        (["--methods", "dense,fastvv"], "unknown method 'fastvv'; the methods that exist, nearest first: fastv,"),
        (["--tasks", "digit"], "unknown task 'digit'; the tasks that exist, nearest first: digits,"),
        (["--device", "cdua"], "unknown device 'cdua'; the devices that exist, nearest first: cuda,"),
        (["--dtype", "bfloat"], "unknown dtype 'bfloat'; the dtypes that exist, nearest first: bfloat16,"),
        (["--attention", "flash"], "the attentions that exist, nearest first: flash_attention_2,"),
        (["--budgets", "0"], "a budget is a share of the dense decoder's prefill FLOPs in (0, 1], got 0"),
        (["--budgets", "0.5,1.5"], "in (0, 1], got 1.5"),
        (["--budgets", "nan"], "in (0, 1], got nan"),
        (["--budgets", "half"], "budgets are numbers like 0.5,0.25, got 'half'"),
        (["--budgets", ","], "no budget is named"),
        (["--budgets", "192"], "in (0, 1], got 192"),
        (["--tokens", "0.5"], "a token budget is a number of visual tokens above 1"),
        (["--tokens", "many"], "token budgets are numbers like"),
        (["--methods", ""], "no method is named"),
        (["--methods", "dense,dense"], "method 'dense' is named twice"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--suite", "nowhere.yaml"], "the suite file nowhere.yaml does not exist"),
        (["--out", __file__], "is a file; it must be a folder"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments, expected, monkeypatch, capsys):
    monkeypatch.setattr("evaluations.run.execute", lambda *_, **__: pytest.fail("it went on"))
    try:
        status = main(arguments)
    except SystemExit as exit_by_argparse:
        status = exit_by_argparse.code
    out, message = capsys.readouterr()
    assert (status, out) == (2, "") and expected in message


def test_a_folder_that_is_no_model(tmp_path, capsys):
    assert main(["--model", str(tmp_path)]) == 2
    assert "it has no config.json" in capsys.readouterr().err


def test_an_interrupt_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("evaluations.run.execute", interrupted)
    assert main(["--model", str(tmp_path)]) == 130
    assert "the same command continues" in capsys.readouterr().err


@pytest.mark.parametrize("name", suite_names())
def test_shipped_suites_name_what_exists(name):
    suite = load_suite(name)
    assert suite.name == name and suite.title and suite.description
    assert all(task.name in TASKS for task in suite.tasks) and all(method in METHODS for method in suite.methods)
    assert "dense" in suite.methods and all(0 < budget < 1 for budget in suite.budgets)


def test_the_suites_of_the_contract_exist():
    assert {"coarse", "fine-grained", "reasoning", "all", "smoke"} <= set(suite_names())


@pytest.mark.parametrize(
    "text, message",
    [
        ("- a", "a suite is a mapping"),
        ("title: [", "cannot be read as YAML"),
        ("title: x", "the key 'tasks' is missing"),
        ("budgts: [0.5]", "unknown key 'budgts'; the keys that exist there, nearest first: budgets, "),
        ("timing: {min_run: 3}", "unknown key 'timing.min_run'; .* nearest first: min_runs, "),
        ("tasks: [{name: digits, limt: 3}]", "unknown key 'tasks.0.limt'; .* nearest first: limit, "),
        ("methods: dense", "methods: input should be a valid tuple, got 'dense'"),
        ("timing: {new_tokens: 1}", "timing: new_tokens must be an integer of at least 2"),
        ("tasks: [{name: a, limit: 0}]", "limit must be an integer of at least 1"),
    ],
)
def test_a_broken_suite_file_is_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    base = (SUITES_FOLDER / "smoke.yaml").read_text()
    path.write_text(base + "\n" + text if text.startswith(("timing", "tasks", "budgts", "methods")) else text)
    with pytest.raises(SuiteError, match=message) as error:
        load_suite(str(path))
    assert "mine.yaml" in str(error.value)


def test_a_suite_of_ones_own(tmp_path):
    (tmp_path / "mine.yaml").write_text((SUITES_FOLDER / "smoke.yaml").read_text())
    assert load_suite(str(tmp_path / "mine.yaml")).name == "mine"
