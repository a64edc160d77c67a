"""Attention supervision: the queries of CROSS layers learn where text should attend while it reads the image.

In the first CROSS layer, a word that names a thing attends to the patches where that thing stands. In the last two, the
token that is about to say a character attends to the patch where it is written. Half of the heads are supervised; the
others stay free. Without this, the SELF layers of the larger configurations, where text sees the image anyway, answer
most questions, and the queries of CROSS layers learn no lookup by a character in thousands of steps. An auxiliary loss
for scenes with ground truth, not part of the model, and off unless a recipe gives it a weight.

Shapes: B rows, T text tokens, V visual tokens, D width, N targets, H heads, G key-value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from visor.training.rows import Row

LEAST_MASS = 1e-6  # attention below it counts as this much: the loss stays finite


class AttentionSupervision:
    """Watches the attention of CROSS blocks.

    Args:
        blocks: the decoder's CROSS blocks, by layer.
        cross_layers: of the VISOR model.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], cross_layers: Sequence[int]) -> None:
        self.blocks, order = blocks, sorted(cross_layers)
        self.naming_layers, self.answering_layers = order[:1], order[-2:]
        self._seen: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        for layer in {*self.naming_layers, *self.answering_layers}:
            blocks[str(layer)].register_forward_hook(
                lambda block, inputs, output, at=layer: self._see(at, block, inputs, output)
            )

    def _see(self, layer: int, block: nn.Module, inputs: tuple, output: tuple) -> None:
        if block.training:
            self._seen[layer] = inputs[0], output[1][0], inputs[2] if len(inputs) > 2 else None

    def loss_sum(self, rows: Sequence[Row]) -> tuple[Tensor | None, list[bool]]:
        """-log of the attention that falls on the right patches, summed over targets, its mean over the supervised
        layers; and for which targets the strongest attention is on a right patch, in the last of these layers.

        Args:
            rows: of the batch that has just run, through every CROSS layer.

        Returns:
            (None, []) where the rows have no targets.
        """
        seen, self._seen = self._seen, {}
        total, right = None, []
        for is_answer, layers in ((False, self.naming_layers), (True, self.answering_layers)):
            # The text stream is padded on the left: places count from its end.
            targets = [
                (b, one.place - row.num_text, one.patches)
                for b, row in enumerate(rows)
                for one in row.attention_targets
                if one.is_answer is is_answer
            ]
            ran = [layer for layer in layers if layer in seen]
            if not targets or not ran:
                continue
            for layer in ran:
                mass_N, found = self._mass(layer, *seen[layer], targets)
                loss = -mass_N.clamp(min=LEAST_MASS).log().sum() / len(ran)
                total = loss if total is None else total + loss
            right += found
        return total, right

    def _mass(
        self,
        layer: int,
        text_BTD: Tensor,
        keys_BGVd: Tensor,
        valid_BV: Tensor | None,
        targets: Sequence[tuple[int, int, tuple[int, ...]]],
    ) -> tuple[Tensor, list[bool]]:
        """Attention [N] on the right patches, the mean over every other head, and whether the strongest is on one."""
        block, device = self.blocks[str(layer)], text_BTD.device
        row_N, from_end_N = torch.tensor([one[:2] for one in targets], device=device).unbind(1)
        queries_BTHd = block.q_proj(block.text_norm(text_BTD)).unflatten(-1, (block.num_heads, block.head_dim))
        group_of_head = torch.arange(0, block.num_heads, 2, device=device) * block.num_kv_heads // block.num_heads
        # All of the text at once: one product is cheaper than to gather the keys for each target.
        scores_BHTV = queries_BTHd[:, :, ::2].transpose(1, 2) @ keys_BGVd[:, group_of_head].transpose(-1, -2)
        with torch.autocast(device.type, enabled=False):
            scores_NHV = scores_BHTV.transpose(1, 2)[row_N, from_end_N].float()
            if valid_BV is not None:
                scores_NHV = scores_NHV.masked_fill(~valid_BV[row_N, None], float("-inf"))
            attention_NV = (scores_NHV * block.head_dim**-0.5).softmax(-1).mean(1)
            sought_NV = torch.zeros_like(attention_NV, dtype=torch.bool)
            for n, (_, _, patches) in enumerate(targets):
                sought_NV[n, list(patches)] = True
            found = sought_NV.gather(1, attention_NV.detach().argmax(-1, keepdim=True))[:, 0].tolist()
            return (attention_NV * sought_NV).sum(-1), found
