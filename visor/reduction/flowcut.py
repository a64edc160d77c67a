"""FlowCut: follow the flow of information through the tower's blocks, and cut the tokens that it leaves, bit by bit.

In every block a patch scores s = (a / sum a + c / sum c) |v|_1. a is the attention that the CLS row pays it, mean over
heads; c is softmax(v_cls v^T), of each head for itself and with the CLS among the columns, then the mean over heads;
the sums are over the patches; v is the value averaged over heads. The running score is 0.5 old + 0.5 s. With B blocks
before the projector's features, cuts come behind block B - 2 and every second one before it (of CLIP-L's 24 with
features from 23: 1, 3, ..., 21). Behind block b round((N_now - T) / sqrt(B - 2 - b) * (1 - (H / H_max)^2)) tokens with
the lowest running score go, H being the entropy of a / sum a and H_max = log(N_now): the more focused the attention,
the more goes. The last cut leaves exactly T = `keep`, and block B - 1 runs on them. Output in the order of the image.

Deviations: without CLS a is the attention received, averaged over all rows, v_cls the mean value, and c has no CLS
column. Samples of a batch cut different numbers: each runs at the longest, under a mask (the release cuts the largest
number from all). A sample that has reached T goes on scoring, which changes nothing. The tower is priced without the
early cuts, whose size depends on the image: an upper bound. CLIP and SigLIP towers; images of several packed tiles are
refused, because their packing needs the whole grid.

Shapes: T tiles, P live tower tokens (CLS included), N patches, D tower width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import after_tower, check_fraction, check_integer, feature_blocks, is_reduced_by
from visor.reduction.method import Method

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from visor.vision.tower import TowerWalk


@METHODS.register("flowcut")
@dataclass(frozen=True)
class FlowCut(Method):
    """Options: `keep` tokens (a sample that has fewer keeps all); `momentum`, the share of the old score in the running
    one."""

    keep: int = 64
    momentum: float = 0.5

    title: ClassVar[str] = "FlowCut"
    paper: ClassVar[str] = "Tong et al., FlowCut: Rethinking Redundancy via Information Flow, NeurIPS 2025"
    stage: ClassVar[str] = "inside"
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_integer(self.title, "keep", self.keep, 1)
        check_fraction(self.title, "momentum", self.momentum, low=0, high=1, includes_high=False)

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        feature_blocks(self.title, geometry)
        return after_tower(geometry.num_layers, num_visual, "flowcut", self.keep, {"momentum": self.momentum})

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[FlowCut]:
        return [replace(self, keep=keep) for keep in range(1, num_visual + 1)]

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """In each block up to the last cut the scored rows of q.k, and one row of v.v."""
        if not is_reduced_by(schedule, "flowcut"):
            return 0
        tower = geometry.vision
        tokens = schedule.source_visual + tower.num_prefix_tokens
        rows = 1 if tower.num_prefix_tokens else tokens
        num_scored = last_cut(feature_blocks(self.title, geometry)) + 1
        return num_scored * 2 * (rows + 1) * tokens * tower.hidden_size

    def tower_flops(self, geometry: ModelGeometry, schedule: Schedule) -> int:
        """The blocks that lead to the features: uncut up to the last cut, then on what it leaves."""
        tower = geometry.vision
        width, num_blocks = tower.hidden_size, feature_blocks(self.title, geometry)
        num_whole = last_cut(num_blocks) + 1
        flops = 2 * schedule.source_visual * width * tower.num_channels * tower.patch_size**2
        for patches, blocks in ((schedule.source_visual, num_whole), (schedule.encoder.keep, num_blocks - num_whole)):
            tokens = patches + tower.num_prefix_tokens
            block = 2 * tokens * (4 * width**2 + tower.num_mlp_matrices * width * tower.intermediate_size)
            flops += blocks * (block + 4 * width * tokens**2)
        return flops

    def reduce_in_tower(self, walk: TowerWalk, tiles: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        from visor.engine.stopwatch import scoring
        from visor.engine.streams import take
        from visor.vision.taps import recorded_projections

        hidden_TPD = walk.embed(tiles)
        num_tiles, prefix, device = len(hidden_TPD), int(walk.has_cls), hidden_TPD.device
        num_visual, num_blocks = hidden_TPD.shape[1] - prefix, len(walk.blocks)
        origin_TN = torch.arange(num_visual, device=device).expand(num_tiles, -1)
        alive_TN = torch.ones_like(origin_TN, dtype=torch.bool)
        left_T = torch.full((num_tiles,), num_visual, device=device)
        running_TN = torch.zeros((num_tiles, num_visual), device=device)
        last = last_cut(num_blocks)
        for index, block in enumerate(walk.blocks):
            alive_TP = torch.nn.functional.pad(alive_TN, (prefix, 0), value=True)
            bias_T1PP = None
            if alive_TN.shape[1] < num_visual and index <= last:  # behind the last cut no sample has dead tokens
                bias_TP = torch.zeros(alive_TP.shape, dtype=hidden_TPD.dtype, device=device)
                bias_TP = bias_TP.masked_fill(~alive_TP, torch.finfo(hidden_TPD.dtype).min)
                bias_T1PP = bias_TP[:, None, None].expand(-1, -1, alive_TP.shape[1], -1)
            with recorded_projections(block, "qkv" if index <= last else "") as seen:
                hidden_TPD = walk.feed_forward(block, walk.attend(block, hidden_TPD, bias_T1PP))
            if index > last:
                continue
            with scoring("tower"):
                attention_TN, flow_TN = flow(seen, alive_TP, walk.num_heads, walk.has_cls)
                running_TN = flow_TN if index == 0 else self.momentum * running_TN + (1 - self.momentum) * flow_TN
                if not cuts_behind(index, num_blocks):
                    continue
                surplus_T = left_T - keep
                if index < last:
                    spread_T = entropy(attention_TN) / left_T.clamp(min=2).log()
                    share_T = (1 - spread_T.square()).clamp(min=0, max=1) / (last - index) ** 0.5
                    surplus_T = (surplus_T * share_T).round().long()
                left_T = left_T - surplus_T
                order_TN = running_TN.masked_fill(~alive_TN, -torch.inf).argsort(dim=1, descending=True, stable=True)
                alive_TN = order_TN.argsort(dim=1) < left_T[:, None]
                # Those that stay first, in order; a sample that cut more than another drags dead tokens along.
                longest = int(left_T.max())
                stay_TM = (~alive_TN).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
                alive_TN, origin_TN, running_TN = (x.gather(1, stay_TM) for x in (alive_TN, origin_TN, running_TN))
                hidden_TPD = torch.cat([hidden_TPD[:, :prefix], take(hidden_TPD[:, prefix:], stay_TM)], dim=1)
        kept_TN = torch.zeros((num_tiles, num_visual), dtype=torch.bool, device=device)
        return hidden_TPD, kept_TN.scatter(1, origin_TN, True)


def last_cut(num_blocks: int) -> int:
    """The block behind which T tokens are left: the last but one that leads to the features."""
    return max(0, num_blocks - 2)


def cuts_behind(block: int, num_blocks: int) -> bool:
    """True at the last cut and at every second block before it."""
    return block <= last_cut(num_blocks) and (last_cut(num_blocks) - block) % 2 == 0


def flow(
    seen: dict[str, torch.Tensor], alive_TP: torch.Tensor, num_heads: int, has_cls: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention paid to each patch, summing to 1, and its score: both [T, N], 0 at dead tokens."""
    import torch

    from visor.vision.taps import ROWS_PER_CHUNK, split_heads

    q_THPd, k_THPd = (split_heads(seen[name], num_heads).float() for name in "qk")
    v_THPd, prefix = split_heads(seen["v"], num_heads).float(), int(has_cls)
    dead_T11P = ~alive_TP[:, None, None]
    attention_TP = torch.zeros(alive_TP.shape, device=v_THPd.device)
    rows = q_THPd[:, :, :1] if has_cls else q_THPd
    alive_rows = alive_TP[:, :1] if has_cls else alive_TP
    for rows_THRd, alive_TR in zip(rows.split(ROWS_PER_CHUNK, 2), alive_rows.split(ROWS_PER_CHUNK, 1), strict=True):
        logits_THRP = rows_THRd @ k_THPd.transpose(2, 3) * k_THPd.shape[-1] ** -0.5
        share_TRP = logits_THRP.masked_fill(dead_T11P, -torch.inf).softmax(-1).mean(1)
        attention_TP = attention_TP + (share_TRP * alive_TR[..., None]).sum(1)
    if has_cls:
        centre_TH1d = v_THPd[:, :, :1]
    else:
        num_alive_T111 = alive_TP.sum(1)[:, None, None, None]
        centre_TH1d = (v_THPd * alive_TP[:, None, :, None]).sum(2, keepdim=True) / num_alive_T111
    close_THP = (centre_TH1d @ v_THPd.transpose(2, 3))[:, :, 0].masked_fill(~alive_TP[:, None], -torch.inf).softmax(-1)
    alive_TN = alive_TP[:, prefix:]
    attention_TN, close_TN = (
        share_TN / share_TN.sum(1, keepdim=True).clamp(min=1e-12)
        for share_TN in (attention_TP[:, prefix:] * alive_TN, close_THP.mean(1)[:, prefix:] * alive_TN)
    )
    size_TN = v_THPd.mean(1)[:, prefix:].abs().sum(-1)
    return attention_TN, (attention_TN + close_TN) * size_TN * alive_TN


def entropy(share_TN: torch.Tensor) -> torch.Tensor:
    """Of shares that sum to 1: [T]."""
    return -(share_TN * share_TN.clamp(min=1e-30).log()).sum(1)
