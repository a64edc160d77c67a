"""SparseVLM: text tokens that have to do with the image rate its tokens, at three layers; some of the rest is recycled.

The layers at 2, 6 and 15 of 32 (in proportion in other decoders) run on all current tokens, and their *output* is
pruned by their own attention: mean over heads and over the rows of the raters. Raters are found once, at the
embeddings: of the text tokens after the image those whose mean over the visual tokens V of softmax_text(V T^T) is above
average.
How many stay is a table for 576 visual tokens, `tokens` being its row:

    v1.5   192: 300, 200, 110    128: 303, 110, 36    96: 238, 48, 26    64: 66, 30, 17
    v2     192: 300, 200, 118    128: 238, 108, 60    96: 246, 54, 28    64: 66, 34, 20

v1.5 recycles: of the D dropped tokens the best n = int(0.3 D) + 1 form c = int(n / 10) + 1 clusters by density peaks
(distance L2 / sqrt(d), density exp(-mean squared distance to the c nearest)); the mean of each cluster stands behind
the kept tokens. Position ids are renumbered.

v2 does not recycle and keeps position ids, and its score has two rules more. The attention, behind its softmax, is
divided by what RoPE makes of the product of an all-ones query and an all-ones key, over sqrt(head width): a function of
their distance, 11.3 at 0 and 2.35 at 600 at a head width of 128, so that distant tokens are not rated down for being
distant. And only the heads count (14 of 32, here in proportion) that then have the most attention from the raters to
the image. A kernel of narrow heads or of great distances can come near 0 or below it, and so can the release's.

Deviations: other values of `tokens` and other numbers of visual tokens interpolate the table in proportion; of two
points of equal density the earlier is the denser (the release adds noise), and equal points are at equal distances;
where no text token is above average all of them rate, and without text after the image the last prompt token does; of
two ways to split a count the one with fewer clusters is taken.

Shapes: B batch, N live tokens, V visual, W text tokens, R recycled, C clusters, D hidden width, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import check_choice, check_fraction, check_integer, inside_decoder
from visor.reduction.method import Method

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from visor.engine.context import LayerContext, Selection

TABLE_TOKENS, TABLE_LAYERS = 576, 32


@METHODS.register("sparsevlm")
@dataclass(frozen=True)
class SparseVLM(Method):
    """Options: `tokens`, the row of the table, in visual tokens of the sample; `layers`, whose output is pruned, three
    comma-separated, or None: at 2, 6, 15 of 32; `positions`: "contiguous" or "kept"; `recycle` dropped ones or not."""

    tokens: int = 192
    layers: str | None = None
    positions: str = "contiguous"
    recycle: bool = True

    name: ClassVar[str] = "sparsevlm"
    title: ClassVar[str] = "SparseVLM"
    paper: ClassVar[str] = "Zhang et al., SparseVLM: Visual Token Sparsification for Efficient VLM Inference, ICML 2025"
    looks_back: ClassVar[bool] = True
    reads_embeddings: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    version: ClassVar[int] = 2
    table: ClassVar[dict[int, tuple[int, int, int]]] = {
        0: (0, 0, 0), 64: (66, 30, 17), 96: (238, 48, 26), 128: (303, 110, 36), 192: (300, 200, 110),
        576: (576, 576, 576),
    }  # fmt: skip

    def __post_init__(self) -> None:
        check_integer(self.title, "tokens", self.tokens, 1)
        check_choice(self.title, "positions", self.positions, ("contiguous", "kept"))
        check_choice(self.title, "recycle", self.recycle, (True, False))
        if self.recycle and self.positions == "kept":
            raise ValueError(f"{self.title}: recycled tokens have no position to keep; use positions='contiguous'")
        if self.layers is not None:
            self.named_layers()

    def named_layers(self) -> tuple[int, ...]:
        """`layers` as numbers."""
        try:
            layers = tuple(int(layer) for layer in str(self.layers).split(","))
        except ValueError as error:
            raise ValueError(f"{self.title}: layers must be three like '2,6,15', got {self.layers!r}") from error
        if len(layers) != 3 or list(layers) != sorted(set(layers)) or layers[0] < 0:
            raise ValueError(f"{self.title}: layers must be three in ascending order, got {self.layers!r}")
        return layers

    def entries(self, num_layers: int) -> tuple[int, ...]:
        """The layers that fewer tokens enter."""
        scaled = tuple(round(layer * num_layers / TABLE_LAYERS) for layer in (2, 6, 15))
        layers = scaled if self.layers is None else self.named_layers()
        entries = tuple(layer + 1 for layer in layers)
        if len(set(entries)) < 3 or entries[-1] >= num_layers:
            raise ValueError(
                f"{self.title}: the outputs of layers {', '.join(map(str, layers))} cannot be pruned one after the "
                f"other in a decoder of {num_layers} layers"
            )
        return entries

    def kept(self, num_visual: int) -> list[int]:
        """Tokens that stay themselves at each stage: the table in proportion."""
        row = self.tokens * TABLE_TOKENS / num_visual
        if row >= TABLE_TOKENS:
            return [num_visual] * 3
        rows = sorted(self.table)
        below = max(each for each in rows if each <= row)
        above = rows[rows.index(below) + 1]
        share = (row - below) / (above - below)
        between = [low + share * (high - low) for low, high in zip(self.table[below], self.table[above], strict=True)]
        return [max(1, round(count * num_visual / TABLE_TOKENS)) for count in between]

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        keep_at_layer, live = {}, num_visual
        for entry, kept in zip(self.entries(geometry.num_layers), self.kept(num_visual), strict=True):
            kept = min(kept, live)
            live = keep_at_layer[entry] = kept + (num_clusters(live - kept) if self.recycle else 0)
        return inside_decoder(geometry.num_layers, num_visual, self.name, keep_at_layer, self.positions, self.params())

    def params(self) -> dict[str, Any]:
        """The options that change the rule, for the schedule."""
        return {"positions": self.positions, "recycle": self.recycle}

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[SparseVLM]:
        return [replace(self, tokens=tokens) for tokens in range(1, num_visual + 1)]

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """Once, visual times text embeddings. A stage: query rows of all text tokens (which of them rate is not known
        beforehand) against n keys, and the distances of the tokens that are recycled."""
        flops, width, heads_width = 0, geometry.hidden_size, geometry.query_size
        for layer, op in enumerate(schedule.layers):
            if op.reduce and op.reduce.method == self.name:
                live = schedule.visual_tokens[layer - 1]
                if not flops:
                    flops = 2 * live * num_text * width
                flops += 2 * num_text * width * heads_width + 2 * heads_width * num_text * (live + num_text)
                if self.recycle:
                    flops += 2 * num_recycled(live - split(live, op.reduce.keep)[0]) ** 2 * width
        return flops

    def rows(self, context: LayerContext) -> tuple[torch.Tensor, torch.Tensor]:
        """Query rows [B, W] of all text tokens, and 1 at those that rate."""
        from visor.engine.streams import take

        if "raters" not in context.memo:
            context.memo["raters"] = raters(context)
        text_BW, is_text_BW = context.slots(context.valid_BN & ~context.visual_BN, context.num_text)
        weights_BN = take(context.memo["raters"], context.origin_BN)
        return text_BW, take(weights_BN, text_BW) * is_text_BW

    def score_tokens(self, context: LayerContext) -> torch.Tensor:
        text_BW, weights_BW = self.rows(context)
        return context.attention_row(text_BW, weights=weights_BW)

    def select_tokens(self, context: LayerContext) -> Selection:
        from visor.engine.context import best_scored

        scores_BN = self.score_tokens(context)
        return recycled(scores_BN, context) if self.recycle else best_scored(self.title, scores_BN, context)


@METHODS.register("sparsevlm-v2")
@dataclass(frozen=True)
class SparseVLM2(SparseVLM):
    """Options as of SparseVLM; by default position ids are kept and nothing is recycled. `head_share`: of the heads,
    which count, those with the most attention from the raters to the image; the authors' 14 of 32."""

    positions: str = "kept"
    recycle: bool = False
    head_share: float = 14 / 32

    name: ClassVar[str] = "sparsevlm-v2"
    title: ClassVar[str] = "SparseVLM v2"
    merges: ClassVar[bool] = False
    table: ClassVar[dict[int, tuple[int, int, int]]] = {
        0: (0, 0, 0), 64: (66, 34, 20), 96: (246, 54, 28), 128: (238, 108, 60), 192: (300, 200, 118),
        576: (576, 576, 576),
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self.title, "head_share", self.head_share, low=0, high=1, includes_high=True)

    def params(self) -> dict[str, Any]:
        return {**super().params(), "head_share": self.head_share}

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """And a stage, the kernel of all text rows: one product as wide as a head."""
        flops = super().scoring_flops(geometry, schedule, num_text)
        for layer, op in enumerate(schedule.layers):
            if op.reduce and op.reduce.method == self.name:
                flops += 2 * num_text * (schedule.visual_tokens[layer - 1] + num_text) * geometry.head_dim
        return flops

    def score_tokens(self, context: LayerContext) -> torch.Tensor:
        text_BW, weights_BW = self.rows(context)
        attention_BHWN = context.attention_heads(text_BW)
        attention_BHWN = attention_BHWN / context.rotary_kernel(text_BW)[:, None]
        return best_heads(attention_BHWN, weights_BW, context.visual_BN, self.head_share)


