"""Policies: which configuration answers a sample, from what is known of the sample, and what that costs.

A model trained for several budgets has *configurations*, cheapest first. Run each of them on every sample, and any
policy over them is arithmetic on two matrices, `scores` and `costs` [num_samples, num_configurations]: nothing has to
be run twice. All functions return configuration indices.

    fixed        one configuration for all
    per-task     one a task, chosen on a validation split
    router       one a sample, predicted from it; a weight lambda trades the predicted success against the cost
    cascade      cheap first; continue while the first answer token is uncertain; every attempt is paid for
    random       the router's own choices, dealt out to the wrong samples: what a router must beat
    oracle       the cheapest configuration that is right; it knows the answers, so it is a bound

Pure numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

POLICIES = ("fixed", "per-task", "router", "cascade", "random", "oracle")
SHARE = 0.99
"""Good enough: this share of what the largest configuration scores (VISOR, arXiv 2603.23495)."""


def _matrix(name: str, values: npt.ArrayLike, shape: tuple[int, ...] | None = None) -> np.ndarray:
    matrix = np.asarray(values, dtype=float)
    if matrix.ndim != 2 or matrix.shape[1] == 0 or (shape is not None and matrix.shape != shape):
        expected = "[num_samples, num_configurations >= 1]" if shape is None else f"{list(shape)}"
        raise ValueError(f"{name} must be a matrix {expected}, got shape {list(matrix.shape)}")
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite; leave out samples that were not answered")
    return matrix


def _cheapest(allowed: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """The cheapest allowed configuration of each sample, the first of equals; one must be allowed in every row."""
    return np.where(allowed, costs, np.inf).argmin(axis=1)


def oracle(scores: npt.ArrayLike, costs: npt.ArrayLike) -> np.ndarray:
    """The cheapest configuration with the best score that any of them gets on the sample: [num_samples].

    For right or wrong answers that is the cheapest that is right, and the cheapest of all where none is.
    """
    scores = _matrix("scores", scores)
    return _cheapest(scores >= scores.max(axis=1, keepdims=True), _matrix("costs", costs, scores.shape))


def pseudo_labels(scores: npt.ArrayLike, costs: npt.ArrayLike, share: float = SHARE) -> np.ndarray:
    """What a router is trained on: the cheapest configuration with `share` of the last one's score: [num_samples].

    The last configuration is the largest. Unlike the oracle this never asks for more than the full model knows: where
    the full model is wrong, the label is the cheapest configuration.
    """
    scores = _matrix("scores", scores)
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in 0..1, got {share}")
    return _cheapest(scores >= share * scores[:, -1:], _matrix("costs", costs, scores.shape))


def best_per_task(scores: npt.ArrayLike, costs: npt.ArrayLike, tasks: Sequence, share: float = SHARE) -> dict[str, int]:
    """By task, the cheapest configuration whose mean score reaches `share` of the largest one's mean.

    To be called with a validation split: chosen on the samples that it is then scored on, it would be too good.

    Args:
        tasks: the task of each sample.
    """
    scores = _matrix("scores", scores)
    costs, tasks = _matrix("costs", costs, scores.shape), np.asarray(tasks)
    if tasks.shape != scores.shape[:1]:
        raise ValueError(f"tasks must name the task of each of {len(scores)} samples, got shape {list(tasks.shape)}")
    chosen = {}
    for task in dict.fromkeys(tasks.tolist()):
        mean_score, mean_cost = (matrix[tasks == task].mean(axis=0, keepdims=True) for matrix in (scores, costs))
        chosen[task] = int(_cheapest(mean_score >= share * mean_score[:, -1:] - 1e-12, mean_cost)[0])
    return chosen


def most_likely(logits: npt.ArrayLike) -> np.ndarray:
    """The paper's router: the configuration with the highest logit, the cheaper of equals: [num_samples]."""
    return _matrix("logits", logits).argmax(axis=1)


def success(logits: npt.ArrayLike) -> np.ndarray:
    """Probability that each configuration does as well as the largest: [num_samples, num_configurations].

    The softmax says which is the cheapest that suffices, and with it all costlier ones do.

    Args:
        logits: of the router, cheapest configuration first.
    """
    logits = _matrix("logits", logits)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights.cumsum(axis=1) / weights.sum(axis=1, keepdims=True)


