"""What the methods of the encoder's side execute to choose tokens costs what they are priced at, FLOP for FLOP."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from samples import loaded
from tiny_models import make_model
from torch.utils.flop_counter import FlopCounterMode

from budgets.costs import price
from budgets.geometry import from_config
from budgets.registry import METHODS
from visor.families.base import adapter_for
from visor.reduction.method import tower_reduction
from visor.reduction.tome import lengths
from visor.vision.features import encode_images
from visor.vision.tower import TowerWalk

AFTER_TOWER = ("cdpruner", "divprune", "fastervlm", "hired", "prumerge", "prumerge+", "visionzip", "vispruner")
NUM_TEXT = 7


def counted(work):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        result = work()
    return result, counter.get_total_flops()


@pytest.mark.parametrize("keep", [1, 5, 12])
@pytest.mark.parametrize("name", AFTER_TOWER)
def test_choosing_costs_what_it_is_priced_at(name, keep):
    model = loaded("llava", "eager")  # eager: the counter misses SDPA on the CPU
    method, adapter = METHODS.get(name)(keep=keep), model.adapter
    inputs = [{"pixel_values": torch.randn(1, 3, 56, 56)}]
    encode = lambda taps: encode_images(adapter, inputs, ["image"], taps)[0]
    _, plain = counted(lambda: encode(()))
    vision, with_taps = counted(lambda: encode(method.taps))
    schedule = method.schedule(model.geometry, 16)
    if method.stage == "projected":
        vision = type(vision)(torch.randn(1, 16, 64), "projected", text=(torch.randn(NUM_TEXT, 64),))
    _, rule = counted(lambda: method.reduce_features(vision, keep))
    assert with_taps - plain + rule == price(model.geometry, schedule, NUM_TEXT).parts["scoring"] > 0


@pytest.mark.parametrize("keep", [4, 8, 15])
def test_merging_in_the_tower_costs_what_it_is_priced_at(keep):
    model, method = loaded("llava", "eager"), METHODS.get("tome")(keep=keep)
    schedule, walk = method.schedule(model.geometry, 16), TowerWalk(model.adapter)
    _, flops = counted(lambda: method.reduce_in_tower(walk, torch.randn(1, 3, 56, 56), keep))
    cost = price(model.geometry, schedule, NUM_TEXT)
    assert flops == cost.parts["tower"] + cost.parts["scoring"]
    assert (
        cost.parts["tower"]
        < price(model.geometry, METHODS.get("random")(keep=keep).schedule(model.geometry, 16), 7).parts["tower"]
    )
    assert len(lengths(16, keep, len(walk.blocks))) == model.geometry.vision.feature_blocks


@pytest.mark.parametrize(("tower", "num_blocks"), [("clip", 2), ("clip", 5), ("siglip", 5)])
def test_cutting_in_the_tower_costs_at_most_what_it_is_priced_at(tower, num_blocks):
    """How much goes early depends on the image; an even look, which cuts nothing early, is the price."""
    model = make_model("llava", "eager") if tower == "clip" else siglip("eager")
    vision = model.config.vision_config
    walk = TowerWalk(adapter_for(model))
    walk.blocks = [walk.blocks[0]] * num_blocks
    geometry, side = from_config(model.config), vision.image_size
    geometry = replace(geometry, vision=replace(geometry.vision, feature_blocks=num_blocks))
    num_visual = (side // vision.patch_size) ** 2
    method, tiles = METHODS.get("flowcut")(keep=5), torch.randn(1, 3, side, side)
    cost = price(geometry, method.schedule(geometry, num_visual), NUM_TEXT)
    priced = cost.parts["tower"] + cost.parts["scoring"]
    nearly_all = METHODS.get("flowcut")(keep=num_visual - 1).schedule(geometry, num_visual)
    assert cost.parts["tower"] < price(geometry, nearly_all, NUM_TEXT).parts["tower"]  # the last block runs on the rest
    _, flops = counted(lambda: method.reduce_in_tower(walk, tiles, 5))
    assert 0 < flops <= priced
    with torch.no_grad():
        walk.blocks[0].self_attn.q_proj.weight.zero_()
        walk.blocks[0].self_attn.q_proj.bias.zero_()
    _, flops = counted(lambda: method.reduce_in_tower(walk, tiles, 5))
    assert flops == priced


# --- the walk through the tower -------------------------------------------------------------------------------------


class Nothing:
    """Reduces nothing: the walk must be the tower."""

    def reduce(self, walk, tiles):
        hidden = walk.embed(tiles)
        for block in walk.blocks:
            hidden = walk.feed_forward(block, walk.attend(block, hidden))
        return walk.features(hidden)


def siglip(attention="sdpa"):
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent))
    from tiny_checkpoint import make_llava

    return make_llava(attention)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_a_walk_that_changes_nothing_is_the_tower(tower):
    model = make_model("llava") if tower == "clip" else siglip()
    adapter, side = adapter_for(model), model.config.vision_config.image_size
    tiles = torch.randn(2, 3, side, side)
    rows = encode_images(adapter, [{"pixel_values": tiles[i : i + 1]} for i in range(2)], ["a", "b"])
    found = Nothing().reduce(TowerWalk(adapter), tiles)
    assert torch.equal(found, torch.cat([row.features_BND for row in rows]))


@pytest.mark.parametrize("name", ["tome", "flowcut"])
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@torch.no_grad()
def test_methods_in_the_tower_keep_their_number_on_both_towers(tower, name):
    model = make_model("llava") if tower == "clip" else siglip()
    adapter, side = adapter_for(model), model.config.vision_config.image_size
    tiles = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    num_visual = (side // model.config.vision_config.patch_size) ** 2
    walk = TowerWalk(adapter)
    for keep in (num_visual // 2, num_visual - 1):
        method = METHODS.get(name)(keep=keep)
        hidden, kept = method.reduce_in_tower(walk, tiles, keep)
        assert walk.features(hidden).shape[1] == keep and kept.sum(1).tolist() == [keep] * 3
        for row in range(3):
            alone, alone_kept = method.reduce_in_tower(walk, tiles[row : row + 1], keep)
            assert torch.equal(alone_kept[0], kept[row]) and torch.allclose(alone[0], hidden[row], atol=1e-4)


def test_features_made_in_the_tower_serve_no_other_method():
    model = loaded("llava")
    schedule = METHODS.get("tome")(keep=9).schedule(model.geometry, 16)
    from samples import samples

    sample = samples("llava")[0]
    row = model.encode([sample], inside=tower_reduction(schedule))[0]
    assert row.num_tokens == 9 and row.inside == schedule.encoder
    other = METHODS.get("random")(keep=9).schedule(model.geometry, 16)
    with pytest.raises(ValueError, match="encoded with inside="):
        model.reduce([row], [other])
