"""From the samples of a task to batches that are always the same, and to the lengths of its questions.

What is cut here depends on the samples and the batch size alone, so a run that is continued meets the batches of the
run that it continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from evaluations.records import digest
from evaluations.task import prepare_sample
from visor.vision.image import MAX_PIXELS, as_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

    from evaluations.task import Sample, Task

VALIDATION = "@validation"  # ends the name of a task's validation split


@dataclass(frozen=True)
class Lengths:
    """What a sample's schedule and price depend on, beside the model."""

    num_visual: int
    num_text: int


@dataclass(frozen=True)
class PlannedTask:
    """A split of a task with its samples, cut into batches that do not depend on anything but samples and batch size.

    Args:
        name: of the task, with "@validation" behind it for that split.
        lengths: of its shortest and its longest question, between which all others lie.
    """

    name: str
    task: Task
    samples: tuple[Sample, ...]
    batches: tuple[tuple[Sample, ...], ...]
    lengths: tuple[Lengths, ...]

    @cached_property
    def samples_digest(self) -> str:
        """Hash of what is asked and what counts as right: part of a cell's key."""
        return digest([[sample.sample_id, sample.question, list(sample.references)] for sample in self.samples])


def make_batches(samples: Sequence[Sample], batch_size: int) -> tuple[tuple[Sample, ...], ...]:
    """Batches in a fixed order, images kept together: an image with several questions is encoded once.

    Images whose longest questions are about equally long share a batch, so that little of it is padding.

    The batches follow from the samples and the batch size alone. Rounding may depend on a batch's composition, so a
    continued run that cut its batches elsewhere could answer differently from an unbroken one.
    """
    batches: list[list[Sample]] = [[]]
    by_image: dict[str, list[Sample]] = {}
    for sample in sorted(samples, key=lambda sample: (sample.image_id, sample.sample_id)):
        by_image.setdefault(sample.image_id, []).append(sample)
    longest = lambda group: max(len(sample.question) for sample in group)
    for group in sorted(by_image.values(), key=longest):  # of equally long ones, in the order of their ids
        if len(batches[-1]) + len(group) > batch_size:
            batches.append([])
        for start in range(0, len(group), batch_size):
            if start:
                batches.append([])
            batches[-1] += group[start : start + batch_size]
    return tuple(tuple(batch) for batch in batches if batch)


def plan_task(
    name: str, task: Task, samples: Sequence[Sample], batch_size: int, loaded: Any, max_pixels: int = MAX_PIXELS
) -> PlannedTask:
    """Order and measure the samples of a task.

    Args:
        max_pixels: samples with a larger image fail.

    Raises:
        ValueError: there are none, or two have the same id.
    """
    if not samples:
        raise ValueError(f"task {name!r} yields no sample")
    ids = [sample.sample_id for sample in samples]
    if len(set(ids)) != len(ids):
        raise ValueError(f"task {name!r} yields two samples of the same id; records are told apart by it")
    batches = make_batches(samples, batch_size)
    lengths = []
    by_length = sorted(samples, key=lambda sample: (len(sample.question), sample.sample_id))
    for ordered in (by_length, by_length[::-1]):
        for sample in ordered:
            try:
                check_sample(sample, max_pixels)
                prepared = prepare_sample(loaded, sample)
            except Exception:  # it becomes a failed record later; here the next sample serves as well
                continue
            lengths.append(Lengths(prepared.num_visual, prepared.num_text))
            break
    return PlannedTask(name, task, tuple(s for batch in batches for s in batch), batches, tuple(dict.fromkeys(lengths)))


def check_sample(sample: Sample, max_pixels: int = MAX_PIXELS) -> Image | None:
    """Refuse what no model can answer.

    Returns:
        The (first) image as a model sees it; None for a conversation without one.

    Raises:
        ValueError: an empty question, or an image that cannot be read (`visor.vision.image`).
    """
    if not sample.question.strip():
        raise ValueError("the question is empty")
    if sample.image is None:
        if sample.messages is not None:  # a benchmark may ask without an image
            return None
        raise ValueError("the sample has no image")
    return as_rgb(sample.image, max_pixels)
