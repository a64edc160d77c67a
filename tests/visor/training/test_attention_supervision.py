"""Where text attends while it reads the image: at stated places, measured as the attention is, and learnable."""

from dataclasses import replace

import pytest
import torch
from tiny_checkpoint import make_image, make_llava, make_processor
from tiny_models import wake_cross_blocks

from visor.embedded.scene_tokens import SceneTokens
from visor.embedded.symbolic import PatchWords
from visor.embedded.vocabulary import build_processor
from visor.model.conversion import convert
from visor.training.auxiliary.attention_supervision import LEAST_MASS
from visor.training.batch import Batch
from visor.training.data import Example, WorldSource
from visor.training.encoding import Encoder
from visor.training.forward import PackedModel
from visor.training.objectives import VisorObjective
from visor.training.rows import AttentionTarget
from visor.worlds.worlds import scene


@pytest.mark.parametrize("world", ["forms", "glyphs", "digits", "charts", "connections", "scenes"])
def test_attention_goes_to_what_is_named_and_to_what_is_said(world):
    processor = build_processor(12)
    tokenizer, image_id = processor.tokenizer, processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    example, drawn = WorldSource(world).read(5), scene(world, "train", 5)
    row = Encoder(processor, [image_id], targets_of=SceneTokens(processor.tokenizer)).encode(example)
    held = {
        patch: {tokenizer.decode([word]) for word in words}
        for patch, words in PatchWords(tokenizer, 12).of(drawn).items()
    }
    text, labels = [token for token in row.prefix if token != image_id], [-100] * (len(row.prefix) - row.num_visual)
    for segment in row.segments:
        text += segment.ids
        labels += segment.labels
    for target in row.attention_targets:
        word = tokenizer.decode([labels[target.place] if target.is_answer else text[target.place]]).strip()
        assert all(word in held[patch] for patch in target.patches)
    said = sum(len(question.where) for question in drawn.questions)
    assert sum(target.is_answer for target in row.attention_targets) == said and (said > 0) == (world != "scenes")
    assert any(not target.is_answer for target in row.attention_targets) == (
        world in ("charts", "connections", "scenes")
    )


@pytest.fixture
def supervised():
    """(model whose attention is supervised, a batch of two rows of different lengths, its features)."""
    torch.manual_seed(0)
    packed = PackedModel(wake_cross_blocks(convert(make_llava(), self_layers=[1, 3], cross_layers=[0, 2, 4, 5])))
    packed.supervise_attention()
    packed.model.train()
    encoder = Encoder(make_processor(), packed.adapter.image_token_ids)
    texts = ("what 1?", "what is in 1 2?")
    rows = [encoder.encode(Example(t, make_image(i), (((t, "1"),),), ("k",))) for i, t in enumerate(texts)]
    rows = [
        replace(
            row,
            attention_targets=(
                AttentionTarget(row.num_text - 3, (1, 4), False),
                AttentionTarget(row.num_text - 2, (slot,), True),
            ),
        )
        for row, slot in zip(rows, (3, 2), strict=True)
    ]
    assert rows[0].num_text != rows[1].num_text
    batch = Batch.of(rows, 0)
    return packed, batch, packed.image_features(batch)


def attention_of(packed, layer, block_inputs):
    """What half of the heads attend to in a CROSS block, from its inputs: [T, V], mean over them."""
    block, (text_1TD, visual_1VD, *_) = packed.decoder.cross_blocks[str(layer)], block_inputs
    keys_1GVd, _ = block.keys_values(visual_1VD, None)
    queries_THd = block.q_proj(block.text_norm(text_1TD))[0].unflatten(-1, (block.num_heads, block.head_dim))
    share = block.num_heads // block.num_kv_heads
    each = [
        (queries_THd[:, head] @ keys_1GVd[0, head // share].T * block.head_dim**-0.5).softmax(-1)
        for head in range(0, block.num_heads, 2)
    ]
    return torch.stack(each).mean(0)


def test_the_loss_is_of_the_attention_that_the_blocks_compute(supervised):
    packed, batch, features = supervised
    expected, found = 0.0, []
    for b, row in enumerate(batch.rows):  # each row alone, where no padding shifts a place
        seen = {}
        hooks = [
            block.register_forward_hook(lambda _, inputs, __, at=int(layer), seen=seen: seen.__setitem__(at, inputs))
            for layer, block in packed.decoder.cross_blocks.items()
        ]
        packed.logits(Batch.of([row], 0, multiple=1), [features[b]], (1,))
        for hook in hooks:
            hook.remove()
        for target in row.attention_targets:
            for layer in (4, 5) if target.is_answer else (0,):
                attention_V = attention_of(packed, layer, seen[layer])[target.place]
                mass = attention_V[list(target.patches)].sum().clamp(min=LEAST_MASS)
                expected -= mass.log().item() / (2 if target.is_answer else 1)
            found.append((target.is_answer, int(attention_V.argmax()) in target.patches))
    packed.logits(batch, features, (1,))
    loss, right = packed.attention_supervision.loss_sum(batch.rows)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert right == [ok for _, ok in sorted(found, key=lambda one: one[0])]
    assert packed.attention_supervision.loss_sum(batch.rows) == (None, [])  # watched once


def test_nothing_is_watched_in_evaluation_or_without_targets(supervised):
    packed, batch, features = supervised
    packed.logits(batch, features, ())
    assert packed.attention_supervision.loss_sum([replace(row, attention_targets=()) for row in batch.rows]) == (
        None,
        [],
    )
    packed.model.eval()
    packed.logits(batch, features, ())
    assert packed.attention_supervision.loss_sum(batch.rows) == (None, [])


def test_attention_targets_join_the_loss_and_are_learned(supervised):
    packed, batch, features = supervised
    features = [tuple(x.detach() for x in one) for one in features]
    objective, plain = VisorObjective(((1, 3),), attention_supervision_weight=2.0), VisorObjective(((1, 3),))
    (one,), (other,) = (list(each.passes(packed, batch, features, 0)) for each in (objective, plain))
    packed.logits(batch, features, (1, 3))
    loss, _ = packed.attention_supervision.loss_sum(batch.rows)
    assert one.answers.loss_sum.item() == pytest.approx(other.answers.loss_sum.item() + 2 * loss.item(), rel=1e-5)
    optimizer = torch.optim.Adam(packed.model.parameters(), 1e-2)
    for _ in range(60):
        (one,) = objective.passes(packed, batch, features, 0)
        optimizer.zero_grad()
        one.answers.loss_sum.backward()
        optimizer.step()
    packed.logits(batch, features, (1, 3))
    after, right = packed.attention_supervision.loss_sum(batch.rows)
    assert right == [True] * 4 and after.item() < 0.3 * loss.item()
