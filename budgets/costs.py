"""What a schedule costs: FLOPs by part and KV bytes, from a geometry, a schedule and the lengths. Integers, no torch.

FLOPs = 2 x MACs of every matrix product and convolution that is executed; norms, softmax, RoPE, activations and
embedding look-ups count 0, as in `torch.utils.flop_counter`. Attention is the full square that a dense kernel executes;
the causal ("useful") figure stands beside it. The tests hold these figures against the counter, FLOP for FLOP.

Per layer, with n tokens, width d, query width q, key width k and MLP width m (3 matrices in SwiGLU):

    projections 2n(2dq + 2dk)     attention 4qn^2     MLP 2n * 3dm
    CROSS adds  2t * 2dq + 2v(2dk + kernel * d)   and   4qtv   for t text queries and v visual keys
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from budgets.geometry import ModelGeometry, VisionGeometry
from budgets.registry import METHODS
from budgets.schedule import LayerMode, Schedule

# What the budget dial turns: everything that runs between the visual tokens and the language-model head.
DECODER_PARTS = ("decoder_projections", "decoder_attention", "decoder_mlp", "cross_projections", "cross_attention",
                 "scoring", "router")  # fmt: skip
PARTS = ("tower", "projector", *DECODER_PARTS, "lm_head")


@dataclass(frozen=True)
class LayerCost:
    """One decoder layer in the prefill, in FLOPs; `visual_tokens` is 0 where the layer never sees the image."""

    layer: int
    mode: str
    text_tokens: int
    visual_tokens: int
    projections: int
    attention: int
    attention_causal: int
    mlp: int
    cross_projections: int
    cross_attention: int
    scoring: int
    kv_bytes: int

    @property
    def own_tokens(self) -> int:
        """Tokens that the layer runs on: text, and in SELF layers the image."""
        return self.text_tokens + (self.visual_tokens if self.mode == LayerMode.SELF.value else 0)

    @property
    def flops(self) -> int:
        """All of the layer, with the scoring that decided its tokens; attention as the full square."""
        return (self.projections + self.attention + self.mlp + self.cross_projections + self.cross_attention
                + self.scoring)  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """The price of one sample.

    Args:
        parts: prefill FLOPs by part (`PARTS`), attention as the full square.
        attention_causal: the useful half of `parts["decoder_attention"]`.
        layers: the decoder layers of the prefill.
        decode_parts: FLOPs by part of the passes that follow the prefill, together.
        kv_bytes: cached keys and values after the prefill: every layer's own, and VISOR's cross K/V.
        kv_bytes_final: the same after the last pass.
    """

    parts: dict[str, int]
    attention_causal: int
    layers: tuple[LayerCost, ...]
    decode_parts: dict[str, int]
    kv_bytes: int
    kv_bytes_final: int

    @cached_property
    def decoder_prefill(self) -> int:
        """The dial: FLOPs of the decoder layers and of choosing their tokens; no tower, projector or head."""
        return sum(self.parts[part] for part in DECODER_PARTS)

    @property
    def decoder_prefill_causal(self) -> int:
        """The dial with attention counted causally."""
        return self.decoder_prefill - self.parts["decoder_attention"] + self.attention_causal

    @property
    def prefill(self) -> int:
        """All FLOPs from pixels to the first token."""
        return sum(self.parts.values())

    @property
    def decode(self) -> int:
        """All FLOPs of the passes after the prefill."""
        return sum(self.decode_parts.values())

    @property
    def per_layer(self) -> list[int]:
        """FLOPs of each decoder layer in the prefill; they sum to `decoder_prefill` less the router."""
        return [layer.flops for layer in self.layers]

    @property
    def visual_tokens(self) -> list[int]:
        """Visual tokens that each layer computes on (SELF) or reads (CROSS); 0 in TEXT layers."""
        return [layer.visual_tokens for layer in self.layers]

    @property
    def visual_tokens_mean(self) -> float:
        """Average of `visual_tokens` over the layers."""
        return sum(self.visual_tokens) / len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON values."""
        return {
            "parts": dict(self.parts), "attention_causal": self.attention_causal,
            "decoder_prefill": self.decoder_prefill, "decoder_prefill_causal": self.decoder_prefill_causal,
            "prefill": self.prefill, "per_layer": self.per_layer,
            "layers": [asdict(layer) for layer in self.layers], "decode_parts": dict(self.decode_parts),
            "kv_bytes": self.kv_bytes, "kv_bytes_final": self.kv_bytes_final,
            "visual_tokens_mean": self.visual_tokens_mean,
        }  # fmt: skip


