"""Progress: an ETA from the work of this process alone, on stderr alone."""

import pytest

from evaluations import progress as module
from evaluations.progress import Progress, duration, progress


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (7384, "2:03:04")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_the_eta_leaves_out_what_an_earlier_process_did(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    line = Progress("accuracy", total=100, done=80, bar=None)
    assert "left" not in line.line()
    now[0] += 30
    line.done += 10
    assert line.line("forms") == "accuracy: 90 of 100 (90%), 0:30 left  forms"


def test_plain_lines_go_to_stderr_and_only_now_and_then(capsys, monkeypatch):
    with progress("accuracy", 100) as line:
        for _ in range(50):
            line.advance()
        monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
        line.advance(50, "forms")
        line.say("a cell failed")
    out, err = capsys.readouterr()
    assert out == "" and err.count("accuracy:") == 2
    assert "accuracy: 100 of 100 (100%)" in err and "a cell failed\n" in err


def test_nothing_to_do_says_nothing(capsys):
    with progress("timing", 0):
        pass
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    import rich.console

    monkeypatch.setattr(rich.console.Console, "is_terminal", property(lambda self: True))
    with progress("accuracy", 10, done=4) as line:
        assert line.bar is not None
        line.advance(6, "forms [not markup]")
        line.say("a [cell] failed")
        assert line.bar[0].tasks[0].completed == 10
    assert "a [cell] failed" in capsys.readouterr().err
