"""Which SELF subsets are viable: candidates, their order, and the short list that universal training keeps.

As VISOR (arXiv 2603.23495) does for universal training: evaluate subsets of the SELF slots on the largest trained model
and keep a short list from none to all of them. There are 2^n subsets; two families cost n^2/2 evaluations at most:

* nested greedy elimination: from all slots, drop again and again the one that is missed least;
* evenly spaced: k of the n slots, as far apart as they go.

Pure functions: who evaluates a subset, and on what, is the caller's business (`visor.training.explore`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

Subset = tuple[int, ...]
Evaluate = Callable[[Sequence[Subset]], Sequence[float]]
"""Scores of several subsets at once, the higher the better: one pass over the images serves them all."""


@dataclass(frozen=True)
class Candidate:
    """One evaluated subset.

    Args:
        layers: the SELF layers, ascending.
        score: on the validation split, the higher the better.
        cost: decoder prefill FLOPs relative to dense.
        found_by: families that proposed it.
        viable: True if it is on the short list.
    """

    layers: Subset
    score: float
    cost: float
    found_by: tuple[str, ...]
    viable: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The row of the table as JSON values."""
        return {**asdict(self), "layers": list(self.layers), "found_by": list(self.found_by)}


def check_slots(slots: Sequence[int]) -> Subset:
    """The slots as a subset.

    Raises:
        ValueError: a slot stands twice, out of order, or is negative.
    """
    if list(slots) != sorted(set(slots)) or min(slots, default=0) < 0:
        raise ValueError(f"SELF slots must be different layers in ascending order, got {list(slots)}")
    return tuple(slots)


def evenly_spaced(slots: Sequence[int], num: int) -> Subset:
    """`num` of the slots, spread evenly.

    Raises:
        ValueError: there are not so many slots.
    """
    slots = check_slots(slots)
    if not 0 <= num <= len(slots):
        raise ValueError(f"cannot take {num} of {len(slots)} SELF slots {list(slots)}")
    return tuple(slots[(2 * i + 1) * len(slots) // (2 * num)] for i in range(num))


def eliminate(slots: Sequence[int], evaluate: Evaluate) -> list[Subset]:
    """The nested chain from all slots to none; each member leaves out the layer that is missed least.

    Of equals the subset that leaves out the latest layer is taken: an earlier SELF layer serves more CROSS layers.
    """
    chain = [check_slots(slots)]
    while chain[-1]:
        children = [tuple(slot for slot in chain[-1] if slot != gone) for gone in reversed(chain[-1])]
        scores = evaluate(children)
        chain.append(children[max(range(len(children)), key=lambda child: scores[child])])
    return chain


def shortlist(
    scores: Mapping[Subset, float], costs: Mapping[Subset, float], longest: int | None = None, margin: float = 0.0
) -> list[Subset]:
    """The viable subsets, cheapest first: the cheapest and the costliest, and between them those that buy something.

    A subset between the two is kept if it scores more than `margin` above every cheaper subset on the list. With
    `longest`, those that buy least over their cheaper neighbour go first.

    Args:
        scores, costs: of the same subsets.
        longest: number of subsets to keep at most (at least 2), or None.

    Raises:
        ValueError: nothing to choose from, or subsets without a cost.
    """
    if not scores or set(scores) - set(costs):
        raise ValueError(
            f"a short list needs subsets with score and cost; without cost: {sorted(set(scores) - set(costs))}"
        )
    if longest is not None and longest < 2:
        raise ValueError(f"a short list has the cheapest and the costliest subset at least, got longest={longest}")
    by_cost = sorted(scores, key=lambda subset: (costs[subset], -scores[subset], subset))
    first = by_cost[0]
    top = max(costs[subset] for subset in by_cost)
    last = max((s for s in by_cost if costs[s] == top), key=lambda subset: scores[subset])
    kept, best = [first], scores[first]
    for subset in by_cost[1:]:
        if subset != last and costs[subset] < top and scores[subset] > best + margin:
            kept.append(subset)
            best = scores[subset]
    while longest is not None and len(kept) > longest - 1:
        gains = [scores[kept[i]] - scores[kept[i - 1]] for i in range(1, len(kept))]
        del kept[1 + min(range(len(gains)), key=gains.__getitem__)]
    return kept if last == first else [*kept, last]


def search(
    slots: Sequence[int],
    evaluate: Evaluate,
    cost: Callable[[Subset], float],
    longest: int | None = None,
    margin: float = 0.0,
) -> list[Candidate]:
    """Evaluate both families, each subset once, and mark the short list; cheapest first.

    Args:
        slots: the SELF layers that may be chosen.
        evaluate: scores on a validation split.
        cost: of a subset.
        longest, margin: see `shortlist`.
    """
    slots = check_slots(slots)
    scores: dict[Subset, float] = {}

    def remembered(subsets: Sequence[Subset]) -> list[float]:
        new = list(dict.fromkeys(subset for subset in subsets if subset not in scores))
        if new:
            scores.update(zip(new, evaluate(new), strict=True))
        return [scores[subset] for subset in subsets]

    spaced = [evenly_spaced(slots, num) for num in range(len(slots) + 1)]
    remembered(spaced)
    nested = eliminate(slots, remembered)
    costs = {subset: cost(subset) for subset in scores}
    viable = set(shortlist(scores, costs, longest, margin))
    return [
        Candidate(
            subset,
            scores[subset],
            costs[subset],
            tuple(name for name, family in (("elimination", nested), ("evenly spaced", spaced)) if subset in family)
            or ("tried on the way",),
            subset in viable,
        )
        for subset in sorted(scores, key=lambda subset: (costs[subset], -scores[subset], subset))
    ]


def table(candidates: Sequence[Candidate]) -> str:
    """The candidates for people, cheapest first; the short list is marked."""
    lines = [f"  {'SELF layers':<24}{'FLOPs vs dense':>15}{'score':>9}  found by"]
    for one in candidates:
        layers = ", ".join(map(str, one.layers)) or "none"
        mark = "*" if one.viable else " "
        lines.append(f"{mark} {layers:<24}{one.cost:>14.1%}{one.score:>10.3f}  {', '.join(one.found_by)}")
    return "\n".join(lines)
