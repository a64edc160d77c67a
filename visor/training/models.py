"""Models of a stage: read with float32 weights, made a VISOR model where the stage asks for one, written whole."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visor.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn


def load_model(name_or_path: str | Path) -> tuple[nn.Module, Any]:
    """A model with float32 weights, on the CPU, and its processor.

    Raises:
        ValueError: there is no such model.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import visor.model.configuration  # noqa: F401  registers VISOR models with the Auto classes
    from visor.inference import checkpoint
    from visor.inference.loading import without_bars

    folder = checkpoint.resolve(name_or_path)
    with without_bars():
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
        )
    return model, AutoProcessor.from_pretrained(folder, local_files_only=True)


def save_model(model: nn.Module, processor: Any, folder: Path) -> None:
    """Write a model folder whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def as_visor(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model itself if it is a VISOR model, else one made of it as the recipe says.

    Raises:
        ValueError: a base, but a stage that goes on from a VISOR model.
    """
    import torch

    from visor.model.conversion import convert

    if model.config.model_type == "visor":
        return model
    if recipe.stage not in ("blocks", "everything"):
        raise ValueError(f"the stage {recipe.stage!r} needs a VISOR model; run the stage 'blocks' on this base first")
    how = recipe.conversion
    torch.manual_seed(recipe.seed)
    layers = {name: getattr(how, name) and list(getattr(how, name)) for name in ("cross_layers", "self_layers")}
    model = convert(model, **layers, cross_kernel=how.cross_kernel, visual_source=how.visual_source)
    start_blocks(model, how.blocks)
    return model


def note_base(model: nn.Module, recipe: Recipe) -> None:
    """Write into the config of a VISOR model that the base's own weights are trained on, and whose they were."""
    config = model.config
    if config.model_type == "visor" and config.trained_from is None and set(recipe.train) - {"cross"}:
        config.trained_from = Path(config.base_config._name_or_path).name or "an unnamed base"


def start_blocks(model: nn.Module, how: str) -> None:
    """Give the new cross-attention blocks weights to start from; see `Conversion.blocks`."""
    import torch

    decoder = model.get_decoder()
    with torch.no_grad():
        for layer, block in decoder.cross_blocks.items():
            if how == "copy":
                own = decoder.layers[int(layer)]
                for name in ("q_proj", "k_proj", "v_proj"):
                    getattr(block, name).weight.copy_(getattr(own.self_attn, name).weight)
                for norm in (block.text_norm, block.visual_norm):
                    norm.weight.copy_(own.input_layernorm.weight)
                block.position_conv.weight.normal_(0, 0.1 * block.position_conv.weight[0].numel() ** -0.5)
            elif how == "fan_in":
                for module in (block.q_proj, block.k_proj, block.v_proj, block.position_conv):
                    module.weight.normal_(0, module.weight[0].numel() ** -0.5)
