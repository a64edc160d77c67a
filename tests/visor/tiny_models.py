"""Tiny random models of the real Hugging Face classes, and left-padded batches for them.

Tests say `from tiny_models import ...`: conftest.py puts this folder on the path.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, IMAGE_TOKEN, VIDEO_TOKEN, PAD = 300, 290, 291, 0
FAMILIES = ("llava", "llava_onevision")
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


def make_model(family: str, attention: str = "sdpa", num_layers: int = NUM_LAYERS, seed: int = 0) -> nn.Module:
    """A tiny model whose weights are large enough that attention is far from uniform and logits matter."""
    cls, config = {"llava": _llava, "llava_onevision": _llava_onevision}[family](num_layers)
    torch.manual_seed(seed)
    model = cls._from_config(config, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = None  # never stop early
    model.generation_config.pad_token_id = PAD
    with torch.no_grad():
        for name, weight in model.named_parameters():
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
    prompt = {}
    if model.config.model_type == "llava":
        num_visual = [16] * len(pictured)
        pixels = torch.randn(len(pictured), 3, 56, 56, generator=generator)
    else:
        prompt["image_sizes"] = torch.tensor([[56, 56], [100, 110], [56, 90]] * batch)[: len(pictured)]
        pixels = torch.randn(len(pictured), 5, 3, 56, 56, generator=generator)
        if pictured:
            with torch.no_grad():
                packed = model.get_image_features(pixels, prompt["image_sizes"], return_dict=True).pooler_output
            num_visual = [len(features) for features in packed]
    rows = []
    for i in range(batch):
        image = [torch.full((num_visual[pictured.index(i)],), IMAGE_TOKEN)] if i in pictured else []
        rows.append(torch.cat([words(3), *image, words((9, 5, 7)[i % 3])]))
    longest = max(map(len, rows))
    prompt["input_ids"] = torch.stack([torch.cat([torch.full((longest - len(r),), PAD), r]) for r in rows])
    prompt["attention_mask"] = torch.stack([(torch.arange(longest) >= longest - len(r)).long() for r in rows])
    if pictured:
        return {**prompt, "pixel_values": pixels}
    return {name: x for name, x in prompt.items() if name != "image_sizes"}


def single(prompt: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample of a batch in which all have images, without its padding."""
    real = prompt["attention_mask"][row].bool()
    one = {name: prompt[name][row : row + 1] for name in prompt}
    return {**one, "input_ids": one["input_ids"][:, real], "attention_mask": one["attention_mask"][:, real]}


def visual_counts(prompt: dict[str, Tensor]) -> list[int]:
    """Visual tokens of each sample."""
    return (prompt["input_ids"] == IMAGE_TOKEN).sum(1).tolist()


def continued(prompt: dict[str, Tensor], new_ids: Tensor) -> dict[str, Tensor]:
    """The prompt with tokens appended, as one prompt."""
    ones = torch.ones_like(new_ids)
    return {
        **prompt,
        "input_ids": torch.cat([prompt["input_ids"], new_ids], 1),
        "attention_mask": torch.cat([prompt["attention_mask"], ones], 1),
    }


def generate(model: nn.Module, prompt: dict[str, Tensor], num_tokens: int = 5, **options: Any) -> Any:
    """Greedy generation that returns the sequences, the logits of each step and the cache."""
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options}
    with torch.no_grad():
        return model.generate(**prompt, max_new_tokens=num_tokens, **options)


def positions_in_generate(prompt: dict[str, Tensor]) -> Tensor:
    """Position ids as generate() numbers them: each row starts at its first real token."""
    mask = prompt["attention_mask"]
    return (mask.cumsum(1) - 1).masked_fill(mask == 0, 0)
