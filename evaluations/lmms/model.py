"""Our models in lmms-eval: `--model visor --model_args pretrained=...,method=fastv,budget=0.25`.

Requests are answered in batches of about equal length and handed back in lmms-eval's order. What the method saves is
logged beside its throughput: prefill and decode apart, and the decoder's FLOPs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lmms_eval import evaluator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.caching.response_cache import ResponseCache

from evaluations.lmms.engine import Engine
from evaluations.lmms.scoring import without_control_characters
from evaluations.lmms.tasks import conversation, generation_limits

DEFAULT_BATCH_SIZE = 16  # as in `evaluations.run`


class Visor(lmms):
    """A checkpoint under a method of this project.

    Args:
        pretrained: shipped checkpoint, folder or Hub id; or a loaded model, where there is no command line.
        method: registered method, "a+b" for two at once; its own options follow by name.
        budget: decoder prefill FLOPs relative to dense, in (0, 1].
        policy: of a VISOR checkpoint: fixed (with configuration=), router (cost_weight=), cascade (threshold=).
        batch_size: samples answered together; "auto" is the default.
        max_batch_size: bounds it.
        device, dtype, attention: as in `python -m evaluations.run`; each process of `accelerate launch` takes the GPU
            of its number.

    Raises:
        ValueError: no such checkpoint, method, option, policy or device, with those that exist.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: Any = "dense-tiny",
        method: str = "dense",
        budget: float | None = None,
        policy: str | None = None,
        configuration: int | None = None,
        cost_weight: float | None = None,
        threshold: float | None = None,
        device: str | None = None,
        dtype: str | None = None,
        attention: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        values = {"configuration": configuration, "cost_weight": cost_weight, "threshold": threshold}
        given = {name: value for name, value in values.items() if value is not None}
        belongs = {"fixed": "configuration", "router": "cost_weight", "cascade": "threshold"}.get(policy)
        if stray := [name for name in given if name != belongs]:
            raise ValueError(f"{stray[0]}= does not go with policy={policy}")
        self.batch_size = _batch_size(batch_size, max_batch_size)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
            if str(device or "cuda").startswith("cuda") and torch.cuda.is_available():
                device = f"cuda:{self.accelerator.local_process_index}"
        loaded = pretrained
        if isinstance(pretrained, str):
            from visor.inference import LoadedModel

            chosen = {"device": device, "dtype": dtype, "attention": attention}
            loaded = LoadedModel.load(pretrained, **{name: value for name, value in chosen.items() if value})
        self.engine = Engine(loaded, method, budget, policy, given.get(belongs), options)
        _name_in_response_cache(self.engine.identity)

    def __str__(self) -> str:
        return f"visor:{self.engine.identity}"

    __repr__ = __str__

    @property
    def device(self) -> torch.device:
        """Where the weights are; lmms-eval gathers over processes there."""
        return torch.device(str(self.engine.loaded.device))

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics
        from tqdm import tqdm

        results: list[GenerationResult | None] = [None] * len(requests)
        totals = self.engine.begin()
        progress = tqdm(total=len(requests), desc="visor", disable=self.rank != 0)
        for limits, places in self._batches(requests):
            answers = self.engine.answer([self._messages(requests[place]) for place in places], *limits)
            for place, answer in zip(places, answers, strict=True):
                counts = TokenCounts(answer.input_tokens, answer.output_tokens)
                results[place] = GenerationResult(without_control_characters(answer.text), counts)
            progress.update(len(places))
        progress.close()
        speed = totals.num_new_tokens / totals.seconds if totals.seconds else 0.0
        log_metrics(totals.seconds, totals.num_new_tokens, speed, totals.figures())
        return results

    def _batches(self, requests: Sequence[Instance]) -> list[tuple[tuple[int, tuple[str, ...]], list[int]]]:
        """Places of the requests that are answered together, with their limits; those of about equal length."""
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for place, request in enumerate(requests):
            options = next(each for each in request.args if isinstance(each, Mapping))
            groups.setdefault(generation_limits(options, request.task_name), []).append(place)
        batches = []
        for limits, places in groups.items():
            ordered = sorted(places, key=lambda place: (len(requests[place].args[0]), place))
            batches += [(limits, ordered[i : i + self.batch_size]) for i in range(0, len(ordered), self.batch_size)]
        return batches

    def _messages(self, request: Instance) -> Sequence[Any]:
        """The conversation of a request. A task that is a Python class sends simple ones whatever the model is."""
        *_, doc_id, task, split = request.args
        document = self.task_dict[task][split][doc_id]
        if callable(request.args[1]):
            return conversation(request.args[1](document))
        text, _, visuals_of = request.args[:3]
        images = [{"type": "image", "url": visual} for visual in visuals_of(document) or []]
        return conversation([{"role": "user", "content": [*images, {"type": "text", "text": text}]}])

    def loglikelihood(self, requests: Sequence[Instance]) -> Any:
        raise NotImplementedError("visor answers by generating; take a task whose output_type is generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> Any:
        raise NotImplementedError("visor answers one round; take a task whose output_type is generate_until")


class SimpleVisor(Visor):
    """The same for `--force_simple`: the text of a task behind all its images."""

    is_simple = True


def _batch_size(asked: int | str | None, most: int | None) -> int:
    if asked in (None, "auto"):
        size = DEFAULT_BATCH_SIZE
    else:
        try:
            size = int(asked)
        except ValueError:
            raise ValueError(f"batch_size must be a whole number or auto, got {asked!r}") from None
    if size < 1:
        raise ValueError(f"batch_size must be at least 1, got {size}")
    return min(size, int(most)) if most else size


def _name_in_response_cache(identity: str) -> None:
    """Let `--use_cache` tell answers of different weights and schedules apart.

    lmms-eval names a cached answer by the model's arguments, so new weights in the same folder, or a method whose code
    has changed its schedule, would be answered by the old ones.
    """

    class Named(ResponseCache):
        @classmethod
        def create(cls, *args: Any, model_args: Any = "", **rest: Any) -> Any:
            named = f"{model_args},visor={identity}".strip(",")
            return super().create(*args, model_args=named, **rest)

    evaluator.ResponseCache = Named
