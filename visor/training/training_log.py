"""What a training run says of itself: `log.jsonl`, a line for people, TensorBoard where asked for."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from visor.training.data import Skipped
from visor.training.optimisation import Optimisation
from visor.training.processes import Processes


@dataclass
class Tally:
    """What happened since the last log line.

    Args:
        loss_sum, weight: over all processes; their quotient is the loss.
        right: by kind of question, which answers were right, in this process.
        passes: by what ran, and by auxiliary loss, which answers or predictions were right, in this process.
        skipped: (row, reason) of examples that could not be used, in this process.
    """

    loss_sum: float = 0.0
    weight: float = 0.0
    right: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    passes: dict[str, list[bool]] = field(default_factory=lambda: defaultdict(list))
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def answered(self, name: str, kinds: Sequence[Sequence[str]], right: Sequence[Sequence[bool]]) -> None:
        """Take in the answers of a pass: for each example, of each of its questions, the kind and whether it is right.

        Args:
            name: of the pass; "" if there is one kind of pass only.
        """
        for own_kinds, own_right in zip(kinds, right, strict=True):
            if name:
                self.passes[name] += own_right
            # A pass that asks no question has no answers, whatever the example could be asked.
            for kind, ok in zip(own_kinds if own_right else (), own_right, strict=True):
                self.right[kind].append(ok)

    def measured(self, name: str, right: Sequence[bool]) -> None:
        """Take in which predictions of an auxiliary loss were right."""
        self.passes[name] += right


class TrainingLog:
    """The log of a run, written by its main process.

    Args:
        folder: gets `log.jsonl` and `skipped.jsonl`; its name is the run's.
        tensorboard: keep a TensorBoard log too.
    """

    def __init__(self, folder: Path, options: Optimisation, processes: Processes, tensorboard: bool) -> None:
        self.folder, self.options, self.processes = folder, options, processes
        self.skipped = Skipped(folder / "skipped.jsonl", options.max_skipped)
        self.writer = _writer(folder) if tensorboard and processes.is_main else None

    @property
    def path(self) -> Path:
        """One JSON document a line."""
        return self.folder / "log.jsonl"

    def forget_after(self, step: int) -> None:
        """Take lines of steps that will be repeated out of the log."""
        if self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            self.path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))

    def add(
        self,
        tally: Tally,
        step: int,
        steps: int,
        seconds: float,
        total_seconds: float,
        entries: Mapping[str, str],
    ) -> None:
        """One line.

        Args:
            tally: what happened since the last line, in this process.
            step: where the run is.
            steps, seconds: since the last line.
            total_seconds: since the beginning.
            entries: what else the stage says.

        Raises:
            ValueError: too many rows could not be used.
        """
        gathered = self.processes.gather([(dict(tally.right), dict(tally.passes), tally.skipped)])
        if not self.processes.is_main:
            return
        for _, _, skipped in gathered:
            self.skipped.add(skipped)
        self.skipped.check(step * self.options.batch_size)
        row = {
            "step": step,
            "seconds": round(total_seconds, 1),
            "scenes_per_second": round(steps * self.options.batch_size / max(seconds, 1e-9), 2),
            "eta_seconds": round((self.options.steps - step) * seconds / max(1, steps)),
            "rate": self.options.rate(step - 1),
            "loss": round(tally.loss_sum / max(1, tally.weight), 4),
            "accuracy": _mean([right for right, _, _ in gathered]),
            "passes": _mean([passes for _, passes, _ in gathered]),
            "skipped": len(self.skipped.reasons),
            **entries,
        }
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(self._line(row) + "".join(f" | {entry}" for entry in entries.values()), flush=True)
        if self.writer is not None:
            for name in ("loss", "rate", "scenes_per_second", "skipped"):
                self.writer.add_scalar(name, row[name], step)
            for group in ("accuracy", "passes"):
                for name, value in row[group].items():
                    self.writer.add_scalar(f"{group}/{name}", value, step)

    def _line(self, row: Mapping[str, Any]) -> str:
        accuracy = " ".join(f"{name}={value:.2f}" for name, value in {**row["accuracy"], **row["passes"]}.items())
        return (
            f"{self.folder.name} {row['step']}/{self.options.steps} {row['seconds']:.0f}s eta {row['eta_seconds']}s "
            f"{row['scenes_per_second']}/s loss {row['loss']:.3f} | {accuracy}"
            + (f" | skipped {row['skipped']}: {self.skipped.summary(1)}" if row["skipped"] else "")
        )

    def flush(self) -> None:
        """Write what TensorBoard still holds."""
        if self.writer is not None:
            self.writer.flush()


def _mean(parts: Sequence[Mapping[str, list[bool]]]) -> dict[str, float]:
    """By name, the share that was right in all processes together; a name without answers is left out."""
    together: dict[str, list[bool]] = defaultdict(list)
    for part in parts:
        for name, values in part.items():
            together[name] += values
    return {name: round(float(np.mean(values)), 3) for name, values in sorted(together.items()) if values}


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("a TensorBoard log needs a package: pip install tensorboard") from error
    return SummaryWriter(folder / "tensorboard")
