"""From a configuration to settings: which there are, what each costs, and which of them are out of reach.

A *setting* is a method at a budget or under a policy. A method with several configurations (VISOR on a checkpoint
trained for them) has one setting a configuration that is run, and settings that are *derived*: its budgets and its
policies choose among answers that are already there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from budgets.costs import Cost, price
from budgets.geometry import ModelGeometry
from budgets.match import BudgetError, budget_label, counts_tokens, fit, fit_tokens
from budgets.registry import METHODS
from budgets.schedule import Schedule, dense
from evaluations.batches import Lengths
from evaluations.config import RunConfig
from evaluations.models import Models, configurations_of
from evaluations.records import setting_id

if TYPE_CHECKING:
    from visor.reduction.method import Method

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Setting:
    """A method at a budget or under a policy. `budget` is None for a method that has no dial; dense is the budget 1.
    Above 1 it is a number of visual tokens (`budgets.match`).

    Args:
        name: registered name of the method.
        method: its options before a budget changes the one that is its dial.
        value: configuration of the policy "fixed", cost weight of "router" (None: the paper's), threshold of "cascade".
        model: checkpoint that it runs on, by name; "" is the base.
        family: the configurations of that checkpoint as settings of the method, cheapest first; empty if it has none.
    """

    name: str
    method: Method
    budget: float | None = None
    policy: str | None = None
    value: float | None = None
    model: str = ""
    family: tuple[Method, ...] = ()

    @property
    def id(self) -> str:
        """Its name in records and tables: method, budget, policy and value."""
        return setting_id(self.name, self.budget, self.policy, self.value)

    @property
    def configuration(self) -> int | None:
        """Index of the configuration that answers all samples; None where there is no such one."""
        return int(self.value) if self.policy == "fixed" else None

    @property
    def derived(self) -> bool:
        """True if its answers are chosen among those of the configurations, instead of being run."""
        return bool(self.family) and self.policy != "fixed"


class Planner:
    """Schedules and prices, each computed once: samples share few different lengths.

    Args:
        geometry: of the base model.
        dtype: number format of the run, which decides the bytes of a cached key.
        others: by name, the geometries of the checkpoints of trained methods.
    """

    def __init__(self, geometry: ModelGeometry, dtype: str, others: Mapping[str, ModelGeometry] | None = None) -> None:
        in_dtype = lambda each: replace(each, dtype_bytes=DTYPE_BYTES[dtype])
        self.geometry = in_dtype(geometry)
        self.geometries = {"": self.geometry, **{name: in_dtype(each) for name, each in (others or {}).items()}}
        self._fitted: dict[tuple[Setting, Lengths], tuple[Method, Schedule]] = {}
        self._costs: dict[tuple[Schedule, int, str], Cost] = {}

    @classmethod
    def of(cls, models: Models, dtype: str) -> Planner:
        """For all checkpoints of a run."""
        return cls(models.base.geometry, dtype, {name: each.geometry for name, each in models.others.items()})

    def fitted(self, setting: Setting, lengths: Lengths) -> tuple[Method, Schedule]:
        """The method with its dial set for a sample of these lengths, and its schedule.

        Raises:
            ValueError: the method cannot reach the budget, or cannot run on this model, or the policy looks at more
                than the lengths.
        """
        known = self._fitted.get((setting, lengths))
        if known is None and not lengths.num_visual:  # a question without an image has nothing to reduce
            known = self._fitted[setting, lengths] = (setting.method, dense(self.geometry.num_layers, 0))
        if known is None:
            geometry = self.geometries[setting.model]
            if setting.family:
                method = setting.family[self.configuration_within(setting, lengths)]
            elif setting.budget is not None and setting.name != "dense":
                match = fit_tokens if counts_tokens(setting.budget) else fit
                method = match(setting.method, geometry, lengths.num_visual, lengths.num_text, setting.budget)
            else:
                method = setting.method
            known = self._fitted[setting, lengths] = (method, method.schedule(geometry, lengths.num_visual))
        return known

    def configuration_within(self, setting: Setting, lengths: Lengths) -> int:
        """The configuration of a setting for a sample of these lengths: the fixed one, or the dearest in the budget.

        Raises:
            BudgetError: even the cheapest configuration costs more.
            ValueError: a policy that looks at more than the lengths.
        """
        if setting.configuration is not None:
            return setting.configuration
        if setting.budget is None:
            raise ValueError(f"the configuration of {setting.id} depends on the sample, not on its lengths alone")
        in_tokens = counts_tokens(setting.budget)
        costs = self.visual_tokens(setting, lengths) if in_tokens else self.relative_costs(setting, lengths)
        within = [i for i, cost in enumerate(costs) if cost <= setting.budget]
        if not within:
            unit = "visual tokens, mean over the layers" if in_tokens else "of the dense decoder prefill FLOPs"
            raise BudgetError(
                f"{setting.method.title} cannot meet a budget of {setting.budget:g} with {lengths.num_visual} visual "
                f"and {lengths.num_text} text tokens: the cheapest configuration of the checkpoint costs "
                f"{min(costs):.4g} {unit}",
                min(costs),
            )
        return max(within, key=lambda i: (costs[i], i))

    def relative_costs(self, setting: Setting, lengths: Lengths) -> list[float]:
        """Decoder prefill FLOPs of each configuration of a setting's checkpoint, relative to dense."""
        geometry, dense_flops = self.geometries[setting.model], self.dense_cost(lengths).decoder_prefill
        schedules = [method.schedule(geometry, lengths.num_visual) for method in setting.family]
        return [self.cost(s, lengths.num_text, setting.model).decoder_prefill / dense_flops for s in schedules]

    def visual_tokens(self, setting: Setting, lengths: Lengths) -> list[float]:
        """Visual tokens of each configuration of a setting's checkpoint, mean over the layers."""
        geometry = self.geometries[setting.model]
        schedules = [method.schedule(geometry, lengths.num_visual) for method in setting.family]
        return [self.cost(s, lengths.num_text, setting.model).visual_tokens_mean for s in schedules]

    def cost(self, schedule: Schedule, num_text: int, model: str = "") -> Cost:
        """The price of the prefill on a checkpoint of the run."""
        known = self._costs.get((schedule, num_text, model))
        if known is None:
            known = self._costs[schedule, num_text, model] = price(self.geometries[model], schedule, num_text)
        return known

    def router_flops(self, setting: Setting) -> int:
        """What asking the router about a sample costs; 0 where the policy asks none."""
        trained = self.geometries[setting.model].visor
        return trained.router_flops if trained is not None and setting.policy == "router" else 0

    def dense_cost(self, lengths: Lengths) -> Cost:
        """The price of the unmodified model for a sample of these lengths."""
        return self.cost(dense(self.geometry.num_layers, lengths.num_visual), lengths.num_text)

    def relative_cost(self, setting: Setting, lengths: Lengths) -> float:
        """Decoder prefill FLOPs relative to dense."""
        cost = self.cost(self.fitted(setting, lengths)[1], lengths.num_text, setting.model)
        return cost.decoder_prefill / self.dense_cost(lengths).decoder_prefill


def _with_seed(method: Method, seed: int) -> Method:
    return replace(method, seed=seed) if any(f.name == "seed" for f in fields(method)) else method


def make_settings(
    config: RunConfig, planner: Planner, lengths: Sequence[Lengths], models: Models
) -> tuple[tuple[Setting, ...], tuple[dict[str, Any], ...]]:
    """The settings of a run, and those left out, each with its reason.

    Raises:
        ValueError: a method cannot reach a budget that was asked for, a method or a policy that was asked for cannot be
            run at all, or nothing is left to run.
    """
    settings: list[Setting] = []
    unreachable: list[dict[str, Any]] = []
    for name in config.methods:
        method, model = _with_seed(METHODS.get(name)(), config.seed), models.by_method.get(name, "")
        family = configurations_of(method, models[model])
        if "+" in name:  # composed with a reduction, whose dial it has; the layers are the checkpoint's default
            family = ()
        if family:
            found = _of_family(Setting(name, method, model=model, family=family), config)
        else:
            found = [replace(s, model=model) for s in _of_method(name, method, config, planner, lengths, model)]
        for setting in found:
            try:
                _check_setting(setting, planner, lengths, models[model])
            except ValueError as error:
                if (config.budgets_asked or setting.budget in config.tokens) and not setting.family:
                    raise ValueError(f"{setting.id}: {error}") from error
                if config.policies_asked and setting.policy in config.policies:
                    raise ValueError(f"policy {setting.policy!r}: {error}") from error
                unreachable.append(
                    {"method": name, "budget": setting.budget, "policy": setting.policy, "reason": str(error),
                     "least": getattr(error, "least", None)}
                )  # fmt: skip
            else:
                settings.append(setting)
        if config.methods_asked and all(setting.name != name for setting in settings):
            raise ValueError(f"{name} cannot be run: {unreachable[-1]['reason']}")
    if not settings:
        reasons = "; ".join(entry["reason"] for entry in unreachable)
        raise ValueError(f"there is nothing to run: no method reaches a budget of its list: {reasons}")
    if config.policies_asked and not any(setting.family for setting in settings):
        raise ValueError(
            f"--policies {','.join(config.policies)}: no method of this run has configurations to choose from; they "
            "come with --methods visor on a checkpoint trained for it (--visor-model)"
        )
    return tuple(settings), tuple(unreachable)


def _of_method(
    name: str, method: Method, config: RunConfig, planner: Planner, lengths: Sequence[Lengths], model: str
) -> list[Setting]:
    if name == "dense":
        return [Setting(name, method, 1.0)]
    try:
        geometry = planner.geometries[model]
        has_dial = any(len(method.settings(geometry, each.num_visual)) > 1 for each in lengths)
    except ValueError:
        has_dial = True  # what is wrong comes up, with its reason, when the settings are fitted
    own = [] if has_dial and not method.adaptive else [Setting(name, method)]  # adaptive: also as the authors have it
    return [Setting(name, method, budget) for budget in (*config.budgets, *config.tokens) if has_dial] + own


def _of_family(setting: Setting, config: RunConfig) -> list[Setting]:
    """Every configuration, the budgets, and the policies with their values."""
    settings = [replace(setting, policy="fixed", value=i) for i in range(len(setting.family))]
    settings += [replace(setting, budget=budget) for budget in (*config.budgets, *config.tokens)]
    values = {"router": (None, *config.cost_weights), "cascade": config.thresholds}
    for policy in config.policies:
        if policy != "fixed":
            settings += [replace(setting, policy=policy, value=value) for value in values.get(policy, (None,))]
    return settings


def _check_setting(setting: Setting, planner: Planner, lengths: Sequence[Lengths], loaded: Any) -> None:
    """Refuse what cannot be run.

    Raises:
        ValueError: with the reason.
    """
    largest = max((each.num_visual for each in lengths), default=0)
    if setting.budget is not None and counts_tokens(setting.budget) and lengths and setting.budget >= largest:
        raise ValueError(
            f"a budget of {budget_label(setting.budget)} leaves nothing out: the images have at most {largest} visual "
            "tokens; give fewer"
        )
    if not setting.derived or setting.budget is not None:
        loaded.check([planner.fitted(setting, each)[1] for each in lengths])
    elif setting.policy == "router" and not planner.router_flops(setting):
        raise ValueError(f"{setting.method.title}: the checkpoint has no router; train one, or leave the policy out")
    elif setting.policy == "cascade" and len(setting.family) < 2:
        raise ValueError(f"{setting.method.title}: a cascade needs 2 configurations, the checkpoint has 1")
