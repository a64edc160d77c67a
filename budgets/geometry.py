"""The numbers of a model that its cost depends on: widths, heads and layers of decoder, tower and projector.

A geometry comes from a Hugging Face config (a dict or a config object) or from the presets of known models
(`budgets.presets`), so that a price needs neither weights nor torch. Configs on the Hub leave out what equals the
default of their class; the defaults are kept here (`tests/budgets/test_geometry.py` holds them against transformers).
"""

from __future__ import annotations

from collections.abc import Mapping
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
            LLaVA-OneVision, Idefics3, InternVL).
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


@dataclass(frozen=True)
class VisorGeometry:
    """What a trained VISOR model can run (`visor.model.configuration.VisorConfig`).

    Args:
        cross_layers: layers with a cross-attention block.
        slots: layers that may run on the whole sequence.
        configurations: viable subsets of the slots, cheapest first.
        default: index of the one that runs where nothing is said.
        router: (in, out) of the router's matrices; empty without a router.
    """

    cross_layers: tuple[int, ...]
    slots: tuple[int, ...]
    configurations: tuple[tuple[int, ...], ...]
    default: int
    router: tuple[tuple[int, int], ...] = ()

    @property
    def router_flops(self) -> int:
        """FLOPs of asking the router about one sample."""
        return 2 * sum(inputs * outputs for inputs, outputs in self.router)


@dataclass(frozen=True)
class ModelGeometry:
    """A decoder, the language-model head, and the tower in front of it (None for a text-only model).

    Args:
        num_mlp_matrices: 3 for SwiGLU (gate, up, down).
        cross_kernel: taps of VISOR's depth-wise convolution over the visual keys.
        dtype_bytes: bytes of one cached key or value element.
        visor: layers and configurations of a trained VISOR model; None for any other.
        trained_sides: of the token grids that an M3 model was trained on; empty for any other.
    """

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    vision: VisionGeometry | None = None
    num_mlp_matrices: int = 3
    cross_kernel: int = 7
    dtype_bytes: int = 2
    visor: VisorGeometry | None = None
    trained_sides: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.name}: num_heads={self.num_heads} is no multiple of num_kv_heads={self.num_kv_heads}"
            )

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together (values are as wide)."""
        return self.num_kv_heads * self.head_dim

    def tower_tokens(self, num_visual: int) -> int:
        """Length of the tower's own sequence for one tile of an image of `num_visual` tokens, CLS included."""
        if self.vision.image_size is None:
            return num_visual * self.vision.patches_per_token
        return self.vision.tokens_per_tile

    def num_tiles(self, num_visual: int) -> int:
        """Tower passes behind `num_visual` tokens, rounded up; anyres models that crop padding may have run more."""
        if self.vision is None or self.vision.image_size is None:
            return 1
        return max(1, -(-num_visual // self.vision.visual_tokens_per_tile))


# --- from a Hugging Face config -------------------------------------------------------------------------------------

# Defaults of the config classes: layers, width, MLP width, heads, KV heads (None: as heads), head_dim, vocabulary.
_TEXT_KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
              "head_dim", "vocab_size")  # fmt: skip
TEXT_DEFAULTS: dict[str, tuple[int | None, ...]] = {
    "llama": (32, 4096, 11008, 32, None, None, 32000),
    "mistral": (32, 4096, 14336, 32, 8, None, 32000),
    "qwen2": (32, 4096, 22016, 32, 32, None, 151936),
    "qwen3": (32, 4096, 22016, 32, 32, 128, 151936),
    "qwen2_5_vl_text": (80, 8192, 29568, 64, 8, None, 152064),
    "qwen3_vl_text": (32, 4096, 22016, 32, 32, 128, 151936),
}
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
}  # fmt: skip
_OUTER_VISION["llava_next"] = _OUTER_VISION["llava"]
_OUTER_TEXT = {"llava": "llama", "llava_next": "llama", "llava_onevision": "qwen2", "idefics3": "llama",
               "smolvlm": "llama", "qwen2_5_vl": "qwen2_5_vl_text", "qwen3_vl": "qwen3_vl_text",
               "internvl": "qwen2"}  # fmt: skip
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


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


