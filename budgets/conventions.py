"""The formulas that papers count with, so that their numbers can be reproduced and set beside ours.

All three count MACs of the decoder layers in the prefill, attention as the full square; none counts tower, projector,
head, decode, or the method's own scoring. Per layer, n tokens, width d, MLP width m:

    f2   4nd^2 + 2n^2 d + 2ndm                       FastV, DivPrune, DyCoke: an MLP of two matrices, no GQA
    f3   4nd^2 + 2n^2 d + 3ndm                       PyramidDrop, SparseVLM, DART: three (SwiGLU), no GQA
    gqa  2nd(h hd) + 2nd(kv hd) + 2n^2 h hd + 3ndm   three matrices and grouped keys and values; f3 where kv = h

No paper has a formula for text-only and cross-attention layers; there the same terms are applied to the text tokens,
and cross-attention adds q and o on t text tokens, k and v on v visual tokens, and 2tv for the products.

Papers put numbers into these formulas that no run can have: FastV's (2, 0.9) figure takes 57.6 tokens where 58 are
kept (0.3 % less). A method says so by `nominal_visual_tokens`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from budgets.geometry import ModelGeometry
from budgets.registry import UnknownNameError, check_name
from budgets.schedule import LayerMode, Schedule

# Matrices of the MLP, and whether query and key widths differ from d.
FORMULAS: dict[str, tuple[int, bool]] = {"f2": (2, False), "f3": (3, False), "gqa": (3, True)}
CONVENTIONS = ("ours", *FORMULAS)


def check_convention(name: str) -> None:
    """Refuse unknown names, listing those that exist."""
    check_name("convention", name, CONVENTIONS)


@dataclass(frozen=True)
class ConventionCost:
    """MACs of the decoder layers in the prefill, by a paper's formula.

    Args:
        per_layer: MACs of each layer; they sum to `decoder_prefill`.
        parts: MACs by part, named as in `budgets.costs`.
    """

    per_layer: tuple[int, ...]
    parts: dict[str, int]

    @property
    def decoder_prefill(self) -> int:
        """MACs of all decoder layers."""
        return sum(self.per_layer)


def layer_macs(geometry: ModelGeometry, num_tokens: float, formula: str) -> dict[str, int]:
    """MACs of one layer over `num_tokens` tokens, by part, rounded to integers.

    Raises:
        UnknownNameError: no such formula.
        ValueError: a mixture of experts, which no paper's formula knows.
    """
    num_matrices, is_grouped = _formula(formula)
    if geometry.experts is not None:
        raise ValueError(f"{geometry.name} is a mixture of experts; papers' formulas have one MLP a layer: use ours")
    width = geometry.hidden_size
    query, key = (geometry.query_size, geometry.kv_size) if is_grouped else (width, width)
    return {
        "decoder_projections": round(num_tokens * (2 * width * query + 2 * width * key)),
        "decoder_attention": round(2 * num_tokens**2 * query),
        "decoder_mlp": round(num_matrices * num_tokens * width * geometry.intermediate_size),
    }


def macs_of_lengths(geometry: ModelGeometry, tokens_per_layer: Iterable[float], formula: str) -> int:
    """MACs of layers that run over the given numbers of tokens: a paper's token table to its figure."""
    return sum(sum(layer_macs(geometry, num_tokens, formula).values()) for num_tokens in tokens_per_layer)


def price_by_formula(
    geometry: ModelGeometry,
    schedule: Schedule,
    num_text: int,
    formula: str,
    visual_tokens: Sequence[float] | None = None,
) -> ConventionCost:
    """MACs of a schedule by a paper's formula.

    Args:
        visual_tokens: visual tokens by layer to put into the formula; None takes the schedule's own.

    Raises:
        UnknownNameError: no such formula.
        ValueError: the schedule has another number of layers than the model.
    """
    if schedule.num_layers != geometry.num_layers:
        raise ValueError(f"the schedule has {schedule.num_layers} layers, {geometry.name} has {geometry.num_layers}")
    is_grouped, width = _formula(formula)[1], geometry.hidden_size
    query, key = (geometry.query_size, geometry.kv_size) if is_grouped else (width, width)
    names = ("decoder_projections", "decoder_attention", "decoder_mlp", "cross_projections", "cross_attention")
    parts, per_layer = dict.fromkeys(names, 0), []
    for op, live in zip(schedule.layers, visual_tokens or schedule.visual_tokens, strict=True):
        layer = layer_macs(geometry, num_text + (live if op.mode is LayerMode.SELF else 0), formula)
        if op.mode is LayerMode.CROSS and live:
            layer["cross_projections"] = round(2 * num_text * width * query + 2 * live * width * key)
            layer["cross_attention"] = round(2 * num_text * live * query)
        for part, macs in layer.items():
            parts[part] += macs
        per_layer.append(sum(layer.values()))
    return ConventionCost(tuple(per_layer), parts)


def _formula(name: str) -> tuple[int, bool]:
    check_convention(name)
    if name not in FORMULAS:
        raise UnknownNameError(f"{name!r} is no paper's formula; the formulas that exist: {', '.join(FORMULAS)}")
    return FORMULAS[name]
