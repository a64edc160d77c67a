"""What is read of the vision tower: equal to eager attention, in the order of the decoder's tokens, without a trace."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make_model

from budgets.registry import METHODS
from visor.families.base import adapter_for
from visor.vision.features import VisionFeatures, encode_images
from visor.vision.taps import ROWS_PER_CHUNK, attention_received, tower_blocks


def pixels(seed, side=56):
    return {"pixel_values": torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed))}


def anyres(seed, size):
    tiles = torch.randn(1, 5, 3, 56, 56, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": tiles, "image_sizes": torch.tensor([size])}


@torch.no_grad()
def encode(model, inputs, taps=("salience", "keys"), **options):
    keys = [str(i) for i in range(len(inputs))]
    return encode_images(adapter_for(model), inputs, keys, taps, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_cls_attention_is_the_eager_row(attention):
    inputs = [pixels(1), pixels(2)]
    rows = encode(make_model("llava", attention), inputs)
    tower = make_model("llava", "eager").model.vision_tower
    with torch.no_grad():
        block = tower(torch.cat([i["pixel_values"] for i in inputs]), output_attentions=True).attentions[-2]
    expected = block.mean(1)[:, 0, 1:]
    assert (torch.cat([row.tap("salience") for row in rows]) - expected).abs().max() < 1e-4
    assert expected.std() > 1e-3  # the test would say nothing of uniform attention
    assert rows[0].grid == (4, 4) and rows[0].cls_B1D.shape == (1, 1, 32)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_received_attention_is_the_eager_mean_in_the_order_of_the_packed_tokens(attention):
    inputs = [anyres(1, (56, 56)), anyres(2, (100, 110))]
    rows = encode(make_model("llava_onevision", attention), inputs)
    model = make_model("llava_onevision", "eager")
    for row, one in zip(rows, inputs, strict=True):
        tiles = adapter_for(model).tiles(one)
        received = model.model.vision_tower(tiles, output_attentions=True).attentions[-2].mean(1).mean(1)
        packed, _ = model.model.pack_image_features(
            [received[..., None]], one["image_sizes"], image_newline=torch.tensor([-1.0])
        )
        assert row.tap("salience").shape == (1, row.num_tokens)
        assert (row.tap("salience")[0] - packed[0][:, 0]).abs().max() < 1e-4
        assert row.tap("keys").shape[:2] == (1, row.num_tokens)


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
@torch.no_grad()
def test_features_are_the_models_own(family):
    model = make_model(family)
    one = pixels(1) if family == "llava" else anyres(1, (100, 110))
    row = encode(model, [one])[0]
    projected = row.features_BND if row.stage == "projected" else model.model.multi_modal_projector(row.features_BND)
    own = model.get_image_features(**one, return_dict=True).pooler_output[0]
    assert torch.equal(projected[0], own)


def test_long_towers_are_scored_in_chunks():
    q, k = torch.randn(2, 1, 2, ROWS_PER_CHUNK * 2 + 30, 4, generator=torch.Generator().manual_seed(0)) * 3
    whole = (q @ k.transpose(2, 3) / 2).softmax(-1).mean((1, 2))
    assert torch.allclose(attention_received(q, k), whole, atol=1e-6)
    assert torch.allclose(attention_received(q, k).sum(1), torch.ones(1))


def test_half_precision_is_scored_in_fp32():
    model = make_model("llava").to(torch.bfloat16)
    inputs = {"pixel_values": pixels(1)["pixel_values"].to(torch.bfloat16)}
    row = encode(model, [inputs])[0]
    assert row.features_BND.dtype == torch.bfloat16 and row.tap("salience").dtype == torch.float32


def test_equal_images_are_encoded_once_and_rows_stand_alone():
    model, seen = make_model("llava"), []
    handle = model.model.vision_tower.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    inputs = [pixels(1), pixels(2), pixels(1)]
    with torch.no_grad():
        rows = encode_images(adapter_for(model), inputs, ["a", "b", "a"], ["keys"])
    handle.remove()
    assert seen == [2]
    assert rows[0] is rows[2] and rows[0].sample_keys == ("a",)
    # A view would keep the batch alive in a cache that counts one row.
    assert rows[0].features_BND.untyped_storage().nbytes() == rows[0].features_BND.nbytes
    assert rows[0].num_bytes == (16 * 32 + 16 * 8 + 32) * 4


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_a_batch_is_its_images(family):
    model = make_model(family)
    inputs = [pixels(1), pixels(2)] if family == "llava" else [anyres(1, (56, 90)), anyres(2, (100, 110))]
    for together, one in zip(encode(model, inputs), inputs, strict=True):
        alone = encode(model, [one])[0]
        assert torch.allclose(together.features_BND, alone.features_BND, atol=1e-4)
        for name, tap in alone.taps.items():
            assert torch.allclose(together.tap(name), tap, atol=1e-4)


def test_no_hook_stays():
    model = make_model("llava")
    attention = tower_blocks(model.model.vision_tower)[-2].self_attn
    encode(model, [pixels(1)])
    with pytest.raises(RuntimeError):
        encode(model, [{"pixel_values": torch.zeros(1, 5, 56, 56)}])
    assert not attention.q_proj._forward_hooks and not attention.k_proj._forward_hooks


@pytest.mark.parametrize("side", [1, 2, 3])
def test_a_smaller_image_gives_fewer_tokens(side):
    row = encode(make_model("llava"), [pixels(1)], image_scale=side / 4)[0]
    assert (row.num_tokens, row.grid, row.image_scale) == (side * side, (side, side), side / 4)


def test_tiles_are_not_downsampled():
    with pytest.raises(ValueError, match="several tiles cannot be down-sampled"):
        encode(make_model("llava_onevision"), [anyres(1, (100, 110))], image_scale=0.5)


def test_unknown_taps_are_named():
    with pytest.raises(ValueError, match=r"unknown taps \['colour'\]; the taps that exist: salience, keys"):
        encode(make_model("llava"), [pixels(1)], taps=["colour"])


def test_visionzip_over_clip_keeps_the_cls_and_over_tiles_selects_packed_tokens():
    model = make_model("llava")
    row = encode(model, [pixels(1)])[0]
    reduced = METHODS.get("visionzip")().reduce_features(row, 8)
    assert reduced.features_BTD.shape == (1, 8, 32) and torch.equal(reduced.features_BTD[:, :1], row.cls_B1D)
    row = encode(make_model("llava_onevision"), [anyres(2, (100, 110))])[0]
    reduced = METHODS.get("visionzip")(contextual=0).reduce_features(row, 12)
    assert torch.equal(reduced.features_BTD[0], row.features_BND[0][reduced.kept_BN[0]])
    assert (row.tap("salience")[reduced.kept_BN] > 0).all()  # no line's end


def test_stacking_keeps_what_all_rows_have():
    rows = encode(make_model("llava"), [pixels(1), pixels(2)])
    bare = VisionFeatures(rows[1].features_BND, grid=(4, 4), sample_keys=("b",), cls_B1D=rows[1].cls_B1D)
    stack = VisionFeatures.stack([rows[0], bare])
    assert stack.features_BND.shape == (2, 16, 32) and stack.sample_keys == ("0", "b") and not stack.taps
