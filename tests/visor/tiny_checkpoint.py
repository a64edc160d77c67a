"""A tiny LLaVA checkpoint as it would ship: SigLIP tower without CLS, Qwen2 decoder, tokenizer, PIL image processor."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

GRID, PATCH, NUM_LAYERS = 6, 4, 6
IMAGE_SIZE = GRID * PATCH
NUM_VISUAL = GRID * GRID
SPECIAL = ("<pad>", "<unk>", "<eos>", "<image>", "<assistant>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_processor() -> transformers.LlavaProcessor:
    letters = [*SPECIAL, *(chr(code) for code in range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>",
        additional_special_tokens=["<image>", "<assistant>"], padding_side="left", clean_up_tokenization_spaces=False,
    )  # fmt: skip
    images = SiglipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return transformers.LlavaProcessor(
        image_processor=images, tokenizer=fast, patch_size=PATCH, vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE, image_token="<image>",
    )  # fmt: skip


def make_llava(attention: str = "sdpa", seed: int = 0) -> transformers.LlavaForConditionalGeneration:
    """A random model whose weights are large enough that attention is far from uniform and images matter."""
    tower = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=IMAGE_SIZE,
        patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    vocabulary = len(SPECIAL) + 95
    text = transformers.Qwen2Config(
        vocab_size=vocabulary, hidden_size=48, intermediate_size=96, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=False, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=text, image_token_id=SPECIAL.index("<image>"), image_seq_length=NUM_VISUAL,
        vision_feature_layer=-1, vision_feature_select_strategy="full", tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.mul_(20.0 if "embed_tokens" in name or "lm_head" in name else 6.0)
    return model


def make_image(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)
