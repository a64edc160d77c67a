"""A checkpoint on disk: where it is, whether its weights are whole and finite, and the hash that names its content."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from budgets.registry import nearest_first

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
"""The small trained models that ship with the project, one folder each."""

CONTENT_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".model")
"""Files that can change an answer: weights, configs, tokenizer, chat template. A card (.md) cannot."""


def embedded_names() -> list[str]:
    """Names of the checkpoints that ship with the project."""
    if not CHECKPOINTS.is_dir():
        return []
    return sorted(folder.name for folder in CHECKPOINTS.iterdir() if (folder / "config.json").is_file())


def locate(name_or_path: str | Path) -> Path | None:
    """The folder of a checkpoint that is on this machine; None for a Hub id (`organisation/name`), not yet fetched.

    A folder is taken as it is, a bare name is looked up under `visor/checkpoints`. Reads no weights.

    Raises:
        ValueError: there is no such checkpoint; the message lists the embedded ones, nearest first.
    """
    text, path = str(name_or_path), Path(name_or_path).expanduser()
    for folder in (path, CHECKPOINTS / text):
        if folder.exists():
            if not (folder / "config.json").is_file():
                raise ValueError(
                    f"{folder} is no checkpoint: it has no config.json; give a folder that save_pretrained has written"
                )
            return folder.resolve()
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text):
        return None
    known = ", ".join(nearest_first(text, embedded_names())) or "none"
    raise ValueError(
        f"unknown model {text!r}; the models that ship with the project, nearest first: {known}. A local folder or "
        "the id of a model on the Hugging Face Hub (organisation/name) will do too"
    )


def resolve(name_or_path: str | Path) -> Path:
    """The local folder of a checkpoint (`locate`); a Hub id is fetched: the only case in which the network is used.

    Raises:
        ValueError: there is no such checkpoint, or it cannot be fetched.
    """
    folder = locate(name_or_path)
    if folder is not None:
        return folder
    text = str(name_or_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=[f"*{suffix}" for suffix in (*CONTENT_SUFFIXES, ".md")]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{text!r} is no local folder, and fetching it from the Hugging Face Hub failed ({type(error).__name__}: "
            f"{error}); the models that ship with the project: {', '.join(embedded_names()) or 'none'}"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises:
        ValueError: there are none, or a shard that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ValueError(f"{index} is not a readable index of weights: {error}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks weight files that its index names: {', '.join(missing)}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no .safetensors file; weights in other formats are not loaded")
    return files


def _finite_faults(path: Path) -> Iterator[str]:
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (no mapping)
                tensor = weights.get_tensor(name)
                if tensor.is_floating_point() and tensor.element_size() > 1 and not torch.isfinite(tensor).all():
                    yield name
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error}); fetch or train it again") from error


def verify_weights(folder: Path) -> None:
    """Read every tensor once.

    Raises:
        ValueError: a file is truncated or corrupt, or holds NaN or infinity; the message names the file.
    """
    for path in weight_files(folder):
        faulty = next(_finite_faults(path), None)
        if faulty is not None:
            raise ValueError(f"{path} holds NaN or infinity, first in {faulty!r}; fetch or train it again")


def content_sha256(folder: Path) -> str:
    """Hash over the names and bytes of all files that can change an answer."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in CONTENT_SUFFIXES):
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 22):
                digest.update(block)
        total.update(f"{path.name}\n{digest.hexdigest()}\n".encode())
    return total.hexdigest()


def modules_sha256(modules: Sequence[Any], more: str = "") -> str:
    """Hash over the names and values of some modules' weights, and a text."""
    import torch

    total = hashlib.sha256(more.encode())
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
            # As bytes: numpy has no bfloat16.
            total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def read_card(folder: Path) -> str | None:
    """The text of the model card, or None."""
    card = folder / "README.md"
    return card.read_text(encoding="utf-8") if card.is_file() else None
