"""FlowCut: follow the flow of information through the tower's blocks, and cut the tokens that it leaves, bit by bit.

In every block a patch scores s = (a / sum a + c / sum c) |v|_1 with a the attention that the CLS row pays it (mean over
heads), c = softmax(v_cls v^T) and v the values, all heads together; the running score is 0.5 old + 0.5 s. After every
other block of the second half round((N_now - T) / sqrt(blocks left) * (1 - (H / H_max)^2)) tokens with the lowest
running score go, H being the entropy of a / sum a and H_max = log(N_now): the more focused the attention, the more
goes. The last such block leaves exactly T = `keep`. Output in the order of the image.

Deviations: `first` is our reading of "late" (the half of the blocks), the last cut is behind the last block whose
output the projector reads; without CLS a is the attention received, averaged over all rows, and v_cls the mean value.
Samples of a batch cut different numbers: each runs at the longest, under a mask. The tower is priced without the early
cuts, whose size depends on the image: an upper bound. CLIP and SigLIP towers; images of several packed tiles are
refused, because their packing needs the whole grid.

Shapes: T tiles, P live tower tokens (CLS included), N patches, D tower width.
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
    """Options: `keep` tokens (a sample that has fewer keeps all); `first`, the share of the blocks before any cut;
    `momentum`, the share of the old score in the running one."""

    keep: int = 64
    first: float = 0.5
    momentum: float = 0.5

    title: ClassVar[str] = "FlowCut"
    paper: ClassVar[str] = "Tong et al., FlowCut: Rethinking Redundancy via Information Flow, NeurIPS 2025"
    stage: ClassVar[str] = "inside"

    def __post_init__(self) -> None:
        check_integer(self.title, "keep", self.keep, 1)
        check_fraction(self.title, "first", self.first, low=0, high=1, includes_high=True)
        check_fraction(self.title, "momentum", self.momentum, low=0, high=1, includes_high=False)

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        feature_blocks(self.title, geometry)
        params = {"first": self.first, "momentum": self.momentum}
        return after_tower(geometry.num_layers, num_visual, "flowcut", self.keep, params)

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[FlowCut]:
        return [replace(self, keep=keep) for keep in range(1, num_visual + 1)]

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """In each block the scored rows of q.k, and one row of v.v."""
        if not is_reduced_by(schedule, "flowcut"):
            return 0
        tower = geometry.vision
        tokens = schedule.source_visual + tower.num_prefix_tokens
        rows = 1 if tower.num_prefix_tokens else tokens
        return feature_blocks(self.title, geometry) * 2 * (rows + 1) * tokens * tower.hidden_size

    def tower_flops(self, geometry: ModelGeometry, schedule: Schedule) -> int:
        """The blocks that lead to the features, uncut."""
        tower = geometry.vision
        width, tokens = tower.hidden_size, schedule.source_visual + tower.num_prefix_tokens
        block = 2 * tokens * (4 * width**2 + tower.num_mlp_matrices * width * tower.intermediate_size)
        block += 4 * width * tokens**2
        embedding = 2 * schedule.source_visual * width * tower.num_channels * tower.patch_size**2
        return embedding + feature_blocks(self.title, geometry) * block

    def reduce_in_tower(self, walk: TowerWalk, tiles: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        from visor.engine.stopwatch import scoring
        from visor.engine.streams import take
        from visor.vision.taps import reading_block

        hidden_TPD = walk.embed(tiles)
        num_tiles, prefix, device = len(hidden_TPD), int(walk.has_cls), hidden_TPD.device
        num_visual, num_blocks = hidden_TPD.shape[1] - prefix, len(walk.blocks)
        origin_TN = torch.arange(num_visual, device=device).expand(num_tiles, -1)
        alive_TN = torch.ones_like(origin_TN, dtype=torch.bool)
        left_T = torch.full((num_tiles,), num_visual, device=device)
        running_TN = torch.zeros((num_tiles, num_visual), device=device)
        for index, block in enumerate(walk.blocks):
            alive_TP = torch.nn.functional.pad(alive_TN, (prefix, 0), value=True)
            bias_T1PP = None
            if alive_TN.shape[1] < num_visual:
                bias_TP = torch.zeros(alive_TP.shape, dtype=hidden_TPD.dtype, device=device)
                bias_TP = bias_TP.masked_fill(~alive_TP, torch.finfo(hidden_TPD.dtype).min)
                bias_T1PP = bias_TP[:, None, None].expand(-1, -1, alive_TP.shape[1], -1)
            with reading_block(block, "qkv") as seen:
                hidden_TPD = walk.feed_forward(block, walk.attend(block, hidden_TPD, bias_T1PP))
            with scoring("tower"):
                attention_TN, flow_TN = flow(seen, alive_TP, walk.num_heads, walk.has_cls)
                running_TN = flow_TN if index == 0 else self.momentum * running_TN + (1 - self.momentum) * flow_TN
                if not self.cuts_after(index, num_blocks):
                    continue
                surplus_T = left_T - keep
                if index < num_blocks - 1:
                    spread_T = entropy(attention_TN) / left_T.clamp(min=2).log()
                    share_T = (1 - spread_T.square()).clamp(min=0) / (num_blocks - index) ** 0.5
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

    def cuts_after(self, block: int, num_blocks: int) -> bool:
        """True for every other block of the late ones, the last among them."""
        is_late = block >= min(num_blocks - 1, int(num_blocks * self.first))
        return is_late and (num_blocks - 1 - block) % 2 == 0


def flow(
    seen: dict[str, torch.Tensor], alive_TP: torch.Tensor, num_heads: int, has_cls: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention paid to each patch, summing to 1, and its score: both [T, N], 0 at dead tokens."""
    import torch

    from visor.vision.taps import ROWS_PER_CHUNK, split_heads

    q_THPd, k_THPd = (split_heads(seen[name], num_heads).float() for name in "qk")
    v_TPD, prefix = seen["v"].float(), int(has_cls)
    dead_T11P = ~alive_TP[:, None, None]
    attention_TP = torch.zeros(alive_TP.shape, device=v_TPD.device)
    rows = q_THPd[:, :, :1] if has_cls else q_THPd
    alive_rows = alive_TP[:, :1] if has_cls else alive_TP
    for rows_THRd, alive_TR in zip(rows.split(ROWS_PER_CHUNK, 2), alive_rows.split(ROWS_PER_CHUNK, 1), strict=True):
        logits_THRP = rows_THRd @ k_THPd.transpose(2, 3) * k_THPd.shape[-1] ** -0.5
        share_TRP = logits_THRP.masked_fill(dead_T11P, -torch.inf).softmax(-1).mean(1)
        attention_TP = attention_TP + (share_TRP * alive_TR[..., None]).sum(1)
    centre_T1D = v_TPD[:, :1]
    if not has_cls:
        centre_T1D = (v_TPD * alive_TP[..., None]).sum(1, keepdim=True) / alive_TP.sum(1)[:, None, None]
    close_TN = (centre_T1D @ v_TPD.transpose(1, 2))[:, 0, prefix:]
    close_TN = close_TN.masked_fill(~alive_TP[:, prefix:], -torch.inf).softmax(-1)
    attention_TN = attention_TP[:, prefix:] * alive_TP[:, prefix:]
    attention_TN = attention_TN / attention_TN.sum(1, keepdim=True).clamp(min=1e-12)
    return attention_TN, (attention_TN + close_TN) * v_TPD[:, prefix:].abs().sum(-1) * alive_TP[:, prefix:]


def entropy(share_TN: torch.Tensor) -> torch.Tensor:
    """Of shares that sum to 1: [T]."""
    return -(share_TN * share_TN.clamp(min=1e-30).log()).sum(1)
