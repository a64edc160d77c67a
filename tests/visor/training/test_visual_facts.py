"""Facts predicted from visual tokens: at the right tokens, after the right layers, and learnable."""

from dataclasses import replace

import pytest
import torch
from tiny_checkpoint import make_image, make_llava, make_processor
from tiny_models import wake_cross_blocks

from visor.embedded.scene_tokens import SceneTokens
from visor.embedded.symbolic import PatchWords
from visor.embedded.vocabulary import build_processor
from visor.model.conversion import convert
from visor.training.auxiliary.word_heads import NUM_SLOTS
from visor.training.batch import Batch
from visor.training.data import BadRow, Example, WorldSource
from visor.training.encoding import Encoder
from visor.training.forward import PackedModel
from visor.training.objectives import NestedPooling, VisorObjective
from visor.worlds.world import SLOTS
from visor.worlds.worlds import scene


def test_facts_stand_at_the_patch_of_their_label():
    processor = build_processor(12)
    image_id = processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    example = WorldSource("forms").read(3)
    row = Encoder(processor, [image_id], targets_of=SceneTokens(processor.tokenizer)).encode(example)
    patches, vocabulary = PatchWords(processor.tokenizer, 12), processor.tokenizer.get_vocab()
    first = row.prefix.index(image_id)
    expected = {
        (first + patches.patch_of(label), SLOTS.index(slot), vocabulary[word])
        for label in scene("forms", "train", 3).labels
        for slot, word in label.facts
    }
    assert expected and set(row.visual_facts) == expected
    assert all(row.prefix[place] == image_id for place, _, _ in row.visual_facts)
    assert Encoder(processor, [image_id]).encode(example).visual_facts == ()


def test_a_tokenizer_without_the_words_is_told_so():
    packed = PackedModel(make_llava())
    labelled = Example("x", make_image(0), ((("what 1?", "1"),),), ("k",), scene("scenes", "train", 0))
    labels = tuple(replace(label, facts=(("color", "no-such-word"),)) for label in labelled.scene.labels)
    processor = make_processor()
    encoder = Encoder(processor, packed.adapter.image_token_ids, targets_of=SceneTokens(processor.tokenizer))
    with pytest.raises(BadRow, match="no-such-word.*fact_supervision_weight to 0"):
        encoder.encode(replace(labelled, scene=replace(labelled.scene, labels=labels)))


@pytest.fixture
def reading():
    """(model with heads for facts, a batch of two rows of which one has facts, its features)."""
    torch.manual_seed(0)
    model = wake_cross_blocks(convert(make_llava(), self_layers=[1, 3, 5], cross_layers=[0, 2, 4]))
    packed = PackedModel(model)
    packed.add_fact_heads(20)
    packed.visual_facts.train()
    encoder = Encoder(make_processor(), packed.adapter.image_token_ids)
    rows = [encoder.encode(Example(f"r{i}", make_image(i), ((("what 1?", "1"),),), ("k",))) for i in range(2)]
    first = len(rows[0].prefix) - rows[0].num_visual
    rows[1] = replace(rows[1], visual_facts=((first, 5, 11), (first + 3, 2, 7)))  # not by slot
    batch = Batch.of(rows, 0)
    return packed, batch, packed.image_features(batch)


@pytest.mark.parametrize(("subset", "read"), [((), []), ((5,), []), ((1,), [1]), ((1, 3, 5), [1, 3])])
def test_the_input_and_layers_that_ran_before_the_last_cross_layer_are_read(reading, subset, read):
    packed, batch, features = reading
    layers = {layer: [] for layer in (1, 3, 5)}
    for layer, seen in layers.items():
        packed.decoder.layers[layer].register_forward_hook(
            lambda _, __, output, seen=seen: seen.append(output[0] if isinstance(output, tuple) else output)
        )
    packed.logits(batch, features, subset)
    loss, right = packed.visual_facts.loss_sum(batch.rows, features, subset)
    first, expected = len(batch.rows[1].prefix) - batch.rows[1].num_visual, 0.0
    for layer in [None, *read]:
        for place, slot, word in batch.rows[1].visual_facts:
            hidden_D = features[1][0][place - first] if layer is None else layers[layer][0][1, place]
            logits_SW = packed.visual_facts.classifier(packed.visual_facts.norm(hidden_D)).view(NUM_SLOTS, 20)
            expected -= logits_SW[slot].log_softmax(-1)[word]
    assert len(right) == 2 and loss.item() == pytest.approx(expected.item() / (1 + len(read)), rel=1e-5)
    assert packed.visual_facts.loss_sum(batch.rows[:1], features[:1], subset) == (None, [])


def test_facts_join_the_loss_and_are_learned(reading):
    packed, batch, features = reading
    objective = VisorObjective(((1, 3, 5),), fact_supervision_weight=2.0)
    plain = VisorObjective(((1, 3, 5),))
    (one,), (other,) = (list(each.passes(packed, batch, features, 0)) for each in (objective, plain))
    packed.logits(batch, features, (1, 3, 5))
    facts, _ = packed.visual_facts.loss_sum(batch.rows, features, (1, 3, 5))
    assert one.answers.loss_sum.item() == pytest.approx(other.answers.loss_sum.item() + 2 * facts.item(), rel=1e-5)
    optimizer = torch.optim.Adam([*packed.model.parameters(), *packed.visual_facts.parameters()], 1e-2)
    for _ in range(30):
        (one,) = objective.passes(packed, batch, [tuple(x.detach() for x in f) for f in features], 0)
        optimizer.zero_grad()
        one.answers.loss_sum.backward()
        optimizer.step()
    assert one.auxiliary == {"visual facts": [True, True]}


def test_the_rival_is_taught_them_too(reading):
    _, batch, _ = reading
    packed = PackedModel(make_llava())
    packed.add_fact_heads(20)
    packed.visual_facts.train()
    features = packed.image_features(batch)
    objective = NestedPooling((6,), fact_supervision_weight=2.0)
    without = replace(objective, fact_supervision_weight=0.0)
    (one,), (plain,) = (list(each.passes(packed, batch, features, 0)) for each in (objective, without))
    logits = packed.logits(batch, features, None)
    facts, right = packed.visual_facts.loss_sum(batch.rows, features, range(packed.num_layers))
    assert len(logits) and one.auxiliary == {"visual facts": right} and packed.question_facts is None
    assert one.answers.loss_sum.item() == pytest.approx(plain.answers.loss_sum.item() + 2 * facts.item(), rel=1e-5)
    read = [i for i in range(packed.num_layers) if packed.decoder.layers[i]._forward_hooks]
    assert read == list(range(packed.num_layers // 2))  # above them, text reads
