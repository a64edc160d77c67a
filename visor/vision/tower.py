"""A pass over a tower's own modules, block by block, for methods that drop or merge tokens inside it.

The modules are Hugging Face's; only the loop is ours, so that a method may change the tokens between (or within)
blocks. Without changes the result is the tower's own. Blocks behind the layer that the projector reads do not run.

Shapes: T tiles, P live tower tokens (CLS included), N visual tokens, D tower width.
"""

from __future__ import annotations

from torch import Tensor, nn

from visor.engine.compat import feature_layers
from visor.families.base import FamilyAdapter
from visor.vision.taps import tower_blocks, tower_has_cls

BLOCK_PARTS = ("layer_norm1", "self_attn", "layer_norm2", "mlp")


class TowerWalk:
    """The tower of a model as embedding and blocks.

    Attributes:
        blocks: those that lead to the projector's features.
        num_heads: attention heads of a block.
        has_cls: True if the first token is a CLS.

    Raises:
        ValueError: a tower whose blocks are built in another way than CLIP's and SigLIP's, features that come from
            several layers, or a CLS that becomes a visual token.
    """

    def __init__(self, adapter: FamilyAdapter) -> None:
        config = adapter.model.config
        self.tower: nn.Module = adapter.tower
        layer = feature_layers(config)
        known = all(hasattr(tower_blocks(self.tower)[0], part) for part in BLOCK_PARTS)
        if not known or not isinstance(layer, int) or not hasattr(self.tower, "embeddings"):
            raise ValueError(
                f"methods that act inside the tower run on CLIP and SigLIP towers whose features come from one layer, "
                f"not on {type(self.tower).__name__} with vision_feature_layer={layer!r}"
            )
        every = tower_blocks(self.tower)
        self.blocks = list(every[: layer if layer >= 0 else len(every) + 1 + layer])
        self.num_heads: int = config.vision_config.num_attention_heads
        self.has_cls = tower_has_cls(self.tower)
        cuts_first = adapter.cuts_first_token
        if self.has_cls != cuts_first:
            raise ValueError(
                "methods that act inside the tower need a CLS that is cut off, or no CLS; here the tower "
                f"{'has' if self.has_cls else 'has no'} CLS and its first token is "
                f"{'cut off' if cuts_first else 'kept'}"
            )

    def embed(self, tiles_T3HW: Tensor) -> Tensor:
        """What enters the first block: [T, P, D]."""
        hidden_TPD = self.tower.embeddings(tiles_T3HW)
        norm = getattr(self.tower, "pre_layrnorm", None)  # as transformers spells it
        return hidden_TPD if norm is None else norm(hidden_TPD)

    def attend(self, block: nn.Module, hidden_TPD: Tensor, bias_T1PP: Tensor | None = None) -> Tensor:
        """The first half of a block: hidden states after attention."""
        attended_TPD, _ = block.self_attn(hidden_states=block.layer_norm1(hidden_TPD), attention_mask=bias_T1PP)
        return hidden_TPD + attended_TPD

    def feed_forward(self, block: nn.Module, hidden_TPD: Tensor) -> Tensor:
        """The second half of a block."""
        return hidden_TPD + block.mlp(block.layer_norm2(hidden_TPD))

    def features(self, hidden_TPD: Tensor) -> Tensor:
        """Visual tokens [T, N, D] as the projector takes them."""
        return hidden_TPD[:, 1:] if self.has_cls else hidden_TPD
