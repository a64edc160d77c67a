"""What the engine executes costs what the accountant says, FLOP for FLOP: every kind of schedule, scoring included."""

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
    LlavaOnevisionForConditionalGeneration,
)

from budgets.costs import price
from budgets.geometry import from_config
from budgets.registry import METHODS
from visor.engine.compat import CACHE, cache_of
from visor.engine.decoder import install, running
from visor.families.base import adapter_for
from visor.vision.features import VisionFeatures, run_tower

CLASSES = {
    "tiny-llava": LlavaForConditionalGeneration,
    "tiny-llava-qwen2": LlavaForConditionalGeneration,
    "tiny-onevision": LlavaOnevisionForConditionalGeneration,
    "llava-1.5-7b": LlavaForConditionalGeneration,
    "llava-onevision-0.5b": LlavaOnevisionForConditionalGeneration,
}
TINY = ["tiny-llava", "tiny-llava-qwen2", "tiny-onevision"]
OTHER_FAMILIES = ["tiny-llava-next", "tiny-qwen2.5-vl", "tiny-qwen3-vl", "tiny-smolvlm", "tiny-internvl"]
SETTINGS = {
    "dense": {},
    "fastv": {"layer": 2, "drop": 0.4},
    "pyramiddrop": {},
    "dart": {"drop": 0.4},
    "sparsevlm": {"tokens": 6},
    "sparsevlm-without-recycling": {"tokens": 6, "recycle": False, "positions": "kept"},
    "vtw": {},
    "blind": {},
    "visor": {},
    "visor-no-self": {"self_layers": 0},
    "visor-text-only": {"self_layers": 0, "cross_layers": 0},
    "visor-two-self": {"self_layers": 2},
}
CASES = [
    *((name, setting) for name in TINY for setting in SETTINGS),
    *(("llava-1.5-7b", setting) for setting in ("fastv", "visor-two-self", "sparsevlm", "dart")),
    *((name, setting) for name in OTHER_FAMILIES for setting in ("fastv", "pyramiddrop", "visor")),
    *(("llava-onevision-0.5b", setting) for setting in ("pyramiddrop", "visor")),
]


@pytest.fixture(scope="module")
def model_of(configs, on_meta):
    """An installed model of a named config on the meta device, with every cross-attention block VISOR may ask for."""
    made = {}

    def build(name):
        if name not in made:
            config = configs[name]()
            model = on_meta(CLASSES.get(name) or AutoModelForImageTextToText._model_mapping[type(config)], config)
            geometry = from_config(config)
            cross_layers = METHODS.get("visor")().layers(geometry)[1]
            with torch.device("meta"):
                install(model, cross_layers=cross_layers)
            made[name] = model
        return made[name]

    return build


@pytest.mark.parametrize(("name", "setting"), CASES)
def test_schedules_of_the_engine(model_of, count, name, setting):
    model = model_of(name)
    geometry, decoder = from_config(model.config), model.get_decoder()
    num_visual = 16 if name.startswith("tiny") else geometry.vision.visual_tokens_per_tile
    before, after, new_tokens = 3, 8, 3
    prompt = before + num_visual + after
    schedule = METHODS.get(setting.partition("-")[0])(**SETTINGS[setting]).schedule(geometry, num_visual)
    visual = torch.zeros(1, prompt, dtype=torch.bool)
    visual[:, before : before + num_visual] = True
    embeddings = torch.empty(1, prompt, geometry.hidden_size, device="meta")
    held = {}

    def prefill():
        output = decoder(inputs_embeds=embeddings, use_cache=True)
        model.lm_head(output.last_hidden_state[:, -1:])
        held["cache"] = cache_of(output)

    def decode():
        for _ in range(new_tokens - 1):
            output = decoder(inputs_embeds=embeddings[:, :1], **{CACHE: held["cache"]}, use_cache=True)
            model.lm_head(output.last_hidden_state)

    def bytes_held():
        layers = held["cache"].layers
        own = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
        cross = sum(layer.cross[0].numel() + layer.cross[1].numel() for layer in layers if layer.cross)
        return (own + cross) * geometry.dtype_bytes

    cost = price(geometry, schedule, before + after, num_new_tokens=new_tokens)
    with running(model, schedule, visual=visual):
        assert count(prefill) == cost.decoder_prefill + cost.parts["lm_head"]
        assert bytes_held() == cost.kv_bytes
        assert count(decode) == cost.decode
        assert bytes_held() == cost.kv_bytes_final
    assert (cost.parts["scoring"] > 0) == setting.startswith(("fastv", "pyramiddrop", "dart", "sparsevlm"))


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-qwen2"])
def test_scoring_in_the_tower(configs, count, name):
    """VisionZip, with and without a CLS: rows of q.k in one tower block, then similarities of the leftover."""
    config = configs[name]()
    adapter, geometry = adapter_for(LlavaForConditionalGeneration(config).eval()), from_config(config)
    method, num_visual = METHODS.get("visionzip")(keep=8, contextual=0.25), geometry.vision.visual_tokens_per_tile
    pixels, seen = torch.zeros(1, 3, 56, 56), {}

    def encode(taps):
        seen["features"], seen["cls"], seen["taps"] = run_tower(adapter, pixels, taps)

    plain = count(lambda: encode(()))  # on the CPU SDPA goes uncounted, in both
    scoring = count(lambda: encode(method.taps)) - plain
    vision = VisionFeatures(seen["features"], taps=seen["taps"], grid=(4, 4), sample_keys=("",), cls_B1D=seen["cls"])
    scoring += count(lambda: method.reduce_features(vision, 8))
    cost = price(geometry, method.schedule(geometry, num_visual), 5)
    assert scoring == cost.parts["scoring"] > 0
