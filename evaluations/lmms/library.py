"""lmms-eval itself: whether it is there, and a task of it over documents that lie in a folder or come from the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from budgets.registry import check_name

PIP_LINES = (
    "pip install --no-deps lmms-eval==0.7.3 && pip install -r requirements/lmms-light.txt (the light way, no "
    "torchvision), or pip install visor[lmms] (all that it declares); docs/real-models.md has more"
)
MODEL_NAME = "visor"
"""What lmms-eval's task files would call us, if one of them had a prompt for us: we get the default ones."""

JUDGED = {
    "mmbench": "asks OpenAI's API about answers that it cannot parse, and guesses at random where that is not reached; "
    "use mmbench_en_dev_static, which parses them itself"
}
"""Tasks by the beginning of their names that score through a service, unless their name ends in "static"."""


def require() -> None:
    """Refuse to go on without lmms-eval.

    Raises:
        ValueError: with the line that installs it.
    """
    if find_spec("lmms_eval") is None:
        raise ValueError(f"tasks of lmms-eval need the package lmms-eval, which is not installed: {PIP_LINES}")


def installed_version() -> str:
    """ "lmms-eval 0.7.3"."""
    return f"lmms-eval {version('lmms-eval')}"


@contextmanager
def working_directory(path: Path | None) -> Iterator[None]:
    """Relative paths mean this folder for a while: it is how lmms-eval finds data sets and where it writes results."""
    before = Path.cwd()
    try:
        if path is not None:
            os.chdir(path)
        yield
    finally:
        os.chdir(before)


@lru_cache(maxsize=1)
def _tasks() -> Any:
    """lmms-eval's index of its tasks; making it takes seconds."""
    _quiet()
    from lmms_eval.tasks import TaskManager

    return TaskManager(model_name=MODEL_NAME)


def _quiet() -> None:
    """Its log, and that of its tasks, has lines for every document; what fails comes up as an error anyway."""
    from loguru import logger

    logger.disable("")


def read_config(name: str) -> dict[str, Any]:
    """What the YAML of a task says, included files and all.

    Raises:
        ValueError: no such task, or one that is no single task of generated answers, or one that needs a judge.
    """
    index = _tasks().task_index
    from lmms_eval.utils import load_yaml_config

    check_name("task of lmms-eval", name, list(index))
    for beginning, reason in JUDGED.items():
        if name.startswith(beginning) and "static" not in name:
            raise ValueError(f"lmms:{name} {reason}")
    entry = index[name]
    if entry["type"] != "task":
        listed = entry.get("task")
        if not isinstance(listed, list):  # of a group it is in its file
            listed = load_yaml_config(entry["yaml_path"], mode="simple").get("task", [])
        parts = [each for each in listed if isinstance(each, str)]
        raise ValueError(
            f"lmms:{name} is a {entry['type'].replace('_', ' ')} of lmms-eval, not a single task"
            + (f"; name its tasks: {', '.join(f'lmms:{part}' for part in parts)}" if parts else "")
        )
    config = load_yaml_config(entry["yaml_path"], mode="full")
    output = config.get("output_type", "generate_until")
    if output != "generate_until":
        raise ValueError(f"lmms:{name} scores by {output}; here answers are generated (output_type generate_until)")
    return config


def open_documents(name: str, chat: bool, data_root: Path | None) -> Any:
    """A task of lmms-eval with its documents read.

    Args:
        chat: its prompts as conversations; False: as one text behind all images.

    Raises:
        ValueError: see `read_config`; or its documents are not there or cannot be read, with the first cause.
    """
    require()
    config = read_config(name)
    from lmms_eval.api import task as api

    base = api.ConfigurableMessagesTask if chat else api.ConfigurableTask
    dataset = str(config.get("dataset_path"))
    if data_root is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) and not (data_root / dataset).is_dir():
        raise ValueError(
            f"lmms:{name}: {data_root / dataset} does not exist. `python -m evaluations.data check SUITE --data-root "
            f"{data_root}` says what is missing and how to fetch it"
        )
    with working_directory(data_root):  # relative names of data sets are then folders, also those in Python code
        try:
            return _once(base)(config=config, model_name=MODEL_NAME)
        except Exception as error:
            where = f"under {data_root}" if data_root else "on the Hub or in its cache"
            message = f"lmms:{name}: its documents ({dataset}) cannot be read {where}: {cause(error)}"
            raise ValueError(message) from error


def _once(base: type) -> type:
    """The class without the retries that hide for ten seconds and more why something failed."""
    bare = lambda function: getattr(function, "__wrapped__", function)

    class Once(base):
        def download(self, dataset_kwargs: dict[str, Any] | None = None) -> None:
            bare(base.download)(self, dataset_kwargs)

        def process_results(self, doc: Any, results: list[str], full_docs: Any = None) -> dict[str, Any]:
            return bare(base.process_results)(self, doc, results, full_docs)

    return Once


def cause(error: BaseException) -> str:
    """An error and what it came from, each once, in one line."""
    texts, seen = [], set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"
        texts += [text] * (text not in texts)
        error = error.__cause__ or error.__context__
    return "; from ".join(texts)
