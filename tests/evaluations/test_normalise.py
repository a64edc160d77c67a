"""When two answers are the same, metric by metric: tables of cases, each a row that a reader can check by hand."""

from decimal import Decimal

import pytest

from evaluations import normalise
from evaluations.metrics import METRICS, score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" The  Red. ", "red"),
        ("A", "a"),
        ("A.", "a"),
        ("“A”", "a"),
        ("a dog on the sofa", "dog on sofa"),
        ("plan A", "plan a"),  # an article stands before a word
        ("the", "the"),
        ('the "red"', "red"),
        ("", ""),
        ("...", "..."),
        ("-5", "-5"),
        ("1.5", "1.5"),
        (".5", ".5"),
        ("'.5'.", ".5"),
        ("5%", "5%"),
        ("cafe\u0301", "café"),
    ],
)
def test_for_exact_match(text, expected):
    assert normalise.for_exact_match(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two", "2"),
        ("None", "0"),
        ("ten\ncats", "10 cats"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),  # a comma between digits: all punctuation goes without a trace
        ("two-story", "2 story"),
        ("black, white", "black white"),
        ("black,white", "black white"),
        ("black - white", "black white"),
        ("yes.", "yes"),
        ("U.S.", "us"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("The man's hat", "man's hat"),
        ("dont know", "don't know"),
        ("don’t", "don't"),
        ("couldn'tve", "couldn't've"),
        ("yall'll", "y'all'll"),
        ("oclock", "o'clock"),
        ("were", "were"),  # not we're: the release leaves out what is a word of its own
        ("its", "its"),
        ("A", "a"),
        ("the", "the"),
        ("...", "..."),
        ("-", "-"),
        ("", ""),
    ],
)
def test_for_vqa(text, expected):
    assert normalise.for_vqa(text) == expected
    assert normalise.for_vqa(expected) == expected, "a normal form is its own"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  12  MAY\n2020 ", "12 may 2020"),
        ("A.", "a."),
        ("The end", "the end"),
        ("", ""),
    ],
)
def test_for_anls(text, expected):
    assert normalise.for_anls(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("95", Decimal(95)),
        ("95.", Decimal(95)),
        (" '.5' ", Decimal("0.5")),
        ("+1,234.5", Decimal("1234.5")),
        ("\N{MINUS SIGN}5", Decimal(-5)),
        ("5%", Decimal("0.05")),
        ("5 %.", Decimal("0.05")),
        ("1.2e3", Decimal(1200)),
        ("1,5", "1,5"),  # a comma that groups no thousands may be a decimal one: not known
        ("12,34,567", "12,34,567"),
        ("1_0", "1_0"),
        ("٣", "٣"),  # digits of other scripts are for Python alone
        ("nan", "nan"),
        ("-inf", "-inf"),
        ("1e9999999", "1e9999999"),
        ("%", "%"),
        ("5%%", "5%%"),
        ("The Teal.", "teal"),
        ("A", "a"),
        ("", ""),
    ],
)
def test_for_relaxed_accuracy(text, expected):
    found = normalise.for_relaxed_accuracy(text)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("metric", "answer", "references", "expected"),
    [
        ("exact_match", "", ["A"], 0.0),
        ("exact_match", "...", ["A"], 0.0),
        ("exact_match", "the", ["A"], 0.0),
        ("exact_match", "A.", ["A"], 1.0),
        ("exact_match", "A", ["A"], 1.0),
        ("exact_match", "", ["..."], 0.0),
        ("exact_match", ".5", ["5"], 0.0),
        ("vqa_accuracy", "two", ["2"] * 10, 1.0),
        ("vqa_accuracy", "2", ["two"] * 10, 1.0),
        ("vqa_accuracy", "1,000", ["1000"] * 10, 1.0),
        ("vqa_accuracy", "1000", ["1,000"] * 10, 1.0),
        ("vqa_accuracy", "dont", ["don't"] * 10, 1.0),
        ("vqa_accuracy", "", ["A"] * 10, 0.0),
        ("vqa_accuracy", "...", ["A"] * 10, 0.0),
        ("vqa_accuracy", "two", ["2"] * 2 + ["3"] * 8, 0.6),
        ("vqa_accuracy", "two", ["2"] * 3 + ["3"] * 7, 0.9),
        ("vqa_accuracy", "two", ["2"] * 3, 1.0),  # all who were asked
        ("vqa_accuracy", "two", ["2", "3", "3"], 1 / 3),
        ("relaxed_accuracy", "\N{MINUS SIGN}5", ["-5"], 1.0),
        ("relaxed_accuracy", "-5", ["\N{MINUS SIGN}5"], 1.0),
        ("relaxed_accuracy", "1_0", ["10"], 0.0),
        ("relaxed_accuracy", "1_0", ["1_0"], 1.0),
        ("relaxed_accuracy", "nan", ["NaN"], 1.0),
        ("relaxed_accuracy", "inf", ["inf"], 1.0),
        ("relaxed_accuracy", "inf", ["5"], 0.0),
        ("relaxed_accuracy", "1,000", ["1000"], 1.0),
        ("relaxed_accuracy", "1,5", ["15"], 0.0),
        ("relaxed_accuracy", "5 %", ["5%"], 1.0),
        ("relaxed_accuracy", "5", ["5%"], 0.0),  # 5 is not 0.05
        ("relaxed_accuracy", "1.05", ["1"], 1.0),
        ("relaxed_accuracy", "1.0501", ["1"], 0.0),
        ("relaxed_accuracy", "0.0", ["0"], 1.0),
        ("relaxed_accuracy", "0.001", ["0"], 0.0),
        ("relaxed_accuracy", "", ["A"], 0.0),
        ("anls", "", ["A"], 0.0),
    ],
)
def test_scores(metric, answer, references, expected):
    assert score(metric, answer, references) == pytest.approx(expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("text", ["A", "the", "...", "-", "5", "1_0", "nan", "don't", "$5", "%", "e", ".", "0"])
def test_equal_strings_are_equal_and_no_other_is_nothing(metric, text):
    assert score(metric, text, [text]) == 1.0
    assert score(metric, "", [text]) == score(metric, text, [""]) == 0.0
