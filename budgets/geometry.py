"""The numbers of a model that its cost depends on: widths, heads and layers of decoder, tower and projector.

A geometry comes from a Hugging Face config (a dict or a config object) or from the presets of known models
(`budgets.presets`), so that a price needs neither weights nor torch. Configs on the Hub leave out what equals the
default of their class; the decoders' defaults are kept here, the towers' in `budgets.towers`
(`tests/budgets/test_geometry.py` holds them against transformers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from budgets.towers import TOWER_READERS, VISION_DEFAULTS, VisionGeometry, _filled, tower_from_config

__all__ = [
    "TEXT_DEFAULTS", "VISION_DEFAULTS", "ExpertGeometry", "ModelGeometry", "VisionGeometry", "VisorGeometry",
    "from_config",
]  # fmt: skip


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
class ExpertGeometry:
    """The expert MLPs of a mixture (MoE), and the layers that have them in place of one MLP.

    Args:
        num_experts: of a layer; their weights are all there.
        num_active: that each token goes through: what is computed.
        intermediate_size: width of one expert.
        layers: with experts; all others have the model's one MLP.
    """

    num_experts: int
    num_active: int
    intermediate_size: int
    layers: tuple[int, ...]


@dataclass(frozen=True)
class ModelGeometry:
    """A decoder, the language-model head, and the tower in front of it (None for a text-only model).

    Args:
        num_mlp_matrices: 3 for SwiGLU (gate, up, down).
        cross_kernel: taps of VISOR's depth-wise convolution over the visual keys.
        dtype_bytes: bytes of one cached key or value element.
        visor: layers and configurations of a trained VISOR model; None for any other.
        trained_sides: of the token grids that an M3 model was trained on; empty for any other.
        experts: of a mixture of experts; None where every layer has one MLP.
        windows: by layer, how many tokens it sees at most (itself among them), or None; empty where none has a window.
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
    experts: ExpertGeometry | None = None
    windows: tuple[int | None, ...] = ()

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

    def mlp_weights(self, layer: int, active: bool = True) -> int:
        """Parameters of a layer's MLP matrices; of experts those that a token goes through, with the router.

        Args:
            active: False for all that must be in memory.
        """
        experts = self.experts
        if experts is None or layer not in experts.layers:
            return self.num_mlp_matrices * self.hidden_size * self.intermediate_size
        num = experts.num_active if active else experts.num_experts
        return self.hidden_size * (num * self.num_mlp_matrices * experts.intermediate_size + experts.num_experts)

    def window(self, layer: int) -> int | None:
        """How many tokens a layer sees at most; None if all."""
        return self.windows[layer] if self.windows else None

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
    "qwen2_vl_text": (80, 8192, 29568, 64, 8, None, 152064),
    "qwen3_vl_moe_text": (24, 2048, 5632, 16, 16, None, 151936),
    "glm4v_text": (40, 4096, 13696, 32, 2, None, 151552),
    "gemma3_text": (26, 2304, 9216, 8, 4, 256, 262208),
    "cohere2": (40, 8192, 22528, 64, None, 128, 256000),
}
# The text_config of a whole model without one, where it is more than a class's default.
_OUTER_TEXT_SIZES = {
    "mistral3": {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072},
}  # fmt: skip
_OUTER_TEXT = {"llava": "llama", "llava_next": "llama", "llava_onevision": "qwen2", "idefics3": "llama",
               "smolvlm": "llama", "qwen2_5_vl": "qwen2_5_vl_text", "qwen3_vl": "qwen3_vl_text",
               "internvl": "qwen2", "vipllava": "llama", "mistral3": "mistral", "qwen2_vl": "qwen2_vl_text",
               "qwen3_vl_moe": "qwen3_vl_moe_text", "glm4v": "glm4v_text", "glm46v": "glm4v_text", "ovis2": "qwen2",
               "gemma3": "gemma3_text", "aya_vision": "cohere2"}  # fmt: skip
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


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
    is_flat = family in ("qwen2_vl", "qwen2_5_vl") and "hidden_size" in config and "hidden_size" not in text
    if not text or is_flat:  # text-only models, and Qwen2-VL and Qwen2.5-VL as the Hub first had them
        text = {**_OUTER_TEXT_SIZES.get(family, {}), **config, **text}
        text["model_type"] = _OUTER_TEXT.get(family, family)
    kind = text.get("model_type") or _OUTER_TEXT.get(family)
    where = f"text_config of a {family} model" if config.get("text_config") else f"config of a {family} model"
    layers, width, mlp, heads, kv_heads, head_dim, vocabulary = _filled(
        text, _TEXT_KEYS, TEXT_DEFAULTS.get(kind), where
    )
    vision = None
    if family in TOWER_READERS:
        vision = tower_from_config(config, width)
    elif config.get("vision_config"):
        known = ", ".join(sorted(TOWER_READERS))
        raise ValueError(f"model family {family!r} has a tower that is not priced; families that are: {known}")
    dtype = str(text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype") or "")
    return ModelGeometry(
        name or family or "model", layers, width, mlp, heads, kv_heads or heads, head_dim or width // heads, vocabulary,
        vision, dtype_bytes=_DTYPE_BYTES.get(dtype.removeprefix("torch."), 2),
        trained_sides=tuple(config.get("m3_sides") or ()), experts=_experts(text, layers),
        windows=_windows(text, kind, layers),
    )  # fmt: skip


def _experts(text: Mapping[str, Any], num_layers: int) -> ExpertGeometry | None:
    """The experts of a Qwen3-MoE-type text config; None for any other."""
    if text.get("model_type") != "qwen3_vl_moe_text":
        return None
    step, plain = int(text.get("decoder_sparse_step", 1)), text.get("mlp_only_layers") or ()
    num = int(text.get("num_experts", text.get("num_local_experts", 60)))
    layers = tuple(i for i in range(num_layers) if num > 0 and i not in plain and (i + 1) % step == 0)
    width = int(text.get("moe_intermediate_size", 1408))
    return ExpertGeometry(num, int(text.get("num_experts_per_tok", 4)), width, layers)


# Decoders of which every n-th layer sees all, and the others a window: n, and the window.
_WINDOWED = {"gemma3_text": (6, 4096), "cohere2": (4, 4096)}


def _windows(text: Mapping[str, Any], kind: str | None, num_layers: int) -> tuple[int | None, ...]:
    """By layer, how many tokens it sees at most; empty where none has a window."""
    step, window = _WINDOWED.get(kind, (0, None))
    step, window = int(text.get("sliding_window_pattern") or step), text.get("sliding_window", window)
    types = text.get("layer_types") or ()
    if not types and kind in _WINDOWED:
        types = ["sliding_attention" if (i + 1) % step else "full_attention" for i in range(num_layers)]
    windows = tuple(window if each == "sliding_attention" else None for each in types)
    return windows if any(windows) else ()


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
