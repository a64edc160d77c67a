"""What the engine takes for granted of transformers, compared with what is there when a model is made elastic.

A renamed argument does not always fail: layers take `**kwargs`, and a cache under another name is silently lost. So the
names are looked up in the signatures first, once for each class, and a sentence says what does not fit.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import nn

from visor.engine import compat
from visor.engine.requirements import Unsupported, installed, known

CACHE_LAYER = ("batch_repeat_interleave", "batch_select_indices", "crop", "get_mask_sizes", "get_seq_length",
               "lazy_initialization", "reorder_cache", "reset", "update")  # fmt: skip
CACHE = ("crop", "get_mask_sizes", "get_query_offset", "get_seq_length", "reset", "update")
DECODER_PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")
# In this order: a caller may give them by place.
DECODER = ("input_ids", "attention_mask", "position_ids", compat.CACHE, "inputs_embeds", "use_cache")
LAYER = ("hidden_states", "attention_mask", "position_embeddings", compat.CACHE)
INNER = (compat.CACHE, "mm_encoder_outputs")
MASK = ("config", "inputs_embeds", "attention_mask", compat.CACHE, "position_ids", "layer_idx", "and_mask_function")


def check_model(decoder: nn.Module, inner: nn.Module) -> None:
    """Refuse a model whose classes the engine would call wrongly.

    Args:
        decoder: the text decoder, before its class is changed.
        inner: what merges visual features into the prompt.

    Raises:
        Unsupported: a name or an argument is not there; the message says which, and which releases are known to work.
    """
    check_library()
    if absent := [name for name in DECODER_PARTS if not hasattr(decoder, name)]:
        raise _refusal(f"{type(decoder).__name__} has no {_listed(absent)}")
    _check_class(type(decoder), DECODER, in_order=True)
    _check_class(type(inner), INNER)
    for cls in {type(layer) for layer in decoder.layers}:
        _check_class(cls, LAYER)
    if not merges_any_number(inner):
        raise _refusal(
            f"{type(inner).__name__} merges only so many image tokens as are a multiple of its patch size (mended in "
            "5.22), not any number"
        )


def merges_any_number(inner: nn.Module) -> bool:
    """False for SmolVLM on transformers 5.20, which cuts image tokens into blocks by the wrong number.

    Found by merging one token: neither a name nor a signature shows it. Families that merge in `forward` pass.
    """
    merge = getattr(inner, "inputs_merger", None)
    if merge is None:
        return True
    ids = torch.full((1, 1), inner.config.image_token_id)
    try:
        merge(ids, torch.zeros(1, 1, 2), torch.zeros(1, 1, 2))
    except (RuntimeError, ValueError):
        return False
    return True


def check_library() -> None:
    """The same for what all models share.

    Raises:
        Unsupported: as `check_model`.
    """
    check_arguments(compat.create_causal_mask, "create_causal_mask", MASK)
    for cls, methods in ((compat.DynamicLayer, CACHE_LAYER), (compat.DynamicCache, CACHE)):
        if absent := [name for name in methods if not callable(getattr(cls, name, None))]:
            raise _refusal(f"{cls.__name__} has no {_listed(absent)}")
    output = {field.name for field in fields(compat.BaseModelOutputWithPast)}
    if absent := [name for name in ("last_hidden_state", compat.CACHE) if name not in output]:
        raise _refusal(f"BaseModelOutputWithPast has no {_listed(absent)}")


@functools.cache
def _check_class(cls: type, names: tuple[str, ...], in_order: bool = False) -> None:
    check_arguments(cls.forward, f"{cls.__name__}.forward", names, in_order)


def check_arguments(function: Callable[..., Any], title: str, names: Sequence[str], in_order: bool = False) -> None:
    """Refuse a function that does not name these arguments (`**kwargs` does not count).

    Args:
        in_order: they must also come first, in this order, behind `self`.

    Raises:
        Unsupported: with what it takes instead.
    """
    signature = inspect.signature(function).parameters.values()
    named = [p.name for p in signature if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "self"]
    if absent := [name for name in names if name not in named]:
        raise _refusal(f"{title} takes no {_listed(absent)} (but {', '.join(named)})")
    if in_order and named[: len(names)] != list(names):
        raise _refusal(f"{title} takes its arguments in another order ({', '.join(named)})")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _refusal(what: str) -> Unsupported:
    release = installed("transformers")
    return Unsupported(f"transformers {release}: {what}, which the engine needs; {known('transformers')}")
