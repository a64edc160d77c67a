"""What is installed, before anything of it is imported: too old is refused, newer than known is said once.

The bounds are the oldest and the newest releases that were run; pyproject.toml has the same, and a test holds them
together. Within them and beyond, `selfcheck` compares what the engine relies on with what is there.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.version import Version

# package: oldest release, first one that was not run
KNOWN = {"torch": ("2.6", "2.14"), "transformers": ("5.18", "5.25")}
OPTIONAL = ("torchvision", "flash_attn")  # transformers uses them where they are, and trips where they are broken
NEWEST = {"torch": "2.13", "transformers": "5.24"}


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


@functools.cache
def set_aside_broken(packages: tuple[str, ...] = OPTIONAL) -> tuple[str, ...]:
    """Make optional packages that are installed and cannot be imported count as absent, and say why, once a process.

    torchvision or flash-attn built for another torch fail while they are imported, but transformers asks only whether
    there is a folder of that name. To be called before transformers has asked.

    Returns:
        Those set aside.
    """
    broken = []
    for name in packages:
        if find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # a missing symbol, an operator that does not exist, a library that is not found
            reason = " ".join(str(error).split())
            logging.getLogger("visor").warning(f"{name} is installed but broken, and counts as absent: {reason}")
            for module in [each for each in sys.modules if each.partition(".")[0] == name]:
                del sys.modules[module]
            sys.modules[name] = None  # what Python itself takes for "not there"
            broken.append(name)
    return tuple(broken)
