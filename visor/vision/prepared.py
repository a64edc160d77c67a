"""A question with its images as the processor made them: what the tower encodes, and the prompt around it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class PreparedSample:
    """One question, ready for the model.

    Args:
        input_ids: the prompt, with `num_visual` image tokens in it.
        num_text: all other tokens.
        num_visual: visual tokens of the images at full size (N); 0 without an image.
        pixel_inputs: what the processor made of the images, on the CPU.
        image_key: hash of the pixels; equal ones share vision features. None without an image.
        num_images: images in the prompt, if there is any.
    """

    input_ids: tuple[int, ...]
    num_text: int
    num_visual: int
    pixel_inputs: Mapping[str, Tensor] = field(repr=False)
    image_key: str | None
    num_images: int = 1


def pixel_hash(pixel_inputs: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors on the CPU, with their names, shapes and dtypes: equal images have equal vision features."""
    digest = hashlib.sha256()
    for name, value in sorted(pixel_inputs.items()):
        digest.update(f"{name}:{tuple(value.shape)}:{value.dtype}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()
