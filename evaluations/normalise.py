"""When two answers are the same: one normal form a metric, each after its source.

All of them lower the case and make any white space one space. None makes nothing of something: what is left of an
answer is never empty unless the answer was, so that "A" and "..." are not the same for having lost an article and three
full stops. Tables of cases are in `tests/evaluations/test_normalise.py`.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

ARTICLES = frozenset(("a", "an", "the"))
_SURROUNDING = ".,;:!?\"'`“”‘’… "  # what may stand around an answer without being of it
_BEFORE = re.compile(rf"\A(?:(?!\.[0-9])[{re.escape(_SURROUNDING)}])+")  # but the point of ".5" is of it


def for_exact_match(text: str) -> str:
    """Without punctuation around it, then without the articles that stand before a word.

    The rule is this project's own, a careful SQuAD (Rajpurkar et al. 2016): signs inside an answer count ("-5" is not
    5, "1.5" not 15), and so does an "A" at its end, which is a name and no article.
    """
    folded = _folded(unicodedata.normalize("NFC", text))
    words = _bare(folded).split(" ")
    return _bare(" ".join([word for word in words[:-1] if word not in ARTICLES] + words[-1:]))


# --- VQA --------------------------------------------------------------------------------------------------------------

VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
VQA_NUMBERS = {
    word: str(number)
    for number, words in enumerate("none zero,one,two,three,four,five,six,seven,eight,nine,ten".split(","))
    for word in words.split()
}
# The contractions that the released evaluation knows without their apostrophes, by what they end with.
_STEMS = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "n't've": "could had might should would",
    "'d": "he how it somebody someone something there they where who you",
    "'d've": "he i it she somebody someone something there they we who y'all you",
    "'ll": "how it somebody someone something they what who why y'all you",
    "'m": "i",
    "'re": "there they what why you",
    "'s": "he how somebody someone that there what when where who why",
    "'ve": "could i might must not should they we what where who would you",
    "": "'ow's'at 'twas ma'am o'clock y'all",
}
VQA_CONTRACTIONS = {
    (stem + ending).replace("'", ""): stem + ending for ending, stems in _STEMS.items() for stem in stems.split()
}


def for_vqa(text: str) -> str:
    """As the evaluation that VQA v2 released does it (Antol et al. 2015; GT-Vision-Lab/VQA, `vqaEval.py`).

    Punctuation goes: without a trace where a space is beside it anywhere in the text or a comma stands between digits,
    else for a space. A full stop goes unless a digit follows. Number words to ten become digits, "none" a 0; articles
    go; contractions get their apostrophes. Other than there, apostrophes may be curly, and an answer that would be
    nothing keeps what it is.
    """
    text = " ".join(text.replace("’", "'").split())
    joined = re.search(r"\d,\d", text) is not None
    kept = text
    for sign in VQA_PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        kept = kept.replace(sign, "" if joined or beside_space else " ")
    kept = re.sub(r"\.(?!\d)", "", kept)
    words = [VQA_NUMBERS.get(word, word) for word in (_folded(kept) or _folded(text)).split()]
    words = [word for word in words if word not in ARTICLES] or words
    return " ".join(VQA_CONTRACTIONS.get(word.replace("'", ""), word) for word in words)


# --- documents and charts ---------------------------------------------------------------------------------------------


def for_anls(text: str) -> str:
    """Case and white space alone, as the scripts of the ST-VQA and DocVQA challenges (Biten et al. 2019)."""
    return _folded(text)


_NUMBER = re.compile(
    r"(?P<number>[+-]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]{1,3})?)"
    r" ?(?P<percent>%?)\.?"
)


def for_relaxed_accuracy(text: str) -> Decimal | str:
    """A number where the answer is one, else the normal form of exact match (ChartQA, Masry et al. 2022).

    A number is written in digits, with a minus of any form (U+2212 is what charts print), commas between groups of
    three, a decimal point, an exponent, a percent sign (5 % is 0.05, as in the evaluation that Pix2Struct released).
    What only a programming language takes for a number is none: "1_0", "nan", "inf".
    """
    folded = _folded(text.replace("\N{MINUS SIGN}", "-"))
    found = _NUMBER.fullmatch(folded) or _NUMBER.fullmatch(_bare(folded))
    if found is None:
        return for_exact_match(folded)
    number = Decimal(found["number"].replace(",", ""))
    return number / 100 if found["percent"] else number


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _bare(text: str) -> str:
    """Without the punctuation around it; what is nothing else stays."""
    return _BEFORE.sub("", text.rstrip(_SURROUNDING)) if text.strip(_SURROUNDING) else text
