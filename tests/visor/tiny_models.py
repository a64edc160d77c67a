"""Tiny random models of the real Hugging Face classes, and left-padded batches for them.

Tests say `from tiny_models import ...`: conftest.py puts this folder on the path.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from visor.engine.selfcheck import merges_any_number

VOCABULARY, IMAGE_TOKEN, VIDEO_TOKEN, PAD = 300, 290, 291, 0
INDICATORS = [294, 295, 296, 297, 298]  # Ovis2's, which stand between the tiles of an image
FAMILIES = ("llava", "llava_onevision")  # the engine's tests; all families stand in test_families*.py
CLASSES = {
    "llava_next": "LlavaNext", "qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VLMoe", "glm4v": "Glm4v", "glm46v": "Glm46V", "smolvlm": "SmolVLM", "idefics3": "Idefics3",
    "internvl": "InternVL", "vipllava": "VipLlava", "pixtral": "Llava", "mistral3": "Mistral3", "ovis2": "Ovis2",
}  # fmt: skip
WINDOWED_CLASSES = {"gemma3": "Gemma3", "aya_vision": "AyaVision"}
"""Families whose decoder layers see a window: schedules stop before the decoder."""


def _present(classes: dict[str, str]) -> tuple[str, ...]:
    """Those that this version of transformers has."""
    return tuple(name for name, cls in classes.items() if hasattr(transformers, f"{cls}ForConditionalGeneration"))


NEW_FAMILIES, WINDOWED_FAMILIES = _present(CLASSES), _present(WINDOWED_CLASSES)
ALL_FAMILIES = (*FAMILIES, *NEW_FAMILIES)
QWEN_LIKE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v")
NUM_LAYERS = 6


def _text_config(cls: type, num_kv_heads: int, num_layers: int) -> Any:
    return cls(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=num_kv_heads, max_position_embeddings=2048,
        tie_word_embeddings=False, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def _llava(num_layers: int) -> tuple[type, Any]:
    tower = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=_text_config(transformers.LlamaConfig, 4, num_layers),
        image_token_id=IMAGE_TOKEN, image_seq_length=16,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration, config


def _llava_onevision(num_layers: int) -> tuple[type, Any]:
    tower = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14,
        vision_use_head=False,
    )  # fmt: skip
    config = transformers.LlavaOnevisionConfig(
        vision_config=tower, text_config=_text_config(transformers.Qwen2Config, 2, num_layers),
        image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN, image_grid_pinpoints=[[56, 56], [56, 112], [112, 112]],
        vision_feature_layer=-1, vision_feature_select_strategy="full",
    )  # fmt: skip
    return transformers.LlavaOnevisionForConditionalGeneration, config


def _llava_next(num_layers: int) -> tuple[type, Any]:
    tower = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    config = transformers.LlavaNextConfig(
        vision_config=tower, text_config=_text_config(transformers.LlamaConfig, 4, num_layers),
        image_token_id=IMAGE_TOKEN, image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]], image_seq_length=16,
    )  # fmt: skip
    return transformers.LlavaNextForConditionalGeneration, config


def _qwen_vl(num_layers: int, family: str) -> tuple[type, Any]:
    text = dict(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    )  # fmt: skip
    tower = dict(depth=3, hidden_size=32, intermediate_size=64, num_heads=4, out_hidden_size=64)
    tokens = dict(image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN, tie_word_embeddings=False)
    if family.startswith("glm"):
        text["rope_parameters"] |= {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
        tower |= dict(patch_size=14, image_size=112)
        tokens |= dict(image_start_token_id=292, image_end_token_id=293)
        if family == "glm46v":
            text, tower = {"model_type": "glm4v_text", **text}, {"model_type": "glm4v_vision", **tower}
    else:
        tokens |= dict(vision_start_token_id=292, vision_end_token_id=293)
    if family == "qwen2_vl":
        tower = dict(depth=3, embed_dim=32, hidden_size=64, mlp_ratio=2, num_heads=4, patch_size=14)
    elif family == "qwen2_5_vl":
        tower |= dict(patch_size=14, window_size=56, fullatt_block_indexes=[1])
    elif family.startswith("qwen3"):
        text["head_dim"] = 16
        tower |= dict(patch_size=16, deepstack_visual_indexes=[0, 1], num_position_embeddings=64)
    if family == "qwen3_vl_moe":  # experts in all layers but the first
        text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, mlp_only_layers=[0])
    config = getattr(transformers, f"{CLASSES[family]}Config")(text_config=text, vision_config=tower, **tokens)
    return getattr(transformers, f"{CLASSES[family]}ForConditionalGeneration"), config


def _idefics3(num_layers: int, prefix: str) -> tuple[type, Any]:
    named = lambda suffix: getattr(transformers, prefix + suffix)
    tower = named("VisionConfig")(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14
    )
    config = named("Config")(
        vision_config=tower, text_config=_text_config(transformers.LlamaConfig, 2, num_layers),
        image_token_id=IMAGE_TOKEN, scale_factor=2, tie_word_embeddings=False, pad_token_id=PAD,
    )  # fmt: skip
    return named("ForConditionalGeneration"), config


def _internvl(num_layers: int) -> tuple[type, Any]:
    tower = transformers.InternVLVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=[56, 56],
        patch_size=[14, 14], use_qk_norm=True, layer_scale_init_value=1.0,
    )  # fmt: skip
    config = transformers.InternVLConfig(
        vision_config=tower, text_config=_text_config(transformers.Qwen2Config, 2, num_layers),
        image_token_id=IMAGE_TOKEN, image_seq_length=4, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.InternVLForConditionalGeneration, config


def _vipllava(num_layers: int) -> tuple[type, Any]:
    tower = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    field = "vision_feature_layer"
    field += "" if hasattr(transformers.VipLlavaConfig, field) else "s"  # until 5.22
    config = transformers.VipLlavaConfig(
        vision_config=tower, text_config=_text_config(transformers.LlamaConfig, 4, num_layers),
        image_token_id=IMAGE_TOKEN, image_seq_length=16, **{field: [-2, 1]},
    )  # fmt: skip
    return transformers.VipLlavaForConditionalGeneration, config


def _pixtral(num_layers: int, family: str) -> tuple[type, Any]:
    tower = transformers.PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=112, patch_size=14
    )
    text = _text_config(transformers.MistralConfig, 2, num_layers)
    text.sliding_window = None
    options = dict(vision_config=tower, text_config=text, image_token_id=IMAGE_TOKEN, vision_feature_layer=-1,
                   tie_word_embeddings=False)  # fmt: skip
    if family == "mistral3":
        return transformers.Mistral3ForConditionalGeneration, transformers.Mistral3Config(**options)
    config = transformers.LlavaConfig(**options, vision_feature_select_strategy="full")
    return transformers.LlavaForConditionalGeneration, config


def _ovis2(num_layers: int) -> tuple[type, Any]:
    tower = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14,
        vocab_size=40, hidden_stride=2, num_visual_indicator_tokens=5,
    )  # fmt: skip
    config = transformers.Ovis2Config(
        vision_config=tower, text_config=_text_config(transformers.Qwen2Config, 2, num_layers), hidden_size=64,
        vocab_size=VOCABULARY, image_token_id=IMAGE_TOKEN, visual_indicator_token_ids=INDICATORS,
        tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.Ovis2ForConditionalGeneration, config


def _windowed(num_layers: int, family: str) -> tuple[type, Any]:
    """Every other layer sees 8 tokens."""
    tower = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, patch_size=14,
        image_size=112 if family == "gemma3" else 56, vision_use_head=False,
    )  # fmt: skip
    kind = transformers.Gemma3TextConfig if family == "gemma3" else transformers.Cohere2Config
    text = _text_config(kind, 2, num_layers)
    text.sliding_window, text.head_dim = 8, 16
    text.layer_types = ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(num_layers)]
    options = dict(vision_config=tower, text_config=text, image_token_id=IMAGE_TOKEN, tie_word_embeddings=False)
    if family == "gemma3":
        options |= dict(mm_tokens_per_image=16, boi_token_id=292, eoi_token_id=293)
    cls = WINDOWED_CLASSES[family]
    config = getattr(transformers, f"{cls}Config")(**options)
    return getattr(transformers, f"{cls}ForConditionalGeneration"), config


CONFIGS = {
    "llava": _llava,
    "llava_onevision": _llava_onevision,
    "llava_next": _llava_next,
    "vipllava": _vipllava,
    **{family: functools.partial(_qwen_vl, family=family) for family in QWEN_LIKE},
    "smolvlm": lambda layers: _idefics3(layers, "SmolVLM"),
    "idefics3": lambda layers: _idefics3(layers, "Idefics3"),
    "internvl": _internvl,
    "pixtral": lambda layers: _pixtral(layers, "pixtral"),
    "mistral3": lambda layers: _pixtral(layers, "mistral3"),
    "ovis2": _ovis2,
    "gemma3": lambda layers: _windowed(layers, "gemma3"),
    "aya_vision": lambda layers: _windowed(layers, "aya_vision"),
}


def family_of(model: nn.Module) -> str:
    """The name of a tiny model here: its `model_type`, but for Pixtral, which LLaVA's class runs."""
    is_pixtral = model.config.model_type == "llava" and model.config.vision_config.model_type == "pixtral"
    return "pixtral" if is_pixtral else model.config.model_type


