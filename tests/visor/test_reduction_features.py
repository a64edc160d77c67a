"""Encoder-side rules on hand-made features: what VisionZip merges, what pooling averages, what random draws.

Shapes: B samples, N visual tokens, E feature width, H key width.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from budgets.geometry import ModelGeometry, VisionGeometry
from budgets.registry import METHODS
from visor.reduction.visionzip import merge_leftover
from visor.vision.features import VisionFeatures
from visor.vision.taps import attention_received

TOWER = VisionGeometry(2, 32, 64, 4, 4, 24, projector=((32, 48),))
TINY = ModelGeometry("tiny", 6, 48, 96, 4, 2, 12, 100, vision=TOWER)


def features(batch=2, side=6, width=8, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    num = side * side
    taps = {
        "salience": torch.rand((batch, num), generator=generator),
        "keys": torch.randn((batch, num, 8), generator=generator),
    }
    values = torch.randn((batch, num, width), generator=generator)
    keys = tuple(f"image {i}" for i in range(batch))
    return VisionFeatures(values, taps=taps, grid=(side, side), sample_keys=keys, **options)


def row(vision, index):
    part = slice(index, index + 1)
    taps = {name: tap[part] for name, tap in vision.taps.items()}
    return VisionFeatures(
        vision.features_BND[part], vision.stage, taps, vision.grid, vision.sample_keys[part], image_scale=1.0
    )


# --- VisionZip ------------------------------------------------------------------------------------------------------

# Seven tokens. Salience makes 1 and 5 dominant. Leftover: 0 2 3 4 6; two targets at step 5 // 2 = 2: tokens 0 and 3.
# Token 2 has the key of 0; 4 and 6 that of 3.
SALIENCE = torch.tensor([[0.1, 0.9, 0.2, 0.1, 0.1, 0.8, 0.0]])
KEYS = torch.tensor([[[1.0, 0.0], [0, 0], [5, 0.1], [0, 1], [0.1, 9], [0, 0], [0, 0.2]]])
VALUES = torch.tensor([[[1.0], [20.0], [4.0], [100.0], [10.0], [30.0], [20.0]]])


def seven():
    return VisionFeatures(VALUES, taps={"salience": SALIENCE, "keys": KEYS}, sample_keys=("seven",))


@pytest.mark.parametrize(("merge", "merged"), [("add", [1 + 4, 100 + 15]), ("mean", [2.5, 130 / 3])])
def test_visionzip_on_seven_tokens(merge, merged):
    reduced = METHODS.get("visionzip")(keep=4, contextual=0.5, merge=merge).reduce_features(seven(), 4)
    assert torch.allclose(reduced.features_BTD[0, :, 0], torch.tensor([20.0, 30.0, *merged]))
    assert reduced.kept_BN.tolist() == [[True, True, False, True, False, True, False]]


def test_visionzip_without_merging_is_the_most_salient_in_order():
    reduced = METHODS.get("visionzip")(contextual=0).reduce_features(seven(), 3)
    assert reduced.features_BTD[0, :, 0].tolist() == [20.0, 4.0, 30.0]


def test_visionzip_puts_the_cls_first():
    vision = VisionFeatures(VALUES, taps=seven().taps, sample_keys=("a",), cls_B1D=torch.tensor([[[-1.0]]]))
    reduced = METHODS.get("visionzip")(contextual=0).reduce_features(vision, 3)
    assert reduced.features_BTD[0, :, 0].tolist() == [-1.0, 20.0, 30.0]
    assert reduced.kept_BN.sum() == 2


def test_a_target_that_nobody_joins_stays_itself():
    merged, target = merge_leftover(VALUES[:, [0, 3, 4]], KEYS[:, [0, 3, 4]], 2, "add")
    assert target.tolist() == [0, 1]
    assert merged[0, :, 0].tolist() == [1.0, 110.0]


@pytest.mark.parametrize("num_contextual", [3, 5, 100])
def test_more_contextual_tokens_than_leftover(num_contextual):
    merged, target = merge_leftover(VALUES[:, :3], KEYS[:, :3], num_contextual, "add")
    assert target.tolist() == [0, 1, 2]
    assert torch.equal(merged, VALUES[:, :3])


@pytest.mark.parametrize("keep", range(1, 37))
def test_visionzip_gives_any_number_of_tokens(keep):
    reduced = METHODS.get("visionzip")().reduce_features(features(), keep)
    assert reduced.features_BTD.shape == (2, keep, 8)
    assert reduced.kept_BN.sum(1).tolist() == [keep, keep]


def test_visionzip_needs_its_taps():
    with pytest.raises(ValueError, match="encoded without the tap 'salience'"):
        METHODS.get("visionzip")().reduce_features(VisionFeatures(VALUES), 3)


@pytest.mark.parametrize("keep", [1, 7, 20, 35])
def test_visionzip_executes_the_flops_that_it_is_priced_at(keep):
    method = METHODS.get("visionzip")(keep=keep)
    q, k = torch.randn(2, 1, 4, 36, 8)
    with FlopCounterMode(display=False) as counter:
        attention_received(q, k)
        method.reduce_features(features(batch=1), keep)
    assert counter.get_total_flops() == method.scoring_flops(TINY, method.schedule(TINY, 36), 9)


# --- the controls ---------------------------------------------------------------------------------------------------


def test_pooling_averages_blocks():
    vision = VisionFeatures(torch.arange(16.0).view(1, 16, 1), grid=(4, 4))
    reduced = METHODS.get("pooling")().reduce_features(vision, 4)
    assert reduced.features_BTD[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    assert reduced.kept_BN is None


def test_pooling_needs_a_grid():
    with pytest.raises(ValueError, match="cannot average a token grid of None"):
        METHODS.get("pooling")().reduce_features(VisionFeatures(VALUES), 4)


def test_random_depends_on_seed_and_image_only():
    vision, method = features(batch=3), METHODS.get("random")(seed=4)
    torch.manual_seed(0)
    together = method.reduce_features(vision, 9).kept_BN
    torch.manual_seed(1)
    torch.rand(100)
    assert torch.equal(together, torch.cat([method.reduce_features(row(vision, i), 9).kept_BN for i in range(3)]))
    assert not torch.equal(together, METHODS.get("random")(seed=5).reduce_features(vision, 9).kept_BN)
    assert len({tuple(kept) for kept in together.tolist()}) == 3
    smaller = method.reduce_features(vision, 4).kept_BN
    assert bool((together | ~smaller).all())  # nested


def test_random_is_the_same_on_every_machine():
    kept = METHODS.get("random")(seed=0).reduce_features(row(features(), 0), 5).kept_BN
    assert kept[0].nonzero()[:, 0].tolist() == [3, 8, 14, 16, 21]


def test_random_is_uniform():
    from visor.reduction.random import random_subset

    counts = torch.zeros(36)
    for number in range(2000):
        counts[random_subset(0, str(number), 36, 9)] += 1
    assert (counts - 500).abs().max() < 100


def test_random_needs_to_know_the_images():
    with pytest.raises(ValueError, match="0 keys to draw"):
        METHODS.get("random")().reduce_features(VisionFeatures(VALUES), 3)


def test_downsampling_checks_what_it_was_given():
    with pytest.raises(ValueError, match="the tower gave 7 tokens where the schedule says 4"):
        METHODS.get("downsample")().reduce_features(seven(), 4)


@pytest.mark.parametrize("name", ["visionzip", "pooling", "random", "downsample"])
def test_keeping_everything_changes_nothing(name):
    vision = features()
    assert torch.equal(METHODS.get(name)().reduce_features(vision, 36).features_BTD, vision.features_BND)


@pytest.mark.parametrize("name", ["visionzip", "pooling", "random"])
def test_a_batch_is_its_samples(name):
    vision, method = features(batch=3), METHODS.get(name)()
    together = method.reduce_features(vision, 9).features_BTD
    apart = torch.cat([method.reduce_features(row(vision, i), 9).features_BTD for i in range(3)])
    assert torch.allclose(together, apart, atol=1e-6)


def test_a_decoder_method_does_not_reduce_features_nor_the_other_way_round():
    with pytest.raises(TypeError, match="FastV does not reduce the encoder's output"):
        METHODS.get("fastv")().reduce_features(seven(), 3)
    with pytest.raises(TypeError, match="VisionZip does not reduce inside the decoder"):
        METHODS.get("visionzip")().score_tokens(None)
