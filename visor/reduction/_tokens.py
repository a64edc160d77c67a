"""What the encoder-side tensor rules share. Imported by them when they run: this file imports torch.

Shapes: B samples, N visual tokens, K chosen tokens, E any width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from visor.engine.streams import take
from visor.vision.features import ReducedFeatures, VisionFeatures

__all__ = ["chosen", "cosines", "first_equal", "kept_mask", "ranked", "take"]

ROUNDING = 1e-6
"""More than another batch or another processor changes in a product of unit vectors in fp32 (some 1e-7)."""


def ranked(scores_BN: Tensor) -> Tensor:
    """Indices by falling score; of equals the earlier one first."""
    return scores_BN.argsort(dim=1, descending=True, stable=True)


def kept_mask(index_BK: Tensor, num_visual: int) -> Tensor:
    """The indices as a mask [B, N]."""
    kept_BN = torch.zeros((len(index_BK), num_visual), dtype=torch.bool, device=index_BK.device)
    return kept_BN.scatter(1, index_BK, True)


def chosen(vision: VisionFeatures, index_BK: Tensor) -> ReducedFeatures:
    """The chosen tokens in their order in the image."""
    index_BK = index_BK.sort(dim=1).values
    kept_BN = kept_mask(index_BK, vision.num_tokens)
    return ReducedFeatures(take(vision.features_BND, index_BK), kept_BN, index_BK)


def cosines(features_BNE: Tensor) -> Tensor:
    """Cosine of every token to every other, in fp32, where half precision would tie: [B, N, N]. To itself it is 1."""
    unit_BNE = torch.nn.functional.normalize(features_BNE.float(), dim=-1)
    cosine_BNN = unit_BNE @ unit_BNE.transpose(1, 2)
    cosine_BNN.diagonal(dim1=1, dim2=2).round_()
    return cosine_BNN


def first_equal(products_BNN: Tensor) -> Tensor:
    """Of each token the first that is the same vector, by the products of all with all; else itself: [B, N].

    Equal tokens are common: separators of tiles, plain background. Their products differ by rounding, so a rule that
    takes one token after the other must be told which of them comes first. Vectors a and b are the same if
    |a - b|^2 = aa + bb - 2 ab is at most `ROUNDING` (aa + bb).
    """
    half_BN = products_BNN.diagonal(dim1=1, dim2=2) * (1 - ROUNDING) / 2
    return (products_BNN >= half_BN[:, :, None] + half_BN[:, None]).byte().argmax(2)
