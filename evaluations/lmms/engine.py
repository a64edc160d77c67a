"""Conversations to answers under one setting (a method at a budget or under a policy), batched by length and timed.

lmms-eval's model object deletes every module it holds when an evaluation is over; the model lives here, a level down,
so that one object can be evaluated again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from budgets import policies
from budgets.match import BudgetError
from budgets.registry import METHODS, check_name
from evaluations.batches import Lengths
from evaluations.measure import synchroniser
from evaluations.models import configurations_of
from evaluations.records import digest
from evaluations.settings import Planner, Setting
from visor.inference.collate import group_by_structure
from visor.reduction.method import tower_reduction

if TYPE_CHECKING:
    from visor.reduction.method import Method

REFERENCE = Lengths(num_visual=576, num_text=64)

POLICIES = ("fixed", "router", "cascade")
"""Those that choose from a sample and the model alone, and so can answer one request at a time."""


@dataclass
class Totals:
    """What answering has taken so far; times in seconds, FLOPs of the decoder's prefill."""

    num_samples: int = 0
    num_new_tokens: int = 0
    tower_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    decoder_flops: int = 0
    dense_decoder_flops: int = 0
    layer_visual_tokens: float = 0.0

    @property
    def seconds(self) -> float:
        """Tower, prefill and decode."""
        return self.tower_s + self.prefill_s + self.decode_s

    def figures(self) -> dict[str, float]:
        """By name, as lmms-eval logs them; a sample's share where not in seconds."""
        samples = max(1, self.num_samples)
        return {
            "num_samples": self.num_samples,
            "tower_seconds": self.tower_s,
            "prefill_seconds": self.prefill_s,
            "decode_seconds": self.decode_s,
            "decoder_prefill_gflops": self.decoder_flops / samples / 1e9,
            "of_dense": self.decoder_flops / self.dense_decoder_flops if self.dense_decoder_flops else 1.0,
            "visual_tokens_mean_over_layers": self.layer_visual_tokens / samples,
        }


@dataclass(frozen=True)
class Answer:
    """An answer with what it is made of: tokens of the prompt at full size, and of the answer."""

    text: str
    input_tokens: int
    output_tokens: int
    confidence: float | None


