"""Every name of transformers that is not its public interface, in one place, so that an upgrade breaks one file.

What differs between the versions that pyproject.toml admits is found by looking, not by comparing version numbers:
a name that has moved shows in a signature or in the fields of an output. `selfcheck` says which of these names the
engine relies on, and refuses before a forward can fail on them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from visor.engine.requirements import Unsupported, check_installed, installed, known, set_aside_broken

check_installed()  # before the imports that an old release would break in its own words

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

set_aside_broken()  # before transformers looks for them

try:
    from transformers import initialization
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import (
        BaseModelOutputWithPast,
        BaseModelOutputWithPooling,
        CausalLMOutputWithPast,
        MoeModelOutputWithPast,
    )
    from transformers.utils.generic import merge_with_config_defaults
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, capture_outputs
except ImportError as error:
    raise Unsupported(f"transformers {installed('transformers')}: {error}; {known('transformers')}") from error

__all__ = [
    "CACHE",
    "BaseModelOutputWithPast",
    "Cache",
    "CausalLMOutputWithPast",
    "DynamicCache",
    "DynamicLayer",
    "GradientCheckpointingLayer",
    "attends_to_window",
    "cache_argument",
    "cache_of",
    "capture_outputs",
    "causal_mask",
    "decoder_output",
    "deepstack_output",
    "feature_layers",
    "image_output",
    "indicated_output",
    "initialization",
    "merge_with_config_defaults",
    "one_cache",
    "pixtral_rotated",
    "register_recordable",
    "rotated_heads",
    "rotated_ones",
    "start_weights",
    "vision_rotated",
    "vision_window_index",
]


_OLD_CACHE = "past_key_values"

# What decoders, layers, mask functions, outputs and generate() call the KV cache: `past_key_values` until 5.23, `cache`
# from 5.24 on. They changed it together, and the self-check sees to it that each model's do agree.
_NAMES = {field.name for field in fields(BaseModelOutputWithPast)}
CACHE = _OLD_CACHE if _OLD_CACHE in _NAMES else "cache"


def cache_of(output: Any) -> Any:
    """The KV cache in what a model, a decoder or generate() returns."""
    return getattr(output, CACHE)


def cache_argument(arguments: Mapping[str, Any]) -> Any:
    """The KV cache among the arguments of a call that transformers has not seen yet, by its name or its former one."""
    return one_cache(arguments.get("cache"), arguments.get(_OLD_CACHE))


def one_cache(cache: Any, past_key_values: Any) -> Any:
    """The KV cache that a caller gives by its present name or by its former one.

    Raises:
        ValueError: both are given.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError(f"give the KV cache once: `{CACHE}` (transformers has renamed `{_OLD_CACHE}` to `cache`)")
    return past_key_values if cache is None else cache


def start_weights(module: nn.Module) -> bool:
    """Give a Linear or convolution that says how (`initial_std`) its first weights; False if it does not say.

    What a checkpoint has given is left alone: transformers' own functions can tell. It starts layers one by one and
    calls no block of them, so each layer must say it.
    """
    std = getattr(module, "initial_std", None)
    if std is None:
        return False
    with torch.no_grad():
        initialization.normal_(module.weight, 0.0, std) if std else initialization.zeros_(module.weight)
        if module.bias is not None:
            initialization.zeros_(module.bias)
    return True


def register_recordable(cls: type) -> None:
    """Let a class made at run time answer `output_hidden_states` and `output_attentions` as its base does.

    The registry is a dict keyed by the printed class; newer versions wrap `__setitem__` to take a model instead.
    """
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(cls), cls._can_record_outputs)


def decoder_output(decoder: nn.Module, hidden_BPD: Tensor, cache: Cache | None) -> BaseModelOutputWithPast:
    """What a decoder returns, in the form that the model around it reads: of a mixture of experts with a place for the
    router's logits."""
    recorded = getattr(decoder, "_can_record_outputs", None) or {}
    kind = MoeModelOutputWithPast if "router_logits" in recorded else BaseModelOutputWithPast
    return kind(last_hidden_state=hidden_BPD, **{CACHE: cache})


