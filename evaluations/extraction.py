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

    In this order: the letter alone, with or without a bracket, full stop or colon behind it ("B", "(b)", "B. blue");
    the letter behind "answer is", "answer:", "option" or "choice"; the text of exactly one choice, alone; a capital
    letter in brackets or alone among other words, if exactly one letter stands so; the text of exactly one choice
    within the answer.
    """
    letters, text = LETTERS[: len(choices)], " ".join(answer.split())
    one = f"[{letters}{letters.lower()}]"
    alone = re.fullmatch(rf"\(?({one})\)?[.:,]?", text) or re.match(rf"(?:\(({one})\)|({one})[.:)])(?=\s|$)", text)
    if alone:
        return next(group for group in alone.groups() if group).upper()
    said = re.findall(rf"(?i:answer(?: is)?|option|choice)\s*(?:is|:)?\s*\(?({one})\b(?!['’])\)?", text)
    if len(set(map(str.upper, said))) == 1:
        return said[0].upper()
    plain = lambda each: " ".join(each.lower().split()).strip(" .,;:!?\"'")
    same = [letter for letter, choice in zip(letters, choices, strict=True) if plain(choice) == plain(text)]
    if len(same) == 1:
        return same[0]
    # "A" also begins sentences, and "I" is a word: as words they name nothing unless in brackets.
    standing = set(re.findall(rf"\(([{letters}])\)", text)) or set(re.findall(rf"\b([{letters}])\b(?!['’])", text)) - {
        "A", "I"
    }  # fmt: skip
    if len(standing) == 1:
        return standing.pop()
    words = f" {plain(re.sub(r'[^a-z0-9.%+-]+', ' ', text.lower()))} "
    within = [
        letter
        for letter, choice in zip(letters, choices, strict=True)
        if plain(choice) and f" {plain(re.sub(r'[^a-z0-9.%+-]+', ' ', choice.lower()))} " in words
    ]
    return within[0] if len(within) == 1 else None


def short_answer(answer: str) -> str:
    """A free answer without what models put around it: reasoning in tags, "the answer is", quotes, further lines."""
    text = re.sub(r"(?s)^.*</think>", "", answer).strip()
    found = re.findall(r"(?i)\banswer(?:\s+is|\s*:)\s*:?\s*([^\n]+)", text)
    text = found[-1] if found else text.split("\n")[0]
    text = text.strip().strip("*\"'` ")
    return re.sub(r"\.$", "", text).strip("*\"'` ")
