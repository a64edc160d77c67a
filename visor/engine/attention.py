"""The one attention call of ours, over whichever kernel the model runs with: text queries, visual keys and values.

Hugging Face's own interface serves the decoder's layers. Its flash path takes as many queries as keys once there is
padding, so the cross-attention blocks call the kernel themselves. flash-attn is imported when it is first needed; a
mask (rows with different numbers of visual tokens) is not something it takes, and such batches use torch's kernel.

Shapes: B batch, H heads, G key/value heads, T text tokens, V visual tokens, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FLASH = "flash_attention_2"
FLOAT32 = "float32_sdpa"  # training on a CPU (`visor.training.attention`): bfloat16 has a slow backward there


def cross_attention(
    queries_BHTd: Tensor,
    keys_BGVd: Tensor,
    values_BGVd: Tensor,
    valid_BV: Tensor | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Softmax attention of every query to every valid key, not causal: [B, H, T, d].

    Args:
        valid_BV: which keys are real, at least one a row; None if all are.
        kernel: the model's `_attn_implementation`; all but flash use torch's scaled_dot_product_attention.
    """
    if kernel == FLASH and valid_BV is None:
        return _flash(queries_BHTd, keys_BGVd, values_BGVd)
    if kernel == FLOAT32 and queries_BHTd.dtype != torch.float32:
        with torch.autocast(queries_BHTd.device.type, enabled=False):
            exact = (queries_BHTd.float(), keys_BGVd.float(), values_BGVd.float())
            return cross_attention(*exact, valid_BV, kernel)
    repeats, mask = queries_BHTd.shape[1] // keys_BGVd.shape[1], None
    if valid_BV is not None:
        mask = valid_BV[:, None, None, :].expand(-1, 1, queries_BHTd.shape[2], -1)
        if repeats > 1:  # on CUDA, a mask together with enable_gqa falls back to the slow reference kernel
            keys_BGVd = keys_BGVd.repeat_interleave(repeats, dim=1)
            values_BGVd, repeats = values_BGVd.repeat_interleave(repeats, dim=1), 1
    return F.scaled_dot_product_attention(queries_BHTd, keys_BGVd, values_BGVd, attn_mask=mask, enable_gqa=repeats > 1)


def _flash(queries_BHTd: Tensor, keys_BGVd: Tensor, values_BGVd: Tensor) -> Tensor:
    flash = flash_attention()
    swap = lambda x: x.transpose(1, 2)  # flash-attn has heads behind tokens
    return swap(flash(swap(queries_BHTd), swap(keys_BGVd), swap(values_BGVd), causal=False))


def flash_attention() -> Any:
    """flash-attn's function.

    Raises:
        ValueError: the package is not there; the message says how to install it.
    """
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        raise ValueError(
            "flash_attention_2 needs the package flash-attn, which is built against an installed torch: "
            "pip install --no-build-isolation 'flash-attn>=2.8.3' (Linux, CUDA); or use --attention sdpa"
        ) from error
    return flash_attn_func