def tower_flops(vision: VisionGeometry, num_patches: int) -> int:
    """FLOPs of the tower on one tile of `num_patches` patches: patch embedding, blocks, pooling head.

    Windowed blocks are priced with full windows: exact where the image's sides are multiples of the window, above the
    truth elsewhere.
    """
    width, sequence = vision.hidden_size, num_patches + vision.num_prefix_tokens
    embedding = 2 * num_patches * width * vision.num_channels * vision.num_frames * vision.patch_size**2
    matrices = 4 * width**2 + vision.num_mlp_matrices * width * vision.intermediate_size
    full_layers = vision.num_layers if vision.window_patches is None else vision.num_full_layers
    windowed = (vision.num_layers - full_layers) * min(sequence, vision.window_patches or 0)
    attention = 4 * width * sequence * (full_layers * sequence + windowed)
    head = 0
    if vision.pooling_head:  # one learned query reads all patches, then an MLP
        head = 2 * width**2 * (2 + 2 * sequence) + 4 * width * sequence + 4 * width * vision.intermediate_size
    return embedding + 2 * sequence * vision.num_layers * matrices + attention + head


def projector_flops(vision: VisionGeometry, num_tokens: int) -> int:
    """FLOPs of projecting `num_tokens` visual tokens to the decoder's width."""
    return 2 * num_tokens * sum(inputs * outputs for inputs, outputs in vision.projector)


