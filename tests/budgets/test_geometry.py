"""Presets are what the published configs say, and defaults that configs leave out are those of their classes."""

import json
from dataclasses import replace

import pytest

from budgets.geometry import TEXT_DEFAULTS, VISION_DEFAULTS, from_config
from budgets.presets import PRESETS, load, preset
from budgets.registry import UnknownNameError


@pytest.mark.parametrize(
    "name",
    ["llava-1.5-7b", "llava-1.5-13b", "llava-next-7b", "llava-onevision-0.5b", "llava-onevision-7b", "qwen2-vl-7b",
     "qwen2.5-vl-3b", "qwen3-vl-4b", "internvl3-1b", "smolvlm-256m", "smolvlm-500m", "smolvlm-2.2b"],
)  # fmt: skip
def test_presets_are_the_published_configs(configs, name):
    assert from_config(configs[name](), name=name) == preset(name)
    assert from_config(configs[name]().to_dict(), name=name) == preset(name)


def test_defaults_are_those_of_transformers():
    from transformers import AutoConfig

    for kind, defaults in TEXT_DEFAULTS.items():
        config = AutoConfig.for_model(kind)
        layers, width, mlp, heads, kv_heads, head_dim, vocabulary = defaults
        expected = (layers, width, mlp, heads, kv_heads or heads, head_dim or width // heads, vocabulary)
        assert expected == (
            config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads,
            config.num_key_value_heads, getattr(config, "head_dim", None) or width // heads, config.vocab_size,
        ), kind  # fmt: skip
    known = AutoConfig.for_model.__globals__["CONFIG_MAPPING"]  # newer towers are missing in older versions
    for kind, defaults in VISION_DEFAULTS.items():
        if kind not in known:
            continue
        config = AutoConfig.for_model(kind)
        sides = [side[0] if isinstance(side, tuple) else side for side in (config.image_size, config.patch_size)]
        assert defaults == (
            config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads, *sides,
        ), kind  # fmt: skip


def test_configs_as_the_hub_has_them():
    """Sparse ones: what equals the class's default is left out, and Qwen2.5-VL had the text fields on top."""
    llava = {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "vocab_size": 32064, "torch_dtype": "float16"},
    }
    assert from_config(llava, name="llava-1.5-7b") == preset("llava-1.5-7b")
    qwen = {
        "model_type": "qwen2_5_vl", "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16,
        "num_hidden_layers": 36, "num_key_value_heads": 2, "vocab_size": 151936, "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "qwen2_5_vl", "hidden_size": 1280, "in_chans": 3, "out_hidden_size": 2048},
    }  # fmt: skip
    assert from_config(qwen, name="qwen2.5-vl-3b") == preset("qwen2.5-vl-3b")


def test_text_only_models_have_no_tower():
    geometry = from_config({"model_type": "mistral", "hidden_size": 2048, "dtype": "float32"})
    assert (geometry.vision, geometry.num_layers, geometry.head_dim, geometry.dtype_bytes) == (None, 32, 64, 4)


@pytest.mark.parametrize("name", PRESETS)
def test_tokens_per_tile(name):
    vision = preset(name).vision
    expected = {"llava-1": 576, "llava-n": 576, "llava-o": 729, "smolvlm-2.2b": 81, "smolvlm": 64, "internvl3": 256}
    if vision.image_size is None:
        with pytest.raises(ValueError, match="dynamic resolution"):
            _ = vision.visual_tokens_per_tile
    else:
        assert vision.visual_tokens_per_tile == next(n for start, n in expected.items() if name.startswith(start))
        side = vision.grid_side()
        merge = round(vision.patches_per_token**0.5)
        for part in range(1, side // merge + 1):  # every smaller grid of visual tokens is reached by an image scale
            assert vision.visual_tokens(part / (side // merge)) == part**2


def test_load(tmp_path, configs):
    folder = tmp_path / "my-model"
    folder.mkdir()
    configs["llava-onevision-0.5b"]().save_pretrained(folder)
    assert load(folder) == load(folder / "config.json")
    assert load(str(folder)) == replace(preset("llava-onevision-0.5b"), name="my-model")
    (folder / "config.json").write_text('{"model_type": "llava", ')
    with pytest.raises(ValueError, match=r"my-model/config\.json is no model config"):
        load(folder)
    with pytest.raises(UnknownNameError, match="nearest first: llava-1.5-7b, llava-1.5-13b"):
        load("llava-1.5-7")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt_neo"}, "has no 'num_hidden_layers'"),
        ({"model_type": "blip", "vision_config": {}, "text_config": {"model_type": "llama"}}, None),
        ({"model_type": "blip", "vision_config": {"a": 1}, "text_config": {"model_type": "llama"}}, "not priced"),
        ({"model_type": "llava_next", "vision_config": {"model_type": "pixtral"}}, "'pixtral' is not priced"),
        ({"model_type": "llava", "vision_config": {"model_type": "siglip_vision_model"}}, "without CLS"),
        ({"model_type": "llama", "num_key_value_heads": 5}, "no multiple of num_kv_heads=5"),
    ],
)
def test_configs_that_cannot_be_priced_say_why(tmp_path, config, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    if message is None:
        assert load(path).vision is None
    else:
        with pytest.raises(ValueError, match=message):
            load(path)
