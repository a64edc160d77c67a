"""Observation of a dense prefill layer by layer, without storing it: a function is called with what enters each layer.

Shapes: B batch (always 1 here), N prompt tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from budgets.schedule import dense

if TYPE_CHECKING:
    from visor.inference import LoadedModel
    from visor.vision.features import VisionFeatures
    from visor.vision.prepared import PreparedSample

Observer = Callable[[int, Tensor, Any], None]
"""Called as observer(layer, hidden [1, N, D], rotary): what enters `layer`; rotary is None after the last one."""


@contextmanager
def observing(decoder: nn.Module, observer: Observer) -> Iterator[None]:
    """Within it, every forward of a layer is shown to `observer`; index `num_layers` is what leaves the last layer."""
    last = len(decoder.layers)

    def before(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            observer(layer, args[0] if args else kwargs["hidden_states"], kwargs.get("position_embeddings"))

        return hook

    def after(_module: nn.Module, _args: tuple, output: Any) -> None:
        observer(last, output if isinstance(output, Tensor) else output[0], None)

    handles = [layer.register_forward_pre_hook(before(i), with_kwargs=True) for i, layer in enumerate(decoder.layers)]
    handles.append(decoder.layers[-1].register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def observe(loaded: LoadedModel, prepared: PreparedSample, vision: VisionFeatures, observer: Observer) -> None:
    """Run one sample's prompt densely, with `observer` called at each layer."""
    with observing(loaded.adapter.decoder, observer):
        loaded.prefill([prepared], [vision], [dense(loaded.geometry.num_layers, prepared.num_visual)])


def visual_places(loaded: LoadedModel, prepared: PreparedSample) -> Tensor:
    """Indices of the visual tokens in the prompt, on the host.

    Raises:
        ValueError: the sample has no image.
    """
    if prepared.num_visual == 0:
        raise ValueError("these analyses are about images, but the sample has no image")
    image_ids = torch.tensor(loaded.adapter.image_token_ids)
    return torch.isin(torch.tensor(prepared.input_ids), image_ids).nonzero().flatten()
