"""How an answer is scored: the metrics of the field, each from 0 to 1.

exact_match       the normal forms are equal.
vqa_accuracy      VQA v2 (Antol et al. 2015; Goyal et al. 2017): min(1, matching annotators / 3), averaged over
                  all leave-one-out subsets; with three references the other two are enough, with fewer any match is.
anls              average normalised Levenshtein similarity (Biten et al. 2019, ST-VQA and DocVQA): 1 - distance /
                  length of the nearest reference, 0 below a similarity of 0.5.
relaxed_accuracy  ChartQA (Masry et al. 2022): numbers within 5 % of the reference, other answers by exact match.

What makes two answers the same is another rule in each: `evaluations.normalise`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal

from budgets.registry import check_name
from evaluations.normalise import for_anls, for_exact_match, for_relaxed_accuracy, for_vqa

ANLS_THRESHOLD = 0.5
RELAXED_TOLERANCE = Decimal("0.05")


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals a reference after normalisation."""
    given = for_exact_match(answer)
    return float(any(given == for_exact_match(reference) for reference in references))


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Agreement with the annotators, as in VQA v2, which has ten of them."""
    given = for_vqa(answer)
    matches = [given == for_vqa(reference) for reference in references]
    if len(matches) < 3:
        return float(any(matches))
    total, enough = sum(matches), min(3, len(matches) - 1)  # of three that agree, each subset has only two
    return sum(min(1.0, (total - own) / enough) for own in matches) / len(matches)


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
        given, wanted = for_anls(answer), for_anls(reference)
        longest = max(len(given), len(wanted))
        similarity = 1 - edit_distance(given, wanted) / longest if longest else 1.0
        best = max(best, similarity)
    return best if best >= ANLS_THRESHOLD else 0.0


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if a numeric answer is within 5 % of a reference, or another answer equals one.

    The 5 % are exact: in floats 1.05 is not within 5 % of 1.
    """
    given = for_relaxed_accuracy(answer)
    for reference in references:
        wanted = for_relaxed_accuracy(reference)
        if given == wanted:
            return 1.0
        if isinstance(given, Decimal) and isinstance(wanted, Decimal):
            if abs(given - wanted) <= RELAXED_TOLERANCE * abs(wanted):
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
