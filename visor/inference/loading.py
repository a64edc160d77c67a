"""A checkpoint on disk becomes a Hugging Face model on a device, or a message that says what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from budgets.registry import check_name, nearest_first
from visor.inference import checkpoint

if TYPE_CHECKING:
    import torch
    from torch import nn

DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")


def available_devices() -> list[str]:
    """Names of the devices that this process can use."""
    import torch

    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return names + ["mps"] if torch.backends.mps.is_available() else names


def device_named(name: str) -> torch.device:
    """The device of this name; "cuda" is the first one.

    Raises:
        ValueError: it is not there; the message lists those that are.
    """
    import torch

    known = available_devices()
    accepted = {*known, *(["cuda"] if "cuda:0" in known else []), "cpu:0"}
    if name not in accepted:
        listed = ", ".join(nearest_first(str(name), known))
        raise ValueError(
            f"unknown device {name!r}; the devices that exist here, nearest first: {listed} (torch {torch.__version__} "
            "sees no others)"
        )
    return torch.device(name)


def dtype_named(name: str) -> torch.dtype:
    """The dtype of this name.

    Raises:
        ValueError: it is not one of `DTYPES`.
    """
    import torch

    check_name("dtype", name, DTYPES)
    return getattr(torch, name)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep the "Loading weights" bars of transformers from between a command's lines; afterwards they are as before."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_model(
    name_or_path: str | Path, device: str = "cpu", dtype: str = "float32", attention: str = "sdpa"
) -> tuple[nn.Module, Path]:
    """The model of a checkpoint (`visor.inference.checkpoint.resolve`) on the device, and the folder that it came from.

    Args:
        device: "cpu", "cuda", "cuda:N" or "mps".
        dtype: a name of `DTYPES`.
        attention: a name of `ATTENTIONS`.

    Raises:
        ValueError: no such checkpoint, device, dtype or kernel (the message lists those that exist), or weights that
            are truncated, corrupt, not finite, incomplete or of another model (the message names the file).
    """
    target, weight_dtype = device_named(device), dtype_named(dtype)
    check_name("attention", attention, ATTENTIONS)
    folder = checkpoint.resolve(name_or_path)
    checkpoint.verify_weights(folder)
    from transformers import AutoModelForImageTextToText

    try:
        with without_bars():
            model, loading = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=weight_dtype,
                attn_implementation=attention,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ValueError(
            f"{folder}: its weights are of another base model than its config.json describes (their sizes differ; "
            f"the lines above name them): put back the config.json that the weights were saved with ({error})"
        ) from error
    if loading["missing_keys"]:
        # transformers would go on with random weights in their place.
        names = ", ".join(sorted(loading["missing_keys"])[:5])
        raise ValueError(f"{folder} lacks {len(loading['missing_keys'])} weights of its model, such as {names}")
    return model.to(target), folder
