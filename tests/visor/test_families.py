"""Every family from pixels to answers: through its own image processor, against Hugging Face and against the engine."""

import functools
import json
import sys
from importlib.util import find_spec

import pytest
import torch
from family_processors import load, make_image
from schedules import schedule
from tiny_checkpoint import make_processor
from tiny_models import (
    ALL_FAMILIES,
    IMAGE_TOKEN,
    NUM_LAYERS,
    QWEN_LIKE,
    WINDOWED_FAMILIES,
    make_model,
    make_prompt,
    single,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from budgets.geometry import from_config
from budgets.registry import METHODS
from budgets.schedule import dense
from visor.engine.compat import CACHE, cache_of
from visor.engine.decoder import running
from visor.families.base import adapter_for
from visor.inference.chat import load_processor
from visor.inference.collate import image_arguments
from visor.inference.prompt import reduce_prompt
from visor.vision.multi_image import share_tokens
from visor.vision.taps import TAPS

EVERY_FAMILY = (*ALL_FAMILIES, *WINDOWED_FAMILIES)
UNMERGED = ("llava", "vipllava", "llava_next", "llava_onevision")  # methods see their towers' own tokens
MERGING = tuple(family for family in EVERY_FAMILY if family not in UNMERGED)
GRID = tuple(family for family in ALL_FAMILIES if family in QWEN_LIKE)
TOLERANCE = 2e-4
loaded_of = functools.cache(load)


def conversation(*parts, before=()):
    """A last turn of texts and images (a number is an image's seed) after earlier turns."""
    content = [
        {"type": "image", "image": make_image(part, 100 - 20 * (part % 2), 60 + 30 * (part % 3))}
        if isinstance(part, int)
        else {"type": "text", "text": part}
        for part in parts
    ]
    return [*before, {"role": "user", "content": content}]


def own_answer(loaded, sample, num_tokens=4):
    """Hugging Face's own generate on what the processor made."""
    inputs = {"input_ids": torch.tensor([sample.input_ids])}
    own = ("pixtral", "mistral3")  # whose forward takes the sizes that the others only describe
    described = ("image_sizes", "num_tiles") if loaded.adapter.merges_patches and loaded.name not in own else ()
    described = (*described, "grids")
    inputs |= {name: value for name, value in sample.pixel_inputs.items() if name not in described}
    inputs |= loaded.adapter.prompt_arguments(inputs["input_ids"])
    if loaded.adapter.has_grid_positions:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    plain = make_model(loaded.name)
    with torch.no_grad():
        return plain.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)[0, len(sample.input_ids) :].tolist()


def answers(loaded, samples, schedules, num_tokens=4):
    methods = [METHODS.get(s.encoder.method) for s in schedules if s.encoder]
    vision = loaded.encode(samples, frozenset().union(*(method.taps for method in methods)))
    return loaded.generate(samples, vision, schedules, num_tokens)


CONVERSATIONS = {
    "one image": conversation(1, "what is it"),
    "no image": conversation("what is it"),
    "two images": conversation(1, "is it", 2, "or that?"),
    "second turn": conversation(
        "and now?",
        before=[*conversation(4, "what is it"), {"role": "assistant", "content": "a cat"}],
    ),
    "image in the second turn": conversation(
        2, "and this?", before=[*conversation(1, "what is it"), {"role": "assistant", "content": "a cat"}]
    ),
}


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_dense_answers_are_hugging_faces_own(family):
    """All conversations in one left-padded batch, and each alone."""
    loaded = loaded_of(family)
    samples = [loaded.prepare_chat(messages) for messages in CONVERSATIONS.values()]
    plans = [dense(NUM_LAYERS, sample.num_visual) for sample in samples]
    together = [list(each.token_ids) for each in answers(loaded, samples, plans)]
    for name, sample, answer in zip(CONVERSATIONS, samples, together, strict=True):
        assert answer == own_answer(loaded, sample), name


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_prefill_and_decode_answer_as_generate(family):
    loaded = loaded_of(family)
    samples = [loaded.prepare_chat(CONVERSATIONS[name]) for name in ("one image", "second turn", "no image")]
    plans = [schedule("ssssss", sample.num_visual, {2: 0.5} if sample.num_visual else {}) for sample in samples]
    expected = answers(loaded, samples, plans)
    states = loaded.prefill(samples, loaded.encode(samples), plans)
    first = torch.zeros(len(samples), 1, dtype=torch.long)
    for state in states:
        first[state.members] = state.next_ids_B1
    found = torch.cat([first, loaded.decode(states, 3)], 1).tolist()
    assert found == [list(each.token_ids) for each in expected]


