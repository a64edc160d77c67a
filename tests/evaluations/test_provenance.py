"""Provenance: what was run, on what, in which state of the source."""

import subprocess

from evaluations.provenance import collect, git_state, packages
from evaluations.run_file import card_says_trained


def test_git_state_tells_a_clean_tree_from_a_changed_one(tmp_path):
    git = lambda *arguments: subprocess.run(
        ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b", *arguments], check=True, capture_output=True
    )
    assert git_state(tmp_path) == (None, None)
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "x")
    commit, dirty = git_state(tmp_path)
    assert len(commit) == 40 and dirty is False
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == (commit, True)


def test_what_is_collected():
    found = collect("cpu", "float32", "sdpa", {"sha256": "c0ffee"})
    assert found["device"] == "cpu" and found["cpu"] and found["threads"] >= 1
    assert found["checkpoint"] == {"sha256": "c0ffee"}
    assert packages()["numpy"].count(".") == 2


def test_a_card_says_whether_the_weights_are_trained():
    assert card_says_trained("---\nlicense: x\ntrained: true\n---\n# Name") is True
    assert card_says_trained("trained: False") is False
    assert card_says_trained("We trained: much.") is None and card_says_trained(None) is None
