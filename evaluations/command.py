"""What the commands share: their exit statuses, and lines for people.

stdout is kept for results; the last line there is one JSON document that says where they are.
"""

from __future__ import annotations

import sys

OK, FAILURES, USAGE, INTERRUPTED = 0, 1, 2, 130


def say(text: str) -> None:
    """Print a line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)
