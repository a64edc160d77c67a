"""Progress on stderr, so that stdout stays for results: a live bar with an ETA, or plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS_BETWEEN_LINES = 10.0


def duration(seconds: float) -> str:
    """ "1:05" or "2:03:04"."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """One line of progress.

    Args:
        total: units of work in all, including those done by an earlier process.
        done: units done by an earlier process; they do not count towards the rate.
        bar: a rich progress bar with its task id, or None for plain lines.
    """

    def __init__(self, title: str, total: int, done: int, bar: tuple[Any, Any] | None) -> None:
        self.title, self.total, self.bar = title, total, bar
        self.done = self.resumed = done
        self.started = self.last_line = time.monotonic()

    def advance(self, units: int = 1, detail: str = "") -> None:
        """Report that `units` more are done."""
        self.done += units
        if self.bar:
            self.bar[0].update(self.bar[1], advance=units, detail=detail)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            print(self.line(detail), file=sys.stderr, flush=True)

    def line(self, detail: str = "") -> str:
        """The state in words."""
        elapsed, worked = time.monotonic() - self.started, self.done - self.resumed
        eta = f", {duration(elapsed / worked * (self.total - self.done))} left" if worked else ""
        share = self.done / max(1, self.total)
        return f"{self.title}: {self.done:,} of {self.total:,} ({share:.0%}){eta}  {detail}".rstrip()

    def say(self, text: str) -> None:
        """Print a line for people without tearing the bar."""
        if self.bar:
            self.bar[0].console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Progress]:
    """A progress line for the time of the block, its summary afterwards."""
    from rich import progress as rich
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        columns = (
            rich.TextColumn("{task.description}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeElapsedColumn(),
            rich.TextColumn("ETA"),
            rich.TimeRemainingColumn(elapsed_when_finished=True),
            rich.TextColumn("{task.fields[detail]}", markup=False),
        )
        with rich.Progress(*columns, console=console) as bar:
            # The resumed part is set after the start, or rich would take it for speed.
            task = bar.add_task(title, total=total, completed=done, detail="")
            yield Progress(title, total, done, (bar, task))
    else:
        line = Progress(title, total, done, None)
        yield line
        if total == 0:
            return  # everything was done before: nothing to tell
        spent = duration(time.monotonic() - line.started)
        print(f"{title}: {line.done:,} of {total:,} in {spent}", file=sys.stderr, flush=True)
