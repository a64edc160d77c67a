"""The training loop of every stage: resumable to the bit, and the same for any number of processes.

What a step does depends on the recipe, the step and the stage's own state alone: its examples are numbered by it, its
random numbers are seeded by it. Gradients, losses and their weights are summed over the processes, then divided, so two
processes take the step of one with the doubled batch. What a stage trains and minimises is the stage's business
(`visor.training.stage`): questions packed behind images (`visor.training.packed_stage`), or the stages of the small
models' dense base.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from visor.training.old_names import rename_parameters
from visor.training.optimisation import Optimisation
from visor.training.processes import Processes
from visor.training.stage import Stage
from visor.training.training_log import Tally, TrainingLog

STATE = "state.pt"


class Training:
    """A stage under training: optimiser, average, place in the data.

    Args:
        stage: what is trained.
        optimisation: how.
        folder: where `state.pt`, `log.jsonl` and `skipped.jsonl` go.
        tensorboard: keep a TensorBoard log too.

    Raises:
        ValueError: the folder holds a run that trained other parameters, or options that do not fit the stage.
    """

    def __init__(
        self,
        stage: Stage,
        optimisation: Optimisation,
        folder: Path,
        processes: Processes,
        tensorboard: bool = False,
    ) -> None:
        if optimisation.workers and not stage.reads_ahead:
            raise ValueError(
                f"{folder.name}: what a step reads depends on the steps before it; set optimisation.workers to 0"
            )
        self.stage, self.optimisation, self.folder, self.processes = stage, optimisation, folder, processes
        folder.mkdir(parents=True, exist_ok=True)
        self.parameters = stage.parameters
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        vectors = [p for p in self.parameters.values() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": optimisation.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=optimisation.peak_rate,
            betas=(0.9, 0.98),
            fused=processes.device.type in ("cpu", "cuda"),  # 7 ms instead of 22 for 6.5 M parameters on one core
        )
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()} if optimisation.ema else {}
        self.log = TrainingLog(folder, optimisation, processes, tensorboard)
        self.step, self.seconds = 0, 0.0
        self._resume()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def _state_path(self) -> Path:
        return self.folder / STATE

    def save(self) -> None:
        """Write everything that the rest of the run depends on. Atomic: a kill leaves the last one whole."""
        state = {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "random": {"torch": torch.get_rng_state()},
            "stage": self.stage.state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        temporary = self._state_path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self._state_path)

    def _resume(self) -> None:
        if not self._state_path.exists():
            return
        state = torch.load(self._state_path, map_location="cpu", weights_only=True)
        known, average = (rename_parameters(state[part], self.parameters) for part in ("parameters", "average"))
        sizes = lambda parameters: {name: tuple(p.shape) for name, p in parameters.items()}
        if sizes(known) != sizes(self.parameters) or bool(average) != bool(self.average):
            raise ValueError(
                f"{self._state_path} is of a run that trained other parts; delete the folder to start anew, or repeat "
                "the recipe that began it"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(known[name])
        self.average = {name: value.to(self.parameters[name].device) for name, value in average.items()}
        if "optimizer" in state:  # a state that was packed for elsewhere has none (`without_optimizer`)
            self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"]["torch"].cpu())
        self.stage.load_state(state.get("stage", {}))
        self.step, self.seconds = state["step"], state["seconds"]
        if self.processes.is_main:
            self.log.forget_after(self.step)
            print(f"{self.folder.name}: resumed at step {self.step}", flush=True)

    @torch.no_grad()
    def adopt_average(self) -> None:
        """Put the averaged weights into the model, where the recipe keeps an average."""
        for name, value in self.average.items():
            self.parameters[name].copy_(value)

    def summary(self) -> dict[str, Any]:
        """What `done.json` says of the training."""
        return {
            "steps": self.step,
            "examples": self.step * self.optimisation.batch_size,
            "seconds": round(self.seconds),
            "peak_rate": self.optimisation.peak_rate,
        }

    # --- steps --------------------------------------------------------------------------------------------------------

    def run(self, stop_after: int | None = None) -> None:
        """Train to the end of the recipe, or to step `stop_after` as if interrupted there."""
        options, main = self.optimisation, self.processes.is_main
        last = min(options.steps, stop_after or options.steps)
        loader = torch.utils.data.DataLoader(
            self.stage.data,
            batch_size=None,
            sampler=range(self.step, last),
            num_workers=options.workers,
            collate_fn=_as_it_is,
        )
        started = time.monotonic() - self.seconds
        saved = logged = time.monotonic()
        tally, steps_since = Tally(), 0
        for examples in loader:
            self._seed()
            self._take_step(examples, tally)
            self.stage.after_step()
            self.step += 1
            steps_since += 1
            now = time.monotonic()
            self.seconds = now - started
            if self.step % options.log_every == 0 or self.step == last:
                entries = self.stage.log_entries()
                self.log.add(tally, self.step, steps_since, now - logged, self.seconds, entries)
                tally, steps_since, logged = Tally(), 0, now
            if main and (now - saved >= options.save_every or self.step == last):
                self.save()
                saved = now
        self.log.flush()
        self.processes.wait()

    def _seed(self) -> None:
        """Random numbers of a step depend on the step: nothing is left to where a run was interrupted."""
        seed = (self.optimisation.seed * 1_000_003 + self.step) * 1_009 + self.processes.rank
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def _take_step(self, examples: Any, tally: Tally) -> None:
        options = self.optimisation
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate(self.step)
        loss_sum, weight = self.stage.backward(examples, self.step, tally)
        # All processes must sum as many numbers: a parameter that got no gradient here may have got one elsewhere.
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
        flat = torch.cat([*(g.flatten() for g in gradients), gradients[0].new_tensor([loss_sum, weight])])
        flat = self.processes.sum_(flat)
        total = float(flat[-1])
        tally.loss_sum += float(flat[-2])
        tally.weight += total
        if total == 0:  # not one usable example in the whole step
            self.optimizer.zero_grad(set_to_none=True)
            return
        if not torch.isfinite(flat[-2]):
            raise RuntimeError(f"loss {float(flat[-2])} at step {self.step}; last good state: {self._state_path}")
        flat /= total * self.stage.num_passes(self.step)
        parts = flat[:-2].split([g.numel() for g in gradients])
        for parameter, part in zip(self.parameters.values(), parts, strict=True):
            parameter.grad = part.view_as(parameter)
        nn.utils.clip_grad_norm_(self.parameters.values(), options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, value in self.average.items():
                value.lerp_(self.parameters[name], 1 - options.ema)


def without_optimizer(source: Path, target: Path) -> None:
    """A `state.pt` a fifth the size: bfloat16 weights, no optimiser. Training continues from it, not to the bit."""
    state = torch.load(source, map_location="cpu", weights_only=True)
    del state["optimizer"]
    state["parameters"] = {name: value.to(torch.bfloat16) for name, value in state["parameters"].items()}
    target.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, target)


def _as_it_is(item: Any) -> Any:
    return item
