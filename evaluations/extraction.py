"""From what a model says to its answer: the letter of a choice, or the words behind "the answer is".

Models are asked for a letter or a short answer and often say more. The rules are few and in a fixed order, and what
none of them finds stays as it is: a wrong answer, never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ASKED_FOR_A_LETTER = "Answer with the option's letter from the given choices directly."


def with_choices(question: str, choices: Sequence[str]) -> str:
    """The question with its choices under letters, as the benchmarks of the field ask it.

    Raises:
        ValueError: fewer than two choices, or more than there are letters.
    """
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"a question has 2 to {len(LETTERS)} choices, got {len(choices)}")
    listed = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question.strip(), *listed, ASKED_FOR_A_LETTER])


def chosen_letter(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that an answer names; None if it names none, or several.

    In this order: the letter alone or at the beginning ("B", "(b)", "B. blue"); the letter behind "answer is",
    "answer:", "option" or "choice"; the text of a choice and nothing else; the one letter that stands among other
    words; the one choice whose text stands among other words.
    """
    letters, text = LETTERS[: len(choices)], " ".join(answer.split())
    any_case = f"[{letters}{letters.lower()}]"
    first = re.fullmatch(rf"\(?({any_case})\)?[.:,]?", text) or re.match(
        rf"(?:\(({any_case})\)|({any_case})[.:)])(?=\s|$)", text
    )
    if first:
        return next(group for group in first.groups() if group).upper()
    # "A" is also an article and "I" a word: unless something ends there, they name nothing. Nor does a small letter.
    words = "".join(letter for letter in letters if letter in "AI")
    clear = "".join(letter for letter in letters if letter not in "AI")
    ends = r"(?=\s*(?:[.,;:)\]]|$|and\b|or\b|because\b|since\b))"
    letter = rf"(?:\(({any_case})\)|([{clear}])\b(?!['’])|([{words}]){ends})"
    for pattern in (rf"(?i:\b(?:answer|option|choice)\b(?:\s*(?:is|:))*)\s*{letter}", rf"(?<![\w'’]){letter}"):
        named = {next(group for group in found if group).upper() for found in re.findall(pattern, text)}
        if named:
            return named.pop() if len(named) == 1 else None
        same = [at for at, choice in zip(letters, choices, strict=True) if _plain(choice) == _plain(text)]
        if len(same) == 1:
            return same[0]
    within = [
        at
        for at, choice in zip(letters, choices, strict=True)
        if _plain(choice) and f" {_plain(choice)} " in f" {_plain(text)} "
    ]
    return within[0] if len(within) == 1 else None


def _plain(text: str) -> str:
    """Small letters and figures, everything else a single space."""
    return re.sub(r"[^\w%+-]+", " ", text.lower()).strip()


def short_answer(answer: str) -> str:
    """A free answer without what models put around it: reasoning in tags, "the answer is", quotes, further lines."""
    text = re.sub(r"(?s)^.*</think>", "", answer).strip()
    text = re.split(r"(?i)\banswer(?:\s+is|\s*:)\s*:?", text)[-1].strip()
    text = text.split("\n")[0].strip("*\"'` ")
    return re.sub(r"\.$", "", text).strip("*\"'` ")
