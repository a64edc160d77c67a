"""The stages of VISOR and M3: questions packed behind images, on the engine, under any number of passes a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from visor.training.batch import Batch
from visor.training.data import BadRow, Stream
from visor.training.encoding import Encoder
from visor.training.forward import PackedModel
from visor.training.objectives import Objective
from visor.training.optimisation import Optimisation
from visor.training.parts import auxiliary_heads, freeze_all_but
from visor.training.processes import Processes
from visor.training.rows import Row
from visor.training.stage import Stage
from visor.training.training_log import Tally

StepRows = tuple[list[Row], list[tuple[str, str]]]
"""The rows of a step, and (row, reason) of those that could not be used."""


class StepData(torch.utils.data.Dataset):
    """Item `step` is this process's rows of that step, and the rows that could not be used."""

    def __init__(self, stream: Stream, encoder: Encoder, optimisation: Optimisation, rank: int, size: int) -> None:
        self.stream, self.encoder, self.rank, self.size = stream, encoder, rank, size
        self.batch_size, self.steps = optimisation.batch_size, optimisation.steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> StepRows:
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


class PackedStage(Stage):
    """A model on a stream of examples, with an objective.

    Args:
        packed: the model.
        trainable: names of parts (`parts_of`) whose parameters are updated; the others stand still.
    """

    def __init__(
        self,
        packed: PackedModel,
        trainable: Sequence[str],
        objective: Objective,
        stream: Stream,
        encoder: Encoder,
        optimisation: Optimisation,
        processes: Processes,
    ) -> None:
        self.packed, self.objective, self.processes = packed, objective, processes
        packed.model.to(processes.device).train()
        for head in auxiliary_heads(packed).values():
            head.to(processes.device).train()
        self.parameters = freeze_all_but(packed, trainable)
        self.data = StepData(stream, encoder, optimisation, processes.rank, processes.size)
        self.pad_id, self.micro_batch = encoder.tokenizer.pad_token_id or 0, optimisation.micro_batch

    def num_passes(self, step: int) -> int:
        return self.objective.num_passes(step)

    def backward(self, examples: StepRows, step: int, tally: Tally) -> tuple[float, float]:
        rows, skipped = examples
        tally.skipped += skipped
        loss_sum, num_tokens = 0.0, 0
        for first in range(0, len(rows), self.micro_batch):
            batch = Batch.of(rows[first : first + self.micro_batch], self.pad_id).to(self.processes.device)
            loss, tokens = self._backward(batch, step, tally)
            loss_sum += loss
            num_tokens += tokens
        return loss_sum, num_tokens

    def _backward(self, batch: Batch, step: int, tally: Tally) -> tuple[float, int]:
        """Add the gradients of the summed loss of a micro-batch: (loss sum, mean over passes; answer tokens)."""
        packed, autocast = self.packed, self.processes.autocast
        with autocast():
            features = packed.image_features(batch)
        if wrong := packed.mismatched(batch, features):
            tally.skipped += [(batch.rows[index].key, reason) for index, reason in wrong]
            left = batch.without([index for index, _ in wrong], self.pad_id)
            return (0.0, 0) if left is None else self._backward(left.to(self.processes.device), step, tally)
        # Passes share the features: each backward stops there, and the sum of what arrives goes through the tower once.
        trained = any(level.requires_grad for one in features for level in one)
        leaves = [tuple(level.detach().requires_grad_(trained) for level in one) for one in features]
        loss_sum, count = 0.0, self.objective.num_passes(step)
        with autocast():
            for one in self.objective.passes(packed, batch, leaves, step):
                with torch.autocast(self.processes.device.type, enabled=False):
                    one.answers.loss_sum.backward()
                loss_sum += float(one.answers.loss_sum.detach()) / count
                tally.answered(one.name, [row.kinds for row in batch.rows], one.answers.right)
                for name, right in one.auxiliary.items():
                    tally.measured(f"{one.name} {name}", right)
        if trained:
            pairs = [
                (x, leaf.grad)
                for one, own in zip(features, leaves, strict=True)
                for x, leaf in zip(one, own, strict=True)
            ]
            reached = [(x, grad) for x, grad in pairs if grad is not None]
            torch.autograd.backward([x for x, _ in reached], [grad for _, grad in reached])
        return loss_sum, batch.num_answer_tokens