def causal_mask(
    config: Any,
    hidden_BND: Tensor,
    valid_BK: Tensor | None,
    cache: Cache | None,
    layer: int,
    positions: Tensor | None,
    segment_BN: Tensor | None = None,
) -> Any:
    """The family's own causal mask for queries at the end of a cache layer, in the form its attention kernel takes.

    Args:
        valid_BK: which of the K keys (cached ones first) are real; None if all are.
        layer: cache layer whose length sizes the mask; layers may differ.
        positions: pass position ids only where the tokens are a whole prompt. Gaps in them make transformers believe
            that several sequences are packed into one row.
        segment_BN: where several texts are packed into one row: a token sees segment 0 and its own only.
    """
    same_segment = None
    if segment_BN is not None:

        def same_segment(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (segment_BN[batch, key] == 0) | (segment_BN[batch, key] == segment_BN[batch, query])

    return create_causal_mask(
        config=config,
        inputs_embeds=hidden_BND,
        attention_mask=valid_BK,
        position_ids=positions,
        layer_idx=layer,
        and_mask_function=same_segment,
        **{CACHE: cache},
    )


def attends_to_window(decoder: nn.Module) -> bool:
    """True if any layer of a decoder attends to less than the whole sequence, however its config spells that.

    A config may name each layer's kind (`layer_types`: sliding, chunked, ...), or give one window or chunk for all
    layers (Mistral, Phi-3, Starcoder2), or one for the layers from `max_window_layers` on, behind a switch.
    """
    config = decoder.config
    kinds = getattr(config, "layer_types", None) or ()
    if any(kind != "full_attention" for kind in kinds):
        return True
    attentions = [getattr(layer, "self_attn", None) for layer in decoder.layers]
    if kinds and all(hasattr(attention, "sliding_window") for attention in attentions):
        # Layers that know their own window follow the list. Others read the config alone, whatever the list says:
        # MistralModel builds one windowed mask for all layers even where `layer_types` is all "full_attention".
        return any(attention.sliding_window is not None for attention in attentions)
    if not kinds and getattr(config, "attention_chunk_size", None) is not None:
        return True
    switch, first = getattr(config, "use_sliding_window", None), getattr(config, "max_window_layers", None)
    if getattr(config, "sliding_window", None) is None or switch is False:
        return False
    return not switch or first is None or first < len(decoder.layers)


def rotated_heads(attention: nn.Module, which: str, hidden_BND: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Queries (`which="q"`) or keys ("k") of normed hidden states, after RoPE: [B, heads, N, head_dim]."""
    heads_BNHd = getattr(attention, f"{which}_proj")(hidden_BND).unflatten(-1, (-1, attention.head_dim))
    if (norm := getattr(attention, f"{which}_norm", None)) is not None:
        heads_BNHd = norm(heads_BNHd)
    heads_BHNd = heads_BNHd.transpose(1, 2)
    # The family's own function: some rotate a part of a head, or pairs of neighbours. It takes queries and keys.
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(heads_BHNd, heads_BHNd[:, :1], *rotary)[0]


def rotated_ones(attention: nn.Module, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """An all-ones query or key at each position, after RoPE: [B, N, head_dim]."""
    cos_BNd, _ = rotary
    ones_B1Nd = cos_BNd.new_ones(*cos_BNd.shape[:2], attention.head_dim)[:, None]  # a part of a head may rotate
    return sys.modules[type(attention).__module__].apply_rotary_pos_emb(ones_B1Nd, ones_B1Nd, *rotary)[0][:, 0]


def deepstack_output(features: list[Tensor], levels: list[list[Tensor]]) -> Any:
    """The same for Qwen3-VL: `levels` by level, then by image."""
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    return BaseModelOutputWithDeepstackFeatures(pooler_output=features, deepstack_features=levels)


def vision_window_index(grid_thw: Tensor, tower: nn.Module) -> Tensor:
    """Order in which Qwen2.5-VL's tower puts the cells of images: window by window."""
    from transformers.vision_utils import get_vision_window_index

    index, _ = get_vision_window_index(grid_thw, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    return index


def vision_rotated(attention: nn.Module, q_SHd: Tensor, k_SHd: Tensor, angles: tuple[Tensor, Tensor]) -> Any:
    """Queries and keys of a Qwen-VL tower block after its RoPE, by the family's own function."""
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    return rotate(q_SHd, k_SHd, *angles)


def pixtral_rotated(attention: nn.Module, q_SHd: Tensor, k_SHd: Tensor, angles: tuple[Tensor, Tensor]) -> Any:
    """Queries and keys of a Pixtral tower block after its RoPE, by the family's own function."""
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotate(q_SHd, k_SHd, *angles)


def feature_layers(config: Any) -> int | Sequence[int] | None:
    """Which hidden states of the tower are a family's features; None where its config does not say.

    ViP-LLaVA, which reads several, called the field `vision_feature_layers` until 5.22.
    """
    return getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", None))


def image_output(features: list[Tensor]) -> BaseModelOutputWithPooling:
    """What `get_image_features` returns, made from ready features. Beam search changes it in place: make one a call."""
    return BaseModelOutputWithPooling(pooler_output=features)


def indicated_output(features: Tensor, indicators: Tensor) -> Any:
    """The same for Ovis2, with the embeddings of its visual indicators."""
    from transformers.models.ovis2.modeling_ovis2 import BaseModelOutputWithVisualIndicatorFeatures

    return BaseModelOutputWithVisualIndicatorFeatures(pooler_output=features, visual_indicator_features=indicators)
