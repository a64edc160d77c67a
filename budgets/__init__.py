"""What a run may spend and what it costs: schedules, geometries, prices, and the registries of what can be named.

The lowest floor: everything may import it; it imports no other room, and torch nowhere. A method it knows in
annotations only (`visor.reduction.method`), and the registries find methods, families and tasks by name.
"""

from __future__ import annotations

import sys


def check_python(found: tuple) -> None:
    """Say in a sentence what an older Python would say in a traceback; all packages call this first."""
    if found[:2] < (3, 10):
        sys.exit(
            f"VISOR needs Python 3.10 or newer, and this is {found[0]}.{found[1]}: make a virtual environment with a "
            "newer one and run `pip install --editable .` in it"
        )


check_python(tuple(sys.version_info))
