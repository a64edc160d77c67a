"""Packed training equals asking one by one: dense, every VISOR configuration, and what the router would read."""

import pytest
import torch
from tiny_checkpoint import make_image, make_llava
from tiny_checkpoint import make_processor as make_plain_processor
from tiny_models import wake_cross_blocks

from visor.embedded.vocabulary import CHAT_TEMPLATE
from visor.model.conversion import convert
from visor.training.batch import Batch
from visor.training.data import BadRow, Example
from visor.training.encoding import Encoder
from visor.training.forward import PackedModel, answers_of
from visor.training.rows import IGNORED

QUESTIONS = ((("what is it?", "cat"),), (("and the colour of the thing?", "red"),), (("n?", "12"), ("sure?", "yes")))


def make_processor():
    processor = make_plain_processor()
    processor.chat_template = CHAT_TEMPLATE
    return processor


def example(number, num_questions):
    kinds = ("one", "two", "turns")
    return Example(f"row{number}", make_image(number), QUESTIONS[:num_questions], kinds[:num_questions])


def encoder_for(packed, processor=None, **options):
    return Encoder(
        processor or make_processor(), packed.adapter.image_token_ids, packed.adapter.image_fields, **options
    )


@pytest.fixture(scope="module")
def visor():
    model = convert(make_llava(), self_layers=[1, 3, 5], cross_layers=[0, 2, 4], configurations=[[], [3], [1, 3, 5]])
    model.add_router(hidden_size=8)
    return wake_cross_blocks(model).eval()


def alone(row, number):
    """(ids, labels) of one segment behind its image, as an unpacked sequence."""
    segment = row.segments[number]
    ids = torch.tensor([[*row.prefix, *segment.ids]])
    labels = torch.tensor([[IGNORED] * len(row.prefix) + list(segment.labels)])
    return ids, labels


@pytest.mark.parametrize("subset", [None, (), (3,), (1, 3, 5)])
def test_every_segment_computes_what_it_would_compute_alone(visor, subset):
    packed = PackedModel(visor)
    encoder = encoder_for(packed)
    rows = [encoder.encode(example(0, 3)), encoder.encode(example(1, 1))]
    batch = Batch.of(rows, 0)
    with torch.no_grad():
        features = packed.image_features(batch)
        together = packed.logits(batch, features, subset)
        single = []
        for row in rows:
            for number in range(len(row.segments)):
                ids, labels = alone(row, number)
                how = "dense" if subset is None else visor.config.configurations.index(list(subset))
                output = visor(input_ids=ids, pixel_values=row.pixel_inputs["pixel_values"], configuration=how)
                single.append(output.logits[0][labels[0] != IGNORED])
    torch.testing.assert_close(together, torch.cat(single), atol=1e-4, rtol=1e-4)


def test_a_base_model_packs_too_and_equals_transformers():
    base = make_llava().eval()
    packed = PackedModel(base)
    row = encoder_for(packed).encode(example(2, 2))
    ids, labels = alone(row, 1)
    with torch.no_grad():
        batch = Batch.of([row], 0)
        mine = packed.logits(batch, packed.image_features(batch), None)
        theirs = make_llava().eval()(input_ids=ids, **row.pixel_inputs).logits[0][labels[0] != IGNORED]
    torch.testing.assert_close(mine[-len(theirs) :], theirs, atol=1e-4, rtol=1e-4)


def test_routing_vectors_are_those_of_the_prompt_alone(visor):
    packed = PackedModel(visor)
    rows = [encoder_for(packed).encode(example(0, 2)), encoder_for(packed).encode(example(1, 1))]
    batch = Batch.of(rows, 0)
    with torch.no_grad():
        features = packed.image_features(batch)
        vectors = packed.routing_vectors(batch, features, visor.config.configurations, visor.router.inputs)
        for b, row in enumerate(rows):
            for q, segment in enumerate(row.segments):
                prompt = torch.tensor([[*row.prefix, *segment.ids[: segment.prompt_end + 1]]])
                expected = visor.routing_vectors(prompt, **row.pixel_inputs)[0]
                torch.testing.assert_close(vectors[b, q], expected, atol=1e-4, rtol=1e-4)


