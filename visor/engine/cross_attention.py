"""The cross-attention block of VISOR: text reads the visual tokens, which stand still (arXiv 2603.23495).

Pre-norm on both sides; grouped key/value heads as in the base model; a depth-wise convolution over the visual
sequence as conditional positional encoding, x + conv(x); no RoPE; not causal. The output projection starts at zero, so
that a freshly converted model equals its text-only ablation.

Shapes: B batch, T text tokens, V visual tokens, D hidden width, H heads, G key/value heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visor.engine.attention import cross_attention
from visor.engine.compat import GradientCheckpointingLayer, start_weights


class CrossAttentionBlock(GradientCheckpointingLayer):
    """`text + o_proj(attention(q(norm(text)), k, v))`, with keys and values from `norm(v + conv(v))`.

    Args:
        config: the decoder's config: hidden_size, num_attention_heads, num_key_value_heads, rms_norm_eps.
        kernel: width of the convolution, odd; padding keeps the length.
    """

    def __init__(self, config: Any, kernel: int = 7) -> None:
        super().__init__()
        self.config = config  # the kernel may be chosen after the block is made
        width, self.num_heads = config.hidden_size, config.num_attention_heads
        self.num_kv_heads = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.head_dim = getattr(config, "head_dim", None) or width // self.num_heads
        self.text_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.visual_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.position_conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, width, bias=False)
        std = getattr(config, "initializer_range", 0.02)
        for module in (self.q_proj, self.k_proj, self.v_proj, self.position_conv):
            module.initial_std = std
        self.o_proj.initial_std = 0.0
        for module in self.children():
            start_weights(module)

    def keys_values(self, visual_BVD: Tensor, valid_BV: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, G, V, d] of the visual tokens. They are constant while decoding."""
        if valid_BV is not None:  # padding must look like the convolution's own zero padding
            visual_BVD = visual_BVD * valid_BV[..., None]
        visual_BVD = self.with_positions(visual_BVD)
        split = lambda x: x.unflatten(-1, (self.num_kv_heads, self.head_dim)).transpose(1, 2)
        if all(map(_is_plain, (self.visual_norm, self.k_proj, self.v_proj))):
            weight = torch.cat([self.k_proj.weight, self.v_proj.weight])  # one product for both
            keys, values = self._normed_product(visual_BVD, weight).chunk(2, dim=-1)
            return split(keys), split(values)
        visual_BVD = self.visual_norm(visual_BVD)
        return split(self.k_proj(visual_BVD)), split(self.v_proj(visual_BVD))

    def _normed_product(self, visual_BVD: Tensor, weight_KD: Tensor) -> Tensor:
        """The product of normed visual tokens with a weight: [B, V, K].

        The norm's weight goes into the product and its scale behind it: tokens are read where they lie. A norm of its
        own would write all of them twice more, which takes longer than the thin product.
        """
        norm, kind = self.visual_norm, torch.promote_types(visual_BVD.dtype, torch.float32)
        if _product_dtype(visual_BVD) == torch.float16:  # tokens that are not normed may exceed its range
            return F.linear(norm(visual_BVD), weight_KD)
        # norm(v) = scale(v) * weight * v, and a product is linear: W norm(v) = scale(v) * ((W * weight) v).
        length_BV1 = torch.linalg.vector_norm(visual_BVD, dim=-1, keepdim=True, dtype=kind)
        scale_BV1 = (length_BV1.square() / visual_BVD.shape[-1] + norm.eps).rsqrt()
        product_BVK = F.linear(visual_BVD, weight_KD * norm.weight)
        return (product_BVK * scale_BV1).to(product_BVK.dtype)

    def with_positions(self, visual_BVD: Tensor) -> Tensor:
        """x + conv(x) over the visual sequence: [B, V, D].

        As a 2D convolution of a channels-last image one pixel wide, the tokens are read as they lie in memory; a 1D
        convolution would transpose them twice, which takes several times as long as the convolution itself. To add x
        is to add one to the middle of the kernel, where the kernel is precise enough to hold both.
        """
        conv = self.position_conv
        if not _is_plain(conv):
            return visual_BVD + conv(visual_BVD.transpose(1, 2)).transpose(1, 2)
        middle, kernel = conv.padding[0], conv.weight
        is_precise = _product_dtype(visual_BVD).itemsize >= 4
        if is_precise:
            kernel = kernel + F.pad(kernel.new_ones(1), (middle, middle))
        pixels_BDV1 = visual_BVD[:, :, None].permute(0, 3, 1, 2)
        encoded_BDV1 = F.conv2d(pixels_BDV1, kernel[..., None], conv.bias, padding=(middle, 0), groups=conv.groups)
        encoded_BVD = encoded_BDV1[..., 0].transpose(1, 2)
        return encoded_BVD if is_precise else visual_BVD + encoded_BVD

    def attend(self, text_BTD: Tensor, keys: Tensor, values: Tensor, valid_BV: Tensor | None) -> Tensor:
        """What the text reads: [B, T, D]."""
        queries = self.q_proj(self.text_norm(text_BTD)).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        # No RoPE: the convolution has told the visual tokens where they stand, and the text reads all of them.
        read = cross_attention(queries, keys, values, valid_BV, getattr(self.config, "_attn_implementation", None))
        return self.o_proj(read.transpose(1, 2).flatten(2))

    def forward(
        self,
        text_BTD: Tensor,
        visual_BVD: Tensor | None,
        valid_BV: Tensor | None = None,
        active_B: Tensor | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Text after the block, and the keys and values to cache.

        Args:
            visual_BVD: visual tokens; unused (None) where `keys_values` are given from the cache.
            valid_BV: which visual tokens are real; None if all are. A row without any must be all True here (a softmax
                over nothing is not defined) and False in `active_B`.
            active_B: rows that have an image; None if all have. The others pass unchanged.
        """
        keys, values = keys_values if keys_values is not None else self.keys_values(visual_BVD, valid_BV)
        read_BTD = self.attend(text_BTD, keys, values, valid_BV)
        if active_B is not None:
            read_BTD = read_BTD.where(active_B[:, None, None], 0.0)
        return text_BTD + read_BTD, (keys, values)


def weight_placement(*modules: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype for new weights beside those of the first module that has some to go by.

    The layers of a quantised model hold integers (or one-byte floats), but their norms are in the dtype it computes in.

    Raises:
        ValueError: the weights are offloaded: where they will be is not known.
    """
    weights = [weight for module in modules for weight in module.parameters()]
    if weights[0].device.type == "meta" and any(hasattr(each, "_hf_hook") for m in modules for each in m.modules()):
        raise ValueError(
            "the layers' weights are offloaded, and new blocks cannot be put beside them: call install (or "
            "visor.convert) before accelerate's dispatch"
        )
    floats = [weight for weight in weights if weight.is_floating_point() and weight.element_size() > 1]
    return weights[0].device, floats[0].dtype if floats else torch.get_default_dtype()


def _product_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    is_cast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # "meta" knows no autocast
    return torch.get_autocast_dtype(device) if is_cast else x.dtype


def _is_plain(module: nn.Module) -> bool:
    """True if its weight may be used without calling it: no adapter, no quantised layer, no hook that fetches it."""
    return type(module) in (nn.Linear, nn.Conv1d, nn.RMSNorm) and not hasattr(module, "_hf_hook")
