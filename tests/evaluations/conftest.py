"""Puts this folder on the import path, so that tests share `fakes`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def with_fake_tasks():
    """The tasks of `fakes` are registered while a module is tested."""
    from fakes import fake_tasks

    with fake_tasks():
        yield
