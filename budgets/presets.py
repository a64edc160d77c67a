"""The geometries of known models by name, and of any `config.json`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from budgets.geometry import ModelGeometry, VisionGeometry, from_config
from budgets.registry import UnknownNameError, nearest_first

CHECKPOINTS = Path(__file__).resolve().parent.parent / "visor" / "checkpoints"


def _clip_llava(name: str, layers: int, width: int, mlp: int, heads: int, packs_tiles: bool = False) -> ModelGeometry:
    projector = ((1024, width), (width, width))
    vision = VisionGeometry(24, 1024, 4096, 16, 14, 336, projector, num_prefix_tokens=1, packs_tiles=packs_tiles,
                            feature_blocks=23)  # fmt: skip
    return ModelGeometry(name, layers, width, mlp, heads, heads, width // heads, 32064, vision)


def _onevision(
    name: str, layers: int, width: int, mlp: int, heads: int, kv_heads: int, vocabulary: int
) -> ModelGeometry:
    vision = VisionGeometry(26, 1152, 4304, 16, 14, 384, ((1152, width), (width, width)), packs_tiles=True)
    return ModelGeometry(name, layers, width, mlp, heads, kv_heads, width // heads, vocabulary, vision)


def _qwen2_5_vl(
    name: str, layers: int, width: int, mlp: int, heads: int, kv_heads: int, vocabulary: int
) -> ModelGeometry:
    vision = VisionGeometry(
        32, 1280, 3420, 16, 14, None, ((5120, 5120), (5120, width)), num_frames=2, num_mlp_matrices=3,
        patches_per_token=4, window_patches=64, num_full_layers=4,
    )  # fmt: skip
    return ModelGeometry(name, layers, width, mlp, heads, kv_heads, 128, vocabulary, vision)


def _qwen2_vl(
    name: str, layers: int, width: int, mlp: int, heads: int, kv_heads: int, vocabulary: int
) -> ModelGeometry:
    vision = VisionGeometry(32, 1280, 5120, 16, 14, None, ((5120, 5120), (5120, width)), num_frames=2,
                            patches_per_token=4)  # fmt: skip
    return ModelGeometry(name, layers, width, mlp, heads, kv_heads, 128, vocabulary, vision)


def _qwen3_vl(name: str, decoder: tuple[int, ...], tower: tuple[int, int, int]) -> ModelGeometry:
    layers, width, mlp = tower
    merger = ((width * 4, width * 4), (width * 4, decoder[1]))
    vision = VisionGeometry(layers, width, mlp, 16, 16, None, merger * 4, num_frames=2, patches_per_token=4)
    return ModelGeometry(name, *decoder, 128, 151936, vision)


def _smolvlm(name: str, decoder: tuple[int, ...], vision: VisionGeometry) -> ModelGeometry:
    return ModelGeometry(name, *decoder, replace(vision, packs_tiles=True))


def _internvl3(name: str, layers: int, width: int, mlp: int, heads: int, kv_heads: int) -> ModelGeometry:
    vision = VisionGeometry(24, 1024, 4096, 16, 14, 448, ((4096, width), (width, width)), num_prefix_tokens=1,
                            patches_per_token=4, packs_tiles=True)  # fmt: skip
    return ModelGeometry(name, layers, width, mlp, heads, kv_heads, width // heads, 151674, vision)


PRESETS: dict[str, ModelGeometry] = {
    geometry.name: geometry
    for geometry in (
        _clip_llava("llava-1.5-7b", 32, 4096, 11008, 32),
        _clip_llava("llava-1.5-13b", 40, 5120, 13824, 40),
        _clip_llava("llava-next-7b", 32, 4096, 11008, 32, packs_tiles=True),  # Vicuna; up to 5 tiles
        _onevision("llava-onevision-0.5b", 24, 896, 4864, 14, 2, 152000),
        _onevision("llava-onevision-7b", 28, 3584, 18944, 28, 4, 152128),
        _onevision("llava-onevision-72b", 80, 8192, 29568, 64, 8, 152128),
        _qwen2_vl("qwen2-vl-2b", 28, 1536, 8960, 12, 2, 151936),
        _qwen2_vl("qwen2-vl-7b", 28, 3584, 18944, 28, 4, 152064),
        _qwen2_5_vl("qwen2.5-vl-3b", 36, 2048, 11008, 16, 2, 151936),
        _qwen2_5_vl("qwen2.5-vl-7b", 28, 3584, 18944, 28, 4, 152064),
        _qwen3_vl("qwen3-vl-2b", (28, 2048, 6144, 16, 8), (24, 1024, 4096)),
        _qwen3_vl("qwen3-vl-4b", (36, 2560, 9728, 32, 8), (24, 1024, 4096)),
        _qwen3_vl("qwen3-vl-8b", (36, 4096, 12288, 32, 8), (27, 1152, 4304)),
        _internvl3("internvl3-1b", 24, 896, 4864, 14, 2),
        _internvl3("internvl3-8b", 28, 3584, 18944, 28, 4),
        _smolvlm("smolvlm-256m", (30, 576, 1536, 9, 3, 64, 49280),
                 VisionGeometry(12, 768, 3072, 12, 16, 512, ((768 * 16, 576),), patches_per_token=16)),
        _smolvlm("smolvlm-500m", (32, 960, 2560, 15, 5, 64, 49280),
                 VisionGeometry(12, 768, 3072, 12, 16, 512, ((768 * 16, 960),), patches_per_token=16)),
        _smolvlm("smolvlm-2.2b", (24, 2048, 8192, 32, 32, 64, 49155),
                 VisionGeometry(27, 1152, 4304, 16, 14, 384, ((1152 * 9, 2048),), patches_per_token=9)),
    )
}  # fmt: skip


def local_models() -> list[str]:
    """Names of the models that ship with the project (folders of visor/checkpoints)."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))


def names() -> list[str]:
    """All models that can be priced by name."""
    return [*PRESETS, *(name for name in local_models() if name not in PRESETS)]


def preset(name: str) -> ModelGeometry:
    """The geometry of a known model.

    Raises:
        UnknownNameError: no such model; the message lists those that exist, nearest first.
    """
    if name not in PRESETS:
        raise UnknownNameError(_unknown(name))
    return PRESETS[name]


def load(name_or_path: str | Path) -> ModelGeometry:
    """The geometry of a preset, of a model of visor/checkpoints by its name, of a config.json or a folder with one.

    Raises:
        UnknownNameError: neither a known name nor a path that exists.
        ValueError: the file is no config that we can price; the message names the file.
    """
    name = str(name_or_path)
    if name in PRESETS:
        return PRESETS[name]
    candidates = [Path(name)] if Path(name).exists() else []
    if not any(separator in name for separator in "/\\"):
        candidates.append(CHECKPOINTS / name)
    for path in candidates:
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(config, dict):
                raise ValueError("it holds no JSON object")
            return from_config(config, name=file.parent.name if file.name == "config.json" else file.stem)
        except ValueError as error:  # JSON errors are ValueErrors too
            raise ValueError(f"{file} is no model config that can be priced: {error}") from error
    raise UnknownNameError(_unknown(name))


def _unknown(name: str) -> str:
    known = ", ".join(nearest_first(name, names()))
    return f"unknown model {name!r}: neither a config.json nor a name; the models that exist, nearest first: {known}"
