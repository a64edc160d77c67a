"""Text-to-image attention mass: which share of its attention a layer's text pays to the image.

The softmax rows of the text tokens that follow the image, summed over the visual columns, mean over heads and rows.
Made from q and k of these rows alone: no N x N matrix is stored, and the model's own attention kernel stays as it is.

Shapes: N prompt tokens, T text tokens after the image, V visual tokens, H query heads, G key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from visor.analysis.observe import observe, visual_places
from visor.engine.compat import rotated_heads
from visor.engine.streams import take

if TYPE_CHECKING:
    from visor.inference import LoadedModel
    from visor.vision.features import VisionFeatures
    from visor.vision.prepared import PreparedSample


@dataclass(frozen=True)
class AttentionMass:
    """Shares in 0..1 by layer: of all text tokens after the image, and of the last one, which says the answer."""

    text: tuple[float, ...]
    last: tuple[float, ...]


def attention_mass(loaded: LoadedModel, prepared: PreparedSample, vision: VisionFeatures) -> AttentionMass:
    """The mass in every layer of the dense model, for one sample."""
    places_V = visual_places(loaded, prepared)
    rows_T = torch.arange(int(places_V[-1]) + 1, len(prepared.input_ids))
    if not len(rows_T):
        raise ValueError("no text follows the image in this prompt, so none of it can attend to the image")
    decoder, by_layer = loaded.adapter.decoder, []

    def observer(layer: int, hidden_1ND: Tensor, rotary: Any) -> None:
        if layer < len(decoder.layers):
            by_layer.append(mass_of_rows(decoder.layers[layer], hidden_1ND, rotary, rows_T, places_V).cpu())

    observe(loaded, prepared, vision, observer)
    mass_LT = torch.stack(by_layer)
    return AttentionMass(tuple(mass_LT.mean(1).tolist()), tuple(mass_LT[:, -1].tolist()))


def mass_of_rows(layer: nn.Module, hidden_1ND: Tensor, rotary: Any, rows_T: Tensor, places_V: Tensor) -> Tensor:
    """Attention that rows pay to places under a causal mask, [T], in fp32."""
    attention, device = layer.self_attn, hidden_1ND.device
    rows_1T, places_V = rows_T[None].to(device), places_V.to(device)
    normed_1ND = layer.input_layernorm(hidden_1ND)
    queries_1HTd = rotated_heads(attention, "q", take(normed_1ND, rows_1T), _rows_of(rotary, rows_1T))
    keys_1GNd = rotated_heads(attention, "k", normed_1ND, rotary)
    group = queries_1HTd.shape[1] // keys_1GNd.shape[1]
    keys_1HNd = keys_1GNd.repeat_interleave(group, dim=1)
    logits_1HTN = (queries_1HTd @ keys_1HNd.transpose(-1, -2)).float() * attention.scaling
    later_TN = torch.arange(logits_1HTN.shape[-1], device=device) > rows_1T[0, :, None]
    weights_1HTN = logits_1HTN.masked_fill(later_TN, -torch.inf).softmax(-1)
    return weights_1HTN[..., places_V].sum(-1).mean(1)[0]


def _rows_of(rotary: tuple[Tensor, Tensor], rows_1T: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of some tokens, whatever axes stand before (token, d)."""
    cos, sin = rotary
    return cos[..., rows_1T[0], :], sin[..., rows_1T[0], :]
