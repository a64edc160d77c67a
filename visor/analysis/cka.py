"""CKA over depth: how much of the visual tokens' geometry after the first layer is still there in later ones.

Centred kernel alignment (Kornblith et al. 2019) with a linear kernel, in its debiased form accumulated over images
(Song et al. 2012; Nguyen, Raghu and Kornblith 2021). With fewer tokens than features the plain form is close to 1
between any two layers; the debiased one is not, and it needs no matrix larger than tokens x tokens.

    CKA(x, y) = mean HSIC(x, y) / sqrt(mean HSIC(x, x) * mean HSIC(y, y)),   means over images

Shapes: N visual tokens, D hidden width, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from visor.analysis.observe import observe, visual_places

if TYPE_CHECKING:
    from visor.inference import LoadedModel
    from visor.vision.features import VisionFeatures
    from visor.vision.prepared import PreparedSample


@dataclass(frozen=True)
class LayerSimilarity:
    """HSIC terms of one image by layer [L]: with the first layer's output, of the layer itself, of the first itself."""

    cross: tuple[float, ...]
    own: tuple[float, ...]
    first: float


def gram(x_ND: Tensor) -> Tensor:
    """Linear kernel of tokens, its diagonal zero; scaled to a mean square of 1, which cancels in every CKA."""
    x_ND = x_ND.float()
    x_ND = x_ND - x_ND.mean(0)  # HSIC is invariant to it; the numbers stay small
    kernel_NN = x_ND @ x_ND.T
    kernel_NN.fill_diagonal_(0.0)
    return kernel_NN / kernel_NN.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)


def hsic(k_NN: Tensor, l_NN: Tensor) -> float:
    """The unbiased estimate (Song et al. 2012, equation 5) from kernels with zero diagonal; at least 4 tokens."""
    n = k_NN.shape[0]
    if n < 4:
        raise ValueError(f"CKA needs at least 4 visual tokens, got {n}")
    k_N, l_N = k_NN.sum(0).double().cpu(), l_NN.sum(0).double().cpu()
    trace = (k_NN * l_NN).sum().double().cpu()  # tr(KL) of symmetric K, L
    value = trace + k_N.sum() * l_N.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k_N @ l_N)
    return float(value / (n * (n - 3)))


def similarity_to_first(loaded: LoadedModel, prepared: PreparedSample, vision: VisionFeatures) -> LayerSimilarity:
    """The terms of one image. Layer i's output is compared with layer 0's, so the first entry of a CKA is 1.

    An output is what the next layer gets: in models with DeepStack, after the features that are added in between.
    """
    places_V = visual_places(loaded, prepared)
    first: list[Tensor] = []
    cross, own = [], []

    def observer(layer: int, hidden_1ND: Tensor, _rotary: Any) -> None:
        if layer == 0:
            return  # what enters the decoder; its first layer's output is the reference
        kernel_NN = gram(hidden_1ND[0, places_V.to(hidden_1ND.device)])
        if not first:
            first.append(kernel_NN)
        cross.append(hsic(first[0], kernel_NN))
        own.append(hsic(kernel_NN, kernel_NN))

    observe(loaded, prepared, vision, observer)
    return LayerSimilarity(tuple(cross), tuple(own), own[0])


def cka(images: list[LayerSimilarity], drawn: np.ndarray | None = None) -> np.ndarray:
    """CKA to the first layer over some images, [L].

    Args:
        drawn: how often each image counts; None for once. A bootstrap draws them anew.
    """
    if not images:
        raise ValueError("CKA needs at least one image")
    weights = np.ones(len(images)) if drawn is None else np.asarray(drawn, dtype=float)
    cross, own = weights @ np.array([i.cross for i in images]), weights @ np.array([i.own for i in images])
    first = weights @ np.array([i.first for i in images])
    product = first * own
    return np.divide(cross, np.sqrt(np.abs(product)), out=np.zeros_like(cross), where=product > 0)