def _vision_parts(geometry: ModelGeometry, schedule: Schedule, tiles: int | None) -> tuple[int, int]:
    vision = geometry.vision
    if vision is None or schedule.source_visual == 0:
        return 0, 0
    tiles = geometry.num_tiles(schedule.source_visual) if tiles is None else tiles
    if vision.image_size is None:  # dynamic resolution: the image is as large as its tokens say
        tokens = max(1, round(schedule.source_visual * schedule.image_scale**2))
        tower = tiles * tower_flops(vision, -(-tokens // tiles) * vision.patches_per_token)
    else:
        tokens = tiles * vision.visual_tokens(schedule.image_scale)
        tower = tiles * tower_flops(vision, vision.grid_side(schedule.image_scale) ** 2)
    # A rule that reads tower features leaves fewer tokens to project; one that reads projected features does not.
    reduction = schedule.encoder
    reduces_tower = reduction is not None and METHODS.get(reduction.method).stage in ("inside", "tower")
    if reduction is not None and METHODS.get(reduction.method).stage == "inside":
        shorter = METHODS.get(reduction.method)(**dict(reduction.params)).tower_flops(geometry, schedule)
        tower = tower if shorter is None else tiles * shorter
    if reduces_tower and not vision.projects_first:
        tokens = min(tokens, schedule.encoder.keep)
    return tower, projector_flops(vision, tokens)


def _scoring(geometry: ModelGeometry, schedule: Schedule, num_text: int) -> list[int]:
    """FLOPs of choosing tokens, by layer. A method's whole sum stands at the first layer that it reduces for."""
    scoring, seen = [0] * schedule.num_layers, set()
    for layer, reduction in [(0, schedule.encoder), *((i, op.reduce) for i, op in enumerate(schedule.layers))]:
        if reduction is None or reduction.method in seen:
            continue
        seen.add(reduction.method)
        method = METHODS.get(reduction.method)(**dict(reduction.params))
        scoring[layer] += int(method.scoring_flops(geometry, schedule, num_text))
    return scoring


def _layer(geometry: ModelGeometry, index: int, mode: LayerMode, num_text: int, live: int, scoring: int) -> LayerCost:
    width, query, key = geometry.hidden_size, geometry.query_size, geometry.kv_size
    seen = 0 if mode is LayerMode.TEXT else live
    tokens = num_text + (live if mode is LayerMode.SELF else 0)
    reads = mode is LayerMode.CROSS and live > 0
    own = tokens if geometry.window(index) is None else min(tokens, geometry.window(index) - 1)
    cached = own + (live if reads else 0)
    read = 4 * num_text * width * query + 2 * live * (2 * width * key + geometry.cross_kernel * width)
    return LayerCost(
        index, mode.value, num_text, seen,
        projections=2 * tokens * (2 * width * query + 2 * width * key),
        attention=4 * query * tokens**2,
        attention_causal=2 * query * tokens * (tokens + 1),
        mlp=2 * tokens * geometry.mlp_weights(index),
        cross_projections=reads * read,
        cross_attention=reads * 4 * query * num_text * live,
        scoring=scoring,
        kv_bytes=2 * cached * key * geometry.dtype_bytes,
    )  # fmt: skip


def price(
    geometry: ModelGeometry,
    schedule: Schedule,
    num_text: int,
    num_new_tokens: int = 0,
    tiles: int | None = None,
    routed: bool = False,
) -> Cost:
    """The cost of one sample.

    Args:
        num_text: tokens of the prompt that are not visual (template included).
        num_new_tokens: tokens to generate. The prefill yields the first, so `num_new_tokens - 1` passes follow.
        tiles: tower passes; None derives them from the number of visual tokens.
        routed: True if the model's router has chosen the schedule.

    Raises:
        ValueError: the schedule has another number of layers than the model, or changes what layers with a window see,
            or a length is negative.
    """
    if any(geometry.windows) and not schedule.is_dense_inside:
        raise ValueError(
            f"{geometry.name}: most of its decoder's layers see a window of cached tokens (sliding-window layers), "
            "which dropped tokens would widen; use a method that acts before the decoder"
        )
    if schedule.num_layers != geometry.num_layers:
        raise ValueError(f"the schedule has {schedule.num_layers} layers, {geometry.name} has {geometry.num_layers}")
    if num_text < 0 or num_new_tokens < 0 or (tiles is not None and tiles < 0):
        raise ValueError(
            f"lengths must be >= 0, got num_text={num_text}, num_new_tokens={num_new_tokens}, tiles={tiles}"
        )
    scoring = _scoring(geometry, schedule, num_text)
    layers = tuple(
        _layer(geometry, i, op.mode, num_text, live, scoring[i])
        for i, (op, live) in enumerate(zip(schedule.layers, schedule.visual_tokens, strict=True))
    )
    tower, projector = _vision_parts(geometry, schedule, tiles)
    if routed and (geometry.visor is None or not geometry.visor.router):
        raise ValueError(f"{geometry.name} has no router, so none has chosen its schedule")
    router = geometry.visor.router_flops if routed else 0
    head = 2 * geometry.hidden_size * geometry.vocab_size  # logits of the last position only
    parts = {
        "tower": tower, "projector": projector,
        "decoder_projections": sum(layer.projections for layer in layers),
        "decoder_attention": sum(layer.attention for layer in layers),
        "decoder_mlp": sum(layer.mlp for layer in layers),
        "cross_projections": sum(layer.cross_projections for layer in layers),
        "cross_attention": sum(layer.cross_attention for layer in layers),
        "scoring": sum(scoring), "router": router, "lm_head": head,
    }  # fmt: skip
    passes = max(0, num_new_tokens - 1)
    return Cost(
        parts,
        sum(layer.attention_causal for layer in layers),
        layers,
        _decode_parts(geometry, layers, passes),
        kv_bytes=sum(layer.kv_bytes for layer in layers),
        kv_bytes_final=sum(
            layer.kv_bytes + 2 * _grown(geometry, layer, passes) * geometry.kv_size * geometry.dtype_bytes
            for layer in layers
        ),
    )


def _grown(geometry: ModelGeometry, layer: LayerCost, passes: int) -> int:
    """New tokens that a layer's cache holds after `passes` passes beyond those that had to go."""
    window, own = geometry.window(layer.layer), layer.own_tokens
    return passes if window is None else min(own + passes, window - 1) - min(own, window - 1)


def _decode_parts(geometry: ModelGeometry, layers: tuple[LayerCost, ...], passes: int) -> dict[str, int]:
    """FLOPs of `passes` passes of one token each; pass s attends to the layer's cache and to s new tokens."""
    width, query, key = geometry.hidden_size, geometry.query_size, geometry.kv_size
    parts = dict.fromkeys(PARTS, 0)
    for layer in layers:
        own, window = layer.own_tokens, geometry.window(layer.layer)
        parts["decoder_projections"] += passes * 2 * (2 * width * query + 2 * width * key)
        seen = passes * own + passes * (passes + 1) // 2
        if window is not None:
            seen = sum(min(own + step, window) for step in range(1, passes + 1))
        parts["decoder_attention"] += 4 * query * seen
        parts["decoder_mlp"] += passes * 2 * geometry.mlp_weights(layer.layer)
        if layer.mode == LayerMode.CROSS.value and layer.visual_tokens:
            parts["cross_projections"] += passes * 4 * width * query
            parts["cross_attention"] += passes * 4 * query * layer.visual_tokens
    parts["lm_head"] = passes * 2 * width * geometry.vocab_size
    return parts