def best_heads(
    attention_BHWN: torch.Tensor, weights_BW: torch.Tensor, visual_BN: torch.Tensor, share: float
) -> torch.Tensor:
    """Mean over raters and over the heads with the most attention from raters to visual tokens: [B, N].

    Args:
        weights_BW: 1 at the query rows of raters; the others may hold anything.
        share: of the heads that count, at least one.
    """
    import torch

    # A padded row saw nothing and is NaN; where, because 0 * NaN would stay NaN.
    rows_BHWN = torch.where(weights_BW[:, None, :, None] > 0, attention_BHWN, 0)
    rated_BHN = rows_BHWN.sum(2) / weights_BW.sum(1)[:, None, None].clamp(min=1e-12)
    mass_BH = torch.where(visual_BN[:, None], rated_BHN, 0).sum(-1)
    num_heads = max(1, round(mass_BH.shape[1] * share))
    counts_BH = mass_BH.argsort(dim=1, descending=True, stable=True).argsort(dim=1) < num_heads
    return torch.where(counts_BH[..., None], rated_BHN, 0).sum(1) / num_heads


def num_recycled(num_dropped: int) -> int:
    """How many of the dropped tokens are recycled."""
    return int(0.3 * num_dropped) + 1 if num_dropped else 0


def num_clusters(num_dropped: int) -> int:
    """Into how many tokens they are merged."""
    return num_recycled(num_dropped) // 10 + 1 if num_dropped else 0