def make_model(family: str, attention: str = "sdpa", num_layers: int = NUM_LAYERS, seed: int = 0) -> nn.Module:
    """A tiny model whose weights are large enough that attention is far from uniform and logits matter."""
    cls, config = CONFIGS[family](num_layers)
    torch.manual_seed(seed)
    model = cls._from_config(config, attn_implementation=attention).eval()
    if not merges_any_number(model.model):
        pytest.skip(f"{family} of this transformers merges image tokens only in multiples of its patch size")
    model.generation_config.eos_token_id = None  # never stop early
    model.generation_config.pad_token_id = PAD
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2 and not weight.any():  # InternVL's CLS and positions, Gemma's projector
                weight.normal_()
            if weight.ndim >= 2:
                weight.mul_(20.0 if "embed_tokens" in name or "lm_head" in name else 6.0)
    return model


def wake_cross_blocks(model: nn.Module, seed: int = 5) -> nn.Module:
    """Give the zero-initialised cross-attention blocks weights that show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.get_decoder().cross_blocks.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.15)
    return model


def make_prompt(model: nn.Module, batch: int, seed: int = 1, no_image: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Forward arguments of a left-padded batch: text, image, text of differing lengths.

    Args:
        no_image: samples that have no image.
    """
    generator = torch.Generator().manual_seed(seed)
    words = lambda n: torch.randint(5, 280, (n,), generator=generator)
    pictured = [i for i in range(batch) if i not in no_image]
    images, blocks = images_of(model, len(pictured), generator) if pictured else ({}, [])
    rows = []
    for i in range(batch):
        pieces = [words(3)]
        for number, length in enumerate(blocks[pictured.index(i)] if i in pictured else []):
            between = torch.tensor([INDICATORS[number % 5]]) if family_of(model) == "ovis2" else words(2)
            pieces += [torch.full((length,), IMAGE_TOKEN), between]
        rows.append(torch.cat([*pieces, words((7, 3, 5)[i % 3])]))
    longest = max(map(len, rows))
    prompt = {}
    prompt["input_ids"] = torch.stack([torch.cat([torch.full((longest - len(r),), PAD), r]) for r in rows])
    prompt["attention_mask"] = torch.stack([(torch.arange(longest) >= longest - len(r)).long() for r in rows])
    if family_of(model) in QWEN_LIKE:
        prompt["mm_token_type_ids"] = (prompt["input_ids"] == IMAGE_TOKEN).int()
    return {**prompt, **images}


