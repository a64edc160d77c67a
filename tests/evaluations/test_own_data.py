"""`folder:DIR`: own questions run like any task; extraction of letters and short answers; refusals name the row."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from evaluations.config import RunConfig
from evaluations.extraction import chosen_letter, short_answer, with_choices
from evaluations.suite import load_suite
from evaluations.task import open_task

CHOICES = ("a dog", "a cat", "a cow")


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"), ("b", "B"), ("(b)", "B"), ("B.", "B"), ("B. a cat", "B"), ("b) it looks so", "B"), ("A: yes", "A"),
        ("The answer is B", "B"), ("Answer: (C)", "C"), ("The correct option is B because of its ears", "B"),
        ("The answer is A.", "A"), ("Answer: A because it barks", "A"),
        ("a cat", "B"), ("A cat.", "B"), ("It is a cow, I think", "C"), ("I see it: C", "C"), ("(A) I guess", "A"),
        ("The answer is a cat", "B"), ("Answer: A cat", "B"),  # "a" is an article here
        ("A, B", None), ("B or C", None), ("a dog and a cat", None), ("nothing", None), ("", None), ("D", None),
        ("The category", None), ("answer is B, or option C", None),
    ],
)  # fmt: skip
def test_chosen_letter(answer, letter):
    assert chosen_letter(answer, CHOICES) == letter


def test_a_letter_is_not_taken_from_inside_a_word_or_from_i_am():
    assert chosen_letter("I'd say it's none", [str(i) for i in range(12)]) is None
    assert chosen_letter("I", [str(i) for i in range(12)]) == "I"


@pytest.mark.parametrize(
    "answer, short",
    [
        ("3.5", "3.5"), ("The answer is 3.5.", "3.5"), ("Answer: **red**", "red"), ('"Main St."', "Main St"),
        ("red\nbecause it is", "red"), ("<think>blue? no</think>\nred", "red"), ("", ""),
        ("First I thought the answer is 4, but the answer is 5.", "5"),
    ],
)  # fmt: skip
def test_short_answer(answer, short):
    assert short_answer(answer) == short


def test_choices_are_asked_under_letters():
    assert with_choices("What is it? ", CHOICES).split("\n")[:2] == ["What is it?", "A. a dog"]
    with pytest.raises(ValueError, match="2 to 26 choices"):
        with_choices("?", ["one"])


ROWS = [
    {"image": "a.png", "question": "How many?", "answers": ["2", "two"]},
    {"image": "a.png", "question": "Which date?", "answers": "1 May", "metric": "anls"},
    {"image": "b.png", "question": "What is it?", "answers": "a cat", "choices": list(CHOICES), "id": "q3"},
    {"image": "b.png", "question": "And this?", "answers": ["A", "C"], "choices": list(CHOICES)},
]


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (60, 40), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS) + "\n")
    return tmp_path


def test_rows_become_samples_and_scores(folder):
    task = open_task(f"folder:{folder}")
    samples = task.samples()
    assert (task.num_samples, task.title) == (4, folder.name)
    assert task.metric == "exact_match or anls or multiple_choice"
    assert [sample.references for sample in samples] == [("2", "two"), ("1 May",), ("B",), ("A", "C")]
    assert samples[0].image_id == samples[1].image_id != samples[2].image_id
    answers = ("The answer is two.", "1 Mai", "(B) I think", "B")
    scored = [task.score(*each).score for each in zip(samples, answers, strict=True)]
    assert scored == [1, pytest.approx(0.8), 1, 0]
    assert samples[0].image.size == (60, 40)


def test_parquet_with_images_inside_asks_the_same(folder, tmp_path_factory):
    import pyarrow as pa
    import pyarrow.parquet as pq

    other = tmp_path_factory.mktemp("parquet")
    several = lambda answers: [answers] if isinstance(answers, str) else answers
    inside = [
        {**dict.fromkeys(("metric", "choices", "id")), **row, "answers": several(row["answers"]),
         "image": {"bytes": (folder / row["image"]).read_bytes(), "path": None}}
        for row in ROWS
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(inside), other / "questions.parquet")
    a, b = open_task(f"folder:{folder}").samples(), open_task(f"folder:{other}").samples()
    same = lambda sample: (sample.question, sample.references, sample.image_id, sample.metric, sample.image.tobytes())
    assert list(map(same, a)) == list(map(same, b))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image": "a.png", "question": "?"}, r"row 1: lacks \['answers'\]"),
        ({**ROWS[0], "colour": 1}, r"has unknown \['colour'\]"),
        ({**ROWS[0], "question": " "}, "the question is empty"),
        ({**ROWS[0], "answers": []}, "at least one answer"),
        ({**ROWS[0], "metric": "anl"}, "nearest first: anls"),
        ({**ROWS[0], "image": "c.png"}, "c.png does not exist"),
        ({**ROWS[2], "answers": "a horse"}, "neither a choice nor the letter of one"),
        ({**ROWS[2], "metric": "anls"}, "metric of a question with choices"),
        ([1], "a row is an object"),
    ],
)
def test_a_bad_row_is_named(folder, row, message):
    (folder / "questions.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        open_task(f"folder:{folder}")


def test_a_folder_without_questions_and_broken_lines(tmp_path):
    with pytest.raises(ValueError, match="neither questions.jsonl nor questions.parquet"):
        RunConfig.of(load_suite("smoke"), tasks=[f"folder:{tmp_path}"])
    (tmp_path / "questions.jsonl").write_text('{"a": 1}\n{"b"')
    with pytest.raises(ValueError, match="lacks"):
        open_task(f"folder:{tmp_path}")
    (tmp_path / "questions.jsonl").write_text('{"b"')
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        open_task(f"folder:{tmp_path}")


def test_own_data_runs_to_a_report(folder, tmp_path_factory):
    from evaluations.run import main

    out = tmp_path_factory.mktemp("run") / "own"
    arguments = ["--tasks", f"folder:{folder}", "--methods", "dense,pooling", "--budgets", "0.5", "--no-timing"]
    assert main([*arguments, "--out", str(out)]) == 0
    assert folder.name in (out / "report.html").read_text()
