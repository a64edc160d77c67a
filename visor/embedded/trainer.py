"""One training loop for all stages: resumable, deterministic in (seed, step), with a log one can watch.

A run resumes from its last checkpoint with the same weights as an unbroken one: the data of a step depend only on the
seed, the step and the curriculum, and all of them are in the checkpoint.
"""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn

from visor.embedded.curriculum import Curriculum
from visor.embedded.parallel import Group
from visor.training.optimisation import rate_at
from visor.worlds.world import Scene
from visor.worlds.worlds import scene


@dataclass(frozen=True)
class Recipe:
    """How a stage is optimised. Rate: linear warm-up, constant, linear decay to a tenth over the last `decay` share."""

    steps: int
    batch_size: int = 16
    peak_rate: float = 1e-3
    warmup: int = 100
    decay: float = 0.3
    clip: float = 1.0
    weight_decay: float = 0.01
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return rate_at(step, self.steps, self.peak_rate, self.warmup, self.decay)


@dataclass
class StepResult:
    """Loss to differentiate, for each scene which of its questions were answered right, and side measures to log."""

    loss: torch.Tensor
    right: list[list[bool]]
    measures: dict[str, float] = field(default_factory=dict)


class Stage(ABC):
    """What a stage trains: a module with everything that it updates, and the loss on a batch of scenes."""

    name: str
    module: nn.Module
    curriculum: Curriculum

    @abstractmethod
    def step(self, scenes: list[Scene], generator: torch.Generator) -> StepResult:
        """Forward pass on one batch."""

    @abstractmethod
    def kinds(self, scene: Scene) -> list[str]:
        """What each entry of `StepResult.right` of a scene is about."""


def batch_of(stage: Stage, recipe: Recipe, step: int, group: Group) -> tuple[list[str], list[Scene]]:
    """The worlds of a step's scenes, and those of the scenes that this process draws."""
    rng = np.random.default_rng([recipe.seed, step])
    draws = [stage.curriculum.draw(rng) for _ in range(recipe.batch_size)]
    first = step * recipe.batch_size
    numbered = [(first + i, world, size) for i, (world, size) in enumerate(draws)]
    scenes = [scene(world, "train", index, size, recipe.seed) for index, world, size in group.share(numbered)]
    return [world for world, _ in draws], scenes


def _save(path: Path, stage: Stage, optimizer, step: int, seconds: float) -> None:
    temporary = path.with_suffix(".tmp")
    state = {
        "module": stage.module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "curriculum": stage.curriculum.state(),
        "step": step,
        "seconds": seconds,
    }
    torch.save(state, temporary)
    os.replace(temporary, path)


def without_optimizer(source: Path, target: Path) -> None:
    """A checkpoint a fifth the size: bfloat16 weights, no optimiser state. Training continues from it, not exactly."""
    state = torch.load(source, map_location="cpu", weights_only=True)
    del state["optimizer"]
    state["module"] = {
        name: value.to(torch.bfloat16) if value.is_floating_point() else value
        for name, value in state["module"].items()
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, target)


def load_weights(path: Path, module: nn.Module) -> None:
    """The weights of a finished or running stage."""
    if not path.exists():
        raise ValueError(f"no checkpoint at {path}; run the stage that writes it first")
    module.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["module"])


def train(
    stage: Stage,
    recipe: Recipe,
    folder: Path,
    save_every: float = 120.0,
    log_every: float = 20.0,
    stop_after: int | None = None,
) -> None:
    """Train a stage to the end of its recipe, continuing from `folder/<stage>.pt` if it exists.

    Args:
        folder: where the checkpoint and the log `<stage>.jsonl` go.
        save_every, log_every: seconds between checkpoints and log lines.
        stop_after: stop at this step, with a checkpoint, as if interrupted there.
    """
    group = Group()
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint, log = folder / f"{stage.name}.pt", folder / f"{stage.name}.jsonl"
    decayed = [p for p in stage.module.parameters() if p.ndim >= 2 and p.requires_grad]
    others = [p for p in stage.module.parameters() if p.ndim < 2 and p.requires_grad]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_rate, betas=(0.9, 0.98))
    step, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        stage.module.load_state_dict(state["module"])
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        stage.curriculum.load(state["curriculum"])
        step, seconds = state["step"], state["seconds"]
        print(f"{stage.name}: resumed at step {step}", flush=True)

    started = time.monotonic() - seconds
    saved = logged = time.monotonic()
    losses, tally, scenes_since = [], defaultdict(list), 0
    last = min(recipe.steps, stop_after or recipe.steps)
    while step < last:
        worlds, scenes = batch_of(stage, recipe, step, group)
        for parameters in optimizer.param_groups:
            parameters["lr"] = recipe.rate(step)
        result = stage.step(scenes, torch.Generator().manual_seed(recipe.seed * 1_000_003 + step))
        if not torch.isfinite(result.loss):
            raise RuntimeError(f"{stage.name}: loss {result.loss.item()} at step {step}; last good state: {checkpoint}")
        result.loss.backward()
        group.average_gradients(stage.module.parameters())
        nn.utils.clip_grad_norm_(stage.module.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        losses.append(result.loss.item())
        scenes_since += len(worlds)
        answered = group.gather([(stage.kinds(one), right) for one, right in zip(scenes, result.right, strict=True)])
        for world, (kinds, right) in zip(worlds, answered, strict=True):
            stage.curriculum.note(world, right)
            for kind, ok in zip(kinds, right, strict=True):
                tally[kind].append(ok)
        for name, value in result.measures.items():
            tally[name].append(value)

        now = time.monotonic()
        if group.rank == 0 and (now - logged >= log_every or step == last):
            elapsed = now - started
            row = {
                "step": step,
                "seconds": round(elapsed),
                "scenes_per_second": round(scenes_since / (now - logged), 1),
                "eta_seconds": round((recipe.steps - step) * (now - logged) / max(1, len(losses))),
                "rate": recipe.rate(step),
                "loss": round(float(np.mean(losses)), 4),
                "accuracy": {k: round(float(np.mean(v)), 3) for k, v in sorted(tally.items())},
                "curriculum": str(stage.curriculum),
            }
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
            accuracy = " ".join(f"{k}={v:.2f}" for k, v in row["accuracy"].items())
            print(
                f"{stage.name} {step}/{recipe.steps} {row['seconds']}s eta {row['eta_seconds']}s "
                f"{row['scenes_per_second']}/s loss {row['loss']:.3f} | {accuracy} | {row['curriculum']}",
                flush=True,
            )
            losses, tally, scenes_since, logged = [], defaultdict(list), 0, now
        if group.rank == 0 and (now - saved >= save_every or step == last):
            _save(checkpoint, stage, optimizer, step, now - started)
            saved = now
