"""Tasks and metrics."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from budgets.registry import TASKS, UnknownNameError
from evaluations.metrics import METRICS, edit_distance, score
from evaluations.task import image_id_of


@pytest.mark.parametrize("name", list(TASKS))
def test_samples_are_fixed_distinct_and_enough(name):
    task = TASKS.get(name)()
    samples = task.samples()
    assert len(samples) >= 500
    assert len({s.sample_id for s in samples}) == len(samples)
    assert [s.sample_id for s in task.samples(7)] == [s.sample_id for s in samples[:7]]
    assert task.metric in METRICS and all(s.references and s.task == name for s in samples)
    assert max(len(s.references[0]) for s in samples) < 20
    most_common = max(set(answers := [s.references[0] for s in samples]), key=answers.count)
    assert answers.count(most_common) / len(answers) < 0.3, "one answer must not carry the task"


def test_counting_asks_how_many_and_scenes_asks_the_rest():
    questions = {name: [s.question for s in TASKS.get(name)().samples(60)] for name in ("counting", "scenes")}
    assert all("how many" in question for question in questions["counting"])
    assert not any("how many" in question for question in questions["scenes"])
    assert {s.references[0] for s in TASKS.get("counting")().samples(60)} == {"1", "2", "3", "4"}


def test_an_image_id_is_of_what_a_model_sees():
    """Ids of plain RGB images are golden: sample ids, and with them all records, hang on them."""
    gradient = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    assert image_id_of(gradient) == "010403af1bf5614f"
    assert image_id_of(TASKS.get("forms")().samples(1)[0].image) == "7c1cea6fe518859e"
    black, clear = Image.new("RGB", (4, 4)), Image.new("RGBA", (4, 4))
    assert image_id_of(black) != image_id_of(clear) == image_id_of(Image.new("RGB", (4, 4), "white"))
    assert image_id_of(Image.new("L", (4, 4))) == image_id_of(black) != image_id_of(Image.new("RGB", (2, 8)))
    deep = [Image.fromarray(np.full((4, 4), value, np.uint16)) for value in (30000, 40000)]
    assert image_id_of(deep[0]) != image_id_of(deep[1])


def test_unreadable_images_have_ids_of_their_own(tmp_path):
    """Else two damaged files with one question would be one sample, and the list of samples would end at the first."""
    nothing = [Image.new("RGB", (0, 0)), Image.new("RGB", (0, 3))]
    numbers = [Image.fromarray(np.array([[np.nan, value]], np.float32)) for value in (1, 2)]
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(tmp_path / f"{name}.png", compress_level=0)
        content = (tmp_path / f"{name}.png").read_bytes()
        (tmp_path / f"{name}.png").write_bytes(content[:-2000])
    with Image.open(tmp_path / "red.png") as red, Image.open(tmp_path / "blue.png") as blue:
        ids = [image_id_of(image) for image in (*nothing, *numbers, red, blue)]
        assert len(set(ids)) == 6
        assert ids == [image_id_of(image) for image in (*nothing, *numbers, red, blue)]
    assert len(image_id_of(red)) == 16, "nor does a file that was closed too early end the list"


def test_limit_and_names():
    with pytest.raises(ValueError, match="at least 1"):
        TASKS.get("forms")().samples(0)
    with pytest.raises(UnknownNameError, match="unknown task 'form'.*nearest first: forms"):
        TASKS.get("form")


@pytest.mark.parametrize(
    ("metric", "answer", "references", "expected"),
    [
        ("exact_match", " The Red. ", ["red"], 1.0),
        ("exact_match", "dark red", ["red"], 0.0),
        ("vqa_accuracy", "yes", ["yes"], 1.0),
        ("vqa_accuracy", "yes", ["yes"] * 2 + ["no"] * 8, (2 * (1 / 3) + 8 * (2 / 3)) / 10),
        ("vqa_accuracy", "yes", ["yes"] * 4 + ["no"] * 6, 1.0),
        ("anls", "1234", ["1235"], 0.75),
        ("anls", "12", ["1299"], 0.5),
        ("anls", "1", ["129"], 0.0),
        ("anls", "", ["129"], 0.0),
        ("relaxed_accuracy", "95", ["100"], 1.0),
        ("relaxed_accuracy", "94.9", ["100"], 0.0),
        ("relaxed_accuracy", "Teal", ["teal"], 1.0),
        ("relaxed_accuracy", "5%", ["0.05"], 1.0),
        ("relaxed_accuracy", "blue", ["50"], 0.0),
    ],
)
def test_metrics_by_hand(metric, answer, references, expected):
    assert score(metric, answer, references) == pytest.approx(expected)


def test_edit_distance_by_hand():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3 and edit_distance("a", "a") == 0


def test_bad_metric_or_no_reference():
    with pytest.raises(ValueError, match="the metrics that exist, nearest first: anls"):
        score("anl", "a", ["b"])
    with pytest.raises(ValueError, match="at least one reference"):
        score("anls", "a", [])


def test_show_writes_images_and_questions(tmp_path):
    command = [sys.executable, "-m", "evaluations.tasks", "show", "glyphs", "--num", "2", "--out", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "glyphs-00.png",
        "glyphs-00.txt",
        "glyphs-01.png",
        "glyphs-01.txt",
    ]
    assert "\t" in (tmp_path / "glyphs-00.txt").read_text()
