"""How sure we are of a score, and of a difference between two methods that answered the same questions.

Three decisions run through the file. Questions about one image stand or fall together, so the unit of resampling and
of variance is the image (the *cluster*), not the question. Methods are compared on the same samples, so differences
are paired. And an interval must stay honest at the edge: twenty right answers out of twenty do not prove 100 %, and
twenty equal answers do not prove equality, so a proportion gets Wilson's interval and a difference two pseudo-pairs.

Scores are in 0..1. Everything random takes a seed and is reproducible. Only numpy and scipy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
EXACT_CLUSTERS = 14  # up to 2^14 sign patterns are enumerated; above, they are drawn


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Args:
        estimate, low, high: in the unit of the scores.
        num_samples, num_clusters: how many samples, from how many images, stand behind it.
        rule: how the interval was made, for the reader.
    """

    estimate: float
    low: float
    high: float
    num_samples: int
    num_clusters: int
    rule: str


@dataclass(frozen=True)
class Comparison:
    """A minus B on the same samples.

    Args:
        difference, low, high: in the unit of the scores.
        p_value: two-sided, for "no difference".
        test: which test gave it.
    """

    difference: float
    low: float
    high: float
    p_value: float
    test: str
    num_samples: int
    num_clusters: int


def _scores(values: Sequence[float], where: str) -> np.ndarray:
    scores = np.asarray(values, dtype=float)
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"{where}: expected a non-empty list of scores, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{where}: scores must be finite; a failed sample has no score and must be left out")
    return scores


def _clusters(ids: Sequence | None, num_samples: int, where: str) -> tuple[np.ndarray, int]:
    """Cluster index of each sample, and the number of clusters; without ids each sample is its own."""
    if ids is None:
        return np.arange(num_samples), num_samples
    if len(ids) != num_samples:
        raise ValueError(f"{where}: {num_samples} scores but {len(ids)} cluster ids")
    names, index = np.unique(np.asarray(ids), return_inverse=True)
    return index, len(names)