def test_m_rope_positions_continue_behind_the_image():
    from tiny_models import make_model

    model = make_model("qwen2_5_vl").eval()
    packed = PackedModel(model)
    ids, grid = packed.adapter.image_token_ids[0], torch.tensor([[1, 4, 8]])
    width = model.config.vision_config.in_channels * model.config.vision_config.temporal_patch_size
    width *= model.config.vision_config.patch_size**2
    pixels = {"pixel_values": torch.randn(32, width), "image_grid_thw": grid}
    from visor.training.rows import Row, Segment

    texts = [(7, 8, 9, 10), (11, 12, 13)]
    segments = tuple(Segment(text, text[1:] + (14,), (False,) * len(text), 0) for text in texts)
    row = Row("row", (5, 6, *([ids] * 8)), 8, segments, pixels, ("a", "b"))
    batch = Batch.of([row], 0)
    with torch.no_grad():
        mine = packed.logits(batch, packed.image_features(batch), None)
        alone_logits = []
        for text in texts:
            prompt = torch.tensor([[*row.prefix, *text]])
            types = (prompt == ids).int()
            alone_logits.append(model(input_ids=prompt, mm_token_type_ids=types, **pixels).logits[0, -len(text) :])
    torch.testing.assert_close(mine, torch.cat(alone_logits), atol=2e-4, rtol=1e-3)


def test_labels_mark_answers_only_and_hints_apart():
    packed = PackedModel(make_llava())
    processor = make_processor()
    plain = encoder_for(packed, processor).encode(example(0, 3))
    decode = processor.tokenizer.decode
    said = [decode([label for label in segment.labels if label != IGNORED]) for segment in plain.segments]
    assert said == ["cat<eos>", "red<eos>", "12<eos>yes<eos>"], "answers with their ends, of every turn"
    assert decode(plain.segments[2].ids).startswith("n?<assistant>12<eos>sure?<assistant>yes")
    assert plain.segments[0].ids[plain.segments[0].prompt_end] == processor.tokenizer.convert_tokens_to_ids(
        "<assistant>"
    )
    hinted = encoder_for(packed, processor, hint_tokens=2).encode(example(0, 3)).segments[0]
    assert (
        sum(hinted.hints) == 2 and decode([hinted.labels[i] for i in range(len(hinted.ids)) if hinted.hints[i]]) == "cc"
    )
    assert hinted.ids == plain.segments[0].ids


def test_a_template_without_roles():
    packed = PackedModel(make_llava())
    encoder = encoder_for(packed, make_plain_processor())
    row = encoder.encode(example(0, 1))
    assert encoder.tokenizer.decode(row.segments[0].ids) == "what is it?<assistant>cat"
    with pytest.raises(BadRow, match="does not continue the first"):
        encoder.encode(example(0, 3))


def test_scores_tell_whole_answers():
    packed = PackedModel(make_llava())
    rows = [encoder_for(packed, hint_tokens=1).encode(example(i, n)) for i, n in ((0, 2), (1, 1))]
    batch = Batch.of(rows, 0)
    labels = batch.labels_BS[batch.labels_BS != IGNORED]
    logits = torch.nn.functional.one_hot(labels, 110).float() * 50
    assert answers_of(logits, batch).right == [[True, True], [True]]
    hints = batch.hint_BS[batch.labels_BS != IGNORED]
    first_answer_of_second = int((~hints).nonzero()[4])  # c a t <eos> | r
    logits[int(hints.nonzero()[0])] *= -1
    assert answers_of(logits, batch).right == [[True, True], [True]], "a hint is no answer"
    logits[first_answer_of_second] *= -1
    answers = answers_of(logits, batch)
    assert answers.right == [[True, False], [True]] and answers.likelihood[0][0] > 0.99 > 0.5 > answers.likelihood[0][1]


@pytest.mark.parametrize(
    ("conversation", "options", "message"),
    [
        ((("x" * 50, "y"),), {"max_text_tokens": 20}, "more than 20"),
        ((("a <image> b", "y"),), {}, "image marks in the rendered prompt|inside the text"),
        ((("a", "<image>"),), {}, "inside the text of a conversation"),
    ],
)
def test_rows_that_cannot_be_encoded(conversation, options, message):
    packed = PackedModel(make_llava())
    with pytest.raises(BadRow, match=message):
        encoder_for(packed, **options).encode(Example("row", make_image(0), (conversation,), ("all",)))


def test_unsupported_families_are_refused():
    base = make_llava()
    base.config.model_type = "idefics3"
    with pytest.raises(ValueError, match="packed training knows the families"):
        PackedModel(base)
