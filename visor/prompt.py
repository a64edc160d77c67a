"""What travels between a question and the model: prepared samples, prompts, answers. Data and pure functions.

Shapes: B samples, P padded prompt length, N visual tokens before reduction, T after it, D decoder width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from budgets.schedule import Schedule

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PreparedSample:
    """One question, ready for the model.

    Args:
        input_ids: the prompt, with one block of `num_visual` image tokens.
        num_text: all other tokens.
        num_visual: visual tokens of the image at full size (N); 0 without an image.
        pixel_inputs: what the processor made of the image, on the CPU.
        image_key: hash of the pixels; equal ones share vision features. None without an image.
    """

    input_ids: tuple[int, ...]
    num_text: int
    num_visual: int
    pixel_inputs: Mapping[str, Tensor] = field(repr=False)
    image_key: str | None


@dataclass(frozen=True)
class Generation:
    """An answer. `kept` tells of each of the N visual tokens whether it stood for itself in the last layer; None if
    tokens were averaged, or there was no image."""

    text: str
    token_ids: tuple[int, ...]
    kept: list[bool] | None


@dataclass(frozen=True)
class Prompt:
    """A left-padded batch with its visual features in place, all of one schedule structure.

    Args:
        features: one [T, D] tensor for each sample that has an image.
        kept: for each sample which of the N tokens the encoder side kept, [N]; None if averaged or without an image.
    """

    input_ids_BP: Tensor
    attention_mask_BP: Tensor
    features: tuple[Tensor, ...]
    schedules: tuple[Schedule, ...]
    kept: tuple[Tensor | None, ...]

    @property
    def positions_BP(self) -> Tensor:
        """Position ids: real tokens count from 0."""
        return (self.attention_mask_BP.cumsum(1) - 1).clamp(min=0)


def kept_over_image(prompt: Prompt, alive: Sequence[Tensor] | None) -> list[list[bool] | None]:
    """For each sample, over its N visual tokens, which stand for themselves in the last layer.

    Args:
        alive: for each sample which of the tokens that entered the decoder are alive at its end; None means all.
    """
    kept_rows: list[list[bool] | None] = []
    for index, (kept_N, schedule) in enumerate(zip(prompt.kept, prompt.schedules, strict=True)):
        if alive is not None and schedule.encoder is not None:
            kept_N = None  # the encoder side may have reordered its tokens: which patch is alive is not known
        elif alive is not None and kept_N is not None:
            kept_N = alive[index]
        kept_rows.append(None if kept_N is None else kept_N.tolist())
    return kept_rows


def readable(image: Image) -> Image:
    try:
        image.load()
        if min(image.size) < 1:
            raise ValueError(f"its size is {image.size}")
        return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds (OSError, SyntaxError, struct.error, ...) for broken files
        raise ValueError(f"the image cannot be read: {error}") from error


def pixel_hash(pixel_inputs: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(pixel_inputs.items()):
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def shortened(input_ids: Sequence[int], image_ids: set[int], num_visual: int) -> list[int]:
    """The prompt with its block of image tokens cut to `num_visual`."""
    first = next((index for index, token in enumerate(input_ids) if token in image_ids), len(input_ids))
    block = sum(token in image_ids for token in input_ids)
    assert num_visual <= block
    return [*input_ids[: first + num_visual], *input_ids[first + block :]]
