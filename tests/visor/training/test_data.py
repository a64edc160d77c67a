"""Training data: every form of it, the numbering of a mixture, and rows that cannot be used."""

import json
import sys
from collections import Counter

import pytest
from llava_rows import conversation
from tiny_checkpoint import make_image

from visor.training.data import BLOCK, BadRow, LlavaSource, Skipped, Stream, WorldSource, exchanges, sources_of


def test_llava_rows(llava_data):
    source = LlavaSource(*llava_data)
    one = source.read(3)
    assert source.length == 24 and one.key == "good.json[3]" and one.kinds == ("even",)
    assert one.conversations == ((("how many 3?", "3"),),) and one.image.mode == "RGB" and one.image.size == (40, 30)


def test_several_turns_stay_one_conversation():
    turns = conversation("what?", "this") + conversation("and?", "that")
    turns[2]["value"] = "and?"
    assert exchanges(turns) == (("what?", "this"), ("and?", "that"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (24, "no image"),
        (25, "2 images where one is meant"),
        (26, "cannot be read: FileNotFoundError"),
        (27, "cannot be read: UnidentifiedImageError"),
        (28, "2 image marks for one image"),
        (29, "0 image marks for one image"),
        (30, "must alternate"),
        (31, "an empty turn"),
        (32, "neither conversations, messages, nor question and answer"),
        (33, "not an object"),
    ],
)
def test_bad_rows_say_why(llava_data, row, reason):
    source = LlavaSource(llava_data[1] / "mixed.json", llava_data[1])
    with pytest.raises(BadRow, match=reason):
        source.read(row)


def test_rows_are_skipped_counted_and_listed_once(llava_data, tmp_path):
    stream = Stream([LlavaSource(llava_data[1] / "mixed.json", llava_data[1])], [1.0], seed=0)
    skipped = Skipped(tmp_path / "skipped.jsonl", most=0.25)
    for _ in range(2):  # two passes over the data
        results = [stream.read(position) for position in range(34)]
        bad = [result for result in results if isinstance(result, tuple)]
        assert len(bad) == 10
        skipped.add(bad)
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert len(lines) == 10 and {"row": "mixed.json[24]", "reason": "no image"} in lines
    again = Skipped(tmp_path / "skipped.jsonl")
    assert again.reasons == skipped.reasons and "(e.g. mixed.json[" in again.summary()
    with pytest.raises(ValueError, match="10 of 34 rows cannot be used"):
        skipped.check(34)
    skipped.check(200)


def test_a_finite_source_is_passed_through_in_a_new_order_each_time(llava_data):
    stream = Stream([LlavaSource(*llava_data)], [1.0], seed=3)
    orders = [[stream.locate(24 * epoch + i)[1] for i in range(24)] for epoch in range(3)]
    assert all(sorted(order) == list(range(24)) for order in orders) and orders[0] != orders[1] != orders[2]
    again = Stream([LlavaSource(*llava_data)], [1.0], seed=3)
    assert [again.locate(50 + i)[1] for i in range(5)] == orders[2][2:7], "a position alone says what stands there"


def test_a_mixture_keeps_its_proportions_and_repeats_nothing():
    stream = Stream.of([{"worlds": {"forms": 3, "glyphs": 1}, "weight": 2}, {"worlds": ["digits"], "weight": 1}], 1)
    drawn = [stream.locate(position) for position in range(2 * BLOCK)]
    counts = Counter(source.world for source, _ in drawn)
    assert counts["forms"] == 1000 and {counts["glyphs"], counts["digits"]} <= {332, 334, 666, 668}
    assert len({(source.world, index) for source, index in drawn}) == len(drawn)
    assert [s.world for s, _ in drawn[:20]] != sorted(s.world for s, _ in drawn[:20])


def test_worlds_are_reproducible_and_packed():
    one, again = (WorldSource("forms", seed=4, questions=3).read(9) for _ in range(2))
    assert one.conversations == again.conversations and one.image.tobytes() == again.image.tobytes()
    assert 1 <= len(one.conversations) <= 3 and set(one.kinds) == {"forms/value"}
    assert WorldSource("forms", seed=5).read(9).image.tobytes() != one.image.tobytes()


@pytest.mark.parametrize("form", ["folder", "dict", "parquet"])
def test_hugging_face_datasets(form, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {
        "image": [make_image(i) for i in range(3)] + [None],
        "question": ["a?", "b?", "c?", "d?"],
        "answers": [["one", "one", "two"], ["x"], ["y"], ["z"]],
    }
    features = datasets.Features(
        image=datasets.Image(), question=datasets.Value("string"), answers=datasets.List(datasets.Value("string"))
    )
    data = datasets.Dataset.from_dict(rows, features=features)
    if form == "folder":
        data.save_to_disk(tmp_path / "set")
    elif form == "dict":
        datasets.DatasetDict(train=data).save_to_disk(tmp_path / "set")
    else:
        (tmp_path / "set").mkdir()
        data.to_parquet(tmp_path / "set" / "train.parquet")
    ((source,), _) = sources_of([{"dataset": str(tmp_path / "set")}], 0)
    assert source.length == 4
    assert source.read(0).conversations == ((("a?", "one"),),), "what most annotators say"
    assert source.read(1).image.size == (40, 30)
    with pytest.raises(BadRow, match="no image"):
        source.read(3)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        sources_of([{"dataset": "somewhere"}], 0)


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ([], "names no data"),
        ([{"worlds": ["form"]}], "unknown world 'form'; expected one of forms"),
        ([{"worlds": ["forms"], "split": "dev"}], "unknown split 'dev'"),
        ([{"llava": "nowhere.json", "images": "."}], "no training file at nowhere.json"),
        ([{"files": "x"}], "one of worlds, llava, dataset"),
        ([{"worlds": ["forms"], "colour": 1}], "colour"),
        ([{"worlds": ["forms"], "weight": 0}], "weights of data must be positive"),
    ],
)
def test_bad_specifications(specification, message):
    with pytest.raises(ValueError, match=message):
        sources_of(specification, 0)


def test_a_file_that_is_no_list_of_rows(tmp_path):
    (tmp_path / "rows.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="must hold a list of rows, at least one; it holds dict"):
        LlavaSource(tmp_path / "rows.json", tmp_path)
    (tmp_path / "rows.jsonl").write_text("{]")
    with pytest.raises(ValueError, match="no valid JSON"):
        LlavaSource(tmp_path / "rows.jsonl", tmp_path)
