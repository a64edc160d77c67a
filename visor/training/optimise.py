"""The training loop of the VISOR stages: resumable to the bit, and the same for any number of processes.

What a step does depends on the recipe and the step alone: its examples are the next `batch_size` positions of the
stream, its random numbers are seeded by it. Processes take turns at the examples; gradients and losses are summed, then
divided by the answer tokens of the whole step, so two processes take the step of one with the doubled batch, and
accumulation over micro-batches changes nothing either.
"""

from __future__ import annotations

import json
import os
import random
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from visor.training.batch import Batch
from visor.training.data import BadRow, Skipped, Stream
from visor.training.encoding import Encoder, Row
from visor.training.forward import Answers, Features, PackedModel

PRECISIONS = {"bf16": torch.bfloat16, "fp32": None}


@dataclass(frozen=True)
class Optimisation:
    """How a stage is optimised. Rate: linear warm-up, constant, linear decay to a tenth over the last `decay` share.

    Args:
        steps: optimiser steps.
        batch_size: examples a step, over all processes.
        micro_batch: examples a process runs at once; the rest of its share accumulates.
        peak_rate, warmup, decay: see above; `warmup` in steps.
        clip: largest gradient norm.
        weight_decay: of AdamW, on matrices (the paper: none).
        precision: "bf16" (autocast, float32 weights) or "fp32".
        ema: decay of an exponential moving average of the weights, which then is what the stage yields; 0 is off.
        hint_weight: weight of the hints in the loss (`visor.training.encoding`).
        facts_weight: weight of a fact in the loss (`visor.training.refined`, `asked`, `written`); 0 reads none.
        looks_weight: weight of a look in the loss (`visor.training.looks`); 0 watches none.
        seed: of data order and random choices.
        workers: processes that read and encode data ahead; 0 reads in the training process.
        log_every: steps between log lines.
        save_every: seconds between checkpoints.
        max_skipped: share of unusable rows at which the run stops.
    """

    steps: int
    batch_size: int = 16
    micro_batch: int = 16
    peak_rate: float = 5e-4
    warmup: int = 100
    decay: float = 0.3
    clip: float = 1.0
    weight_decay: float = 0.0
    precision: str = "bf16"
    ema: float = 0.0
    hint_weight: float = 0.0
    facts_weight: float = 0.0
    looks_weight: float = 0.0
    seed: int = 0
    workers: int = 0
    log_every: int = 20
    save_every: float = 110.0
    max_skipped: float = 0.5

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch", "warmup", "log_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("peak_rate", "clip", "save_every"):
            if not isinstance(getattr(self, name), (int, float)) or not getattr(self, name) > 0:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)!r}")
        for name in ("decay", "ema", "max_skipped"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        start_decay = self.steps * (1 - self.decay)
        done = max(0.0, step - start_decay) / max(1.0, self.steps - start_decay)
        return self.peak_rate * min(1.0, (step + 1) / self.warmup) * max(0.1, 1 - 0.9 * done)


@dataclass
class Pass:
    """One forward pass of a step: what ran, for the log, what came out, and which facts were right, by reader."""

    name: str
    answers: Answers
    facts: dict[str, list[bool]] = field(default_factory=dict)


class Objective(ABC):
    """What is minimised: one or several passes over a batch, which count equally."""

    @abstractmethod
    def passes(self, packed: PackedModel, batch: Batch, features: Sequence[Features], step: int) -> Iterable[Pass]:
        """The passes of a step, each ready for its backward before the next one runs."""

    @abstractmethod
    def num_passes(self, step: int) -> int:
        """How many they are."""


class Processes:
    """The processes that train together, through Accelerate.

    Raises:
        ValueError: accelerate is not installed.
    """

    def __init__(self, precision: str = "fp32") -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ValueError("training needs a package: pip install accelerate") from error
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.size, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.dtype = PRECISIONS[precision]

    def autocast(self) -> Any:
        """bf16 matrix products, where the precision asks for them."""
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def share(self, items: Sequence) -> list:
        """This process's items: every `size`-th."""
        return list(items[self.rank :: self.size])

    def sum_(self, flat: Tensor) -> Tensor:
        """The sum over the processes, on each."""
        return flat if self.size == 1 else self.accelerator.reduce(flat, "sum")

    def gather(self, items: list) -> list:
        """Items of all processes, process by process."""
        if self.size == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()


@dataclass
class Tally:
    """What happened since the last log line."""

    loss_sum: float = 0.0
    num_tokens: int = 0
    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    passes: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def note(self, one: Pass, batch: Batch) -> None:
        """Take in the answers of a pass."""
        for row, right in zip(batch.rows, one.answers.right, strict=True):
            self.passes[one.name] += right
            for kind, ok in zip(row.kinds if right else (), right, strict=True):
                self.right[kind].append(ok)
        for reader, right in one.facts.items():
            self.passes[f"{one.name} {reader}"] += right


class StepData(torch.utils.data.Dataset):
    """Item `step` is this process's rows of that step, and the rows that could not be used."""

    def __init__(self, stream: Stream, encoder: Encoder, optimisation: Optimisation, rank: int, size: int) -> None:
        self.stream, self.encoder, self.rank, self.size = stream, encoder, rank, size
        self.batch_size, self.steps = optimisation.batch_size, optimisation.steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[list[Row], list[tuple[str, str]]]:
        rows, skipped = [], []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size)[self.rank :: self.size]:
            example = self.stream.read(position)
            if isinstance(example, tuple):
                skipped.append(example)
                continue
            try:
                rows.append(self.encoder.encode(example))
            except BadRow as error:
                skipped.append((example.key, str(error)))
        return rows, skipped


