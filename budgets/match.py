"""One dial for every method: the setting that comes nearest to a budget and does not cost more than it says.

"Budget" means different things in different papers (docs/methods.md). Here it is one number: the decoder prefill FLOPs
relative to dense, in (0, 1] (`fit`). Beside it stands what papers quote, a number of visual tokens, the mean over the
decoder's layers (`fit_tokens`); always above 1, so that a number tells by itself which of the two it is. Sequence
lengths differ between samples, so the match is made per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from budgets.costs import price
from budgets.geometry import ModelGeometry
from budgets.schedule import dense

if TYPE_CHECKING:
    from visor.reduction.method import Method


class BudgetError(ValueError):
    """A budget that a method cannot meet; the message says what it can reach.

    Attributes:
        least: what its cheapest setting costs, in the unit of the budget: relative to dense, or visual tokens.
    """

    def __init__(self, message: str, least: float) -> None:
        super().__init__(message)
        self.least = least


def fit(method: Method, geometry: ModelGeometry, num_visual: int, num_text: int, budget: float) -> Method:
    """The setting of `method` that costs most among those not above `budget`.

    Args:
        method: options that the dial does not turn are kept as they are.
        budget: decoder prefill FLOPs relative to dense, in (0, 1].

    Raises:
        ValueError: the budget is outside (0, 1], or there is nothing to reduce.
        BudgetError: even the cheapest setting costs more.
    """
    check_budget(budget)
    if num_visual < 1:
        raise ValueError(f"a budget needs at least 1 visual token to act on, got num_visual={num_visual}")
    return _fit(method, geometry, num_visual, num_text, float(budget))


def fit_tokens(method: Method, geometry: ModelGeometry, num_visual: int, num_text: int, tokens: float) -> Method:
    """The setting of `method` with the most visual tokens, mean over the decoder's layers, among those not above
    `tokens`. A sample that has no more than that keeps all.

    Raises:
        ValueError: no number above 1, or there is nothing to reduce.
        BudgetError: even the cheapest setting has more.
    """
    check_tokens(tokens)
    if num_visual < 1:
        raise ValueError(f"a budget needs at least 1 visual token to act on, got num_visual={num_visual}")
    return _fit(method, geometry, num_visual, num_text, float(tokens))


def check_budget(budget: float) -> None:
    """Refuse anything but a number in (0, 1]."""
    is_number = isinstance(budget, (int, float)) and not isinstance(budget, bool) and math.isfinite(budget)
    if not is_number or not 0 < budget <= 1:
        raise ValueError(f"a budget is a number in (0, 1]: decoder prefill FLOPs relative to dense; got {budget!r}")


def check_tokens(tokens: float) -> None:
    """Refuse anything but a number above 1: up to 1 a number in a record is a share of FLOPs."""
    is_number = isinstance(tokens, (int, float)) and not isinstance(tokens, bool) and math.isfinite(tokens)
    if not is_number or tokens <= 1:
        raise ValueError(
            f"a token budget is a number of visual tokens above 1, mean over the decoder's layers; got {tokens!r}"
        )


def counts_tokens(budget: float) -> bool:
    """True for a number of visual tokens, False for a share of FLOPs."""
    return budget > 1


def budget_label(budget: float) -> str:
    """A budget for a reader: "25 %" or "192 tokens"."""
    return f"{budget:g} tokens" if counts_tokens(budget) else f"{100 * budget:.3g} %"


def relative_cost(method: Method, geometry: ModelGeometry, num_visual: int, num_text: int) -> float:
    """Decoder prefill FLOPs of a setting relative to dense: the budget that it stands for."""
    cost = price(geometry, method.schedule(geometry, num_visual), num_text)
    return cost.decoder_prefill / price(geometry, dense(geometry.num_layers, num_visual), num_text).decoder_prefill


@lru_cache(maxsize=65536)
def _fit(method: Method, geometry: ModelGeometry, num_visual: int, num_text: int, budget: float) -> Method:
    settings = method.settings(geometry, num_visual)
    full = price(geometry, dense(geometry.num_layers, num_visual), num_text).decoder_prefill

    def cost(i: int) -> float:
        priced = price(geometry, settings[i].schedule(geometry, num_visual), num_text)
        # The division, not a product: a setting then meets exactly the budget that `relative_cost` reports for it.
        return priced.visual_tokens_mean if counts_tokens(budget) else priced.decoder_prefill / full

    # The last setting may keep everything; it then scores nothing, and can cost less than the one before it.
    last = len(settings) - 1
    if cost(last) <= budget:
        return settings[last]
    best = _last_within(cost, last, budget)
    if best is None:
        low, high = cost(0), cost(last)
        reach = f"only {low:.4g}" if math.isclose(low, high) else f"{low:.4g} to {high:.4g}"
        unit = "visual tokens, mean over the layers" if counts_tokens(budget) else "of the dense decoder prefill FLOPs"
        raise BudgetError(
            f"{method.title} cannot meet a budget of {budget:g} with {num_visual} visual and {num_text} text tokens on "
            f"{geometry.name}: it reaches {reach} {unit}",
            low,
        )
    return settings[best]


def _last_within(cost: Callable[[int], float], count: int, budget: float) -> int | None:
    """The last of `count` rising costs that is not above the budget, by bisection."""
    low, high = 0, count  # settings before `low` are within, those from `high` on are above
    while low < high:
        middle = (low + high) // 2
        if cost(middle) <= budget:
            low = middle + 1
        else:
            high = middle
    return low - 1 if low else None
