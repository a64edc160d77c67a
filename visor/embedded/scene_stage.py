"""A stage on drawn scenes: the curriculum chooses them, and each term of the loss is a mean over the whole step.

A term, such as the loss of hints, is divided by how many there are in the step, in all processes and micro-batches
together. These counts follow from the data, so they are summed before the backward: two processes then take the step of
one, whatever their shares hold.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset

from visor.embedded.curriculum import Curriculum
from visor.embedded.model import TinyModel
from visor.embedded.recipes import BaseRecipe
from visor.training.processes import Processes
from visor.training.stage import Stage
from visor.training.training_log import Tally
from visor.worlds.world import Scene
from visor.worlds.worlds import scene

B = TypeVar("B")


@dataclass
class Drawn:
    """What a process trains on in a step.

    Args:
        step: its number.
        worlds: of all scenes of the step.
        places: of this process's scenes among them.
        scenes: these.
    """

    step: int
    worlds: list[str]
    places: list[int]
    scenes: list[Scene]


@dataclass
class Outcome:
    """What a forward pass gave.

    Args:
        loss: to differentiate.
        right: of each scene, which of its questions were answered right.
        auxiliary: by auxiliary loss, which predictions were right.
    """

    loss: torch.Tensor
    right: list[list[bool]]
    auxiliary: dict[str, list[bool]]


class SceneStage(Stage, Generic[B]):
    """A part of the small model on the scenes of a curriculum.

    Args:
        model: all of it; what is not in `parts` stands still.
        recipe: of the stage.
        processes: that train together.
    """

    parts: ClassVar[tuple[str, ...]]
    """Modules of `TinyModel` that are trained, by their names in it."""
    counted: ClassVar[tuple[str, ...]]
    """What `counts` counts: the denominators of the terms of the loss."""
    reads_ahead = False  # which worlds are drawn depends on what was answered

    def __init__(self, model: TinyModel, recipe: BaseRecipe, processes: Processes) -> None:
        self.model, self.recipe, self.processes = model, recipe, processes
        self.curriculum = Curriculum(recipe.curriculum)
        model.to(processes.device).train().requires_grad_(False)
        self.parameters = {
            name: parameter.requires_grad_(True)
            for name, parameter in model.named_parameters()
            if name.startswith(tuple(f"{part}." for part in self.parts))
        }
        self.data = _Steps(self)
        self._worlds: list[str] = []
        self._right: list[list[bool]] = []

    # --- what a stage says ---

    @abstractmethod
    def prepare(self, drawn: Drawn) -> B:
        """Scenes to tensors."""

    @abstractmethod
    def counts(self, batch: B) -> tuple[float, ...]:
        """What there is of each of `counted` in a batch."""

    @abstractmethod
    def loss(self, batch: B, counts: Mapping[str, float]) -> Outcome:
        """Forward pass on one batch.

        Args:
            counts: by name, of the whole step.
        """

    def kinds(self, one: Scene) -> list[str]:
        """What each entry of `Outcome.right` of a scene is about."""
        return [question.kind for question in one.questions]

    # --- what the loop asks ---

    def draw(self, step: int) -> Drawn:
        """The worlds of a step's scenes, and this process's share of the scenes."""
        options, seed = self.recipe.optimisation, self.recipe.seed
        rng = np.random.default_rng([seed, step])
        draws = [self.curriculum.draw(rng) for _ in range(options.batch_size)]
        places = self.processes.share(range(options.batch_size))
        first = step * options.batch_size
        scenes = [scene(draws[i][0], "train", first + i, draws[i][1], seed) for i in places]
        return Drawn(step, [world for world, _ in draws], places, scenes)

    def backward(self, examples: Drawn, step: int, tally: Tally) -> tuple[float, float]:
        drawn, micro = examples, self.recipe.optimisation.micro_batch
        parts = [
            replace(drawn, places=drawn.places[first : first + micro], scenes=drawn.scenes[first : first + micro])
            for first in range(0, len(drawn.scenes), micro)
        ]
        batches = [self.prepare(part) for part in parts]
        counts = self._whole_step([self.counts(batch) for batch in batches])
        loss_sum, self._worlds, self._right = 0.0, drawn.worlds, []
        for part, batch in zip(parts, batches, strict=True):
            outcome = self.loss(batch, counts)
            outcome.loss.backward()
            loss_sum += float(outcome.loss.detach())
            kinds = [self.kinds(one) if right else [] for one, right in zip(part.scenes, outcome.right, strict=True)]
            tally.answered("", kinds, outcome.right)
            for name, right in outcome.auxiliary.items():
                tally.measured(name, right)
            self._right += outcome.right
        # The losses are parts of one mean already, so the weights of all processes must add up to one.
        return loss_sum, float(self.processes.is_main)

    def _whole_step(self, counts: Sequence[Sequence[float]]) -> dict[str, float]:
        """Counts of all micro-batches and processes together."""
        own = torch.tensor([*counts, [0.0] * len(self.counted)], dtype=torch.float64, device=self.processes.device)
        return dict(zip(self.counted, self.processes.sum_(own.sum(0)).tolist(), strict=True))

    def after_step(self) -> None:
        # On every process alike, or they would draw different worlds from here on.
        for world, right in zip(self._worlds, self.processes.gather_shared(self._right), strict=True):
            self.curriculum.note(world, right)

    def state(self) -> dict[str, Any]:
        return {"curriculum": self.curriculum.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.curriculum.load(state["curriculum"])

    def log_entries(self) -> dict[str, str]:
        return {"curriculum": str(self.curriculum)}


class _Steps(Dataset):
    """Item `step` is drawn when it is asked for: the curriculum of the moment decides."""

    def __init__(self, stage: SceneStage) -> None:
        self.stage = stage

    def __getitem__(self, step: int) -> Drawn:
        return self.stage.draw(step)
