"""What `install` puts around a model, so that its decoder knows the prompt, and no schedule is left out unnoticed.

The decoder is handed embeddings and is never told which of them are visual; the model around it is. And a forward that
was replaced before `install` would go on calling the family's own: the answer would be the dense one, without a word.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from visor.engine.compat import cache_argument
from visor.engine.streams import PromptLayout
from visor.families.base import adapter_for


def note_prompt(inner: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Before the forward: learn on the host which tokens of a prompt are visual, which the decoder is never told.

    Finds everything from the module it is called with, so that copies of a model have their own.
    """
    decoder = inner.get_decoder()
    decoder._layout, decoder._has_run = None, True
    if decoder._run is None or decoder._run.unmodified:
        return
    decoder._has_run = decoder._run.is_plain  # a plain schedule may be left to the family's own forward
    adapter, cache = adapter_for(inner), cache_argument(kwargs)
    fed = adapter.images_are_fed(kwargs)
    if cache is not None and cache.get_seq_length() > 0:
        if fed and not decoder._run.is_dense:
            raise ValueError(
                "images behind a cached prompt are not supported under a schedule: for new images in a later turn "
                "start a new conversation; for a prompt cut into chunks leave prefill_chunk_size unset"
            )
        return
    input_ids = kwargs.get("input_ids", args[0] if args else None)
    if input_ids is None:
        if fed and not decoder._run.is_dense:  # otherwise transformers would first look for them by itself
            decoder._run.layout(None, kwargs["inputs_embeds"].shape[:2], kwargs.get("attention_mask"))
        return
    input_ids = input_ids.to("cpu")
    visual = torch.isin(input_ids, torch.tensor(adapter.image_token_ids)) if fed else torch.zeros_like(input_ids)
    if fed and not visual.any() and decoder._run.visual_BP is None and not decoder._run.is_dense:
        raise ValueError(
            f"the prompt comes with pixels, but input_ids hold none of the image tokens {adapter.image_token_ids}: the "
            "schedule would find no visual token. Pass the ids that the processor made, or running(..., visual=mask)"
        )
    mask = kwargs.get("attention_mask")
    decoder._layout = PromptLayout.of(visual, mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)


def check_ran(inner: nn.Module, args: tuple, output: Any) -> None:
    """After the forward: a schedule that has not run is an error, not a dense answer."""
    decoder = inner.get_decoder()
    if not decoder._has_run:
        decoder._has_run = True
        raise ValueError(
            f"the schedule did not run: the forward of {type(decoder).__name__} was replaced by one that calls the "
            "family's own. Call visor.engine.install(model) again after whatever replaced it"
        )


def rebind_hooked_forward(decoder: nn.Module, own_forward: Any) -> None:
    """Let accelerate's hooks, where they were put on before `install`, call the elastic forward.

    accelerate keeps the forward that it found as an attribute of the module, bound to the family's own class.

    Raises:
        ValueError: the forward was replaced by something that keeps no such attribute.
    """
    if "forward" not in decoder.__dict__:
        return
    hooked = decoder.__dict__.get("_old_forward")
    if not hasattr(decoder, "_hf_hook") or getattr(hooked, "__func__", None) is not own_forward:
        raise ValueError(
            f"the forward of this {type(decoder).__name__} has been replaced on the module itself, and a schedule "
            "would not run; install first, and wrap the model after that"
        )
    decoder._old_forward = types.MethodType(type(decoder).forward, decoder)
