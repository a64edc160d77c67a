"""GLM-4.1V and GLM-4.6V: a tower of dynamic resolution, a convolution that merges 2 x 2 patches, M-RoPE, GLM-4 decoder.

For the engine a Qwen-VL with other modules: the same grid of cells, the same three axes of positions. The decoder
rotates only a part of each head, in pairs of neighbours (`visor.engine.compat.rotated_heads` asks the family).
"""

from __future__ import annotations

from torch import nn

from budgets.registry import FAMILIES
from visor.families.qwen_vl import QwenVLAdapter


@FAMILIES.register("glm4v")
class Glm4vAdapter(QwenVLAdapter):
    """`Glm4vForConditionalGeneration`."""

    @property
    def projector(self) -> nn.Module:
        """What stands behind the merging convolution, which is the tower's."""
        return self.inner.visual.merger


@FAMILIES.register("glm46v")
class Glm46VAdapter(Glm4vAdapter):
    """`Glm46VForConditionalGeneration`: the same towers and decoders under a newer processor."""