def cost_aware(success: npt.ArrayLike, relative_costs: npt.ArrayLike, cost_weight: float) -> np.ndarray:
    """argmax over configurations of success - cost_weight * cost, the cheaper of equals: [num_samples].

    Args:
        success: predicted probability that each configuration suffices (`success`).
        relative_costs: of each configuration, relative to dense; [num_samples, C], or [C] for all samples.
        cost_weight: lambda: how much probability of success a whole dense prefill is worth; 0 asks for success alone.
    """
    success = _matrix("success", success)
    if not np.isfinite(cost_weight) or cost_weight < 0:
        raise ValueError(f"cost_weight must be a number >= 0, got {cost_weight}")
    relative_costs = _matrix("relative_costs", np.broadcast_to(relative_costs, success.shape), success.shape)
    utility = success - cost_weight * relative_costs
    return _cheapest(utility >= utility.max(axis=1, keepdims=True), relative_costs)


def ladder(costs: npt.ArrayLike) -> list[int]:
    """The rungs of a cascade: the cheapest configuration, then each next at least twice as dear, and the last.

    With doubling costs all attempts together cost at most three times the largest, however long the list.

    Args:
        costs: mean cost of each configuration, cheapest first.
    """
    costs = np.asarray(costs, dtype=float)
    if costs.ndim != 1 or costs.size == 0 or not (np.diff(costs) >= 0).all() or costs[0] <= 0:
        raise ValueError(f"a ladder needs the positive costs of the configurations, cheapest first, got {costs}")
    rungs = [0]
    for configuration in range(1, len(costs) - 1):
        if 2 * costs[rungs[-1]] <= costs[configuration]:
            rungs.append(configuration)
    return rungs + [len(costs) - 1] * (len(costs) > 1)


def cascade(confidence: npt.ArrayLike, threshold: float, rungs: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Start with the first rung; take the next one while the answer's first token is less likely than `threshold`.

    Args:
        confidence: probability of the first answer token under each configuration, [num_samples, C].
        rungs: configurations in the order in which they are tried.

    Returns:
        The configuration that gives the answer [num_samples], and all that ran [num_samples, C]: what is paid for.
    """
    confidence = _matrix("confidence", confidence)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is a probability in 0..1, got {threshold}")
    num_configurations = confidence.shape[1]
    if not rungs or any(not 0 <= rung < num_configurations for rung in rungs):
        raise ValueError(f"rungs must name configurations 0 to {num_configurations - 1}, got {list(rungs)}")
    chosen = np.full(len(confidence), rungs[0])
    ran = np.zeros(confidence.shape, dtype=bool)
    going = np.ones(len(confidence), dtype=bool)
    for rung in rungs:
        chosen[going], ran[going, rung] = rung, True
        going = going & (confidence[:, rung] < threshold)
    return chosen, ran


def deal(choices: npt.ArrayLike, sample_ids: Sequence[str], seed: int = 0) -> np.ndarray:
    """The same choices, dealt out to the samples at random: equal cost, no knowledge of the sample.

    The order follows from the ids, so that it does not depend on the order of the samples.
    """
    choices = np.asarray(choices)
    if choices.shape != (len(sample_ids),):
        raise ValueError(f"{len(sample_ids)} samples need one choice each, got shape {list(choices.shape)}")
    place = lambda salt: sorted(range(len(choices)), key=lambda i: _hashed(f"{seed}:{salt}:{sample_ids[i]}"))
    dealt = np.empty_like(choices)
    dealt[place("receives")] = choices[place("gives")]
    return dealt


def uniform(num_configurations: int, sample_ids: Sequence[str], seed: int = 0) -> np.ndarray:
    """A configuration for each sample, all equally likely: the random policy where there is no router to match."""
    if num_configurations < 1:
        raise ValueError(f"there must be at least 1 configuration, got {num_configurations}")
    return np.array([int(_hashed(f"{seed}:uniform:{i}"), 16) % num_configurations for i in sample_ids], dtype=int)


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def taken(values: npt.ArrayLike, choices: npt.ArrayLike) -> np.ndarray:
    """The entry of each row that was chosen: [num_samples]."""
    values, choices = np.asarray(values), np.asarray(choices)
    return values[np.arange(len(choices)), choices]


def by_task(chosen: Mapping[str, int], tasks: Sequence[str]) -> np.ndarray:
    """The configuration of each sample's task: [num_samples].

    Raises:
        ValueError: nothing was chosen for a task.
    """
    if missing := sorted(set(tasks) - set(chosen)):
        raise ValueError(f"no configuration was chosen for {', '.join(missing)}; chosen for: {', '.join(chosen)}")
    return np.array([chosen[task] for task in tasks], dtype=int)