def images_of(model: nn.Module, count: int, generator: torch.Generator) -> tuple[dict[str, Tensor], list[list[int]]]:
    """What a processor would make of `count` images, one a sample, of differing sizes where the family allows it; and
    for each image the lengths of its blocks of image tokens in the prompt."""
    family, side = family_of(model), (count, 3, 56, 56)
    if family in ("llava", "vipllava"):
        return {"pixel_values": torch.randn(side, generator=generator)}, [[16]] * count
    if family == "gemma3":
        return {"pixel_values": torch.randn(count, 3, 112, 112, generator=generator)}, [[16]] * count
    if family == "internvl":
        return {"pixel_values": torch.randn(side, generator=generator)}, [[4]] * count
    if family in ("smolvlm", "idefics3"):  # two tiles and the whole image: three blocks
        return {"pixel_values": torch.randn(count, 3, 3, 56, 56, generator=generator)}, [[4, 4, 4]] * count
    if family == "aya_vision":  # four tiles and the whole image
        return {"pixel_values": torch.randn(5 * count, 3, 56, 56, generator=generator)}, [[4] * 5] * count
    if family == "ovis2":  # the whole image and two tiles
        pixels = torch.randn(3 * count, 3, 56, 56, generator=generator)
        return {"pixel_values": pixels}, [[4, 4, 4]] * count
    if family in ("pixtral", "mistral3"):  # a block a row
        sizes = torch.tensor([[84, 56], [56, 112], [28, 84]] * count)[:count]
        side = 14 if family == "pixtral" else 28
        blocks = [[width // side] * (height // side) for height, width in sizes.tolist()]
        return {"pixel_values": torch.randn(count, 3, 84, 112, generator=generator), "image_sizes": sizes}, blocks
    if family in QWEN_LIKE:
        patch = model.config.vision_config.patch_size
        grids = torch.tensor([[1, 8, 8], [1, 4, 6], [1, 6, 8]] * count)[:count]
        pixels = torch.randn(int(grids.prod(-1).sum()), 3 * 2 * patch**2, generator=generator)
        blocks = [[n // 4] for n in grids.prod(-1).tolist()]
        return {"pixel_values": pixels, "image_grid_thw": grids}, blocks
    sizes = torch.tensor([[56, 56], [100, 110], [56, 90]] * count)[:count]
    images = {"pixel_values": torch.randn(count, 5, 3, 56, 56, generator=generator), "image_sizes": sizes}
    with torch.no_grad():
        packed = model.get_image_features(**images, return_dict=True).pooler_output
    return images, [[len(features)] for features in packed]


def single(prompt: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample of a batch in which all have images, without its padding."""
    real = prompt["attention_mask"][row].bool()
    one = {name: prompt[name][row : row + 1] for name in prompt}
    if "image_grid_thw" in prompt:  # Qwen-VL: the patches of all images in one row
        one["pixel_values"] = prompt["pixel_values"].split(prompt["image_grid_thw"].prod(-1).tolist())[row]
    elif len(prompt["pixel_values"]) != len(prompt["input_ids"]):  # the tiles of all images in one row, as many each
        one["pixel_values"] = prompt["pixel_values"].chunk(len(prompt["input_ids"]))[row]
    by_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {name: x[:, real] if name in by_token else x for name, x in one.items()}


def visual_counts(prompt: dict[str, Tensor]) -> list[int]:
    """Visual tokens of each sample."""
    return (prompt["input_ids"] == IMAGE_TOKEN).sum(1).tolist()


def continued(prompt: dict[str, Tensor], new_ids: Tensor) -> dict[str, Tensor]:
    """The prompt with tokens appended, as one prompt."""
    ones = torch.ones_like(new_ids)
    types = {}
    if "mm_token_type_ids" in prompt:
        types["mm_token_type_ids"] = torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(new_ids).int()], 1)
    return {
        **prompt,
        "input_ids": torch.cat([prompt["input_ids"], new_ids], 1),
        "attention_mask": torch.cat([prompt["attention_mask"], ones], 1),
        **types,
    }


def generate(model: nn.Module, prompt: dict[str, Tensor], num_tokens: int = 5, **options: Any) -> Any:
    """Greedy generation that returns the sequences, the logits of each step and the cache."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options}
    with torch.no_grad():
        return model.generate(**prompt, max_new_tokens=num_tokens, **options)


def positions_in_generate(model: nn.Module, prompt: dict[str, Tensor]) -> Tensor:
    """Position ids [axes, B, P] as generate() numbers them: each row starts at its first real token."""
    mask = prompt["attention_mask"]
    if "image_grid_thw" in prompt:
        return model.model.get_rope_index(**{name: x for name, x in prompt.items() if name != "pixel_values"})[0]
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)[None]