@pytest.mark.parametrize("messages", ["one image", "image in the second turn"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_dropping_before_the_decoder_equals_dropping_at_its_entrance(family, messages):
    """Reduced features in a shorter prompt, against the full prompt whose tokens the engine drops before layer 0:
    positions (kept under M-RoPE, renumbered elsewhere), DeepStack levels and blocks of tokens must all agree."""
    loaded = loaded_of(family)
    sample = loaded.prepare_chat(CONVERSATIONS[messages])
    keep = round(0.4 * sample.num_visual)
    plan = METHODS.get("random")(keep=keep).schedule(loaded.geometry, sample.num_visual)
    prompt = loaded.collate([sample], loaded.encode([sample]), [plan])
    kept = prompt.kept[0]
    assert int(kept.sum()) == keep == prompt.features[0].shape[0]
    image_inputs = image_arguments(loaded.adapter, prompt)
    with torch.no_grad():
        short = loaded.model(
            input_ids=prompt.input_ids_BP,
            attention_mask=prompt.attention_mask_BP,
            position_ids=prompt.positions_BP,
            **image_inputs,
        ).logits[:, -1]
        full = loaded.collate([sample], loaded.encode([sample]), [dense(NUM_LAYERS, sample.num_visual)])
        positions = "kept" if family in GRID else "contiguous"
        at_entrance = schedule("ssssss", sample.num_visual, {0: keep / sample.num_visual}, positions=positions)
        with running(loaded.model, at_entrance, keep_masks={0: [kept]}):
            expected = loaded.model(
                input_ids=full.input_ids_BP,
                attention_mask=full.attention_mask_BP,
                position_ids=full.positions_BP,
                **image_arguments(loaded.adapter, full),
            ).logits[:, -1]
    assert (short - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_encoder_side_methods_of_all_kinds(family):
    """Selecting, merging, sharing among tiles, averaging: alone or with FastV, alone or in a batch."""
    loaded = loaded_of(family)
    samples = [loaded.prepare_chat(CONVERSATIONS[name]) for name in ("one image", "two images", "second turn")]
    for name in ("visionzip", "prumerge+", "hired", "divprune", "fastervlm+fastv"):
        methods = METHODS.get(name)
        option = "fastervlm_keep" if "+fastv" in name else "keep"
        plans = [methods(**{option: s.num_visual // 2}).schedule(loaded.geometry, s.num_visual) for s in samples]
        if family in WINDOWED_FAMILIES and "+fastv" in name:
            with pytest.raises(ValueError, match="sliding-window layers"):
                answers(loaded, samples, plans, 2)
            continue
        together = answers(loaded, samples, plans, 2)
        alone = [answers(loaded, [s], [p], 2)[0] for s, p in zip(samples, plans, strict=True)]
        assert [each.token_ids for each in together] == [each.token_ids for each in alone], name


@pytest.mark.parametrize("family", WINDOWED_FAMILIES)
@torch.no_grad()
def test_before_a_windowed_decoder_a_shorter_prompt_is_hugging_faces_own(family):
    """The reduced features in the places of a prompt with fewer image tokens, embedded by hand."""
    loaded = loaded_of(family)
    sample = loaded.prepare_chat(CONVERSATIONS["two images"])
    vision, keep = loaded.encode([sample]), sample.num_visual // 2
    plan = METHODS.get("random")(keep=keep).schedule(loaded.geometry, sample.num_visual)
    prompt = loaded.collate([sample], vision, [plan])
    ids_BP, features_TD = prompt.input_ids_BP, prompt.features[0]
    everything_ND = torch.cat([image.features_BND[0] for image in vision[0].images])
    assert torch.equal(features_TD, everything_ND[prompt.kept[0]]) and len(features_TD) == keep
    plain = make_model(family)
    embedded_BPD = plain.get_input_embeddings()(ids_BP)
    embedded_BPD[ids_BP == IMAGE_TOKEN] = features_TD
    output = plain(
        inputs_embeds=embedded_BPD, attention_mask=prompt.attention_mask_BP, **loaded.adapter.prompt_arguments(ids_BP)
    )
    expected = []
    for _ in range(4):
        expected.append(int(output.logits[0, -1].argmax()))
        output = plain(input_ids=torch.tensor([expected[-1:]]), **{CACHE: cache_of(output)})
    assert list(answers(loaded, [sample], [plan])[0].token_ids) == expected


def test_methods_that_do_not_say_where_their_tokens_stand_are_refused():
    loaded = loaded_of("smolvlm")
    sample = loaded.prepare_chat(CONVERSATIONS["one image"])
    plan = METHODS.get("pooling")(side=1).schedule(loaded.geometry, sample.num_visual)
    with pytest.raises(ValueError, match="the image has several blocks of tokens; use a method that selects"):
        answers(loaded, [sample], [plan])
    loaded = loaded_of("qwen3_vl")
    sample = loaded.prepare(make_image(1, 64, 64), "what")
    with pytest.raises(ValueError, match="a smaller image .* is not supported there"):
        loaded.encode([sample], image_scale=0.5)


def test_pooling_keeps_places_in_the_image():
    """Qwen-VL: means of a square grid stand in the middle of their windows, with the middle's DeepStack levels."""
    loaded = loaded_of("qwen3_vl")
    sample = loaded.prepare(make_image(1, 128, 128), "what")
    assert sample.num_visual == 16
    plan = METHODS.get("pooling")(side=12).schedule(loaded.geometry, 16)  # half of LLaVA's side
    row = loaded.encode([sample], {"places"})[0]
    prompt = loaded.collate([sample], [row], [plan])
    first = sample.input_ids.index(IMAGE_TOKEN)
    assert (prompt.grid_positions[2:, 0, first : first + 4] - first).tolist() == [[1, 1, 3, 3], [1, 3, 1, 3]]
    assert torch.equal(prompt.levels[0][0], row.levels[0][0, [5, 7, 13, 15]])


# --- what is read of the towers -------------------------------------------------------------------------------------


def eager_attention(model, pixels, monkeypatch):
    """Post-softmax attention [tiles, heads, P, P] of each call in the tower, as Hugging Face computes it."""
    module, seen = sys.modules[type(adapter_for(model).tower).__module__], []
    original = module.eager_attention_forward

    def noted(*args, **kwargs):
        output = original(*args, **kwargs)
        seen.append(output[1])
        return output

    with monkeypatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", noted)
        model.get_image_features(**pixels, return_dict=True)
    return seen


@pytest.mark.parametrize("family", MERGING)
@torch.no_grad()
def test_salience_is_eager_attention_averaged_over_merged_patches(family, monkeypatch):
    model = make_model(family)
    prompt = single(make_prompt(model, 2), 1)
    pixels = {name: x for name, x in prompt.items() if name in ("pixel_values", "image_grid_thw", "image_sizes")}
    taken = {"grids": torch.tensor([[1, 2]])} if family == "ovis2" else {}
    encoded = adapter_for(model).encode_image(
        {**pixels, **taken}, {"salience", "keys", "last_salience", "last_keys"}
    )
    own = model.get_image_features(**pixels, return_dict=True).pooler_output
    own = own.flatten(0, 1) if isinstance(own, torch.Tensor) else torch.cat(list(own))
    assert torch.equal(encoded.features_ND, own)
    blocks = eager_attention(make_model(family, "eager"), pixels, monkeypatch)
    if family == "qwen2_5_vl":  # block 1 of 3 sees everything; 24 patches in cells of 2 x 2, sorted by window
        weights = next(block for block in blocks if block.shape[-1] == 24)
        expected = weights.mean(1).mean(1)[0].view(-1, 4).mean(1)[torch.tensor([0, 1, 3, 4, 2, 5]).argsort()]
    elif family in QWEN_LIKE:
        expected = blocks[-2].mean(1).mean(1)[0].view(-1, 4).mean(1)
    elif family in ("pixtral", "mistral3"):  # 4 x 8 patches
        side = adapter_for(model).merge
        expected = torch.nn.functional.avg_pool2d(blocks[-2].mean(1).mean(1).view(1, 4, 8), side).flatten()
    else:
        weights = blocks[-2].mean(1)
        rows = weights[:, 0, 1:] if family == "internvl" else weights.mean(1)
        side = round(rows.shape[1] ** 0.5)
        expected = torch.nn.functional.avg_pool2d(rows.view(-1, 1, side, side), 2).flatten()
    assert (encoded.taps["salience"] - expected).abs().max() < 1e-4
    assert expected.std() > 1e-4, "uniform attention would show nothing"
    for name, tap in encoded.taps.items():
        assert len(tap) == len(own), name


def test_places_of_split_images():
    """Tiles in reading order, the whole image last: rows and columns follow from the image's shape."""
    loaded = loaded_of("idefics3")
    sample = loaded.prepare(make_image(1, 100, 60), "what")
    places = loaded.encode([sample], {"places"})[0].tap("places")[0]
    assert sample.num_visual == 20 and places[:16, 0].eq(1).all() and places[16:, 0].eq(0).all()
    assert places[4].tolist() == [1, 0.25, 1.25] and places[15].tolist() == [1, 1.75, 1.75]


def test_every_family_takes_every_tap():
    for family in EVERY_FAMILY:
        loaded = loaded_of(family)
        sample = loaded.prepare(make_image(1), "what")
        row = loaded.encode([sample], TAPS)[0]
        assert set(row.taps) == set(TAPS)
        assert all(tap.shape[:2] == (1, row.num_tokens) for tap in row.taps.values()), family


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_arranging_prompts():
    ids = [1, 9, 9, 9, 2, 9, 9, 3]
    assert reduce_prompt(ids, {9}, [(3, 2, None), (2, 1, None)]).sources == [0, 1, 2, 4, 5, 7]
    assert reduce_prompt(ids, {9}, [(3, 2, [2, 0]), (2, 1, [1])], in_place=True).sources == [0, 3, 1, 4, 6, 7]
    split = reduce_prompt(ids, {9}, [(5, 3, [4, 0, 2])])  # one image in two blocks
    assert split.sources == [0, 1, 3, 4, 6, 7] and split.order == [1, 2, 0]
    with pytest.raises(ValueError, match="5 image tokens, its images have 4"):
        reduce_prompt(ids, {9}, [(4, 2, None)])


@pytest.mark.parametrize(
    "keep, counts, shares",
    [(4, [16, 16], [2, 2]), (5, [16, 16], [3, 2]), (3, [30, 1, 1], [1, 1, 1]), (10, [30, 1, 1], [8, 1, 1])],
)
def test_images_share_a_budget(keep, counts, shares):
    assert share_tokens(keep, counts) == shares and sum(shares) == keep


def test_fewer_tokens_than_images():
    with pytest.raises(ValueError, match="1 visual tokens cannot be shared among 2 images"):
        share_tokens(1, [4, 4])


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "must end with a turn of the user"),
        ([{"role": "assistant", "content": "hello"}], "must end with a turn of the user"),
        ([{"role": "tool", "content": "x"}, *conversation("y")], "message 0: unknown role 'tool'"),
        (
            [{"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}],
            "must be a text or an image, got 'video'",
        ),
        (conversation("what is <image>"), "the question holds '<image>'"),
        (conversation("?", before=conversation("an <image>")), "text of message 0 holds '<image>'"),
        (conversation(1), "the question is empty"),
    ],
)
def test_conversations_that_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        loaded_of("llava").prepare_chat(messages)


def test_a_processor_that_needs_torchvision_says_what_to_install(tmp_path):
    if find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    make_model("qwen2_5_vl", num_layers=1).config.save_pretrained(tmp_path)
    make_processor().tokenizer.save_pretrained(tmp_path)
    Qwen2VLImageProcessorPil().save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    names = {"processor_class": "Qwen2_5_VLProcessor", "image_processor_type": "Qwen2VLImageProcessor"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **names}))
    with pytest.raises(ValueError, match="pip install torchvision"):
        load_processor(tmp_path)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_geometry_follows_the_config(family):
    """Visual tokens of a real image, from the geometry alone where tiles are fixed."""
    loaded = loaded_of(family)
    sample = loaded.prepare(make_image(1), "what")
    vision = from_config(loaded.model.config).vision
    num_tokens = loaded.encode([sample])[0].num_tokens
    assert num_tokens == sample.num_visual
    if family in MERGING:
        assert vision.projects_first
    if vision.image_size is not None and family not in ("llava_next", "llava_onevision"):
        assert num_tokens == vision.visual_tokens_per_tile * loaded.geometry.num_tiles(num_tokens)
