"""Models without weights, and the counters that the analytic figures are held against."""

from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def count() -> Callable[[Callable], int]:
    """FLOPs of a call, by `torch.utils.flop_counter`. On the meta device SDPA is a pair of bmm, so it is counted."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    def counted(call: Callable) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    return counted


@pytest.fixture(scope="session")
def on_meta() -> Callable:
    """A model of a config, or `cls(*args)`, on the meta device: shapes without memory."""
    import torch

    def build(cls, config):
        config._attn_implementation = "sdpa"
        with torch.device("meta"):
            return cls(config).eval()

    return build


@pytest.fixture(scope="session")
def configs() -> dict[str, Callable]:
    """Hugging Face configs by name: tiny ones, and published models as their config.json on the Hub has them."""
    import transformers as hf

    def clip(**changes):
        sizes = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4,
                 "image_size": 56, "patch_size": 14}  # fmt: skip
        return {"model_type": "clip_vision_model", **sizes, **changes}

    def text(kind, **changes):
        sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 136, "num_hidden_layers": 6,
                 "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
        return {"model_type": kind, **sizes, **changes}

    so400m = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
              "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
              "vision_use_head": False}  # fmt: skip
    clip_large = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
                  "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14}  # fmt: skip
    vicuna = {"model_type": "llama", "vocab_size": 32064}
    return {
        "tiny-llava": lambda: hf.LlavaConfig(vision_config=clip(), text_config=text("llama", num_key_value_heads=4)),
        "tiny-llava-qwen2": lambda: hf.LlavaConfig(
            vision_config=clip(model_type="siglip_vision_model", image_size=58),
            text_config=text("qwen2", num_attention_heads=2, num_key_value_heads=1, head_dim=48),
            vision_feature_layer=[-1, -2],
            vision_feature_select_strategy="full",
        ),
        "tiny-llava-full": lambda: hf.LlavaConfig(
            vision_config=clip(), text_config=text("llama"), vision_feature_select_strategy="full"
        ),
        "tiny-onevision": lambda: hf.LlavaOnevisionConfig(
            vision_config=clip(model_type="siglip_vision_model", vision_use_head=False), text_config=text("qwen2")
        ),
        "tiny-smolvlm": lambda: hf.SmolVLMConfig(
            vision_config=clip(model_type="smolvlm_vision"), text_config=text("llama"), scale_factor=2
        ),
        "tiny-qwen2.5-vl": lambda: hf.Qwen2_5_VLConfig(
            text_config=text("qwen2_5_vl_text", bos_token_id=1, eos_token_id=2,
                             rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]}),
            vision_config={"depth": 3, "hidden_size": 32, "intermediate_size": 72, "num_heads": 4,
                           "out_hidden_size": 64, "window_size": 56, "fullatt_block_indexes": [1]},
        ),
        "tiny-llava-next": lambda: hf.LlavaNextConfig(vision_config=clip(), text_config=text("llama")),
        "tiny-idefics3": lambda: hf.Idefics3Config(
            vision_config=clip(model_type="idefics3_vision"), text_config=text("llama"), scale_factor=2
        ),
        "tiny-internvl": lambda: hf.InternVLConfig(
            vision_config=clip(model_type="internvl_vision", image_size=[56, 56], patch_size=[14, 14]),
            text_config=text("qwen2"),
        ),
        "tiny-qwen3-vl": lambda: hf.Qwen3VLConfig(
            text_config=text("qwen3_vl_text", head_dim=16, bos_token_id=1, eos_token_id=2,
                             rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]}),
            vision_config={"depth": 3, "hidden_size": 32, "intermediate_size": 72, "num_heads": 4,
                           "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
        ),
        "tiny-qwen2-vl": lambda: hf.Qwen2VLConfig(
            text_config=text("qwen2_vl_text", bos_token_id=1, eos_token_id=2,
                             rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]}),
            vision_config={"depth": 3, "embed_dim": 32, "mlp_ratio": 3, "num_heads": 4, "hidden_size": 64},
        ),
        "tiny-glm4v": lambda: hf.Glm4vConfig(
            text_config=text("glm4v_text", rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5,
                                                            "mrope_section": [1, 1, 2]}),
            vision_config={"depth": 3, "hidden_size": 32, "intermediate_size": 72, "num_heads": 4,
                           "out_hidden_size": 64, "image_size": 112},
        ),
        "tiny-vipllava": lambda: hf.VipLlavaConfig(
            vision_config=clip(), text_config=text("llama"), vision_feature_layer=[-2, 1]
        ),
        "tiny-pixtral": lambda: hf.LlavaConfig(
            vision_config=clip(model_type="pixtral"), text_config=text("mistral"), vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
        "tiny-mistral3": lambda: hf.Mistral3Config(
            vision_config=clip(model_type="pixtral"), text_config=text("mistral")
        ),
        "tiny-ovis2": lambda: hf.Ovis2Config(
            vision_config=clip(model_type="ovis2_vision", vocab_size=40, hidden_stride=2), text_config=text("qwen2"),
            hidden_size=64, vocab_size=300, visual_indicator_token_ids=[294, 295, 296, 297, 298],
        ),
        "tiny-gemma3": lambda: hf.Gemma3Config(
            vision_config=clip(model_type="siglip_vision_model"), text_config=text("gemma3_text", head_dim=16),
            mm_tokens_per_image=4,
        ),
        "tiny-aya-vision": lambda: hf.AyaVisionConfig(
            vision_config=clip(model_type="siglip_vision_model", vision_use_head=False),
            text_config=text("cohere2", head_dim=16),
        ),
        "tiny-qwen3-vl-moe": lambda: hf.Qwen3VLMoeConfig(
            text_config=text("qwen3_vl_moe_text", head_dim=16, num_experts=4, num_experts_per_tok=2,
                             moe_intermediate_size=48, mlp_only_layers=[1], bos_token_id=1, eos_token_id=2,
                             rope_parameters={"rope_type": "default", "mrope_section": [2, 3, 3]}),
            vision_config={"depth": 3, "hidden_size": 32, "intermediate_size": 72, "num_heads": 4,
                           "out_hidden_size": 64, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
        ),
        "llava-1.5-7b": lambda: hf.LlavaConfig(vision_config=clip_large, text_config=vicuna),
        "llava-1.5-13b": lambda: hf.LlavaConfig(
            vision_config=clip_large,
            text_config={**vicuna, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                         "num_attention_heads": 40, "num_key_value_heads": 40},
        ),
        "llava-next-7b": lambda: hf.LlavaNextConfig(vision_config=clip_large, text_config=vicuna),
        "llava-onevision-0.5b": lambda: hf.LlavaOnevisionConfig(
            vision_config=so400m,
            text_config={"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                         "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 152000},
        ),
        "llava-onevision-7b": lambda: hf.LlavaOnevisionConfig(
            vision_config=so400m,
            text_config={"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944,
                         "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
                         "vocab_size": 152128},
        ),
        "qwen2.5-vl-3b": lambda: hf.Qwen2_5_VLConfig(
            text_config={"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
                         "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936,
                         "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
            vision_config={"hidden_size": 1280, "out_hidden_size": 2048},
        ),
        "qwen2-vl-7b": lambda: hf.Qwen2VLConfig(
            text_config={"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                         "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
                         "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
            vision_config={"hidden_size": 3584},
        ),
        "qwen3-vl-4b": lambda: hf.Qwen3VLConfig(
            text_config={"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
                         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
                         "rope_parameters": {"rope_type": "default", "mrope_section": [24, 20, 20]}},
            vision_config={"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560,
                           "deepstack_visual_indexes": [5, 11, 17]},
        ),
        "internvl3-1b": lambda: hf.InternVLConfig(
            text_config={"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
                         "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151674},
        ),
        "smolvlm-500m": lambda: hf.Idefics3Config(
            vision_config={"model_type": "idefics3_vision", "hidden_size": 768, "image_size": 512,
                           "num_attention_heads": 12, "patch_size": 16},
            text_config={"model_type": "llama", "hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
                         "num_attention_heads": 15, "num_key_value_heads": 5, "head_dim": 64, "vocab_size": 49280},
            scale_factor=4,
        ),
        "smolvlm-256m": lambda: hf.Idefics3Config(
            vision_config={"model_type": "idefics3_vision", "hidden_size": 768, "image_size": 512,
                           "num_attention_heads": 12, "patch_size": 16},
            text_config={"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                         "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49280},
            scale_factor=4,
        ),
        "smolvlm-2.2b": lambda: hf.Idefics3Config(
            vision_config={"model_type": "idefics3_vision", "hidden_size": 1152, "image_size": 384, "patch_size": 14,
                           "intermediate_size": 4304, "num_hidden_layers": 27},
            text_config={"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
                         "head_dim": 64, "vocab_size": 49155},
            scale_factor=3,
        ),
    }  # fmt: skip
