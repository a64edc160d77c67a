"""A KV cache whose layers may hold different tokens.

TEXT and CROSS layers cache text only, SELF layers cache what is alive when they run, CROSS layers also keep the
keys and values of the visual tokens they read. To the outside (generate, multi-turn slicing, position ids) the cache
is as long as the sequence the *model* has seen.

Shapes: B batch, H key/value heads, K cached tokens, V visual tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visor.engine.compat import CACHE, Cache, DynamicCache, DynamicLayer


class ElasticLayer(DynamicLayer):
    """The cache of one decoder layer.

    Attributes:
        valid_BK: which cached keys are real; None if all are.
        group: layers of one group hold the same tokens, so they share masks. A constant while decoding.
        shift_B1: how much lower position ids of later tokens are in this layer (contiguous positions); None if they
            are as the model counts them.
        shift_group: layers of one group have one shift.
        cross: keys [B, H, V, d], values [B, H, V, d], valid [B, V] or None, active [B] or None of the cross block.
    """

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        self.valid_BK: Tensor | None = None
        self.group: Hashable = 0
        self.shift_B1: Tensor | None = None
        self.shift_group = 0
        self.cross: tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None = None

    def reset(self) -> None:
        super().reset()
        self._forget()

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply one change of the batch dimension to everything that has one."""
        on_rows = lambda x: None if x is None else change(x)
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
        self.valid_BK, self.shift_B1 = on_rows(self.valid_BK), on_rows(self.shift_B1)
        if self.cross is not None:
            self.cross = tuple(on_rows(x) for x in self.cross)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda x: x[indices])

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        # The cross keys stay: `ElasticCache.crop` never reaches the visual tokens.
        if tokens_to_remove and self.valid_BK is not None:
            self.valid_BK = self.valid_BK[:, : -abs(tokens_to_remove)]

    def join(self, parts: Sequence[ElasticLayer], order: Tensor) -> None:
        """Fill this empty layer with the rows of several, padded on the left to the longest.

        Args:
            order: place of each row among the rows of all parts, one part after the other.
        """
        # Left padding, as in a prompt: the newest tokens of all rows stand in one column; decoding appends the next.
        rows = lambda values: torch.cat(values).index_select(0, order)
        longest = max(part.get_seq_length() for part in parts)
        self.update(*(rows([_pad(getattr(p, name), longest) for p in parts]) for name in ("keys", "values")))
        if any(p.valid_BK is not None or p.get_seq_length() < longest for p in parts):
            self.valid_BK = rows([_pad_mask(p.valid_BK, p.keys, longest) for p in parts])
        self.group = tuple(part.group for part in parts)  # rows hold the same tokens where all their parts did
        assert all(part.shift_B1 is None for part in parts), "a batch whose rows part does not reduce"
        if any(part.cross is not None for part in parts):
            self._join_cross(parts, rows)

    def _join_cross(self, parts: Sequence[ElasticLayer], rows: Callable[[list[Tensor]], Tensor]) -> None:
        """The same for the visual tokens; rows that read none are inactive, and all valid for the softmax's sake."""
        crosses, some = [part.cross for part in parts], next(part.cross for part in parts if part.cross is not None)
        longest = max(cross[0].shape[-2] for cross in crosses if cross is not None)
        keys, values, valid, active = [], [], [], []
        for part, cross in zip(parts, crosses, strict=True):
            batch = part.keys.shape[0]
            if cross is None:
                _, heads, _, width = some[0].shape
                empty = some[0].new_zeros(batch, heads, longest, width)
                cross = empty, empty, None, torch.zeros(batch, dtype=torch.bool, device=empty.device)
            keys.append(_pad(cross[0], longest))
            values.append(_pad(cross[1], longest))
            valid.append(_pad_mask(cross[2], cross[0], longest))
            ones = torch.ones(batch, dtype=torch.bool, device=keys[0].device)
            active.append(ones if cross[3] is None else cross[3])
        masked = any(c is not None and (c[2] is not None or c[0].shape[-2] < longest) for c in crosses)
        partly = any(c is None or c[3] is not None for c in crosses)
        self.cross = rows(keys), rows(values), rows(valid) if masked else None, rows(active) if partly else None


def _pad(x: Tensor, length: int) -> Tensor:
    """Keys or values [B, H, K, d] with zeros before them."""
    return F.pad(x, (0, 0, length - x.shape[-2], 0))


def _pad_mask(valid_BK: Tensor | None, keys: Tensor, length: int) -> Tensor:
    """Which of the padded keys are real, [B, length]."""
    if valid_BK is None:
        valid_BK = torch.ones(keys.shape[0], keys.shape[-2], dtype=torch.bool, device=keys.device)
    return F.pad(valid_BK, (length - valid_BK.shape[1], 0))