def split(live: int, left: int) -> tuple[int, int]:
    """(kept, merged) such that `left` of `live` tokens remain: the largest possible number of kept ones."""
    if left >= live:
        return live, 0
    return next((kept, left - kept) for kept in range(left, -1, -1) if kept + num_clusters(live - kept) <= left)


def raters(context: LayerContext) -> torch.Tensor:
    """1 at text tokens after the image that resemble it more than the average one does, 0 elsewhere: [B, P]."""
    import torch

    from visor.engine.streams import take

    visual_BN, embedded_BND = context.visual_BN, context.embedded_BPD
    order_N = torch.arange(visual_BN.shape[1], device=visual_BN.device)
    last_visual_B1 = (order_N * visual_BN).amax(1, keepdim=True)
    text_BW, is_text_BW = context.slots(context.valid_BN & ~visual_BN, context.num_text)
    visual_BV, is_visual_BV = context.slots(visual_BN, context.num_visual)
    is_after_BW = is_text_BW & (text_BW > last_visual_B1)
    logits_BVW = (take(embedded_BND, visual_BV) @ take(embedded_BND, text_BW).transpose(1, 2)).float()
    share_BVW = logits_BVW.masked_fill(~is_after_BW[:, None], -torch.inf).softmax(-1).nan_to_num()
    mean_BW = (share_BVW * is_visual_BV[..., None]).sum(1) / is_visual_BV.sum(1, keepdim=True).clamp(min=1)
    average_B1 = mean_BW.sum(1, keepdim=True) / is_after_BW.sum(1, keepdim=True).clamp(min=1)
    rates_BW = is_after_BW & (mean_BW > average_B1)
    rates_BW = torch.where(rates_BW.any(1, keepdim=True), rates_BW, is_after_BW)
    rates_BW = torch.where(rates_BW.any(1, keepdim=True), rates_BW, text_BW == context.last_B1)
    return torch.zeros(visual_BN.shape, device=visual_BN.device).scatter(1, text_BW, rates_BW.float())


