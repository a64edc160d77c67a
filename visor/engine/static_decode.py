"""Decoding whose every step has the same shapes, so that a CUDA graph can replay it: one launch a token.

After the prefill, each layer's keys and values move into a buffer with room for the tokens to come. Layers keep their
own lengths (TEXT and CROSS layers hold text, SELF layers what was alive), so each has its own place to write at and its
own mask; both are tensors that a step moves on itself. On a CPU the same step runs as it is, and tests compare that.

Shapes: B batch, H key/value heads, K keys that a layer holds, R room (K and the new tokens), d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from visor.engine.cache import ElasticCache, ElasticLayer
from visor.engine.compat import CACHE
from visor.engine.positions import lowered, rotary, split_position_ids

NUM_WARM_UP = 3  # steps before a capture, as torch asks for


class FixedLayer:
    """One layer's buffers, and where it writes next."""

    def __init__(self, held: ElasticLayer, room: int) -> None:
        batch, _, num_held, _ = held.keys.shape
        # The buffers have room for all tokens to come; the mask says how much of them is written.
        widen = lambda x: torch.cat([x, x.new_zeros(*x.shape[:2], room, x.shape[3])], 2)
        self.keys, self.values = widen(held.keys), widen(held.values)
        device = held.keys.device
        valid_BK = (
            torch.ones(batch, num_held, dtype=torch.bool, device=device) if held.valid_BK is None else held.valid_BK
        )
        later_BR = torch.zeros(batch, room, dtype=torch.bool, device=device)
        self.mask_B11R = torch.cat([valid_BK, later_BR], 1)[:, None, None]
        self.slot_1 = torch.tensor([num_held], device=device)
        self.shift_B1, self.cross = held.shift_B1, held.cross

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the keys and values of one token; all of the buffer, which the mask cuts."""
        self.keys.index_copy_(2, self.slot_1, keys)
        self.values.index_copy_(2, self.slot_1, values)
        return self.keys, self.values

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What a step changes."""
        return self.keys, self.values, self.mask_B11R, self.slot_1


class FixedCache:
    """What Hugging Face's layers take for a cache: `update` is all that they ask of it."""

    def __init__(self, cache: ElasticCache, room: int) -> None:
        self.layers = [FixedLayer(held, room) for held in cache.layers]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.layers[layer_idx].update(keys, values)


class FixedDecode:
    """Greedy decoding after a prefill.

    Args:
        model: with an elastic decoder.
        cache: what the prefill has left. It is copied, and stays as it is.
        next_ids_B1: the first token.
        positions: its position ids, as the decoder takes them.
        room: how many tokens can follow.

    Raises:
        ValueError: more tokens are asked for than there is room for.
    """

    def __init__(
        self, model: nn.Module, cache: ElasticCache, next_ids_B1: Tensor, positions: Tensor, room: int
    ) -> None:
        self.model, self.decoder = model, model.get_decoder()
        self.cache, self.room, self.num_done = FixedCache(cache, room), room, 0
        self.ids_B1 = next_ids_B1.clone()
        self.positions = split_position_ids(positions, self.decoder.rotary_emb)[0].clone()
        self.graph: Any = None

    @torch.inference_mode()
    def step(self) -> None:
        """One token: reads and replaces `ids_B1`. Changes tensors in place only, so that it can be replayed."""
        decoder, cache = self.decoder, self.cache
        hidden_BND = decoder.embed_tokens(self.ids_B1)
        plain = rotary(decoder.rotary_emb, hidden_BND, self.positions)
        # Slots, masks and positions are tensors that the step moves on in place: a replayed graph repeats operations on
        # the same memory, and a number of Python's would stay what it was when captured.
        for i, held in enumerate(cache.layers):
            held.mask_B11R.index_fill_(3, held.slot_1, True)
            embeddings = plain
            if held.shift_B1 is not None:
                embeddings = rotary(decoder.rotary_emb, hidden_BND, lowered(self.positions, held.shift_B1))
            if held.cross is not None:
                keys, values, valid_BV, active_B = held.cross
                block = decoder.cross_blocks[str(i)]
                hidden_BND, _ = block(hidden_BND, None, valid_BV, active_B, (keys, values))
            hidden_BND = decoder.layers[i](
                hidden_BND, attention_mask=held.mask_B11R, position_embeddings=embeddings, position_ids=None,
                use_cache=True, **{CACHE: cache},
            )  # fmt: skip
            held.slot_1 += 1
        logits = self.model.get_output_embeddings()(decoder.norm(hidden_BND))
        self.ids_B1.copy_(logits.argmax(-1))
        self.positions += 1

    @torch.inference_mode()
    def run(self, num_tokens: int) -> Tensor:
        """The next tokens, [B, num_tokens]."""
        if self.num_done + num_tokens > self.room:
            raise ValueError(f"there is room for {self.room} tokens, {self.num_done + num_tokens} are asked for")
        self.num_done += num_tokens
        advance = self.step if self.ids_B1.device.type != "cuda" else self._replay()
        found = []
        for _ in range(num_tokens):
            advance()
            found.append(self.ids_B1.clone())
        return torch.cat(found, 1)

    def _replay(self) -> Callable[[], None]:
        """The captured step. Warming up and capturing move the state on, so it is put back afterwards."""
        if self.graph is None:
            state = [self.ids_B1, self.positions, *(x for layer in self.cache.layers for x in layer.tensors)]
            saved = [x.clone() for x in state]
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(min(NUM_WARM_UP, self.room)):
                    self.step()
            torch.cuda.current_stream().wait_stream(side)
            restore = lambda: [x.copy_(old) for x, old in zip(state, saved, strict=True)]
            restore()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.step()
            restore()
        return self.graph.replay
