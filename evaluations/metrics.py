"""How an answer is scored: the metrics of the field, each from 0 to 1.

exact_match       the normalised strings are equal.
vqa_accuracy      VQA v2 (Antol et al. 2015; Goyal et al. 2017): min(1, matching annotators / 3), averaged over
                  all leave-one-out subsets; with fewer than three references any match counts fully.
anls              average normalised Levenshtein similarity (Biten et al. 2019, ST-VQA and DocVQA): 1 - distance /
                  length of the nearest reference, 0 below a similarity of 0.5.
relaxed_accuracy  ChartQA (Masry et al. 2022): numbers within 5 % of the reference, other answers by exact match.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from budgets.registry import check_name

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = 0.05


def normalise(text: str) -> str:
    """Lower case, single spaces, no articles, no surrounding punctuation."""
    text = re.sub(r"\s+", " ", text.strip().lower())
    text = re.sub(r"\b(a|an|the)\b ", "", text + " ").strip()
    return text.strip(".,;:!?\"'")


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference after normalisation."""
    return float(any(normalise(answer) == normalise(reference) for reference in references))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Agreement with the annotators, as in VQA v2."""
    matches = [normalise(answer) == normalise(reference) for reference in references]
    if len(matches) < 3:
        return float(any(matches))
    total = sum(matches)
    return sum(min(1.0, (total - own) / 3) for own in matches) / len(matches)


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions, each at cost 1."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def anls(answer: str, references: Sequence[str]) -> float:
    """Similarity to the nearest reference, 0 where less than half agrees."""
    best = 0.0
    for reference in references:
        given, wanted = (" ".join(text.lower().split()) for text in (answer, reference))
        longest = max(len(given), len(wanted))
        similarity = 1 - edit_distance(given, wanted) / longest if longest else 1.0
        best = max(best, similarity)
    return best if best >= ANLS_THRESHOLD else 0.0


def _number(text: str) -> float | None:
    text = text.strip().rstrip(".").replace(",", "")
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if a numeric answer is within 5 % of a reference, or another answer equals one."""
    given = _number(answer)
    for reference in references:
        wanted = _number(reference)
        if given is not None and wanted is not None:
            if abs(given - wanted) <= RELAXED_TOLERANCE * abs(wanted):
                return 1.0
        elif exact_match(answer, [reference]):
            return 1.0
    return 0.0


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "vqa_accuracy": vqa_accuracy,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
}


def score(metric: str, answer: str, references: Sequence[str]) -> float:
    """The score of an answer under a named metric.

    Raises:
        ValueError: unknown metric, or no reference to compare with.
    """
    check_name("metric", metric, list(METRICS))
    if not references:
        raise ValueError(f"{metric}: a sample needs at least one reference answer")
    return METRICS[metric](answer, references)
