"""The architecture of the embedded models: real Hugging Face classes, small, initialised for their width."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from visor.embedded.vocabulary import IMAGE
from visor.worlds.world import IMAGE_SIZE


@dataclass(frozen=True)
class TinyArchitecture:
    """Sizes of a small LLaVA. Defaults: what two cores can train in hours."""

    patch_size: int = 12
    tower_layers: int = 4
    tower_width: int = 192
    tower_heads: int = 6
    decoder_layers: int = 12
    decoder_width: int = 192
    decoder_heads: int = 6
    decoder_kv_heads: int = 3
    decoder_intermediate: int = 512

    @property
    def grid(self) -> int:
        """Visual tokens along one side."""
        return IMAGE_SIZE // self.patch_size


def build(architecture: TinyArchitecture, tokenizer, seed: int = 0) -> LlavaForConditionalGeneration:
    """A randomly initialised model for the tokenizer's vocabulary."""
    a = architecture
    vision = SiglipVisionConfig(
        hidden_size=a.tower_width,
        intermediate_size=a.tower_width * 8 // 3,
        num_hidden_layers=a.tower_layers,
        num_attention_heads=a.tower_heads,
        image_size=IMAGE_SIZE,
        patch_size=a.patch_size,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=a.decoder_width,
        intermediate_size=a.decoder_intermediate,
        num_hidden_layers=a.decoder_layers,
        num_attention_heads=a.decoder_heads,
        num_key_value_heads=a.decoder_kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=a.grid**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    initialise(model, a)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def initialise(model: LlavaForConditionalGeneration, architecture: TinyArchitecture) -> None:
    """N(0, 1/fan_in) everywhere, residual outputs scaled by 1/sqrt(2 layers).

    The library's default deviation of 0.02 is meant for widths above 1,000; at 192 attention starts uniform and stays
    so.
    """
    residual = ("o_proj", "down_proj", "out_proj", "fc2")
    for name, module in model.named_modules():
        layers = architecture.tower_layers if "vision_tower" in name else architecture.decoder_layers
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            fan_in = module.weight[0].numel()
            scale = (2 * layers) ** -0.5 if name.rpartition(".")[2] in residual else 1.0
            module.weight.normal_(0, scale * fan_in**-0.5)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(0, 0.5)
