"""Averaged token grids in training are those of the methods, prompt and all; targets move to their windows."""

from dataclasses import replace

import pytest
import torch
from tiny_checkpoint import make_image, make_llava, make_processor
from tiny_models import wake_cross_blocks

from visor.model.conversion import convert
from visor.reduction.pooling import Pooling
from visor.reduction.pooling_by import PoolingBy
from visor.training.auxiliary.word_heads import slot_in
from visor.training.averaging import averaged, averaged_grid
from visor.training.batch import Batch
from visor.training.data import Example
from visor.training.encoding import Encoder
from visor.training.forward import PackedModel
from visor.training.objectives import VisorObjective
from visor.training.rows import AttentionTarget
from visor.vision.features import VisionFeatures

CROSS_LAYERS, SELF_LAYERS, CONFIGURATIONS = [0, 2, 4], [1, 3], [[], [1, 3]]
BY_2, BY_4 = (lambda side, by=by: PoolingBy(by).shape(side, side) for by in (2, 4))


@pytest.fixture(scope="module")
def packed():
    torch.manual_seed(0)
    visor = convert(make_llava(), CROSS_LAYERS, SELF_LAYERS, configurations=CONFIGURATIONS)
    return PackedModel(wake_cross_blocks(visor).eval())


@pytest.fixture
def batch(packed):
    encoder = Encoder(make_processor(), packed.adapter.image_token_ids)
    texts = ("what 1?", "what is in 1 2?")
    rows = [encoder.encode(Example(t, make_image(i), (((t, "1"),),), ("k",))) for i, t in enumerate(texts)]
    return Batch.of(rows, 0)


@pytest.mark.parametrize(
    ("method", "shape_of", "keep"), [(Pooling(side=3), lambda _: (3, 3), 9), (PoolingBy(2), BY_2, 18)]
)
def test_the_grid_is_averaged_as_the_method_does_it_and_the_prompt_shrinks(packed, batch, method, shape_of, keep):
    with torch.no_grad():
        features = packed.image_features(batch)
    smaller, some = averaged(batch, features, shape_of, 0)
    expected = method.reduce_features(VisionFeatures(features[0][0][None], "projected", grid=(6, 6)), keep)
    torch.testing.assert_close(some[0][0], expected.features_BTD[0])
    assert smaller.rows[0].num_visual == keep and int((smaller.position_BS[0] == keep).sum()) == 1


def test_a_grid_of_its_own_shape_is_left_alone_and_a_larger_one_refused(packed, batch):
    with torch.no_grad():
        features = packed.image_features(batch)
    assert averaged(batch, features, lambda side: (side, side), 0)[1][0][0] is features[0][0]
    with pytest.raises(ValueError, match="to a grid of 7 x 7"):
        averaged_grid(features[0][0], (7, 7))
    with pytest.raises(ValueError, match="cannot average 35 visual tokens"):
        averaged_grid(features[0][0][:-1], (3, 3))


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("index", [0, 1])
def test_training_on_an_averaged_grid_computes_what_a_model_with_that_reduction_computes(packed, batch, factor, index):
    reduction = {"method": "pooling_by", "params": {"factor": factor}}
    carrying = convert(make_llava(), CROSS_LAYERS, SELF_LAYERS, configurations=CONFIGURATIONS, reduction=reduction)
    carrying.load_state_dict(packed.model.state_dict())
    carrying.eval()
    with torch.no_grad():
        features = packed.image_features(batch)
        smaller, some = averaged(batch, features, lambda side: PoolingBy(factor).shape(side, side), 0)
        logits_AW = packed.logits(smaller, some, CONFIGURATIONS[index])
        for row, line_BS in zip(batch.rows, smaller.labels_BS, strict=True):
            ids = torch.tensor([[*row.prefix, *row.segments[0].ids]])
            alone = carrying(ids, **row.pixel_inputs, configuration=index, use_cache=False).logits[0]
            asked = (line_BS[: len(alone)] != -100).nonzero()[:, 0]
            expected, logits_AW = logits_AW[: len(asked)], logits_AW[len(asked) :]
            torch.testing.assert_close(alone[asked], expected, atol=1e-4, rtol=1e-4)
    assert len(logits_AW) == 0


def test_facts_and_attention_targets_move_to_their_windows_and_facts_that_disagree_to_parts_of_them(packed, batch):
    first = len(batch.rows[0].prefix) - 36
    facts = [(0, 2, 7), (1, 3, 8), (6, 2, 9), (7, 2, 5), (7, 3, 8), (35, 2, 7), (34, 2, 7)]  # patch, slot, word
    row = replace(
        batch.rows[0],
        visual_facts=tuple((first + patch, slot, word) for patch, slot, word in facts),
        question_facts=((1, 2, 7),),
        attention_targets=(AttentionTarget(1, (0, 1, 13), False), AttentionTarget(2, (35,), True)),
    )
    with torch.no_grad():
        features = packed.image_features(batch)
    smaller = averaged(replace(batch, rows=(row, batch.rows[1])), features, BY_2, 0)[0].rows[0]
    left, right = slot_in(0, 2), slot_in(1, 2)
    expected = [(0, 2, 7), (0, 3, 8), (3, 3, 8), (3, left, 9), (3, right, 5), (17, 2, 7)]
    assert [(place - first, slot, word) for place, slot, word in smaller.visual_facts] == expected
    quarter = averaged(replace(batch, rows=(row, batch.rows[1])), features, BY_4, 0)[0].rows[0]
    # Patches 0 and 1 are above 6 and 7.
    expected = [(3, 8), (slot_in(0, 2), 7), (slot_in(2, 2), 9), (slot_in(3, 2), 5)]
    assert [fact[1:] for fact in quarter.visual_facts if fact[0] == first] == expected
    assert smaller.question_facts == row.question_facts
    assert smaller.attention_targets == (AttentionTarget(1, (0, 6), False), AttentionTarget(2, (17,), True))


def test_a_step_is_named_by_what_it_ran(packed, batch):
    objective = VisorObjective(((1, 3),), factors=(4,), pooled_share=1.0)
    (one,) = objective.passes(packed, batch, packed.image_features(batch), 0)
    assert one.name == "2 SELF pooled 4x"
