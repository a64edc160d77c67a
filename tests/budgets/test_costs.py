"""Analytic figures equal counted ones, FLOP for FLOP, for the plain Hugging Face models. No weights are made."""

import pytest
import torch
import transformers as hf
from transformers import AutoModelForImageTextToText

from budgets.costs import price, projector_flops, tower_flops
from budgets.geometry import from_config
from budgets.presets import preset
from budgets.schedule import LayerMode, LayerOp, Reduction, Schedule, dense
from visor.engine.compat import CACHE

TINY = ["tiny-llava", "tiny-llava-qwen2", "tiny-llava-full", "tiny-onevision", "tiny-smolvlm", "tiny-qwen2.5-vl",
        "tiny-llava-next", "tiny-idefics3", "tiny-internvl", "tiny-qwen3-vl", "tiny-qwen2-vl", "tiny-glm4v",
        "tiny-vipllava", "tiny-pixtral", "tiny-mistral3", "tiny-ovis2", "tiny-gemma3", "tiny-aya-vision",
        "tiny-qwen3-vl-moe"]  # fmt: skip
ON_THE_CPU = ["tiny-glm4v", "tiny-pixtral", "tiny-mistral3", "tiny-qwen3-vl-moe"]  # they ask tensors for values
REAL = ["llava-1.5-7b", "llava-onevision-0.5b", "qwen2-vl-7b", "qwen2.5-vl-3b", "smolvlm-256m", "qwen3-vl-4b",
        "internvl3-1b"]  # fmt: skip


@pytest.fixture(scope="module")
def model_of(configs, on_meta):
    """A whole model of a named config, on the meta device if its code allows."""
    made = {}

    def build(name):
        if name not in made:
            config = configs[name]()
            cls = AutoModelForImageTextToText._model_mapping[type(config)]
            if name in ON_THE_CPU:  # where kernels of their own would hide products of attention and experts
                made[name] = cls._from_config(config, attn_implementation="eager").eval()
                if hasattr(made[name], "set_experts_implementation"):
                    made[name].set_experts_implementation("eager")
            else:
                made[name] = on_meta(cls, config)
        return made[name]

    return build


@pytest.mark.parametrize("name", TINY + REAL)
def test_dense_decoder_and_head(model_of, count, name):
    model = model_of(name)
    decoder, geometry = model.get_decoder(), from_config(model.config)
    num_visual, num_text = 100, 37
    embeddings = torch.zeros(1, num_visual + num_text, geometry.hidden_size, device=model.device)

    def forward():
        output = decoder(inputs_embeds=embeddings, **{CACHE: hf.DynamicCache()}, use_cache=True)
        model.lm_head(output.last_hidden_state[:, -1:])

    cost = price(geometry, dense(geometry.num_layers, num_visual), num_text)
    assert count(forward) == cost.decoder_prefill + cost.parts["lm_head"]


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-onevision"])
def test_decoding(model_of, count, name):
    model = model_of(name)
    decoder, geometry = model.get_decoder(), from_config(model.config)
    cache, new_tokens = hf.DynamicCache(), 4
    embeddings = torch.empty(1, 50, geometry.hidden_size, device="meta")

    def forward(embeddings):
        output = decoder(inputs_embeds=embeddings, **{CACHE: cache}, use_cache=True)
        model.lm_head(output.last_hidden_state[:, -1:])

    def decode():
        for _ in range(new_tokens - 1):  # the prefill has given the first
            forward(embeddings[:, :1])

    cost = price(geometry, dense(geometry.num_layers, 30), 20, num_new_tokens=new_tokens)
    assert count(lambda: forward(embeddings)) == cost.decoder_prefill + cost.parts["lm_head"]
    held = lambda: sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) * geometry.dtype_bytes
    assert held() == cost.kv_bytes
    assert count(decode) == cost.decode
    assert held() == cost.kv_bytes_final


