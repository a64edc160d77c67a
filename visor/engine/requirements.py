"""What is installed, before anything of it is imported: too old is refused, newer than known is said once.

The bounds are the oldest and the newest releases that were run; pyproject.toml has the same, and a test holds them
together. Within them and beyond, `selfcheck` compares what the engine relies on with what is there.
"""

from __future__ import annotations

import functools
import logging
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

# package: oldest release, first one that was not run
KNOWN = {"torch": ("2.6", "2.15"), "transformers": ("5.18", "5.25")}
NEWEST = {"torch": "2.14", "transformers": "5.24"}


class Unsupported(ImportError, ValueError):
    """An installed package lacks what the engine relies on; the message says what to install."""


def known(package: str) -> str:
    """For the end of a message: the releases that are known to work, and how to get one."""
    oldest, beyond = KNOWN[package]
    return f"known to work: {oldest} to {NEWEST[package]}; pip install '{package}>={oldest},<{beyond}'"


def installed(package: str) -> str:
    """The installed release.

    Raises:
        Unsupported: there is none.
    """
    try:
        return version(package)
    except PackageNotFoundError:
        raise Unsupported(f"{package} is not installed; {known(package)}") from None


def check(package: str, release: str) -> str | None:
    """Refuse a release that is too old; a line to say about one that is newer than all that were run, or None.

    Raises:
        Unsupported: too old.
    """
    oldest, beyond = map(Version, KNOWN[package])
    # The base version: a release candidate or a CUDA build of 2.13 counts as 2.13.
    found = Version(Version(release).base_version)
    if found < oldest:
        raise Unsupported(f"{package} {release} is too old for VISOR; {known(package)}")
    return f"{package} {release} is newer than all that VISOR was run on; {known(package)}" if found >= beyond else None


@functools.cache
def check_installed() -> None:
    """Check what is installed, once a process.

    Raises:
        Unsupported: torch or transformers is missing or too old.
    """
    for package in KNOWN:
        remark = check(package, installed(package))
        if remark:
            logging.getLogger("visor").warning(remark)