def _vision_from_config(config: Mapping[str, Any], family: str, text_width: int) -> VisionGeometry:
    tower = dict(config.get("vision_config") or _OUTER_VISION[family])
    if family == "qwen3_vl":
        width, merge = int(tower.get("hidden_size", 1152)), int(tower.get("spatial_merge_size", 2))
        depth, merged = int(tower.get("depth", 27)), width * merge**2
        levels = [i for i in tower.get("deepstack_visual_indexes", (8, 16, 24)) if i < depth]
        merger = ((merged, merged), (merged, int(tower.get("out_hidden_size", 3584))))
        return VisionGeometry(
            depth, width, int(tower.get("intermediate_size", 4304)), int(tower.get("num_heads", 16)),
            _integer(tower.get("patch_size", 16)), None, projector=merger * (1 + len(levels)),
            num_channels=int(tower.get("in_channels", 3)), num_frames=_integer(tower.get("temporal_patch_size", 2)),
            patches_per_token=merge**2,
        )  # fmt: skip
    if family == "qwen2_5_vl":
        width, merge = int(tower.get("hidden_size", 3584)), int(tower.get("spatial_merge_size", 2))
        patch, depth = _integer(tower.get("patch_size", 14)), int(tower.get("depth", 32))
        merged = width * merge**2
        full = [i for i in tower.get("fullatt_block_indexes", (7, 15, 23, 31)) if i < depth]
        return VisionGeometry(
            depth, width, int(tower.get("intermediate_size", 3420)), int(tower.get("num_heads", 16)), patch, None,
            projector=((merged, merged), (merged, int(tower.get("out_hidden_size", 3584)))),
            num_channels=int(tower.get("in_channels", tower.get("in_chans", 3))),
            num_frames=int(tower.get("temporal_patch_size", 2)), num_mlp_matrices=3, patches_per_token=merge**2,
            window_patches=(int(tower.get("window_size", 112)) // patch // merge * merge) ** 2,
            num_full_layers=len(full),
        )  # fmt: skip
    kind = tower.get("model_type") or _OUTER_VISION[family]["model_type"]
    kind = {"idefics3": "idefics3_vision", "smolvlm": "smolvlm_vision"}.get(kind, kind)  # as old configs spell them
    if kind not in VISION_DEFAULTS:
        raise ValueError(f"vision tower {kind!r} is not priced; known towers: {', '.join(sorted(VISION_DEFAULTS))}")
    where = f"vision_config of a {family} model"
    layers, width, mlp, heads, image, patch = _filled(tower, _VISION_KEYS, VISION_DEFAULTS[kind], where)
    channels, is_clip = int(tower.get("num_channels", 3)), kind == "clip_vision_model"
    if family in ("idefics3", "smolvlm"):
        merge = int(config.get("scale_factor", 2)) ** 2
        return VisionGeometry(layers, width, mlp, heads, patch, image, ((width * merge, text_width),), channels,
                              patches_per_token=merge, packs_tiles=True)  # fmt: skip
    strategy = config.get("vision_feature_select_strategy", "full" if family == "llava_onevision" else "default")
    if family == "internvl":
        merge = round(1 / float(config.get("downsample_ratio", 0.5))) ** 2
        projector = ((width * merge, text_width), (text_width, text_width))
        if strategy != "default":
            raise ValueError(f"{where}: vision_feature_select_strategy {strategy!r} leaves the CLS in pixel shuffle")
        return VisionGeometry(layers, width, mlp, heads, patch, image, projector, channels, num_prefix_tokens=1,
                              patches_per_token=merge, packs_tiles=True)  # fmt: skip
    if strategy == "default" and not is_clip:
        raise ValueError(
            f"{where}: vision_feature_select_strategy 'default' cuts the first patch of a tower without CLS"
        )
    return VisionGeometry(
        layers, width, mlp, heads, patch, image, _mlp_projector(config, width, text_width), channels,
        num_prefix_tokens=int(is_clip), prefix_in_output=is_clip and strategy == "full",
        pooling_head=kind == "siglip_vision_model" and bool(tower.get("vision_use_head", True)),
        packs_tiles=family in ("llava_next", "llava_onevision"),
        feature_blocks=_feature_blocks(config.get("vision_feature_layer"), layers),
    )  # fmt: skip


def from_config(config: Any, name: str | None = None) -> ModelGeometry:
    """The geometry of a Hugging Face config: a dict as in `config.json`, or a config object.

    Text-only configs give a geometry without a tower.

    Raises:
        ValueError: a width is missing, or the model family has a tower that we cannot price.
    """
    config = config if isinstance(config, Mapping) else config.to_dict()
    family = config.get("model_type")
    if family == "visor":
        return _visor_from_config(config, name)
    text = dict(config.get("text_config") or {})
    if not text or (family == "qwen2_5_vl" and "hidden_size" in config and "hidden_size" not in text):
        text = {**config, **text}  # text-only models, and Qwen2.5-VL as the Hub first had it
        text["model_type"] = _OUTER_TEXT.get(family, family)
    kind = text.get("model_type") or _OUTER_TEXT.get(family)
    where = f"text_config of a {family} model" if config.get("text_config") else f"config of a {family} model"
    layers, width, mlp, heads, kv_heads, head_dim, vocabulary = _filled(
        text, _TEXT_KEYS, TEXT_DEFAULTS.get(kind), where
    )
    vision = None
    if family in _OUTER_VISION:
        vision = _vision_from_config(config, family, width)
    elif config.get("vision_config"):
        known = ", ".join(sorted(_OUTER_VISION))
        raise ValueError(f"model family {family!r} has a tower that is not priced; families that are: {known}")
    dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype") or "")
    return ModelGeometry(
        name or family or "model", layers, width, mlp, heads, kv_heads or heads, head_dim or width // heads, vocabulary,
        vision, dtype_bytes=_DTYPE_BYTES.get(dtype.removeprefix("torch."), 2),
        trained_sides=tuple(config.get("m3_sides") or ()),
    )  # fmt: skip


def _visor_from_config(config: Mapping[str, Any], name: str | None) -> ModelGeometry:
    base = from_config(config["base_config"], name or "visor")
    configurations = tuple(map(tuple, config["configurations"]))
    router, matrices = config.get("router"), ()
    if router is not None:
        hidden, inputs = router["hidden_size"], router.get("inputs", ("last", "text", "visual"))
        matrices = ((base.hidden_size * len(inputs), hidden), (hidden, len(configurations)))
    own = VisorGeometry(
        tuple(config["cross_layers"]), tuple(config["self_layers"]), configurations,
        config.get("default_configuration", -1) % len(configurations), matrices,
    )  # fmt: skip
    return replace(base, cross_kernel=config.get("cross_kernel", 7), visor=own)