def run_tower(model, geometry, side_patches):
    """The family's own feature extraction on one image, at a number of patches a side."""
    vision, inner = geometry.vision, model.model
    side = side_patches * vision.patch_size
    if model.config.vision_config.model_type == "pixtral":  # any size; its rows and columns are read on the host
        sizes = torch.tensor([[side, side]])
        pixels = torch.zeros(1, vision.num_channels, side, side)
        return lambda: model.get_image_features(pixels, image_sizes=sizes, return_dict=True)
    if geometry.vision.image_size is None:
        grid = torch.tensor([[1, side_patches, side_patches]])
        width = vision.num_channels * vision.num_frames * vision.patch_size**2
        patches = torch.zeros(side_patches**2, width, device=model.device)
        if model.device.type == "cpu":
            return lambda: inner.visual(patches, grid_thw=grid)
        places = {"position_ids": torch.empty(side_patches**2, 2, dtype=torch.long, device="meta")}
        if model.config.model_type == "qwen3_vl":  # looked up on the host otherwise
            places["interp_indices"] = torch.empty(side_patches**2, 4, dtype=torch.long, device="meta")
            places["interp_weights"] = torch.empty(side_patches**2, 4, device="meta")
        return lambda: inner.visual(patches, grid_thw=grid, **places)
    pixels = torch.empty(1, vision.num_channels, side, side, device="meta")
    if model.config.model_type in ("ovis2", "gemma3", "aya_vision"):
        return lambda: model.get_image_features(pixels, return_dict=True)
    if hasattr(inner, "connector"):
        mask = torch.ones(1, side_patches, side_patches, dtype=torch.bool, device="meta")

        def parts():  # one after the other: their forward asks the padding mask for a value
            tower = inner.vision_model
            hidden = tower.encoder(tower.embeddings(pixels, mask), attention_mask=None).last_hidden_state
            inner.connector(hidden.contiguous())

        return parts
    if model.config.model_type == "internvl":
        return lambda: model.get_image_features(pixels, return_dict=True)
    cut = vision.num_prefix_tokens if not vision.prefix_in_output else 0

    def features():
        layers = model.config.vision_feature_layer
        states = inner.vision_tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        chosen = [states[i] for i in ([layers] if isinstance(layers, int) else layers)]
        inner.multi_modal_projector(torch.cat([state[:, cut:] for state in chosen], dim=-1))

    return features


@pytest.mark.parametrize("name", TINY + REAL)
def test_tower_and_projector(model_of, count, name):
    model = model_of(name)
    geometry = from_config(model.config)
    # Dynamic resolution: a multiple of the attention window on each side.
    side = 16 if geometry.vision.image_size is None else geometry.vision.grid_side()
    num_visual = side**2 // geometry.vision.patches_per_token
    if geometry.vision.image_size is not None:
        num_visual = geometry.vision.visual_tokens_per_tile
    cost = price(geometry, dense(geometry.num_layers, num_visual), 10)
    assert count(run_tower(model, geometry, side)) == cost.parts["tower"] + cost.parts["projector"]


@pytest.mark.parametrize("scale", [0.25, 0.5, 0.75])
def test_smaller_image_costs_a_smaller_tower(model_of, count, scale):
    model = model_of("tiny-llava")
    geometry = from_config(model.config)
    side = geometry.vision.grid_side(scale)
    schedule = Schedule(
        (LayerOp(),) * 6, 16, encoder=Reduction("downsample", side**2) if side < 4 else None, image_scale=scale
    )
    cost = price(geometry, schedule, 10)
    assert count(run_tower(model, geometry, side)) == cost.parts["tower"] + cost.parts["projector"]


