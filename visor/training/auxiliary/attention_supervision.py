"""Where text should look while it reads the image: what the queries of CROSS layers are for, taught directly.

In the first CROSS layer, a word that names a thing looks at the patches where that thing stands. In the last two, the
token that is about to say a character looks at the patch where it is written. Half of the heads are asked; the others
stay free. Without this, the SELF layers of the larger configurations, where text sees the image anyway, answer most
questions, and the queries of CROSS layers learn no lookup by a character in thousands of steps. A training aid of the
built-in worlds, not part of the model, and off unless a recipe gives it a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from visor.training.encoding import Row

LEAST = 1e-6


class Looks:
    """Watches the attention of CROSS blocks.

    Args:
        blocks: the decoder's CROSS blocks, by layer.
        cross_layers: of the VISOR model.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], cross_layers: Sequence[int]) -> None:
        self.blocks, order = blocks, sorted(cross_layers)
        self.naming, self.answering = order[:1], order[-2:]
        self._seen: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}
        for layer in {*self.naming, *self.answering}:
            blocks[str(layer)].register_forward_hook(
                lambda block, inputs, output, at=layer: self._see(at, block, inputs, output)
            )

    def _see(self, layer: int, block: nn.Module, inputs: tuple, output: tuple) -> None:
        if block.training:
            self._seen[layer] = inputs[0], output[1][0], inputs[2] if len(inputs) > 2 else None

    def loss_sum(self, rows: Sequence[Row]) -> tuple[Tensor | None, list[bool]]:
        """-log of the attention that falls on the right patches, summed over looks, its mean over the layers that are
        asked; and which looks are strongest at a right patch, in the last of them.

        Args:
            rows: of the batch that has just run, through every CROSS layer.

        Returns:
            (None, []) where no text of the rows has anything to look for.
        """
        seen, self._seen = self._seen, {}
        total, right = None, []
        for is_answer, layers in ((False, self.naming), (True, self.answering)):
            # The text stream is padded on the left: places count from its end.
            looks = [
                (b, look.place - row.num_text, look.patches)
                for b, row in enumerate(rows)
                for look in row.looks
                if look.is_answer is is_answer
            ]
            taken = [layer for layer in layers if layer in seen]
            if not looks or not taken:
                continue
            for layer in taken:
                mass_N, found = self._mass(layer, *seen[layer], looks)
                loss = -mass_N.clamp(min=LEAST).log().sum() / len(taken)
                total = loss if total is None else total + loss
            right += found
        return total, right

    def _mass(
        self,
        layer: int,
        text_BTD: Tensor,
        keys_BGVd: Tensor,
        valid_BV: Tensor | None,
        looks: Sequence[tuple[int, int, tuple[int, ...]]],
    ) -> tuple[Tensor, list[bool]]:
        """Attention on the right patches, mean over every other head, and whether the strongest is one of them."""
        block, device = self.blocks[str(layer)], text_BTD.device
        row_N, from_end_N = torch.tensor([look[:2] for look in looks], device=device).unbind(1)
        queries_BTHd = block.q_proj(block.text_norm(text_BTD)).unflatten(-1, (block.num_heads, block.head_dim))
        group_of_head = torch.arange(0, block.num_heads, 2, device=device) * block.num_kv_heads // block.num_heads
        # All of the text at once: one product is cheaper than to gather the keys for each look.
        scores_BHTV = queries_BTHd[:, :, ::2].transpose(1, 2) @ keys_BGVd[:, group_of_head].transpose(-1, -2)
        with torch.autocast(device.type, enabled=False):
            scores_NHV = scores_BHTV.transpose(1, 2)[row_N, from_end_N].float()
            if valid_BV is not None:
                scores_NHV = scores_NHV.masked_fill(~valid_BV[row_N, None], float("-inf"))
            attention_NV = (scores_NHV * block.head_dim**-0.5).softmax(-1).mean(1)
            sought_NV = torch.zeros_like(attention_NV, dtype=torch.bool)
            for n, (_, _, patches) in enumerate(looks):
                sought_NV[n, list(patches)] = True
            found = sought_NV.gather(1, attention_NV.detach().argmax(-1, keepdim=True))[:, 0].tolist()
            return (attention_NV * sought_NV).sum(-1), found