class ElasticCache(DynamicCache):
    """One `ElasticLayer` a decoder layer, and the length of the sequence that the model has seen."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self._start(num_layers)

    def _start(self, num_layers: int) -> None:
        self.layers, self.layer_class_to_replicate = [ElasticLayer() for _ in range(num_layers)], None
        # The difference of the lengths is stored, not the length: it is constant while decoding.
        self.num_skipped, self.num_fixed = 0, 0

    def end_prefill(self, prompt_length: int, num_fixed: int) -> None:
        """To be called once, when every layer has cached its part of a prompt of this (padded) length.

        Args:
            num_fixed: how many of its first tokens must not be cropped.
        """
        self.num_skipped, self.num_fixed = prompt_length - super().get_seq_length(0), num_fixed

    def count_as(self, num_more: int, shift_B1: Tensor) -> None:
        """Count a prompt as longer than it ran: tokens were left out before the decoder that the caller still has.

        From here on later tokens come with position ids that count those tokens too; they fall by as many, so that
        they land where the shortened prompt ends.

        Args:
            num_more: columns that the given prompt has more.
            shift_B1: real tokens of each sample that were left out; beams of a sample stand next to each other.
        """
        self.num_skipped += num_more
        self.num_fixed += num_more
        for layer in self.layers:
            shift = shift_B1.to(layer.keys.device).repeat_interleave(layer.keys.shape[0] // len(shift_B1), 0)
            layer.shift_B1 = shift if layer.shift_B1 is None else layer.shift_B1 + shift

    def join(self, start: int, parts: Sequence[tuple[Sequence[int], ElasticCache]]) -> None:
        """Fill the layers from `start` on with what groups of rows have cached, each in a cache of its own.

        Args:
            parts: the rows of each group, and its cache.
        """
        order = torch.tensor([row for members, _ in parts for row in members]).argsort()
        for i in range(start, len(self.layers)):
            layers = [part.layers[i] for _, part in parts]
            self.layers[i].join(layers, order.to(layers[0].keys.device))

    @classmethod
    def can_convert(cls, cache: Cache | None) -> bool:
        """True if `converted` takes this cache."""
        if cache is None or isinstance(cache, cls):
            return True
        return type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0

    @classmethod
    def converted(cls, cache: Cache | None, num_layers: int) -> ElasticCache | None:
        """Turn the empty DynamicCache that generate() made into an ElasticCache, in place: callers hold it already.

        Raises:
            ValueError: any other kind of cache, or one that another forward has filled.
        """
        if cache is None or isinstance(cache, cls):
            return cache
        if type(cache) is not DynamicCache or cache.offloading:
            raise ValueError(
                f"schedules run on a DynamicCache without offloading, got {type(cache).__name__}"
                f"{' with offloading' if getattr(cache, 'offloading', False) else ''}: static, quantized and offloaded "
                f"caches give every layer one length. Leave `cache_implementation` and `{CACHE}` unset."
            )
        if cache.get_seq_length() > 0:
            raise ValueError(
                f"the cache already holds {cache.get_seq_length()} tokens, cached outside `running(...)`; start the "
                "conversation inside it, or continue without a schedule"
            )
        # generate() keeps a reference to the cache that it made and hands the same object to every step.
        cache.__class__ = cls
        cache._start(num_layers)
        return cache

    def get_seq_length(self, layer_idx: int | None = None) -> int:
        """Tokens the model has seen, padding included; with `layer_idx`, tokens that this layer holds."""
        # Without a layer it is transformers that asks, to slice input ids and to number positions: it must hear of the
        # sequence as the caller has it. With one, the mask functions ask what this layer really holds.
        if layer_idx is None:
            return super().get_seq_length(0) + self.num_skipped
        return super().get_seq_length(layer_idx)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: a negative number of them, or (older transformers) the length to crop to.

        Raises:
            ValueError: the crop would reach the visual tokens, which the layers hold in different numbers, or tokens
                that took part in choosing the visual tokens that stay. Assisted generation does the latter when it
                drafts tokens before the prompt has run.
        """
        seen = self.get_seq_length()
        remove = seen - tokens_to_remove if tokens_to_remove > 0 else -tokens_to_remove
        if seen - remove < self.num_fixed:
            raise ValueError(
                f"cannot crop {remove} of {seen} tokens: what the layers hold of the visual tokens was decided by the "
                f"first {self.num_fixed}. Prefill again; for assisted generation under a reduction, give "
                "running(keep_masks=...)"
            )
        super().crop(-remove)

    def reset(self) -> None:
        super().reset()
        self.num_skipped, self.num_fixed = 0, 0

    @property
    def layer_lengths(self) -> tuple[int, ...]:
        """Tokens held by each layer, padding included."""
        return tuple(layer.get_seq_length() for layer in self.layers)

    @property
    def cross_lengths(self) -> tuple[int, ...]:
        """Visual tokens whose cross keys and values each layer holds, padding included."""
        return tuple(layer.cross[0].shape[-2] if layer.cross else 0 for layer in self.layers)

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values, of self- and cross-attention, padding included."""
        held = [(layer.keys, layer.values) for layer in self.layers if layer.is_initialized]
        held += [layer.cross[:2] for layer in self.layers if layer.cross]
        return sum(x.numel() * x.element_size() for pair in held for x in pair)