class Training:
    """A model under training: trainable parameters, optimiser, average, data position.

    Args:
        packed: the model.
        trainable: names of parts (`parts_of`) whose parameters are updated; the others stand still.
        folder: where `state.pt`, `log.jsonl` and `skipped.jsonl` go.
    """

    def __init__(
        self,
        packed: PackedModel,
        trainable: Sequence[str],
        objective: Objective,
        stream: Stream,
        encoder: Encoder,
        optimisation: Optimisation,
        folder: Path,
        processes: Processes,
        tensorboard: bool = False,
    ) -> None:
        self.packed, self.objective, self.optimisation = packed, objective, optimisation
        self.folder, self.processes = folder, processes
        folder.mkdir(parents=True, exist_ok=True)
        packed.model.to(processes.device).train()
        for reader in readers_of(packed).values():
            reader.to(processes.device).train()
        self.parameters = freeze_all_but(packed, trainable)
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
        self.skipped = Skipped(folder / "skipped.jsonl", optimisation.max_skipped)
        self.data = StepData(stream, encoder, optimisation, processes.rank, processes.size)
        self.pad_id = encoder.tokenizer.pad_token_id or 0
        self.step, self.seconds = 0, 0.0
        self.writer = _writer(folder) if tensorboard and processes.is_main else None
        self._resume()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    @property
    def _state_path(self) -> Path:
        return self.folder / "state.pt"

    def save(self) -> None:
        """Write everything that the rest of the run depends on. Atomic: a kill leaves the last one whole."""
        state = {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "random": {"torch": torch.get_rng_state()},
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
        if set(state["parameters"]) != set(self.parameters) or bool(state["average"]) != bool(self.average):
            raise ValueError(
                f"{self._state_path} is of a run that trained other parts; delete the folder to start anew, or repeat "
                "the recipe that began it"
            )
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.average = {name: value.clone() for name, value in state["average"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"]["torch"].cpu())
        self.step, self.seconds = state["step"], state["seconds"]
        if self.processes.is_main:
            self._forget_lines_after(self.step)
            print(f"{self.folder.name}: resumed at step {self.step}", flush=True)

    def _forget_lines_after(self, step: int) -> None:
        """Take log lines of steps that will be repeated out of the log."""
        path = self.folder / "log.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
            path.write_text("".join(lines))

    @torch.no_grad()
    def adopt_average(self) -> None:
        """Put the averaged weights into the model, where the recipe keeps an average."""
        for name, value in self.average.items():
            self.parameters[name].copy_(value)

    # --- steps --------------------------------------------------------------------------------------------------------

    def run(self, stop_after: int | None = None) -> None:
        """Train to the end of the recipe, or to step `stop_after` as if interrupted there."""
        options, main = self.optimisation, self.processes.is_main
        last = min(options.steps, stop_after or options.steps)
        loader = torch.utils.data.DataLoader(
            self.data,
            batch_size=None,
            sampler=range(self.step, last),
            num_workers=options.workers,
            collate_fn=_as_it_is,
        )
        started = time.monotonic() - self.seconds
        saved = logged = time.monotonic()
        tally, steps_since = Tally(), 0
        for rows, skipped in loader:
            self._seed()
            tally.skipped += skipped
            self._take_step(rows, tally)
            self.step += 1
            steps_since += 1
            now = time.monotonic()
            self.seconds = now - started
            if self.step % options.log_every == 0 or self.step == last:
                self._log(tally, steps_since, now - logged)
                tally, steps_since, logged = Tally(), 0, now
            if main and (now - saved >= options.save_every or self.step == last):
                self.save()
                saved = now
        if self.writer is not None:
            self.writer.flush()
        self.processes.wait()

    def _seed(self) -> None:
        """Random numbers of a step depend on the step: nothing is left to where a run was interrupted."""
        seed = (self.optimisation.seed * 1_000_003 + self.step) * 1_009 + self.processes.rank
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def _take_step(self, rows: Sequence[Row], tally: Tally) -> None:
        options = self.optimisation
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate(self.step)
        loss_sum, num_tokens = 0.0, 0
        for first in range(0, len(rows), options.micro_batch):
            batch = Batch.of(rows[first : first + options.micro_batch], self.pad_id).to(self.processes.device)
            loss, tokens = self._backward(batch, tally)
            loss_sum += loss
            num_tokens += tokens
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters.values()]
        flat = torch.cat([*(g.flatten() for g in gradients), gradients[0].new_tensor([loss_sum, num_tokens])])
        flat = self.processes.sum_(flat)
        total = float(flat[-1])
        tally.loss_sum += float(flat[-2])
        tally.num_tokens += int(total)
        if total == 0:  # not one usable row in the whole step
            self.optimizer.zero_grad(set_to_none=True)
            return
        if not torch.isfinite(flat[-2]):
            raise RuntimeError(f"loss {float(flat[-2])} at step {self.step}; last good state: {self._state_path}")
        flat /= total * self.objective.num_passes(self.step)
        parts = flat[:-2].split([g.numel() for g in gradients])
        for parameter, part in zip(self.parameters.values(), parts, strict=True):
            parameter.grad = part.view_as(parameter)
        nn.utils.clip_grad_norm_(self.parameters.values(), options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, value in self.average.items():
                value.lerp_(self.parameters[name], 1 - options.ema)

    def _backward(self, batch: Batch, tally: Tally) -> tuple[float, int]:
        """Add the gradients of the summed loss of a micro-batch: (loss sum, mean over passes; answer tokens)."""
        packed, autocast = self.packed, self.processes.autocast
        with autocast():
            features = packed.image_features(batch)
        if wrong := packed.mismatched(batch, features):
            tally.skipped += [(batch.rows[index].key, reason) for index, reason in wrong]
            left = batch.without([index for index, _ in wrong], self.pad_id)
            return (0.0, 0) if left is None else self._backward(left.to(self.processes.device), tally)
        # Passes share the features: each backward stops there, and the sum of what arrives goes through the tower once.
        trained = any(level.requires_grad for one in features for level in one)
        leaves = [tuple(level.detach().requires_grad_(trained) for level in one) for one in features]
        loss_sum, count = 0.0, self.objective.num_passes(self.step)
        with autocast():
            passes = iter(self.objective.passes(packed, batch, leaves, self.step))
            for one in passes:
                with torch.autocast(self.processes.device.type, enabled=False):
                    one.answers.loss_sum.backward()
                loss_sum += float(one.answers.loss_sum.detach()) / count
                tally.note(one, batch)
        if trained:
            pairs = [
                (x, leaf.grad)
                for one, own in zip(features, leaves, strict=True)
                for x, leaf in zip(one, own, strict=True)
            ]
            reached = [(x, grad) for x, grad in pairs if grad is not None]
            torch.autograd.backward([x for x, _ in reached], [grad for _, grad in reached])
        return loss_sum, batch.num_answer_tokens

    # --- log ----------------------------------------------------------------------------------------------------------

    def _log(self, tally: Tally, steps: int, seconds: float) -> None:
        gathered = self.processes.gather([(dict(tally.right), dict(tally.passes), tally.skipped)])
        if not self.processes.is_main:
            return
        right, passes = defaultdict(list), defaultdict(list)
        for part_right, part_passes, skipped in gathered:
            for total, part in ((right, part_right), (passes, part_passes)):
                for name, values in part.items():
                    total[name] += values
            self.skipped.add(skipped)
        self.skipped.check(self.step * self.optimisation.batch_size)
        mean = lambda values: {name: round(float(np.mean(v)), 3) for name, v in sorted(values.items()) if v}
        row = {
            "step": self.step,
            "seconds": round(self.seconds, 1),
            "scenes_per_second": round(steps * self.optimisation.batch_size / max(seconds, 1e-9), 2),
            "eta_seconds": round((self.optimisation.steps - self.step) * seconds / max(1, steps)),
            "rate": self.optimisation.rate(self.step - 1),
            "loss": round(tally.loss_sum / max(1, tally.num_tokens), 4),
            "accuracy": mean(right),
            "passes": mean(passes),
            "skipped": len(self.skipped.reasons),
        }
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        accuracy = " ".join(f"{name}={value:.2f}" for name, value in {**row["accuracy"], **row["passes"]}.items())
        print(
            f"{self.folder.name} {self.step}/{self.optimisation.steps} {row['seconds']:.0f}s eta {row['eta_seconds']}s "
            f"{row['scenes_per_second']}/s loss {row['loss']:.3f} | {accuracy}"
            + (f" | skipped {row['skipped']}: {self.skipped.summary(1)}" if row["skipped"] else ""),
            flush=True,
        )
        if self.writer is not None:
            for name in ("loss", "rate", "scenes_per_second", "skipped"):
                self.writer.add_scalar(name, row[name], self.step)
            for group in ("accuracy", "passes"):
                for name, value in row[group].items():
                    self.writer.add_scalar(f"{group}/{name}", value, self.step)


def _as_it_is(item: Any) -> Any:
    return item


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("a TensorBoard log needs a package: pip install tensorboard") from error
    return SummaryWriter(folder / "tensorboard")


def parts_of(packed: PackedModel) -> dict[str, list[nn.Module]]:
    """The parts of a model that a recipe may train, by name."""
    decoder, adapter = packed.decoder, packed.adapter
    parts = {
        "tower": [adapter.tower],
        "projector": [adapter.projector],
        "decoder": [decoder.layers, decoder.norm, decoder.embed_tokens, packed.base.get_output_embeddings()],
    }
    if hasattr(decoder, "cross_blocks"):
        parts["cross"] = [decoder.cross_blocks]
    return parts


def freeze_all_but(packed: PackedModel, trainable: Sequence[str]) -> dict[str, nn.Parameter]:
    """Let gradients flow to the named parts only; their parameters by name.

    Raises:
        ValueError: no such part.
    """
    parts = parts_of(packed)
    if not trainable or (unknown := [name for name in trainable if name not in parts]):
        raise ValueError(f"train must name parts of {', '.join(parts)}; got {list(trainable)}" + (
            f", of which {unknown} do not exist here" if trainable and unknown else ""))  # fmt: skip
    packed.model.requires_grad_(False)
    for name in trainable:
        for module in parts[name]:
            module.requires_grad_(True)
    found = {name: p for name, p in packed.model.named_parameters() if p.requires_grad}
    for prefix, reader in readers_of(packed).items():
        found |= {f"{prefix}.{name}": p for name, p in reader.named_parameters()}
    return found


def readers_of(packed: PackedModel) -> dict[str, nn.Module]:
    """What reads facts off the hidden states and is trained beside the model, by name."""
    readers = {"facts": packed.facts, "asked": packed.asked, "written": packed.written}
    return {name: reader for name, reader in readers.items() if reader is not None}