def test_fvcore_counts_the_same(configs):
    """A second counter: fvcore counts MACs, skips SDPA unless told how, and drops what the output does not need."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it calls torch.jit.script, which is deprecated
        from fvcore.nn import FlopCountAnalysis

    config = configs["tiny-llava"]()
    config._attn_implementation = "sdpa"
    model = hf.LlavaForConditionalGeneration(config).eval()
    geometry = from_config(config)

    def attention(inputs, outputs):  # MACs of q.k and of weights.v
        (batch, heads, queries, width), keys = inputs[0].type().sizes(), inputs[1].type().sizes()[2]
        return 2 * batch * heads * queries * keys * width

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, embeddings):
            hidden = self.model.get_decoder()(inputs_embeds=embeddings, use_cache=False).last_hidden_state
            return self.model.lm_head(hidden[:, -1:])

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixels):
            return self.model.model.vision_tower(pixels).last_hidden_state

    def flops(module, argument):
        analysis = FlopCountAnalysis(module, argument).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        analysis.set_op_handle("aten::scaled_dot_product_attention", attention)
        analysis.set_op_handle("aten::layer_norm", lambda inputs, outputs: 0)  # we count matrix products only
        return 2 * analysis.total()

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jit.trace warns about every shape that becomes a constant
        decoder, tower = flops(Decoder(), torch.zeros(1, 40, 64)), flops(Tower(), torch.zeros(1, 3, 56, 56))
    cost = price(geometry, dense(6, 16), 24)
    assert decoder == cost.decoder_prefill + cost.parts["lm_head"]
    assert tower == cost.parts["tower"]


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_parts_and_layers_add_up():
    geometry = preset("llava-onevision-0.5b")
    modes = [LayerMode.TEXT, LayerMode.CROSS, LayerMode.SELF] * 8
    cost = price(geometry, Schedule(tuple(LayerOp(mode) for mode in modes), 729), 50, num_new_tokens=3)
    assert sum(cost.per_layer) == cost.decoder_prefill
    assert cost.prefill == sum(cost.parts.values())
    assert cost.visual_tokens == [0, 729, 729] * 8
    text, cross, full = cost.layers[:3]
    assert cross.flops - text.flops == cross.cross_projections + cross.cross_attention
    width, query, key = 896, 896, 128
    assert cross.cross_projections == 2 * 50 * 2 * width * query + 2 * 729 * (2 * width * key + 7 * width)
    assert cross.cross_attention == 4 * query * 50 * 729
    assert full.attention == 4 * query * 779**2
    assert full.attention_causal == 4 * query * 779 * 780 // 2
    # Text layers cache text, cross layers text and the visual keys, self layers everything.
    assert [layer.kv_bytes // (2 * key * 2) for layer in (text, cross, full)] == [50, 50 + 729, 779]
    assert cost.kv_bytes_final - cost.kv_bytes == 2 * 24 * 2 * key * 2


def test_cross_layers_without_an_image_cost_what_text_layers_do():
    geometry = preset("llava-onevision-0.5b")
    cost = lambda mode: price(geometry, Schedule((LayerOp(mode),) * 24, 0), 50, num_new_tokens=5)
    cross, text = cost(LayerMode.CROSS), cost(LayerMode.TEXT)
    assert (cross.parts, cross.decode, cross.kv_bytes) == (text.parts, text.decode, text.kv_bytes)
    assert cross.parts["tower"] == cross.parts["projector"] == 0


def test_reduction_before_the_projector_saves_projecting():
    geometry = preset("llava-1.5-7b")
    parts = lambda method: price(geometry, Schedule((LayerOp(),) * 32, 576, Reduction(method, 144)), 30).parts
    before, after = parts("random"), parts("pooling")  # one reads tower features, the other projected ones
    assert before["projector"] == projector_flops(geometry.vision, 144)
    assert after["projector"] == projector_flops(geometry.vision, 576)
    assert before["tower"] == after["tower"] == tower_flops(geometry.vision, 576)


def test_tiles_are_projected_before_they_are_packed():
    parts = lambda model: price(preset(model), Schedule((LayerOp(),) * 32, 2880, Reduction("random", 144)), 30).parts
    assert parts("llava-next-7b")["projector"] == projector_flops(preset("llava-next-7b").vision, 2880)
    assert parts("llava-1.5-7b")["projector"] == projector_flops(preset("llava-1.5-7b").vision, 144)


def test_tiles():
    geometry = preset("llava-onevision-7b")
    one, ten = (price(geometry, dense(28, num_visual), 30) for num_visual in (729, 7290))
    assert ten.parts["tower"] == 10 * one.parts["tower"]
    assert price(geometry, dense(28, 5000), 30, tiles=10).parts["tower"] == ten.parts["tower"]
    assert price(geometry, dense(28, 730), 30).parts["tower"] == 2 * one.parts["tower"]


def test_bad_input_is_refused():
    geometry = preset("llava-1.5-7b")
    with pytest.raises(ValueError, match="31 layers, llava-1.5-7b has 32"):
        price(geometry, dense(31, 576), 30)
    with pytest.raises(ValueError, match="num_text=-1"):
        price(geometry, dense(32, 576), -1)
