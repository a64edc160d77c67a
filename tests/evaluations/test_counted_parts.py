"""What runs costs what the accountant says, part by part, for every registered method: tower, projector, projections,
attention, MLP, cross-attention, choosing tokens, head; prefill and decode; and the cache has the priced bytes.

Counted on the CPU, where methods can look at values; torch's counter does not know the CPU's attention kernel, so it is
told. Choosing is told from the rest by the clock that also times it.
"""

import json
import re
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from budgets.costs import PARTS, price
from budgets.geometry import from_config
from budgets.presets import load
from budgets.registry import METHODS
from evaluations.measure import cache_bytes
from evaluations.random_model import RandomModel, build
from visor.engine.stopwatch import scoring_clock
from visor.reduction.method import tower_reduction
from visor.vision.encode import taps_of

TEXT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=100, model_type="qwen2")  # fmt: skip
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=2, image_size=56,
             patch_size=7, model_type="siglip_vision_model", vision_use_head=False)  # fmt: skip
ONEVISION = {"model_type": "llava_onevision", "text_config": TEXT, "vision_config": TOWER, "vision_feature_layer": -1,
             "vision_feature_select_strategy": "full"}  # fmt: skip
LLAVA = {
    "model_type": "llava",
    "text_config": {**TEXT, "num_key_value_heads": 4, "model_type": "llama"},
    "vision_config": {**TOWER, "model_type": "clip_vision_model"},
}
CONFIGS = {"onevision": ONEVISION, "llava": LLAVA}
NUM_TEXT, NEW_TOKENS = 12, 3


def cpu_attention(query, key, value, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(query, key, value)


CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention}
ATTENTION_OPS = ("bmm", "baddbmm", "scaled_dot_product")


class Count:
    """Counted FLOPs by part of whatever runs inside."""

    def __enter__(self):
        self.marks = []
        self.counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        self.counter.__enter__()
        self.clock = scoring_clock(lambda: self.marks.append(self.snapshot()))
        self.clock.__enter__()
        return self

    def __exit__(self, *error):
        self.clock.__exit__(*error)
        self.counter.__exit__(*error)
        self.parts, self.total = self.of(self.snapshot()), self.counter.get_total_flops()
        for before, after in zip(self.marks[::2], self.marks[1::2], strict=True):
            spent = self.of(after)
            spent.subtract(self.of(before))
            self.parts.subtract(spent)  # what a rule computes inside a module is choosing, not the module
            self.parts["scoring"] += after["Global"]["total"] - before["Global"]["total"]

    def snapshot(self):
        found = {}
        for name, ops in self.counter.get_flop_counts().items():
            amounts = {"attention": 0, "other": 0}
            for op, flops in ops.items():
                amounts["attention" if any(a in str(op) for a in ATTENTION_OPS) else "other"] += flops
            found[name] = {**amounts, "total": sum(amounts.values())}
        return {"Global": {"total": 0}, **found}

    @staticmethod
    def of(snapshot):
        parts = Counter(dict.fromkeys(PARTS, 0))
        for name, amount in snapshot.items():
            if re.search(r"(vision_tower|VisionModel)$", name):
                parts["tower"] += amount["total"]
            elif "vision_tower" in name or "VisionModel" in name:
                continue
            elif re.search(r"\.layers\.\d+\.self_attn$", name):
                parts["decoder_projections"] += amount["other"]
                parts["decoder_attention"] += amount["attention"]
            elif re.search(r"\.layers\.\d+\.mlp$", name):
                parts["decoder_mlp"] += amount["total"]
            elif re.search(r"cross_blocks\.\d+$", name):
                parts["cross_projections"] += amount["other"]
                parts["cross_attention"] += amount["attention"]
            elif name.endswith("lm_head"):
                parts["lm_head"] += amount["total"]
            elif re.search(r"(multi_modal_projector|MultiModalProjector)$", name):
                parts["projector"] += amount["total"]
        return parts


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    made = {}

    def make(family):
        if family not in made:
            path = tmp_path_factory.mktemp(family) / "config.json"
            path.write_text(json.dumps(CONFIGS[family]))
            geometry = load(path)
            cross = METHODS.get("visor")().layers(geometry)[1]
            model = build(geometry, "cpu", "float32", cross_layers=cross)
            made[family] = RandomModel(from_config(model.config, geometry.name), model)
        return made[family]

    return make


CASES = [(family, name) for family in CONFIGS for name in METHODS]


def counted(loaded, method, num_visual):
    """(prefill parts, decode parts, bytes after the prefill, the schedule as it ran)."""
    prepared = [loaded.sample(num_visual, NUM_TEXT)]
    schedules = [method.schedule(loaded.geometry, num_visual)]
    inside = tower_reduction(schedules[0])
    options = {} if inside is None else {"inside": inside}
    with Count() as encode:
        vision = loaded.encode(prepared, taps_of(schedules), schedules[0].image_scale, **options)
    if inside is not None:  # its blocks run one by one, outside the tower module
        encode.parts["tower"] = encode.total - encode.parts["scoring"] - encode.parts["projector"]
    with Count() as prefill:
        if method.adaptive:
            schedules = loaded.resolve(vision, schedules)
        states = loaded.prefill(prepared, vision, schedules, NEW_TOKENS)
    held = sum(cache_bytes(state.cache) for state in states)
    with Count() as decode:
        loaded.decode(states, NEW_TOKENS - 1)
    return encode.parts + prefill.parts, decode.parts, held, schedules[0]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_every_part_of_every_method(model_of, family, name):
    loaded, method = model_of(family), METHODS.get(name)()
    num_visual = loaded.geometry.vision.visual_tokens_per_tile
    try:
        choices = method.settings(loaded.geometry, num_visual)
        method = choices[len(choices) // 2]  # where the dial stands half way
        loaded.check([method.schedule(loaded.geometry, num_visual)])
    except ValueError as error:
        pytest.skip(f"{name} does not run on this family: {error}")
    prefill, decode, held, schedule = counted(loaded, method, num_visual)
    cost = price(loaded.geometry, schedule, NUM_TEXT, num_new_tokens=NEW_TOKENS)
    for part in PARTS:
        assert prefill[part] == pytest.approx(cost.parts[part], rel=1e-3), part
        assert decode[part] == pytest.approx(cost.decode_parts[part], rel=1e-3), f"{part} while decoding"
    assert held == cost.kv_bytes * 4 // loaded.geometry.dtype_bytes
