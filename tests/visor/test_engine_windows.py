"""Decoders that attend to a window run as transformers runs them under a dense schedule, and no other schedule."""

import copy

import pytest
import torch
import transformers
from schedules import schedule
from tiny_models import IMAGE_TOKEN, NUM_LAYERS, VOCABULARY, generate, make_prompt

from budgets.schedule import dense
from visor.engine.compat import cache_of
from visor.engine.decoder import install, running

WINDOW = 8  # the prompt has 28 tokens
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=NUM_LAYERS, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
)  # fmt: skip
WINDOWED = {
    "one window for all layers": lambda: transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "a list that its decoder does not read": lambda: transformers.MistralConfig(
        **SIZES, sliding_window=WINDOW, layer_types=["full_attention"] * NUM_LAYERS
    ),
    "phi3": lambda: transformers.Phi3Config(**SIZES, sliding_window=WINDOW),
    "starcoder2": lambda: transformers.Starcoder2Config(**SIZES, sliding_window=WINDOW),
    "a switch and a first layer": lambda: transformers.Qwen2Config(
        **SIZES, sliding_window=WINDOW, use_sliding_window=True, max_window_layers=3
    ),
    "layer types": lambda: transformers.Qwen3Config(
        **SIZES, head_dim=16, sliding_window=WINDOW, use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention"] * 3,
    ),
    "chunks": lambda: transformers.Llama4TextConfig(
        **SIZES, head_dim=16, intermediate_size_mlp=96, num_local_experts=1, attention_chunk_size=WINDOW,
        no_rope_layers=[1] * NUM_LAYERS, interleave_moe_layer_step=10,
    ),
}  # fmt: skip
NOT_WINDOWED = {
    "mistral without a window": lambda: transformers.MistralConfig(**SIZES, sliding_window=None),
    "switched off": lambda: transformers.Qwen2Config(**SIZES, sliding_window=WINDOW, use_sliding_window=False),
    "behind the last layer": lambda: transformers.Qwen2Config(
        **SIZES, sliding_window=WINDOW, use_sliding_window=True, max_window_layers=NUM_LAYERS
    ),
}


def llava_on(text_config):
    tower = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=text_config, image_token_id=IMAGE_TOKEN, image_seq_length=16
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.mul_(20.0 if "embed_tokens" in name or "lm_head" in name else 6.0)
    return model


@pytest.mark.parametrize("spelling", WINDOWED)
def test_dense_is_the_familys_own(spelling):
    plain = llava_on(WINDOWED[spelling]())
    model, prompt = install(copy.deepcopy(plain)), make_prompt(plain, 1)
    assert prompt["input_ids"].shape[1] == 28
    expected, tokens = plain(**prompt).logits, generate(plain, prompt).sequences
    with running(model, dense(NUM_LAYERS, 16)), torch.no_grad():
        assert torch.equal(model(**prompt).logits, expected)
        assert torch.equal(generate(model, prompt).sequences, tokens)


@pytest.mark.parametrize("spelling", WINDOWED)
def test_other_schedules_are_refused(spelling):
    model = install(llava_on(WINDOWED[spelling]()))
    for plan in (schedule("tttttt", 16), schedule("ssssss", 16, {2: 0.5})):
        with pytest.raises(ValueError, match="sliding-window layers.*Only dense schedules"), running(model, plan):
            pass


@pytest.mark.parametrize("spelling", NOT_WINDOWED)
def test_what_only_looks_like_a_window_runs(spelling):
    plain = llava_on(NOT_WINDOWED[spelling]())
    model, prompt = install(copy.deepcopy(plain)), make_prompt(plain, 1)
    with torch.no_grad():
        expected = plain(**prompt).logits
        with running(model, dense(NUM_LAYERS, 16)):
            assert torch.equal(model(**prompt).logits, expected)
        with running(model, schedule("ssssss", 16, {2: 0.5})):
            assert cache_of(model(**prompt)).layer_lengths == (28, 28, 20, 20, 20, 20)
