"""What stands in which part of an averaged window: stated as the scene has it, read off averaged tokens, learnable."""

from dataclasses import replace

import pytest
import torch
from tiny_checkpoint import make_image, make_llava, make_processor

from visor.embedded.scene_tokens import SceneTokens
from visor.embedded.vocabulary import build_processor
from visor.model.conversion import convert
from visor.training.averaging import averaged
from visor.training.batch import Batch
from visor.training.data import Example, WorldSource
from visor.training.encoding import Encoder
from visor.training.forward import PackedModel
from visor.training.objectives import NestedPooling, VisorObjective
from visor.worlds.worlds import scene

SHAPES = {2: (12, 6), 4: (6, 6)}


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("world", ["forms", "digits", "charts"])
def test_words_stand_in_the_part_of_the_window_where_the_scene_has_them(world, factor):
    processor = build_processor(12)
    tokenizer, image_id = processor.tokenizer, processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    drawn = scene(world, "train", 5)
    row = Encoder(processor, [image_id], targets_of=SceneTokens(processor.tokenizer)).encode(WorldSource(world).read(5))
    smaller = averaged(Batch.of([row], 0), [(torch.zeros(144, 4),)], lambda _: SHAPES[factor], 0)[0].rows[0]
    first, (rows, columns) = len(row.prefix) - 144, SHAPES[factor]
    stated = {(place - first, part, tokenizer.decode([word])) for place, part, word in smaller.window_words}
    expected = set()
    for label in drawn.labels:
        x, y = (min(11, int(v / 12)) for v in (label.x, label.y))
        part = x % 2 + (2 * (y % 2) if factor == 4 else 0)
        expected |= {((y * rows // 12) * columns + x // 2, part, word) for word in label.words}
    assert stated == expected and row.window_words == () and smaller.patch_words == ()
    assert Encoder(processor, [image_id]).encode(WorldSource(world).read(5)).patch_words == ()


@pytest.fixture
def batch_of():
    """A batch of two rows for a model, with a word written in two patches of each."""

    def make(packed):
        encoder = Encoder(make_processor(), packed.adapter.image_token_ids)
        rows = [
            encoder.encode(Example(t, make_image(i), (((t, "1"),),), ("k",))) for i, t in enumerate(("what 1?", "n"))
        ]
        first = [len(row.prefix) - row.num_visual for row in rows]
        words = ((0, 7), (1, 8)), ((0, 8), (35, 9))
        written = [tuple((a + place, word) for place, word in b) for a, b in zip(first, words, strict=True)]
        return Batch.of([replace(row, patch_words=each) for row, each in zip(rows, written, strict=True)], 0)

    return make


def test_the_loss_is_of_the_averaged_features_and_full_grids_are_not_asked(batch_of):
    packed = PackedModel(convert(make_llava(), self_layers=[1, 3], cross_layers=[0, 2, 4]))
    packed.add_window_word_head(20)
    batch = batch_of(packed)
    features = packed.image_features(batch)
    smaller, some = averaged(batch, features, lambda _: (6, 3), 0)
    loss, right = packed.window_words.loss_sum(smaller.rows, some)
    expected, found = 0.0, []
    for b, window, part, word in ((0, 0, 0, 7), (0, 0, 1, 8), (1, 0, 0, 8), (1, 17, 1, 9)):
        logits_PW = packed.window_words.classifier(packed.window_words.norm(some[b][0][window])).view(4, 20)
        expected -= logits_PW[part].log_softmax(-1)[word].item()
        found.append(int(logits_PW[part].argmax()) == word)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and right == found
    assert packed.window_words.loss_sum(batch.rows, features) == (None, [])


@pytest.mark.parametrize("rival", [False, True])
def test_window_words_join_the_loss_and_are_learned_by_visor_and_by_m3(batch_of, rival):
    torch.manual_seed(0)
    model = make_llava()
    packed = PackedModel(model if rival else convert(model, self_layers=[1, 3], cross_layers=[0, 2, 4]))
    packed.add_window_word_head(20)
    batch = batch_of(packed)
    if rival:
        objective = NestedPooling((3,), fact_supervision_weight=2.0)
    else:
        objective = VisorObjective(((1, 3),), factors=(4,), pooled_share=1.0, fact_supervision_weight=2.0)
    (plain,) = replace(objective, fact_supervision_weight=0.0).passes(packed, batch, packed.image_features(batch), 0)
    (one,) = objective.passes(packed, batch, packed.image_features(batch), 0)
    smaller, some = averaged(batch, packed.image_features(batch), lambda _: (3, 3), 0)
    loss, _ = packed.window_words.loss_sum(smaller.rows, some)
    assert one.answers.loss_sum.item() == pytest.approx(plain.answers.loss_sum.item() + 2 * loss.item(), rel=1e-5)
    optimizer = torch.optim.Adam([*packed.model.parameters(), *packed.window_words.parameters()], 1e-2)
    for _ in range(60):
        (one,) = objective.passes(packed, batch, packed.image_features(batch), 0)
        optimizer.zero_grad()
        one.answers.loss_sum.backward()
        optimizer.step()
    assert one.auxiliary["window words"] == [True] * 4


@pytest.mark.parametrize("rival", [False, True])
def test_a_share_of_the_steps_asks_for_words_alone_and_moves_no_decoder(batch_of, rival):
    model = make_llava()
    packed = PackedModel(model if rival else convert(model, self_layers=[1, 3], cross_layers=[0, 2, 4]))
    packed.add_window_word_head(20)
    batch = batch_of(packed)
    how = {"fact_supervision_weight": 2.0, "window_words_share": 0.5, "seed": 3}
    objective = NestedPooling((6, 3), **how) if rival else VisorObjective(((),), factors=(2, 4), **how)
    alone = [step for step in range(60) if objective.is_window_words_step(step)]
    assert 15 < len(alone) < 45 and all(objective.num_passes(step) == 1 for step in alone)
    (one,) = objective.passes(packed, batch, packed.image_features(batch), alone[0])
    one.answers.loss_sum.backward()
    assert one.name == "words" and one.answers.right == [[], []] and set(one.auxiliary) == {"window words"}
    moved = {name for name, p in packed.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("projector" in name for name in moved) and not any("language_model" in name for name in moved)
    asked = next(step for step in range(60) if step not in alone)
    assert all(one.answers.right[0] for one in objective.passes(packed, batch, packed.image_features(batch), asked))
    assert not any(replace(objective, window_words_share=0.0).is_window_words_step(step) for step in range(60))


def test_a_batch_without_words_moves_nothing(batch_of):
    packed = PackedModel(convert(make_llava(), self_layers=[1, 3], cross_layers=[0, 2, 4]))
    packed.add_window_word_head(20)
    batch = batch_of(packed)
    batch = replace(batch, rows=tuple(replace(row, patch_words=()) for row in batch.rows))
    objective = VisorObjective(((),), factors=(2,), fact_supervision_weight=1.0, window_words_share=1.0)
    (one,) = objective.passes(packed, batch, packed.image_features(batch), 0)
    one.answers.loss_sum.backward()
    assert one.auxiliary == {} and not any(p.grad is not None and p.grad.any() for p in packed.model.parameters())