class Engine:
    """A loaded model under one setting.

    Args:
        loaded: `visor.inference.loaded_model.LoadedModel`.
        method: registered name; `options` are its own.
        budget: decoder prefill FLOPs relative to dense; None for the method as its authors have it.
        policy: of a VISOR checkpoint, one of `POLICIES`; `value` is its configuration, cost weight or threshold.

    Raises:
        ValueError: no such method, option or policy, or one that this model cannot run.
    """

    def __init__(
        self,
        loaded: Any,
        method: str = "dense",
        budget: float | None = None,
        policy: str | None = None,
        value: float | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.loaded = loaded
        self.planner = Planner(loaded.geometry, str(loaded.dtype).removeprefix("torch."))
        cls, options = METHODS.get(method), dict(options or {})
        for name in options:
            check_name(f"option of {method}", name, [f.name for f in fields(cls)])
        made = cls(**options)
        family = configurations_of(made, loaded) if not options and "+" not in method else ()
        if policy is not None:
            check_name("policy", policy, POLICIES)
            if not family:
                raise ValueError(f"policy={policy}: {method} on {loaded.name} has no configurations to choose from")
            if policy in ("fixed", "cascade") and value is None:
                raise ValueError(f"policy={policy} needs {'configuration' if policy == 'fixed' else 'threshold'}=")
            if policy == "fixed" and not (value == int(value) and 0 <= value < len(family)):
                raise ValueError(f"configuration={value:g}: the checkpoint has configurations 0 to {len(family) - 1}")
        elif family and budget is None:
            policy, value = "fixed", float(len(family) - 1)
        if budget is not None and not 0 < budget <= 1:
            raise ValueError(f"budget={budget:g}: a share of the dense decoder's prefill FLOPs in (0, 1]")
        self.setting = Setting(method, made, 1.0 if method == "dense" else budget, policy, value, family=family)
        self.synchronise = synchroniser(str(loaded.device))
        self.totals, self._mark = Totals(), 0.0

    @property
    def identity(self) -> str:
        """Hash of all that decides an answer but the request: weights, method, dial, schedules, numerics."""
        setting = self.setting
        rule = [setting.name, setting.method.options(), setting.budget, setting.policy, setting.value]
        methods = setting.family or (self._at(REFERENCE),)
        # One prompt stands for the rule that makes schedules, so that a change of the rule's code shows.
        schedules = [each.schedule(self.loaded.geometry, REFERENCE.num_visual).to_json() for each in methods]
        numerics = [str(self.loaded.device).partition(":")[0], str(self.loaded.dtype)]
        return digest([self.loaded.checkpoint_sha256, rule, schedules, numerics])[:20]

    def _at(self, lengths: Lengths) -> Method:
        """The method with its dial set for a prompt; as it is where the budget is out of reach."""
        try:
            return self.planner.fitted(self.setting, lengths)[0]
        except BudgetError:
            return self.setting.method

    def begin(self) -> Totals:
        """Totals that start from zero."""
        self.totals = Totals()
        return self.totals

    def answer(
        self, conversations: Sequence[Any], max_new_tokens: int, stop_strings: Sequence[str] = ()
    ) -> list[Answer]:
        """One batch of conversations (`visor.inference.chat`), in their order."""
        prepared = [self.loaded.prepare_chat(messages) for messages in conversations]
        self.totals.num_samples += len(prepared)
        if self.setting.policy == "cascade":
            return self._cascade(prepared, max_new_tokens, stop_strings)
        settings = [self.setting] * len(prepared)
        if self.setting.policy == "router":
            settings = self._routed(prepared)
        return self._run(prepared, settings, max_new_tokens, stop_strings)

    def _fixed(self, configuration: int) -> Setting:
        return replace(self.setting, policy="fixed", value=float(configuration))

    def _routed(self, prepared: Sequence[Any]) -> list[Setting]:
        """The configuration that the router chooses for each sample."""
        import numpy as np

        lengths = [_lengths(each) for each in prepared]
        schedules = [self.planner.fitted(self._fixed(0), each)[1] for each in lengths]
        vision = self._timed("tower_s", lambda: self._encode(prepared, schedules))
        logits = np.array(self._timed("prefill_s", lambda: self.loaded.route(prepared, vision, schedules)))
        if self.setting.value is None:
            chosen = policies.most_likely(logits)
        else:
            costs = np.array([self.planner.relative_costs(self.setting, each) for each in lengths])
            chosen = policies.cost_aware(policies.success(logits), costs, self.setting.value)
        self.totals.decoder_flops += len(prepared) * self.planner.router_flops(self.setting)
        return [self._fixed(int(configuration)) for configuration in chosen]

    def _cascade(self, prepared: Sequence[Any], max_new_tokens: int, stop_strings: Sequence[str]) -> list[Answer]:
        """Configurations from cheap to dear; an answer stays once its first token is likely enough."""
        import numpy as np

        costs = np.array([self.planner.relative_costs(self.setting, _lengths(each)) for each in prepared])
        answers: dict[int, Answer] = {}
        left = list(range(len(prepared)))
        for configuration in policies.ladder(costs.mean(axis=0)):
            if left:
                settings = [self._fixed(configuration)] * len(left)
                own = self._run([prepared[i] for i in left], settings, max_new_tokens, stop_strings)
                answers |= dict(zip(left, own, strict=True))
                left = [i for i in left if answers[i].confidence < self.setting.value]
        return [answers[i] for i in range(len(prepared))]

    def _run(
        self,
        prepared: Sequence[Any],
        settings: Sequence[Setting],
        max_new_tokens: int,
        stop_strings: Sequence[str],
    ) -> list[Answer]:
        schedules = [self.planner.fitted(s, _lengths(p))[1] for s, p in zip(settings, prepared, strict=True)]
        vision = self._timed("tower_s", lambda: self._encode(prepared, schedules))
        if self.setting.method.adaptive:
            schedules = self.loaded.resolve(vision, schedules)
        answers: list[Answer | None] = [None] * len(prepared)
        for members in group_by_structure(schedules):  # one prefill each, so that it can be told from the rest
            own = [[items[i] for i in members] for items in (prepared, vision, schedules)]
            self._mark = self._now()
            generated = self.loaded.generate(
                *own, max_new_tokens, stop_strings=stop_strings, on_first_token=self._end_of_prefill
            )
            self.totals.decode_s += self._now() - self._mark
            for i, sample, schedule, answer in zip(members, own[0], own[2], generated, strict=True):
                if answer.error is not None:  # lmms-eval knows no failed samples: an empty text would be scored
                    raise ValueError(f"request {i + 1} of its batch has no answer: {answer.error}")
                answers[i] = Answer(
                    answer.text, sample.num_text + sample.num_visual, len(answer.token_ids), answer.confidence
                )
                self._count(sample, schedule, len(answer.token_ids))
        return answers

    def _end_of_prefill(self) -> None:
        now = self._now()
        self.totals.prefill_s += now - self._mark
        self._mark = now

    def _count(self, sample: Any, schedule: Any, num_new_tokens: int) -> None:
        lengths, totals = _lengths(sample), self.totals
        cost = self.planner.cost(schedule, lengths.num_text)
        totals.decoder_flops += cost.decoder_prefill
        totals.dense_decoder_flops += self.planner.dense_cost(lengths).decoder_prefill
        totals.layer_visual_tokens += cost.visual_tokens_mean
        totals.num_new_tokens += num_new_tokens

    def _now(self) -> float:
        """The clock, once the device has done what it was told to."""
        self.synchronise()
        return time.perf_counter()

    def _timed(self, name: str, work: Callable[[], Any]) -> Any:
        started = self._now()
        result = work()
        setattr(self.totals, name, getattr(self.totals, name) + self._now() - started)
        return result

    def _encode(self, prepared: Sequence[Any], schedules: Sequence[Any]) -> list[Any]:
        """Vision features, samples that are encoded alike in one call."""
        features: list[Any] = [None] * len(prepared)
        treatments = [(schedule.image_scale, tower_reduction(schedule)) for schedule in schedules]
        for scale, inside in dict.fromkeys(treatments):
            places = [i for i, treatment in enumerate(treatments) if treatment == (scale, inside)]
            options = {} if inside is None else {"inside": inside}
            taps = self.setting.method.taps if inside is None else ()
            encoded = self.loaded.encode([prepared[i] for i in places], taps, scale, **options)
            for i, value in zip(places, encoded, strict=True):
                features[i] = value
        return features


def _lengths(sample: Any) -> Lengths:
    return Lengths(sample.num_visual, sample.num_text)
