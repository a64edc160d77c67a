"""What a run is asked to do: a frozen configuration, its names and numbers checked before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from budgets.match import check_tokens
from budgets.policies import POLICIES
from budgets.registry import METHODS, TASKS, check_name
from evaluations.suite import Suite, SuiteTask
from visor.inference import checkpoint
from visor.inference.loading import ATTENTIONS, DTYPES
from visor.vision.image import MAX_PIXELS

DEVICES = ("cpu", "cuda", "mps")
COST_WEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)
THRESHOLDS = (0.5, 0.7, 0.9, 0.97)
DEFAULT_POLICIES = ("fixed", "router", "random", "oracle")


@dataclass(frozen=True)
class RunConfig:
    """A run. Building one checks it; `ValueError` says what is wrong and what would be right.

    Args:
        suite: the suite, as loaded.
        tasks: tasks to run with their limits; in the order given.
        methods: registered methods, in the order given.
        budgets: decoder prefill FLOPs relative to dense, each in (0, 1], largest first.
        tokens: budgets as papers state them, beside the others: visual tokens, mean over the decoder's layers, each
            above 1, largest first.
        methods_asked, budgets_asked: True if they were asked for and are not the suite's default list. What was asked
            for and cannot be had is an error; what is merely in the default list is left out and said to be.
        model: shipped checkpoint, folder or Hub name.
        batch_size: samples that share a batch in the accuracy pass.
        limit: samples of each task, overriding the suite; None for the suite's own limits.
        seed: given to methods that draw at random, and to the random policy.
        policies: of methods that have several configurations (VISOR); "fixed", which sweeps them, always runs.
        policies_asked: as the two above.
        cost_weights: lambdas of the cost-aware router.
        thresholds: of the cascade: it goes on while the first answer token is less likely.
        max_pixels: samples with a larger image fail, and are recorded as such.
        checkpoints: (method, model) pairs: what a trained method runs on, instead of the shipped one.
        generation: (name, value) pairs of transformers' GenerationConfig, beside greedy decoding.
        system: text of a system turn before each question; None for what the chat template does by itself.
        data_root: where data sets lie as on the Hub; None for each task's own way to its data.
    """

    suite: Suite
    tasks: tuple[SuiteTask, ...]
    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    methods_asked: bool
    budgets_asked: bool
    out: Path
    model: str = "dense-tiny"
    device: str = "cpu"
    dtype: str = "float32"
    attention: str = "sdpa"
    batch_size: int = 16
    limit: int | None = None
    seed: int = 0
    timing: bool = True
    policies: tuple[str, ...] = DEFAULT_POLICIES
    policies_asked: bool = False
    cost_weights: tuple[float, ...] = COST_WEIGHTS
    thresholds: tuple[float, ...] = THRESHOLDS
    checkpoints: tuple[tuple[str, str], ...] = ()
    max_pixels: int = MAX_PIXELS
    tokens: tuple[float, ...] = ()
    generation: tuple[tuple[str, Any], ...] = ()
    system: str | None = None
    data_root: Path | None = None

    def __post_init__(self) -> None:
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise ValueError(f"a budget is a share of the dense decoder's prefill FLOPs in (0, 1], got {budget:g}")
        for tokens in self.tokens:
            check_tokens(tokens)
        kinds = [("task", [task.name for task in self.tasks]), ("method", self.methods), ("policy", self.policies)]
        for kind, names in kinds:
            if not names:
                raise ValueError(f"there is nothing to run: no {kind} is named")
            for name in names:
                if names.count(name) > 1:
                    raise ValueError(f"{kind} {name!r} is named twice")
        if not self.budgets:
            raise ValueError("there is nothing to run: no budget is named")
        check_name("device", re.sub(r"^cuda:\d+$", "cuda", self.device), DEVICES)
        check_name("dtype", self.dtype, DTYPES)
        check_name("attention", self.attention, ATTENTIONS)
        for name in ("batch_size", "limit", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {self.seed}")
        if self.data_root is not None and not self.data_root.is_dir():
            raise ValueError(f"--data-root {self.data_root} is no folder; data sets lie in it as <org>/<name>")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out} is a file; it must be a folder, new or of an earlier run")
        for method in self.methods:
            METHODS.get(method)
        for policy in self.policies:
            check_name("policy", policy, POLICIES)
        for weight in self.cost_weights:
            if not 0 <= weight < float("inf"):
                raise ValueError(f"a cost weight (lambda) is a number >= 0, got {weight:g}")
        for threshold in self.thresholds:
            if not 0 <= threshold <= 1:
                raise ValueError(f"a threshold is a probability in 0..1, got {threshold:g}")
        for method, model in self.checkpoints:
            check_name("method", method, METHODS.names())
            uses = lambda name, method=method: method in name or METHODS.get(name).changes_modes and method == "visor"
            if not any(uses(name) for name in self.methods):
                raise ValueError(f"a checkpoint is given for {method!r}, but the methods are {', '.join(self.methods)}")
            checkpoint.locate(model)
        settings = [name for name, _ in self.generation]
        if twice := sorted({name for name in settings if settings.count(name) > 1}):
            raise ValueError(f"--generation {twice[0]} is given twice")
        if self.system is not None and not self.system.strip():
            raise ValueError("--system is empty; leave it out for what the chat template does by itself")
        for task in self.tasks:
            TASKS.get(task.name)
        checkpoint.locate(self.model)

    @classmethod
    def of(
        cls,
        suite: Suite,
        *,
        tasks: list[str] | None = None,
        methods: list[str] | None = None,
        budgets: list[float] | None = None,
        tokens: list[float] | None = None,
        policies: list[str] | None = None,
        cost_weights: list[float] | None = None,
        thresholds: list[float] | None = None,
        checkpoints: list[tuple[str, str]] | None = None,
        generation: list[tuple[str, Any]] | None = None,
        limit: int | None = None,
        out: Path | None = None,
        **rest: Any,
    ) -> RunConfig:
        """A configuration that takes from the suite what is not given. Any task may be named, of the suite or not."""
        everything = methods == ["all"]  # what of it cannot be run or reaches no budget is left out, and said to be
        if everything:
            methods = sorted(METHODS.names(), key=lambda name: (name != "dense", name))
        of_suite = {task.name: task for task in suite.tasks}
        chosen = [of_suite.get(name, SuiteTask(name)) for name in tasks] if tasks is not None else list(suite.tasks)
        if limit is not None and limit >= 1:
            chosen = [SuiteTask(task.name, limit) for task in chosen]
        return cls(
            suite=suite,
            tasks=tuple(chosen),
            methods=tuple(suite.methods if methods is None else methods),
            budgets=tuple(sorted(set(suite.budgets if budgets is None else budgets), reverse=True)),
            methods_asked=methods is not None and not everything,
            budgets_asked=budgets is not None and not everything,
            policies=tuple(DEFAULT_POLICIES if policies is None else policies),
            policies_asked=policies is not None,
            cost_weights=tuple(sorted(set(COST_WEIGHTS if cost_weights is None else cost_weights))),
            thresholds=tuple(sorted(set(THRESHOLDS if thresholds is None else thresholds))),
            checkpoints=tuple(checkpoints or ()),
            generation=tuple(generation or ()),
            tokens=tuple(sorted(set(tokens or ()), reverse=True)),
            limit=limit,
            out=Path("runs") / suite.name if out is None else out,
            **rest,
        )

    def to_dict(self) -> dict[str, Any]:
        """For run.json."""
        data_root = None if self.data_root is None else str(self.data_root)
        return {**asdict(self), "suite": self.suite.name, "out": str(self.out), "data_root": data_root}
