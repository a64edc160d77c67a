"""What the training loop knows of a stage: its parameters, its data by step, and how a step adds gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from visor.training.training_log import Tally


class Stage(ABC):
    """What is trained, on what, and with which loss; `visor.training.optimise.Training` runs it.

    A step must depend on its number, the recipe and `state` alone, or a resumed run is not the unbroken one.

    Attributes:
        parameters: what is updated, by name, on the device of this process.
        data: item `step` is what this process needs of that step. Passed on to `backward` as it is.
        reads_ahead: whether the data of a step can be read before the step before it is done.
    """

    parameters: Mapping[str, nn.Parameter]
    data: Dataset
    reads_ahead: bool = True

    @abstractmethod
    def backward(self, examples: Any, step: int, tally: Tally) -> tuple[float, float]:
        """Add to the gradients those of this process's examples.

        Args:
            examples: an item of `data`.
            tally: takes in what was answered, for the log.

        Returns:
            (loss, weight), both summed over the examples. The loop adds up losses, weights and gradients of all
            processes, and divides by the weight: what a step does depends on no division into processes.
        """

    def num_passes(self, step: int) -> int:
        """By how many passes over the same examples, which count equally, gradients are divided too."""
        return 1

    def after_step(self) -> None:  # noqa: B027  most stages have nothing to do here
        """Called on every process once the parameters are updated."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside parameters and optimiser."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Continue from `state`."""

    def log_entries(self) -> dict[str, str]:
        """What a line of the log says beside loss and accuracy."""
        return {}