def recycled(scores_BN: torch.Tensor, context: LayerContext) -> Selection:
    """The best-scored tokens, in order, and behind them the clusters' means, in the first places of the image."""
    import torch

    from visor.engine.context import Selection
    from visor.engine.streams import take

    visual_BN, hidden_BND, device = context.visual_BN, context.hidden_BND, scores_BN.device
    counts = [split(live, left) for live, left in zip(context.num_visual, context.keep, strict=True)]
    column = lambda values: torch.tensor(list(values), device=device)[:, None]
    kept_B1, merged_B1 = column(kept for kept, _ in counts), column(merged for _, merged in counts)
    num_again = [
        num_recycled(live - kept) if merged else 0
        for live, (kept, merged) in zip(context.num_visual, counts, strict=True)
    ]
    ranked_BN = scores_BN.masked_fill(~visual_BN, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank_BN = ranked_BN.argsort(dim=1)
    again_R = torch.arange(max(num_again), device=device)
    is_again_BR = again_R < column(num_again)
    again_BR = ranked_BN.gather(1, (kept_B1 + again_R).clamp(max=ranked_BN.shape[1] - 1))
    num_most = max(merged for _, merged in counts)
    means_BCD, centre_BC = clusters(take(hidden_BND, again_BR).float(), is_again_BR, merged_B1, num_most)
    # Kept tokens move to the first places of the image, in order; clusters take the places behind them.
    place_BN = visual_BN.cumsum(1) - 1
    is_own_BN = visual_BN & (place_BN < kept_B1)
    is_mean_BN = visual_BN & (place_BN >= kept_B1) & (place_BN < kept_B1 + merged_B1)
    own_first_BN = (~(visual_BN & (rank_BN < kept_B1))).to(torch.uint8).argsort(dim=1, stable=True)
    cluster_BN = (place_BN - kept_B1).clamp(min=0, max=num_most - 1)
    source_BN = torch.arange(visual_BN.shape[1], device=device).expand_as(place_BN)
    source_BN = torch.where(is_own_BN, own_first_BN.gather(1, place_BN.clamp(min=0)), source_BN)
    source_BN = torch.where(is_mean_BN, again_BR.gather(1, centre_BC).gather(1, cluster_BN), source_BN)
    moved_BND = take(hidden_BND, source_BN)
    means_BND = take(means_BCD.to(hidden_BND.dtype), cluster_BN)
    return Selection(is_own_BN | is_mean_BN, torch.where(is_mean_BN[..., None], means_BND, moved_BND), source_BN)


def clusters(
    points_BRD: torch.Tensor, valid_BR: torch.Tensor, num_B1: torch.Tensor, num_most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Density-peak clusters (Rodriguez and Laio, 2014), without noise.

    Args:
        valid_BR: which points there are in each sample.
        num_B1: clusters of each sample, at most `num_most`.

    Returns:
        Means [B, C, D] and the places [B, C] of the centres among the R points, C = num_most; the first `num_B1` count.
    """
    import torch

    width, num_points = points_BRD.shape[-1], points_BRD.shape[1]
    norm_BR = points_BRD.square().sum(-1)
    square_BRR = norm_BR[:, :, None] + norm_BR[:, None] - 2 * points_BRD @ points_BRD.transpose(1, 2)
    square_BRR = square_BRR.clamp(min=0) * ~torch.eye(num_points, dtype=torch.bool, device=points_BRD.device) / width
    square_BRR = exact(square_BRR, norm_BR / width)
    both_BRR = valid_BR[:, :, None] & valid_BR[:, None]
    square_BRR = square_BRR.masked_fill(~both_BRR, torch.inf)
    nearest_BRR = square_BRR.sort(dim=-1).values.cumsum(-1)
    index_BR1 = (num_B1 - 1).clamp(min=0, max=num_points - 1)[:, None].expand(-1, num_points, 1)
    spread_BR = nearest_BRR.gather(2, index_BR1)[..., 0] / num_B1.clamp(min=1)
    distance_BRR = square_BRR.sqrt()
    # Denser means less spread; compared before the exponential, which may be 0 for all. Of equals the earlier is the
    # denser: with two clusters the density is that of the nearest neighbour, so each other's nearest are equals.
    is_earlier_RR = torch.ones_like(both_BRR[0]).tril(-1)
    is_denser_BRR = spread_BR[:, None] < spread_BR[:, :, None]
    is_denser_BRR |= (spread_BR[:, None] == spread_BR[:, :, None]) & is_earlier_RR
    to_denser_BR = distance_BRR.masked_fill(~is_denser_BRR, torch.inf).amin(-1)
    farthest_BR = distance_BRR.masked_fill(~both_BRR, 0).amax(-1)
    to_denser_BR = torch.where(to_denser_BR.isinf(), farthest_BR, to_denser_BR)
    peak_BR = (to_denser_BR * (-spread_BR).exp()).nan_to_num().masked_fill(~valid_BR, -torch.inf)
    centre_BC = peak_BR.argsort(dim=1, descending=True, stable=True)[:, :num_most]
    is_centre_BC = torch.arange(num_most, device=points_BRD.device) < num_B1
    to_centre_BRC = distance_BRR.gather(2, centre_BC[:, None].expand(-1, num_points, -1))
    joins_BR = to_centre_BRC.masked_fill(~is_centre_BC[:, None], torch.inf).argmin(-1)
    own_BC = torch.where(is_centre_BC, torch.arange(num_most, device=points_BRD.device), joins_BR.gather(1, centre_BC))
    joins_BR = joins_BR.scatter(1, centre_BC, own_BC)
    member_BCR = (joins_BR[:, None] == torch.arange(num_most, device=points_BRD.device)[:, None]) & valid_BR[:, None]
    sums_BCD = torch.zeros_like(points_BRD[:, :num_most])
    points_BRD = points_BRD * valid_BR[..., None]
    sums_BCD = sums_BCD.scatter_add(1, joins_BR[..., None].expand_as(points_BRD), points_BRD)
    return sums_BCD / member_BCR.sum(-1, keepdim=True).clamp(min=1), centre_BC


def exact(square_BRR: torch.Tensor, norm_BR: torch.Tensor) -> torch.Tensor:
    """Squared distances without what rounding makes unequal: as far there as back, and equal points equally far.

    Args:
        norm_BR: squared length of each point, in the unit of the distances.
    """
    from visor.reduction._tokens import ROUNDING

    square_BRR = square_BRR.triu() + square_BRR.triu(1).transpose(1, 2)
    is_same_BRR = square_BRR <= ROUNDING * (norm_BR[:, :, None] + norm_BR[:, None])
    first_BR = is_same_BRR.byte().argmax(2)  # of points that are the same the first
    rows_BRR = square_BRR.gather(1, first_BR[:, :, None].expand_as(square_BRR))
    square_BRR = rows_BRR.gather(2, first_BR[:, None].expand_as(square_BRR))
    return square_BRR.masked_fill(first_BR[:, :, None] == first_BR[:, None], 0.0)