def _critical(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    return float(stats.norm.ppf(0.5 + confidence / 2))


def clustered_variance(values: Sequence[float], clusters: Sequence | None = None) -> float:
    """Variance of the mean when samples of one cluster are not independent (the ratio estimator's, with C/(C-1))."""
    scores = _scores(values, "clustered_variance")
    index, num_clusters = _clusters(clusters, scores.size, "clustered_variance")
    if num_clusters < 2:
        return float("inf")
    residual = np.bincount(index, scores - scores.mean(), minlength=num_clusters)
    return float(num_clusters / (num_clusters - 1) * (residual**2).sum() / scores.size**2)


def wilson(proportion: float, num: float, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval for a proportion of `num` trials; `num` may be an effective (fractional) number."""
    if not 0 <= proportion <= 1 or num <= 0:
        raise ValueError(f"wilson needs a proportion in 0..1 of at least one trial, got {proportion} of {num}")
    z = _critical(confidence)
    scale = 1 + z**2 / num
    centre = (proportion + z**2 / (2 * num)) / scale
    half = z / scale * np.sqrt(proportion * (1 - proportion) / num + z**2 / (4 * num**2))
    # At the edges the exact value is the bound itself; rounding must not step over it.
    low = 0.0 if proportion == 0 else max(0.0, float(centre - half))
    high = 1.0 if proportion == 1 else min(1.0, float(centre + half))
    return low, high


def bootstrap_means(
    values: np.ndarray, clusters: Sequence | None = None, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Means over cluster resamples, jointly for several score columns: the same images are drawn for every column.

    Args:
        values: scores [samples] or [samples, columns].

    Returns:
        means [num_resamples] or [num_resamples, columns].
    """
    values = np.asarray(values, dtype=float)
    columns = values[:, None] if values.ndim == 1 else values
    index, num_clusters = _clusters(clusters, len(columns), "bootstrap_means")
    sums = np.zeros((num_clusters, columns.shape[1]))
    np.add.at(sums, index, columns)
    sizes = np.bincount(index, minlength=num_clusters).astype(float)
    random = np.random.default_rng(seed)
    draws = random.multinomial(num_clusters, np.full(num_clusters, 1 / num_clusters), size=num_resamples)
    means = draws @ sums / (draws @ sizes)[:, None]
    return means[:, 0] if values.ndim == 1 else means


def mean_interval(
    values: Sequence[float],
    clusters: Sequence | None = None,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval of a mean score.

    Right/wrong scores get Wilson's interval on the effective number of samples: n divided by the design effect of the
    clusters (never below 1), or the number of clusters where all scores agree and the effect cannot be estimated.
    Graded scores get the percentile cluster bootstrap. All-equal graded scores at 0 or 1 fall back to Wilson, which is
    conservative for anything bounded in 0..1.
    """
    scores = _scores(values, "mean_interval")
    index, num_clusters = _clusters(clusters, scores.size, "mean_interval")
    mean = float(scores.mean())
    binary = bool(np.isin(scores, (0.0, 1.0)).all())
    how = "" if num_clusters == scores.size else ", clustered by image"
    if not binary and num_clusters > 1:
        means = bootstrap_means(scores, index, num_resamples, seed)
        low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
        return Interval(mean, float(low), float(high), scores.size, num_clusters, f"percentile bootstrap{how}")
    effective = float(num_clusters)
    if 0 < mean < 1 and num_clusters > 1:
        design_effect = clustered_variance(scores, index) / (mean * (1 - mean) / scores.size)
        effective = scores.size / max(1.0, design_effect)
    low, high = wilson(mean, effective, confidence)
    return Interval(mean, low, high, scores.size, num_clusters, f"Wilson{how}")


def average_interval(intervals: Sequence[Interval]) -> Interval:
    """Macro-average over independent tasks, its interval recovered from theirs (MOVER; Zou & Donner 2008)."""
    if not intervals:
        raise ValueError("average_interval: no intervals")
    mean = float(np.mean([i.estimate for i in intervals]))
    below = np.sqrt(sum((i.estimate - i.low) ** 2 for i in intervals)) / len(intervals)
    above = np.sqrt(sum((i.high - i.estimate) ** 2 for i in intervals)) / len(intervals)
    return Interval(
        mean,
        float(max(0.0, mean - below)),
        float(min(1.0, mean + above)),
        sum(i.num_samples for i in intervals),
        sum(i.num_clusters for i in intervals),
        "recovered from the tasks' intervals (MOVER)",
    )


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Median with the exact order-statistic interval (no distribution assumed); with few values it is their range."""
    ordered = np.sort(_scores(values, "median_interval"))
    num = ordered.size
    # Ranks r and n+1-r enclose the median unless r-1 or fewer values fall on one side: binomial tails of r-1.
    rank = max(int(stats.binom.ppf(0.5 - confidence / 2, num, 0.5)) - 1, 0)
    return Interval(
        float(np.median(ordered)), float(ordered[rank]), float(ordered[num - 1 - rank]), num, num, "order statistics"
    )


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact McNemar test: `only_a` pairs where only A was right, `only_b` where only B was."""
    if only_a < 0 or only_b < 0:
        raise ValueError(f"counts must be >= 0, got {only_a} and {only_b}")
    total = only_a + only_b
    return 1.0 if total == 0 else float(stats.binomtest(only_a, total, 0.5).pvalue)


def sign_flip_test(cluster_differences: Sequence[float], num_resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided paired permutation test: under "no difference" each cluster's difference may change its sign.

    All sign patterns up to 14 clusters that differ at all; above that `num_resamples` random ones and the observed one.
    """
    differences = np.asarray(cluster_differences, dtype=float)
    differences = differences[differences != 0]
    if differences.size == 0:
        return 1.0
    observed = abs(differences.sum())
    tolerance = 1e-12 * np.abs(differences).sum()
    if differences.size <= EXACT_CLUSTERS:
        patterns = (np.arange(2**differences.size)[:, None] >> np.arange(differences.size)) & 1
        sums = (1 - 2 * patterns) @ differences
        return float((np.abs(sums) >= observed - tolerance).mean())
    # Equal magnitudes flip like coins: of k equal ones, Binomial(k, 1/2) stay positive. A few draws replace thousands.
    magnitudes, counts = np.unique(np.round(np.abs(differences), 12), return_counts=True)
    random, exceed, done = np.random.default_rng(seed), 0, 0
    while done < num_resamples:  # in blocks, so that memory does not grow with the number of images
        block = min(1000, num_resamples - done)
        positive = random.binomial(counts, 0.5, size=(block, counts.size))
        exceed += int((np.abs((2 * positive - counts) @ magnitudes) >= observed - 1e-9).sum())
        done += block
    return (1 + exceed) / (1 + num_resamples)


def paired_comparison(
    pairs: Sequence[tuple[Sequence[float], Sequence[float], Sequence | None]],
    confidence: float = CONFIDENCE,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare A with B on the same samples of one or several tasks; several are averaged with equal weight.

    Right/wrong scores of one task with one question an image: exact McNemar. Everything else: sign flips of whole
    images. The interval is clustered-normal with two pseudo-pairs a task, one for either side (the idea of Agresti and
    Min 2005): without them identical answers on a handful of samples would give an interval of width zero.

    Args:
        pairs: per task (scores of A, scores of B, image ids or None), aligned sample by sample.
    """
    if not pairs:
        raise ValueError("paired_comparison: no tasks to compare on")
    difference, variance, flips, num_samples, total_clusters, binary = 0.0, 0.0, [], 0, 0, True
    for a, b, ids in pairs:
        a, b = _scores(a, "paired_comparison"), _scores(b, "paired_comparison")
        if a.size != b.size:
            raise ValueError(f"paired_comparison: {a.size} scores of A against {b.size} of B")
        index, num_clusters = _clusters(ids, a.size, "paired_comparison")
        binary = binary and bool(np.isin(np.concatenate([a, b]), (0.0, 1.0)).all()) and num_clusters == a.size
        weight = 1 / len(pairs)
        delta = a - b
        difference += weight * float(delta.mean())
        spread = clustered_variance(delta, index) if num_clusters > 1 else 1.0
        variance += weight**2 * (spread + 1 / (a.size + 2) ** 2)
        flips.append(np.bincount(index, delta, minlength=num_clusters) * weight / a.size)
        num_samples, total_clusters = num_samples + a.size, total_clusters + num_clusters
    if binary and len(pairs) == 1:
        p_value, test = mcnemar_exact(int((delta > 0).sum()), int((delta < 0).sum())), "exact McNemar"
    else:
        p_value, test = sign_flip_test(np.concatenate(flips), num_resamples, seed), "paired permutation by image"
    half = _critical(confidence) * float(np.sqrt(variance))
    low, high = max(-1.0, difference - half), min(1.0, difference + half)
    return Comparison(difference, low, high, p_value, test, num_samples, total_clusters)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the given order."""
    p = np.asarray(p_values, dtype=float)
    if p.size and not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values must be in 0..1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * (p.size - np.arange(p.size))))
    return adjusted.tolist()


def non_inferior(comparison: Comparison, margin: float) -> bool:
    """True if A is shown to be no more than `margin` below B: the interval of the difference lies above -margin."""
    if margin < 0:
        raise ValueError(f"margin must be >= 0, got {margin}")
    return comparison.low > -margin
