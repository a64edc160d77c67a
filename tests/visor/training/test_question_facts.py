"""Facts that words of questions should know: at words that name things, behind CROSS layers, and learnable."""

from dataclasses import replace

import pytest
import torch
from tiny_checkpoint import make_image, make_llava, make_processor
from tiny_models import wake_cross_blocks

from visor.embedded.scene_tokens import SceneTokens
from visor.embedded.vocabulary import build_processor
from visor.model.conversion import convert
from visor.training.batch import Batch
from visor.training.data import Example, WorldSource
from visor.training.encoding import Encoder
from visor.training.forward import PackedModel
from visor.training.objectives import VisorObjective
from visor.worlds.world import SLOTS
from visor.worlds.worlds import scene


@pytest.mark.parametrize("world", ["charts", "connections", "scenes"])
def test_facts_stand_at_the_words_of_questions_that_name_things(world):
    processor = build_processor(12)
    tokenizer, image_id = processor.tokenizer, processor.tokenizer.convert_tokens_to_ids(processor.image_token)
    example, drawn = WorldSource(world).read(5), scene(world, "train", 5)
    row = Encoder(processor, [image_id], targets_of=SceneTokens(processor.tokenizer)).encode(example)
    text = [token for token in row.prefix if token != image_id]
    is_prompt = [False] * len(text)
    for segment in row.segments:
        text += segment.ids
        is_prompt += [place <= segment.prompt_end for place in range(len(segment.ids))]
    known = {word: {(SLOTS.index(slot), fact) for slot, fact in facts} for word, facts in drawn.known}
    stated = {place: set() for place, _, _ in row.question_facts}
    for place, slot, word in row.question_facts:
        assert is_prompt[place]
        stated[place].add((slot, tokenizer.decode([word]).strip()))
    named = {
        place for place, token in enumerate(text) if is_prompt[place] and tokenizer.decode([token]).strip() in known
    }
    assert named and set(stated) == {p for p in named if known[tokenizer.decode([text[p]]).strip()]}
    assert all(facts == known[tokenizer.decode([text[place]]).strip()] for place, facts in stated.items())
    assert Encoder(processor, [image_id]).encode(example).question_facts == ()


@pytest.fixture
def reading():
    """(model with heads for facts, a batch of two rows of different lengths, which ask for facts, its features)."""
    torch.manual_seed(0)
    packed = PackedModel(wake_cross_blocks(convert(make_llava(), self_layers=[1, 3], cross_layers=[0, 2, 4, 5])))
    packed.add_fact_heads(20)
    encoder = Encoder(make_processor(), packed.adapter.image_token_ids)
    texts = ("what 1?", "what is in 1 2?")
    rows = [encoder.encode(Example(t, make_image(i), (((t, "1"),),), ("k",))) for i, t in enumerate(texts)]
    rows = [
        replace(row, question_facts=((row.num_text - 3, 2, 7), (row.num_text - 2, 5, slot)))
        for row, slot in zip(rows, (11, 12), strict=True)
    ]
    assert rows[0].num_text != rows[1].num_text
    batch = Batch.of(rows, 0)
    return packed, batch, packed.image_features(batch)


@pytest.mark.parametrize("subset", [(), (1, 3)])
def test_text_is_read_behind_the_cross_layers_in_the_middle(reading, subset):
    packed, batch, features = reading
    packed.question_facts.train()
    expected = 0.0
    for b, row in enumerate(batch.rows):  # each row alone, where no padding shifts a place
        alone = Batch.of([row], 0, multiple=1)
        outputs = []
        watch = lambda _, __, output, outputs=outputs: outputs.append(output)
        hooks = [packed.decoder.layers[layer].register_forward_hook(watch) for layer in (2, 4)]
        packed.logits(alone, [features[b]], subset)
        for hook in hooks:
            hook.remove()
        for hidden_1TD in outputs:
            hidden_1TD = hidden_1TD[0] if isinstance(hidden_1TD, tuple) else hidden_1TD
            for place, slot, word in row.question_facts:
                head = packed.question_facts
                logits_SW = head.classifier(head.norm(hidden_1TD[0, place])).view(len(SLOTS), 20)
                expected -= logits_SW[slot].log_softmax(-1)[word].item() / 2
    packed.logits(batch, features, subset)
    loss, right = packed.question_facts.loss_sum(batch.rows, subset)
    assert len(right) == 4 and loss.item() == pytest.approx(expected, rel=1e-5)
    assert packed.question_facts.loss_sum(batch.rows, subset) == (None, [])  # a reading is taken once


def test_without_things_that_are_named_or_in_evaluation_nothing_is_asked(reading):
    packed, batch, features = reading
    packed.question_facts.train()
    packed.logits(batch, features, ())
    assert packed.question_facts.loss_sum([replace(row, question_facts=()) for row in batch.rows], ()) == (None, [])
    packed.question_facts.eval()
    packed.logits(batch, features, ())
    assert packed.question_facts.loss_sum(batch.rows, ()) == (None, [])


@pytest.mark.parametrize("factor", [None, 2])
def test_question_facts_join_the_loss_and_are_learned(reading, factor):
    packed, batch, features = reading
    packed.question_facts.train()
    objective = VisorObjective(
        ((1, 3),), factors=(factor,) if factor else (), pooled_share=1.0 if factor else 0.0, fact_supervision_weight=2.0
    )
    optimizer = torch.optim.Adam([*packed.model.parameters(), *packed.question_facts.parameters()], 1e-2)
    losses = []
    for _ in range(30):
        (one,) = objective.passes(packed, batch, [tuple(x.detach() for x in f) for f in features], 0)
        optimizer.zero_grad()
        one.answers.loss_sum.backward()
        optimizer.step()
        losses.append(one.answers.loss_sum.item())
    assert one.auxiliary == {"question facts": [True] * 4}
    assert losses[-1] < 0.2 * losses[0]
