"""A model of a real geometry with random weights: what time and memory depend on, without a checkpoint.

Time follows shapes, not values, so a 7B model can be timed where its weights cannot be had. The classes are the real
Hugging Face ones; the visual tokens are the tower's own, of as many square tiles as their number asks for, in a row
without line ends, so that every number of visual tokens can be had exactly.

Shapes: T tiles, S side of a tile in pixels, N visual tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from budgets.geometry import ModelGeometry
from budgets.schedule import Reduction
from visor.engine.decoder import install
from visor.inference import LoadedModel
from visor.inference.loading import dtype_named
from visor.vision.features import VisionFeatures, encode_inside, run_tower
from visor.vision.prepared import PreparedSample
from visor.vision.taps import whole_image_places

RANDOM_VALUES = 1 << 20  # weights repeat a block of so many normal values: filling a large model takes seconds


def hub_config(geometry: ModelGeometry) -> Any:
    """The Hugging Face config of a geometry.

    Raises:
        ValueError: a family whose tower is not built here.
    """
    import transformers

    vision, text = geometry.vision, dict(
        vocab_size=geometry.vocab_size, hidden_size=geometry.hidden_size, intermediate_size=geometry.intermediate_size,
        num_hidden_layers=geometry.num_layers, num_attention_heads=geometry.num_heads,
        num_key_value_heads=geometry.num_kv_heads, max_position_embeddings=32768, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    plain = vision is not None and vision.image_size is not None and vision.patches_per_token == 1
    if not plain or geometry.query_size != geometry.hidden_size:
        raise ValueError(
            f"random weights are built for LLaVA and LLaVA-OneVision geometries, not for {geometry.name}; its cost and "
            "roofline are printed by `python -m budgets.cost --device`"
        )
    tower = dict(
        hidden_size=vision.hidden_size, intermediate_size=vision.intermediate_size,
        num_hidden_layers=vision.num_layers, num_attention_heads=vision.num_heads, image_size=vision.image_size,
        patch_size=vision.patch_size,
    )  # fmt: skip
    image_token = geometry.vocab_size - 1
    if vision.num_prefix_tokens:
        return transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**tower),
            text_config=transformers.LlamaConfig(**text, tie_word_embeddings=False),
            image_token_id=image_token,
            image_seq_length=vision.visual_tokens_per_tile,
        )
    side = vision.image_size
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**tower, vision_use_head=vision.pooling_head),
        text_config=transformers.Qwen2Config(**text, tie_word_embeddings=geometry.hidden_size < 2048),
        image_token_id=image_token,
        video_token_id=image_token - 1,
        image_grid_pinpoints=[[side, side]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


@torch.no_grad()
def fill(model: nn.Module, seed: int = 0) -> None:
    """Random weights of the usual size: normal matrices (0.02), norms of one, biases of zero."""
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(RANDOM_VALUES, generator=generator) * 0.02
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            weight.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        flat, values = weight.view(-1), block.to(weight.device, weight.dtype)
        for start in range(0, flat.numel(), RANDOM_VALUES):
            piece = flat[start : start + RANDOM_VALUES]
            piece.copy_(values[: piece.numel()])


def build(
    geometry: ModelGeometry, device: str, dtype: str, attention: str = "sdpa", cross_layers: Sequence[int] = ()
) -> nn.Module:
    """The model, ready to run schedules; on the device "meta" it has shapes and no values."""
    from transformers import AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    config = hub_config(geometry)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype_named(dtype))  # as from_pretrained does: fp32 first would need twice the memory
    try:
        with torch.device(device), no_init_weights():
            model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
            install(model.eval(), cross_layers)
    finally:
        torch.set_default_dtype(default)
    if device != "meta":
        fill(model)
    model.generation_config.eos_token_id = None  # a fixed number of tokens: nothing stops early
    model.generation_config.pad_token_id = 0
    return model.requires_grad_(False)


class RandomModel(LoadedModel):
    """A `LoadedModel` without a checkpoint, whose samples are made to measure."""

    def __init__(self, geometry: ModelGeometry, model: nn.Module) -> None:
        super().__init__(model, SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0)), name=geometry.name)
        self.checkpoint_sha256 = "random"

    def sample(self, num_visual: int, num_text: int, seed: int = 0) -> PreparedSample:
        """A question with an image of exactly `num_visual` tokens.

        Raises:
            ValueError: the family shows one tile an image, and the tokens are not one tile's.
        """
        vision = self.geometry.vision
        tiles = self.geometry.num_tiles(num_visual)
        if not vision.packs_tiles and num_visual != vision.visual_tokens_per_tile:
            raise ValueError(
                f"{self.geometry.name} has {vision.visual_tokens_per_tile} visual tokens an image, always; got "
                f"--visual-tokens {num_visual}"
            )
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(3, self.geometry.vocab_size - 2, (num_text,), generator=generator).tolist()
        # A system prompt before the image, the question after it.
        first, image = num_text // 4, [self.adapter.image_token_ids[0]] * num_visual
        side = vision.image_size
        pixels = torch.randn(1, vision.num_channels, side, side, generator=generator).expand(tiles, -1, -1, -1)
        ids = (*words[:first], *image, *words[first:])
        return PreparedSample(ids, num_text, num_visual, {"tiles": pixels}, f"random-{num_visual}-{seed}")

    @torch.inference_mode()
    def encode(
        self,
        prepared: Sequence[PreparedSample],
        taps: Collection[str] = (),
        image_scale: float = 1.0,
        inside: Reduction | None = None,
    ) -> list[VisionFeatures]:
        """The tower over all tiles of all samples at once, and the projector where the family packs tiles after it.

        Raises:
            ValueError: a method asks where several tiles lie in their image, or acts inside the tower on several.
        """
        if ("places" in taps or inside is not None) and max(len(s.pixel_inputs["tiles"]) for s in prepared) > 1:
            raise ValueError("this method needs the places of tiles in an image; random images of several have none")
        tiles = [sample.pixel_inputs["tiles"].to(self.model.device, self.model.dtype) for sample in prepared]
        if inside is not None:
            keys = [sample.image_key for sample in prepared]
            return encode_inside(self.adapter, tiles, keys, inside)
        features_TND, cls_T1D, tap_values = run_tower(self.adapter, torch.cat(tiles), taps, image_scale)
        if "places" in taps:
            side = self.geometry.vision.grid_side(image_scale)
            tap_values["places"] = whole_image_places(features_TND, (side, side))
        packs = self.geometry.vision.packs_tiles
        if packs:
            features_TND = self.adapter.projector(features_TND)
        counts, rows = [len(each) for each in tiles], []
        split_taps = {name: value.split(counts) for name, value in tap_values.items()}
        split_cls = None if cls_T1D is None or packs else cls_T1D.split(counts)
        for place, (sample, features) in enumerate(zip(prepared, features_TND.split(counts), strict=True)):
            number = round(sample.num_visual * image_scale**2) if image_scale != 1.0 else sample.num_visual
            row = lambda x, n=number: x.flatten(0, 1)[None, :n]
            side = round(features.shape[1] ** 0.5)
            rows.append(
                VisionFeatures(
                    row(features),
                    stage="projected" if packs else "tower",
                    taps={name: row(value[place]) for name, value in split_taps.items()},
                    grid=(side, side) if len(features) == 1 and side**2 == number else None,
                    sample_keys=(sample.image_key,),
                    cls_B1D=None if split_cls is None else split_cls[place],
                    image_scale=image_scale,
                )
            )
        return rows


def prompt_embeddings(model: nn.Module, num_visual: int, num_text: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """(embeddings [batch, P, D], visual mask [batch, P] on the host) of a prompt, for timing the decoder alone."""
    generator, length = torch.Generator().manual_seed(1), num_visual + num_text
    weight = next(model.get_decoder().layers.parameters())
    embeddings = torch.randn(batch, length, model.get_decoder().config.hidden_size, generator=generator)
    visual = torch.zeros(batch, length, dtype=torch.bool)
    visual[:, num_text // 4 : num_text // 4 + num_visual] = True
    return embeddings.to(weight.device, weight.dtype), visual
