"""Vision towers and what stands between them and the decoder: their sizes, and how a Hugging Face config says them.

One function a kind of tower, by the family's `model_type` (`TOWER_READERS`); a new family adds its own. Configs on the
Hub leave out what equals the default of their class; the defaults are kept here (`tests/budgets/test_geometry.py` holds
them against transformers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class VisionGeometry:
    """A vision tower and its projector.

    Args:
        num_layers: blocks that run. Hugging Face also runs those behind the feature layer (LLaVA-1.5 reads block 23 of
            24), so they are counted: the figure is what is executed.
        image_size: side of a tile in pixels, or None for towers of dynamic resolution (one tile = one image).
        projector: matrices (in, out) applied to every visual token; the Qwen-VL mergers count as projector, those of
            DeepStack's levels too.
        num_prefix_tokens: tokens before the patches (CLS).
        prefix_in_output: True if those tokens become visual tokens too (select strategy "full").
        patches_per_token: patches merged into one visual token (pixel shuffle, spatial merge); a square number.
        num_frames: temporal depth of the patch embedding (Qwen-VL doubles a still image).
        window_patches: patches in an attention window; None if every block sees everything.
        num_full_layers: blocks that see everything where the others are windowed.
        pooling_head: SigLIP's attention pooling head runs (its result is not used by the decoder).
        feature_blocks: blocks that lead to the features; None if all do. Methods inside the tower run only those.
        packs_tiles: an image may be several tiles, whose projected tokens stand in one row (LLaVA-NeXT,
            LLaVA-OneVision, Idefics3, InternVL), or its rows stand apart in the prompt (Pixtral).
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    image_size: int | None
    projector: tuple[tuple[int, int], ...]
    num_channels: int = 3
    num_frames: int = 1
    num_mlp_matrices: int = 2
    num_prefix_tokens: int = 0
    prefix_in_output: bool = False
    patches_per_token: int = 1
    window_patches: int | None = None
    num_full_layers: int = 0
    pooling_head: bool = False
    packs_tiles: bool = False
    feature_blocks: int | None = None

    @property
    def projects_first(self) -> bool:
        """True if methods find projected features only, so that the projector sees every token whatever they drop:
        tiles are projected before they are packed, and patches are merged by the projector itself."""
        return self.packs_tiles or self.patches_per_token > 1

    def grid_side(self, image_scale: float = 1.0) -> int:
        """Patches along the side of a tile whose image is scaled by `image_scale`.

        Raises:
            ValueError: the tower has no fixed tile, or the scaled image is smaller than one visual token.
        """
        if self.image_size is None:
            raise ValueError("a tower of dynamic resolution has no fixed grid; give the number of visual tokens")
        side = max(1, round(self.image_size // self.patch_size * image_scale))
        if side * side < self.patches_per_token:
            raise ValueError(f"image_scale={image_scale} leaves no visual token of a {self.image_size} px tile")
        return side

    def visual_tokens(self, image_scale: float = 1.0) -> int:
        """Visual tokens that one tile yields for the decoder."""
        merge = round(self.patches_per_token**0.5)
        prefix = self.num_prefix_tokens if self.prefix_in_output else 0
        return (self.grid_side(image_scale) // merge) ** 2 + prefix

    @property
    def tokens_per_tile(self) -> int:
        """Length of the tower's own sequence for one tile, CLS included."""
        return self.grid_side() ** 2 + self.num_prefix_tokens

    @property
    def visual_tokens_per_tile(self) -> int:
        """Visual tokens that one untouched tile yields for the decoder."""
        return self.visual_tokens()


# Layers, width, MLP width, heads, image side, patch side.
_VISION_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
VISION_DEFAULTS: dict[str, tuple[int, ...]] = {
    "clip_vision_model": (12, 768, 3072, 12, 224, 32),
    "siglip_vision_model": (12, 768, 3072, 12, 224, 16),
    "idefics3_vision": (12, 1152, 3072, 16, 224, 32),
    "smolvlm_vision": (12, 1152, 3072, 16, 224, 32),
    "internvl_vision": (24, 1024, 4096, 16, 448, 14),
    "ovis2_vision": (24, 1024, 2816, 8, 224, 14),
    "pixtral": (24, 1024, 4096, 16, 1024, 16),
}
# What the outer config class takes when it holds no vision_config at all.
_OUTER_VISION: dict[str, dict[str, Any]] = {
    "llava": {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
              "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14},
    "llava_onevision": {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
                        "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
                        "vision_use_head": False},
    "idefics3": {"model_type": "idefics3_vision"},
    "smolvlm": {"model_type": "smolvlm_vision"},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl_vision"},
    "qwen3_vl": {"model_type": "qwen3_vl_vision"},
    "internvl": {"model_type": "internvl_vision"},
    "mistral3": {"model_type": "pixtral", "image_size": 1540, "patch_size": 14},
    "qwen2_vl": {"model_type": "qwen2_vl_vision"},
    "glm4v": {"model_type": "glm4v_vision"},
    "ovis2": {"model_type": "ovis2_vision"},
    "gemma3": {"model_type": "siglip_vision_model"},
    "aya_vision": {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
                   "num_hidden_layers": 26, "num_attention_heads": 14, "image_size": 384, "patch_size": 14,
                   "vision_use_head": False},
}  # fmt: skip
_OUTER_VISION["llava_next"] = _OUTER_VISION["vipllava"] = _OUTER_VISION["llava"]
_OUTER_VISION["qwen3_vl_moe"], _OUTER_VISION["glm46v"] = _OUTER_VISION["qwen3_vl"], _OUTER_VISION["glm4v"]


def _integer(value: Any) -> int:
    """Configs write square sizes as 14 or [14, 14]."""
    if isinstance(value, (list, tuple)):
        if len(set(value)) != 1:
            raise ValueError(f"only square images and patches are priced, got {list(value)}")
        value = value[0]
    return int(value)


def _filled(config: Mapping[str, Any], keys: tuple[str, ...], defaults: tuple[int | None, ...] | None, where: str):
    values = []
    for i, key in enumerate(keys):
        value = config.get(key)
        value = (defaults[i] if defaults else None) if value is None else _integer(value)
        if value is None and key not in ("num_key_value_heads", "head_dim"):
            raise ValueError(f"{where} has no {key!r} and its model_type {config.get('model_type')!r} no known default")
        values.append(value)
    return values


def _mlp_projector(config: Mapping[str, Any], width: int, text_width: int) -> tuple[tuple[int, int], ...]:
    layers = config.get("vision_feature_layer", -2)
    num_layers = len(layers) if isinstance(layers, (list, tuple)) else 1
    return ((width * num_layers, text_width), (text_width, text_width))


def _feature_blocks(layer: Any, num_layers: int) -> int | None:
    """Blocks before the hidden states that the projector reads (-1: all; None, or several: all)."""
    layer = -2 if layer is None else layer
    if not isinstance(layer, int) or layer == -1:
        return None
    return layer if layer >= 0 else num_layers + 1 + layer


def _reads_patches(tower: Mapping[str, Any]) -> dict[str, int]:
    """What the Qwen-VL towers and their kin say alike of patches: a still image doubled in time."""
    return {
        "num_channels": int(tower.get("in_channels", tower.get("in_chans", 3))),
        "num_frames": _integer(tower.get("temporal_patch_size", 2)),
        "patches_per_token": int(tower.get("spatial_merge_size", 2)) ** 2,
    }


def _qwen2_vl(config: Mapping[str, Any], tower: Mapping[str, Any], text_width: int) -> VisionGeometry:
    width, patches = int(tower.get("embed_dim", 1280)), _reads_patches(tower)
    merged = width * patches["patches_per_token"]
    # `hidden_size` is the decoder's here, as the merger writes it.
    merger = ((merged, merged), (merged, int(tower.get("hidden_size", 3584))))
    return VisionGeometry(
        int(tower.get("depth", 32)), width, int(width * tower.get("mlp_ratio", 4)), int(tower.get("num_heads", 16)),
        _integer(tower.get("patch_size", 14)), None, merger, **patches,
    )  # fmt: skip


def _qwen2_5_vl(config: Mapping[str, Any], tower: Mapping[str, Any], text_width: int) -> VisionGeometry:
    width, merge = int(tower.get("hidden_size", 3584)), int(tower.get("spatial_merge_size", 2))
    patch, depth = _integer(tower.get("patch_size", 14)), int(tower.get("depth", 32))
    merged = width * merge**2
    full = [i for i in tower.get("fullatt_block_indexes", (7, 15, 23, 31)) if i < depth]
    return VisionGeometry(
        depth, width, int(tower.get("intermediate_size", 3420)), int(tower.get("num_heads", 16)), patch, None,
        projector=((merged, merged), (merged, int(tower.get("out_hidden_size", 3584)))), num_mlp_matrices=3,
        window_patches=(int(tower.get("window_size", 112)) // patch // merge * merge) ** 2, num_full_layers=len(full),
        **_reads_patches(tower),
    )  # fmt: skip


def _qwen3_vl(config: Mapping[str, Any], tower: Mapping[str, Any], text_width: int) -> VisionGeometry:
    width, merge = int(tower.get("hidden_size", 1152)), int(tower.get("spatial_merge_size", 2))
    depth, merged = int(tower.get("depth", 27)), width * merge**2
    levels = [i for i in tower.get("deepstack_visual_indexes", (8, 16, 24)) if i < depth]
    merger = ((merged, merged), (merged, int(tower.get("out_hidden_size", 3584))))
    return VisionGeometry(
        depth, width, int(tower.get("intermediate_size", 4304)), int(tower.get("num_heads", 16)),
        _integer(tower.get("patch_size", 16)), None, projector=merger * (1 + len(levels)), **_reads_patches(tower),
    )  # fmt: skip


def _glm4v(config: Mapping[str, Any], tower: Mapping[str, Any], text_width: int) -> VisionGeometry:
    """A convolution merges 2 x 2 patches, then a matrix and a gated MLP as wide as the config says (the blocks' own
    MLPs are as wide as their output)."""
    width, out = int(tower.get("hidden_size", 1536)), int(tower.get("out_hidden_size", 4096))
    patches, inner = _reads_patches(tower), int(tower.get("intermediate_size", 13696))
    merger = ((width * patches["patches_per_token"], out), (out, out), (out, inner), (out, inner), (inner, out))
    return VisionGeometry(
        int(tower.get("depth", 24)), width, out, int(tower.get("num_heads", 12)), _integer(tower.get("patch_size", 14)),
        None, merger, num_mlp_matrices=3, **patches,
    )  # fmt: skip


def _pixtral(config: Mapping[str, Any], tower: Mapping[str, Any], text_width: int) -> VisionGeometry:
    """Every image at its own size, up to the config's longest side. Mistral 3 merges patches by a matrix; LLaVA's form
    of Pixtral does not."""
    layers, width, mlp, heads, _, patch = _filled(
        tower, _VISION_KEYS, VISION_DEFAULTS["pixtral"], "vision_config of Pixtral"
    )
    projector, merge = _mlp_projector(config, width, text_width), 1
    if config.get("model_type") == "mistral3":
        merge = int(config.get("spatial_merge_size", 2)) ** 2
        projector = ((width * merge, width), *projector)
    return VisionGeometry(
        layers, width, mlp, heads, patch, None, projector, int(tower.get("num_channels", 3)), num_mlp_matrices=3,
        patches_per_token=merge, packs_tiles=True,
    )  # fmt: skip


def _fixed(config: Mapping[str, Any], tower: Mapping[str, Any], kind: str) -> VisionGeometry:
    """The tower alone, where tiles have a fixed size."""
    if kind not in VISION_DEFAULTS or kind == "pixtral":
        known = ", ".join(sorted(VISION_DEFAULTS))
        raise ValueError(f"vision tower {kind!r} is not priced in a {config.get('model_type')} model; known: {known}")
    where = f"vision_config of a {config.get('model_type')} model"
    layers, width, mlp, heads, image, patch = _filled(tower, _VISION_KEYS, VISION_DEFAULTS[kind], where)
    return VisionGeometry(
        layers, width, mlp, heads, patch, image, (), int(tower.get("num_channels", 3)),
        pooling_head=kind == "siglip_vision_model" and bool(tower.get("vision_use_head", True)),
    )  # fmt: skip


def _pixel_shuffle(config: Mapping[str, Any], tower: Mapping[str, Any], text_width: int) -> VisionGeometry:
    """Idefics3, SmolVLM, InternVL, Aya Vision: tiles, and neighbouring patches laid side by side."""
    family = config["model_type"]
    if family in ("idefics3", "smolvlm"):
        own = _fixed(config, tower, {"idefics3": "idefics3_vision", "smolvlm": "smolvlm_vision"}.get(
            tower["model_type"], tower["model_type"]))  # fmt: skip (old configs spell them without the ending)
        merge = int(config.get("scale_factor", 2)) ** 2
        return replace(own, projector=((own.hidden_size * merge, text_width),), patches_per_token=merge,
                       packs_tiles=True)  # fmt: skip
    own = _fixed(config, tower, tower["model_type"])
    if family == "aya_vision":
        merge = int(config.get("downsample_factor", 2)) ** 2
        inner = int(config.get("alignment_intermediate_size", text_width))
        projector = ((own.hidden_size * merge, inner), (inner // 2, text_width))  # gated: half goes on
        return replace(own, projector=projector, patches_per_token=merge, packs_tiles=True)
    strategy = config.get("vision_feature_select_strategy", "default")
    if strategy != "default":
        raise ValueError(
            f"vision_config of a {family} model: vision_feature_select_strategy {strategy!r} leaves the CLS in pixel "
            "shuffle"
        )
    merge = round(1 / float(config.get("downsample_ratio", 0.5))) ** 2
    projector = ((own.hidden_size * merge, text_width), (text_width, text_width))
    return replace(own, projector=projector, num_prefix_tokens=1, patches_per_token=merge, packs_tiles=True)


def _ovis2(config: Mapping[str, Any], tower: Mapping[str, Any], text_width: int) -> VisionGeometry:
    """A patch becomes a distribution over visual words, and that a mean of their embeddings."""
    own, words = _fixed(config, tower, "ovis2_vision"), int(tower.get("vocab_size", 16384))
    merge = int(tower.get("hidden_stride", 1)) ** 2
    head = (own.hidden_size * merge, words - int(tower.get("num_visual_indicator_tokens", 5)))
    return replace(own, projector=(head, (words, text_width)), num_mlp_matrices=3, patches_per_token=merge,
                   packs_tiles=True)  # fmt: skip


def _gemma3(config: Mapping[str, Any], tower: Mapping[str, Any], text_width: int) -> VisionGeometry:
    """Windows of patches are averaged down to a fixed number of tokens, then one matrix."""
    own = _fixed(config, tower, tower["model_type"])
    window = own.grid_side() // round(int(config.get("mm_tokens_per_image", 256)) ** 0.5)
    return replace(own, projector=((own.hidden_size, text_width),), patches_per_token=window**2)


def _llava(config: Mapping[str, Any], tower: Mapping[str, Any], text_width: int) -> VisionGeometry:
    """The LLaVA family: CLIP or SigLIP, two matrices."""
    family, kind = config["model_type"], tower["model_type"]
    if kind == "pixtral" and family == "llava":
        return _pixtral(config, tower, text_width)
    own, is_clip = _fixed(config, tower, kind), kind == "clip_vision_model"
    strategy = config.get("vision_feature_select_strategy", "full" if family == "llava_onevision" else "default")
    if family == "vipllava":  # several layers, and always without the first token
        layers = config.get("vision_feature_layers", (-2, -5, -8, -11, 6))  # what transformers 5.18 to 5.22 called it
        config, strategy = {"vision_feature_layer": layers, **config}, "default"
    if strategy == "default" and not is_clip:
        raise ValueError(
            f"vision_config of a {family} model: vision_feature_select_strategy 'default' cuts the first patch of a "
            "tower without CLS"
        )
    return replace(
        own, projector=_mlp_projector(config, own.hidden_size, text_width),
        num_prefix_tokens=int(is_clip), prefix_in_output=is_clip and strategy == "full",
        packs_tiles=family in ("llava_next", "llava_onevision"),
        feature_blocks=_feature_blocks(config.get("vision_feature_layer"), own.num_layers),
    )  # fmt: skip


TowerReader = Callable[[Mapping[str, Any], Mapping[str, Any], int], VisionGeometry]
TOWER_READERS: dict[str, TowerReader] = {
    "llava": _llava, "vipllava": _llava, "llava_next": _llava, "llava_onevision": _llava, "mistral3": _pixtral,
    "idefics3": _pixel_shuffle, "smolvlm": _pixel_shuffle, "internvl": _pixel_shuffle, "aya_vision": _pixel_shuffle,
    "qwen2_vl": _qwen2_vl, "qwen2_5_vl": _qwen2_5_vl, "qwen3_vl": _qwen3_vl, "qwen3_vl_moe": _qwen3_vl,
    "glm4v": _glm4v, "glm46v": _glm4v, "ovis2": _ovis2, "gemma3": _gemma3,
}  # fmt: skip
"""By the `model_type` of the whole model: the tower of (config, its vision_config, the decoder's width)."""


def tower_from_config(config: Mapping[str, Any], text_width: int) -> VisionGeometry:
    """The tower of a config whose `model_type` is one of `TOWER_READERS`.

    Raises:
        ValueError: a width is missing, or the tower is none that can be priced.
    """
    family = config["model_type"]
    outer = _OUTER_VISION[family]
    tower = dict(config.get("vision_config") or outer)
    tower["model_type"] = tower.get("model_type") or outer["model_type"]
    return TOWER_READERS[family](config, tower, text_width)
