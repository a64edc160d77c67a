"""Which configuration a sample runs: what the caller of a VISOR model has asked for becomes schedules for the engine.

Shapes: B batch, C configurations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from budgets.costs import price
from budgets.geometry import ModelGeometry
from budgets.match import check_budget
from budgets.registry import nearest_first
from budgets.schedule import LayerMode, LayerOp, Schedule, dense
from visor.engine.streams import PromptStreams
from visor.model.configuration import VisorConfig
from visor.model.router import Router, RouterOutput

POLICIES = ("router",)
DENSE = "dense"
"""What `configuration` may be beside an index: every layer on every token, the base model."""


@dataclass(frozen=True)
class Request:
    """What a call asks for; at most one of the first three.

    Args:
        configuration: an index, "dense", or one of these a sample.
        budget: decoder prefill FLOPs relative to dense, in (0, 1].
        policy: "router".
        cost_weight: with the router: None is the paper's, a number trades success against cost.
    """

    configuration: Any = None
    budget: float | None = None
    policy: str | None = None
    cost_weight: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("configuration", "budget", "policy") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say what runs; give one of them")
        if self.budget is not None:
            check_budget(self.budget)
        if self.policy is not None and self.policy not in POLICIES:
            known = ", ".join(nearest_first(str(self.policy), list(POLICIES)))
            raise ValueError(
                f"unknown policy {self.policy!r}; a model itself knows: {known} (others, such as cascade, are those of "
                "evaluations.run)"
            )
        if self.cost_weight is not None and self.policy is None:
            raise ValueError('cost_weight belongs to policy="router"')

    @property
    def needs_prices(self) -> bool:
        """True if what is chosen depends on what it costs."""
        return self.budget is not None or self.cost_weight is not None

    @property
    def is_empty(self) -> bool:
        return self == Request()


@dataclass
class Selection:
    """What the engine is to run, and what it has run.

    Args:
        schedules: one for all, one a sample, or with `choose` the alternatives.
        choose: see `visor.engine.decoder.running`.
        chosen: by row, the configuration; -1 is dense. Filled by `choose` where there is one.
        router: what the router has said.
    """

    schedules: list[Schedule]
    chosen: list[int] = field(default_factory=list)
    choose: Any = None
    router: RouterOutput | None = None


def schedule_of(config: VisorConfig, index: int | str, num_visual: int) -> Schedule:
    """The schedule of a configuration, by its index, or "dense"."""
    if index == DENSE:
        return dense(config.num_layers, num_visual)
    chosen = config.configurations[config.check_index(index)]
    ops = [LayerOp(LayerMode.TEXT)] * config.num_layers
    for mode, layers in ((LayerMode.CROSS, config.cross_layers), (LayerMode.SELF, chosen)):
        for layer in layers:
            ops[layer] = LayerOp(mode)
    return Schedule(tuple(ops), num_visual)


@lru_cache(maxsize=4096)
def _cost(geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
    return price(geometry, schedule, num_text).decoder_prefill


def relative_costs(config: VisorConfig, geometry: ModelGeometry, num_visual: int, num_text: int) -> list[float]:
    """Decoder prefill FLOPs of each configuration relative to dense, for a sample of these lengths."""
    full = _cost(geometry, dense(config.num_layers, num_visual), num_text)
    indices = range(len(config.configurations))
    return [_cost(geometry, schedule_of(config, i, num_visual), num_text) / full for i in indices]


def select(
    config: VisorConfig,
    geometry: ModelGeometry | None,
    router: Router | None,
    request: Request,
    num_visual: Sequence[int],
    num_text: Sequence[int],
) -> Selection:
    """What a batch is to run.

    Args:
        geometry: the model's; may be None where `request.needs_prices` is not set: not all families have prices.
        num_visual, num_text: tokens of each sample as they enter the decoder.

    Raises:
        ValueError: an index that does not exist, a number of them that is not the batch's, a budget that no
            configuration meets, or a policy that needs a router where there is none.
    """
    if request.policy is not None:
        if router is None:
            raise ValueError("this model has no router; train one (visor.training), or give configuration= or budget=")
        if config.router_layer is None:
            return _fixed(config, [0], num_visual)
        return _routed(config, geometry, router, request.cost_weight)
    if request.budget is not None:
        rows = zip(num_visual, num_text, strict=True)
        return _fixed(config, [_within(config, geometry, request.budget, *row) for row in rows], num_visual)
    wanted = config.default_configuration if request.configuration is None else request.configuration
    if isinstance(wanted, Tensor):
        wanted = wanted.tolist()
    listed = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted]
    if len(listed) not in (1, len(num_visual)):
        raise ValueError(f"{len(listed)} configurations for a batch of {len(num_visual)}: give one, or one a sample")
    return _fixed(config, listed, num_visual)


def _fixed(config: VisorConfig, indices: Sequence[Any], num_visual: Sequence[int]) -> Selection:
    indices = [DENSE if isinstance(i, str) and i == DENSE else config.check_index(i) for i in indices]
    if DENSE in indices and config.trained_from is not None:
        raise ValueError(
            f'configuration="dense" is not the base on this model: its weights were trained on from '
            f"{config.trained_from!r} under the configurations {config.configurations}, and never ran every layer on "
            f"every token. Load {config.trained_from!r} for the dense model"
        )
    if len(set(indices)) == 1:
        schedules, indices = [schedule_of(config, indices[0], 0)], indices[:1] * len(num_visual)
    else:
        schedules = [schedule_of(config, i, n) for i, n in zip(indices, num_visual, strict=True)]
    return Selection(schedules, [-1 if i == DENSE else i for i in indices])


def _within(config: VisorConfig, geometry: ModelGeometry, budget: float, num_visual: int, num_text: int) -> int:
    """The last configuration within the budget; samples without an image run the first, as all cost the same."""
    if num_visual == 0:
        return 0
    costs = relative_costs(config, geometry, num_visual, num_text)
    within = [index for index, cost in enumerate(costs) if cost <= budget]
    if not within:
        raise ValueError(
            f"no configuration meets a budget of {budget:g} with {num_visual} visual and {num_text} text tokens: they "
            f"cost {', '.join(f'{cost:.4g}' for cost in costs)} of the dense decoder prefill FLOPs"
        )
    return within[-1]


def _routed(
    config: VisorConfig, geometry: ModelGeometry | None, router: Router, cost_weight: float | None
) -> Selection:
    selection = Selection([schedule_of(config, i, 0) for i in range(len(config.configurations))])

    def choose(streams: PromptStreams) -> list[int]:
        if len(selection.chosen) == len(streams.num_visual):
            # Generation without a cache runs the prompt again, with more text behind it: the choice stands.
            return selection.chosen
        with torch.no_grad():
            selection.router = RouterOutput(router(router.vector(streams)))
        costs = None
        if cost_weight is not None:
            rows = zip(streams.num_visual, streams.num_text, strict=True)
            costs = [relative_costs(config, geometry, *row) for row in rows]
        chosen = selection.router.choose(cost_weight, costs)
        # Without an image all configurations are one.
        selection.chosen = [i if n else 0 for i, n in zip(chosen, streams.num_visual, strict=True)]
        return selection.chosen

    selection.choose = choose
    return selection
