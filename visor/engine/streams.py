"""Token streams: which tokens are alive, where they came from, and which of them a layer runs on.

Counts live on the host and are known before the forward; only the *choice* of tokens lives on the device. So no
operation here waits for the device or has a size that depends on data, and a batch may keep another number of tokens
in every row: rows are left-padded to the longest.

Shapes: B batch, N live tokens, M selected tokens, T text tokens, V visual tokens, P prompt length, D hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visor.engine.deepstack import DeepStack
from visor.engine.positions import close_gaps

TEXT_GROUP = -1  # cache group of the layers that hold text only; the others count reductions: 0, 1, ...


def left_padding(lengths: Sequence[int]) -> tuple[int, Tensor | None]:
    """(longest, valid [B, longest] on the host, or None if all rows are full)."""
    longest = max(lengths)
    if min(lengths) == longest:
        return longest, None
    return longest, torch.arange(longest)[None] >= longest - torch.tensor(lengths)[:, None]


def to_device(x: Tensor | None, device: torch.device) -> Tensor | None:
    """Copy from the host without waiting for the device."""
    return None if x is None else x.to(device, non_blocking=True)


def take(x: Tensor, index_BM: Tensor) -> Tensor:
    """Rows' elements at `index_BM`, of x [B or 1, N] or [B or 1, N, D]."""
    x = x.expand(index_BM.shape[0], *x.shape[1:])
    return x.gather(1, index_BM) if x.ndim == 2 else x.gather(1, index_BM[..., None].expand(-1, -1, x.shape[-1]))


def put(x_BND: Tensor, index_BM: Tensor, valid_BM: Tensor | None, new_BMD: Tensor) -> Tensor:
    """x with `new` at `index`. Padded slots point at tokens of others (never twice at one): those keep their value."""
    if valid_BM is not None:
        new_BMD = torch.where(valid_BM[..., None], new_BMD, take(x_BND, index_BM))
    return x_BND.scatter(1, index_BM[..., None].expand_as(new_BMD), new_BMD)


@dataclass(frozen=True)
class PromptLayout:
    """Which tokens of a prompt are visual, text, or padding. All on the host.

    Args:
        visual_BP: visual tokens; none of them is padding.
        valid_BP: real tokens, or None if there is no padding.
        num_visual, num_text: real tokens of each row.
        end_visual: number of columns up to the last visual token of any row.
    """

    visual_BP: Tensor
    valid_BP: Tensor | None
    num_visual: tuple[int, ...]
    num_text: tuple[int, ...]
    end_visual: int

    @classmethod
    def of(cls, visual_BP: Tensor, attention_mask_BP: Tensor | None) -> PromptLayout:
        """From a visual mask and the 2D attention mask; copies both to the host."""
        visual_BP = visual_BP.to("cpu", torch.bool)
        valid_BP = None if attention_mask_BP is None else attention_mask_BP.to("cpu", torch.bool)
        if valid_BP is None or bool(valid_BP.all()):
            valid_BP, num_real = None, [visual_BP.shape[1]] * len(visual_BP)
        else:
            visual_BP, num_real = visual_BP & valid_BP, valid_BP.sum(1).tolist()
        num_visual = visual_BP.sum(1).tolist()
        num_text = tuple(real - visual for real, visual in zip(num_real, num_visual, strict=True))
        columns = visual_BP.any(0).nonzero().flatten().tolist()
        return cls(visual_BP, valid_BP, tuple(num_visual), num_text, columns[-1] + 1 if columns else 0)

    @classmethod
    def of_text(cls, batch: int, length: int) -> PromptLayout:
        """Rows of text without padding. Asks no tensor for a value, so that torch.compile can follow."""
        return cls(torch.zeros(batch, length, dtype=torch.bool), None, (0,) * batch, (length,) * batch, 0)

    @property
    def last_B1(self) -> Tensor:
        """Index of each row's last real token."""
        length = self.visual_BP.shape[1]
        if self.valid_BP is None:
            return torch.full((len(self.num_visual), 1), length - 1)
        return (torch.arange(length)[None] * self.valid_BP).argmax(1, keepdim=True)


@dataclass
class TokenStream:
    """Hidden states of a set of tokens, in order.

    Attributes:
        rotary: cos and sin of the tokens' positions, [B or 1, N, d].
        valid_BN: real tokens; None if all are.
        group: names the set of tokens; layers with one group share masks and cache lengths.
        positions: position ids, where the stream is the whole prompt (see `compat.causal_mask`).
        segment_BN: where several texts are packed into a row, which one a token belongs to; 0 is seen by all.
        masks: (valid keys, attention mask) by cache group, shared by all layers that run on this stream.
    """

    hidden_BND: Tensor
    rotary: tuple[Tensor, Tensor]
    valid_BN: Tensor | None = None
    group: int = 0
    positions: Tensor | None = None
    segment_BN: Tensor | None = None
    masks: dict[int, tuple[Tensor | None, Any]] = field(default_factory=dict)

    def select(self, index_BM: Tensor, valid_BM: Tensor | None, group: int) -> TokenStream:
        cos, sin = self.rotary
        segment_BM = None if self.segment_BN is None else take(self.segment_BN, index_BM)
        rotary = take(cos, index_BM), take(sin, index_BM)
        return TokenStream(take(self.hidden_BND, index_BM), rotary, valid_BM, group, segment_BN=segment_BM)


class PromptStreams:
    """A prompt on its way through the decoder: the full stream and, while visual tokens stand still, the text stream.

    Attributes:
        full: all live tokens. Its text is stale while `text` is out.
        positions: position ids of the live tokens, [B or 1, N] or [B, N, A] (`visor.engine.positions`).
        visual_BN: visual tokens among the live ones.
        origin_BN: index of each live token in the prompt; None before the first reduction.
        last_B1: index of the last real token among the live ones.
        num_text, num_visual: live tokens by row, on the host.
        shift_B1: how much lower later position ids are after renumbering; None if nothing was renumbered.
        initial_BND: the live tokens as they entered the decoder, if CROSS layers read those; else None.
        embedded_BPD: the prompt as it entered layer 0, where a method asks for it.
        memo: what methods have computed for this prompt and need again at a later layer.
    """

    def __init__(
        self,
        full: TokenStream,
        positions: Tensor,
        layout: PromptLayout,
        reads_initial: bool = False,
        deepstack: DeepStack | None = None,
    ) -> None:
        device = full.hidden_BND.device
        self.full, self.positions, self.deepstack = full, positions, deepstack
        self.num_text, self.num_visual = layout.num_text, layout.num_visual
        self.visual_BN = to_device(layout.visual_BP, device)
        self.last_B1 = to_device(layout.last_B1, device)
        self.origin_BN: Tensor | None = None
        self.initial_BND = full.hidden_BND if reads_initial else None
        self.shift_B1: Tensor | None = None
        self._former_positions: Tensor | None = None
        self.embedded_BPD: Tensor | None = None
        self.memo: dict[str, Any] = {}
        self._text: TokenStream | None = None
        self._text_masks: dict[int, tuple[Tensor | None, Any]] = {}  # no reduction changes the text
        self._text_slots: tuple[Tensor, Tensor | None] | None = None
        self._visual_slots: tuple[Tensor, Tensor | None, Tensor | None] | None = None
        self._visual: tuple[Tensor, Tensor] | None = None

    @property
    def valid_BN(self) -> Tensor:
        """Real tokens among the live ones."""
        return torch.ones_like(self.visual_BN) if self.full.valid_BN is None else self.full.valid_BN

    def slots(self, mask_BN: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """(index [B, M], valid [B, M] or None) of the tokens in the mask, in order, left-padded to the longest row."""
        longest, valid_BM = left_padding(lengths)
        # Tokens outside the mask sort to the front: a row's padding points at distinct tokens outside it.
        index_BM = mask_BN.to(torch.uint8).argsort(dim=1, stable=True)[:, mask_BN.shape[1] - longest :]
        return index_BM, to_device(valid_BM, mask_BN.device)

    def text_stream(self) -> TokenStream:
        """The text tokens alone. Without any visual token that is the full stream."""
        if not any(self.num_visual):
            return self.full
        if self._text is None:
            if self._text_slots is None:
                self._text_slots = self.slots(self.valid_BN & ~self.visual_BN, self.num_text)
            self._text = self.full.select(*self._text_slots, TEXT_GROUP)
            self._text.masks = self._text_masks  # the text goes out many times, and its masks are made once
        return self._text

    def full_stream(self) -> TokenStream:
        """All live tokens, with what the text stream has become written back."""
        if self._text is not None:
            self.full.hidden_BND = put(self.full.hidden_BND, *self._text_slots, self._text.hidden_BND)
            self._text = None
        return self.full

    def add_levels(self, layer: int) -> None:
        """Add to the visual tokens what DeepStack adds behind `layer`, whether that layer ran on them or not."""
        if self.deepstack is not None:  # the text's share is zero, so it does not matter that it may be out
            self.full.hidden_BND = self.deepstack.add(self.full.hidden_BND, layer)

    def visual_tokens(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(hidden [B, V, D], valid [B, V] or None, rows that have an image [B] or None if all have).

        Rows without an image come with an all-True `valid`, for the softmax's sake.
        """
        if self._visual_slots is None:
            index_BV, valid_BV = self.slots(self.visual_BN, self.num_visual)
            active_B = None
            if not all(self.num_visual):
                active_B = to_device(torch.tensor(self.num_visual) > 0, index_BV.device)
                valid_BV = valid_BV | ~active_B[:, None]
            self._visual_slots = index_BV, valid_BV, active_B
        # Gathered once for a run of CROSS layers. Only a SELF layer makes new hidden states, which is why comparing the
        # tensor by identity is enough.
        source_BND = self.full.hidden_BND if self.initial_BND is None else self.initial_BND
        if self._visual is None or self._visual[0] is not source_BND:  # until a SELF layer refines them
            self._visual = source_BND, take(source_BND, self._visual_slots[0])
        return self._visual[1], *self._visual_slots[1:]

    def rows(self, members: Sequence[int]) -> PromptStreams:
        """Some of the rows, on their way alone. No longer than the longest of them."""
        full = self.full_stream()
        batch, longest = full.hidden_BND.shape[:2]
        index = to_device(torch.tensor(members), full.hidden_BND.device)
        pick = lambda x: x if x is None or x.shape[0] != batch else x.index_select(0, index)
        part = copy.copy(self)
        part.num_text = tuple(self.num_text[i] for i in members)
        part.num_visual = tuple(self.num_visual[i] for i in members)
        lengths = [text + visual for text, visual in zip(part.num_text, part.num_visual, strict=True)]
        cos, sin = full.rotary
        part.full = TokenStream(
            pick(full.hidden_BND),
            (pick(cos), pick(sin)),
            None if min(lengths) == longest else pick(full.valid_BN),
            full.group,
            segment_BN=pick(full.segment_BN),
        )
        for name in ("positions", "visual_BN", "last_B1", "origin_BN", "initial_BND", "shift_B1", "embedded_BPD"):
            setattr(part, name, pick(getattr(self, name)))
        part.deepstack = None if self.deepstack is None else self.deepstack.rows(index)
        part.memo, part._text, part._text_masks = {}, None, {}
        part._text_slots = part._visual_slots = part._visual = None
        if max(lengths) < longest:  # drop the columns that are padding in all of these rows
            part.keep(part.visual_BN, part.num_visual)
        return part

    def keep(
        self, keep_BN: Tensor, counts: Sequence[int], rotary_of: Callable[[Tensor, Tensor], Any] | None = None
    ) -> None:
        """Drop every visual token outside `keep_BN`, for good.

        Args:
            keep_BN: visual tokens that stay.
            counts: how many these are, by row.
            rotary_of: renumber what is left contiguously, and compute cos and sin anew with this; None leaves the
                position ids as they are.
        """
        full, valid_BN = self.full_stream(), self.valid_BN
        # All text stays, and no padding: what is left is padded anew, to the longest row.
        stay_BN = keep_BN | (valid_BN & ~self.visual_BN)
        lengths = [text + count for text, count in zip(self.num_text, counts, strict=True)]
        index_BM, valid_BM = self.slots(stay_BN, lengths)
        if rotary_of is not None:
            self.positions, shift_B1 = close_gaps(self.positions, valid_BN, stay_BN, self._former_positions)
            self.shift_B1 = shift_B1 if self.shift_B1 is None else self.shift_B1 + shift_B1
        self.positions = take(self.positions, index_BM)
        self.full = full.select(index_BM, valid_BM, full.group + 1)  # another set of tokens: other masks from here on
        if rotary_of is not None:
            self.full.rotary = rotary_of(self.full.hidden_BND, self.positions)
        if self.deepstack is not None:
            self.deepstack = self.deepstack.take(index_BM)
        self.visual_BN = take(self.visual_BN & stay_BN, index_BM)
        if self.initial_BND is not None:
            self.initial_BND = take(self.initial_BND, index_BM)
        self.origin_BN = index_BM if self.origin_BN is None else take(self.origin_BN, index_BM)
        # Left-padded, so every row now ends in the last column.
        self.last_B1 = torch.full_like(self.last_B1, index_BM.shape[1] - 1)
        self.num_visual = tuple(counts)
        self._text_slots = self._visual_slots = self._visual = self._former_positions = None

    def rewrite(self, hidden_BND: Tensor, source_BN: Tensor) -> None:
        """Give the live tokens new hidden states, and say for which live token each now stands.

        One number a token is its place in the row, which is renumbered after this; places in an image (M-RoPE) and
        DeepStack levels belong to the token.
        """
        full = self.full_stream()
        full.hidden_BND = hidden_BND
        if self.positions.ndim == 3:
            # `close_gaps` must still see the values that vanish with this merge, or they would leave gaps.
            self._former_positions = self.positions
            self.positions = take(self.positions, source_BN)
            full.rotary = tuple(take(part, source_BN) for part in full.rotary)
        if self.deepstack is not None:
            self.deepstack = self.deepstack.take(source_BN)
        self.origin_BN = source_BN if self.origin_BN is None else take(self.origin_BN, source_BN)
        if self.initial_BND is not None:
            self.initial_BND = take(self.initial_BND, source_BN)
        self._visual = None

    def alive_in_prompt(self, prompt_length: int) -> Tensor:
        """Live visual tokens as a mask over the prompt, [B, P]."""
        if self.origin_BN is None:
            return self.visual_BN
        alive = self.visual_BN.new_zeros(self.visual_BN.shape[0], prompt_length)
        return alive.scatter(1, self.origin_BN, self.visual_BN)

    def prompt_hidden(self, norm: Callable[[Tensor], Tensor], prompt_length: int) -> Tensor:
        """Normed hidden states [B, P, D] as transformers returns them; zero where a token did not reach the end.

        While only the text ran last, only the text is normed.
        """
        if self._text is None:
            stream, index_BM = self.full, self.origin_BN
        else:
            stream, index_BM = self._text, self._text_slots[0]
            index_BM = index_BM if self.origin_BN is None else take(self.origin_BN, index_BM)
        normed_BMD = norm(stream.hidden_BND)
        if index_BM is None:
            return normed_BMD
        if stream.valid_BN is not None:  # padded slots point at tokens that are not here, which are zero
            normed_BMD = normed_BMD.where(stream.valid_BN[..., None], 0.0)
        everywhere_BPD = normed_BMD.new_zeros(normed_BMD.shape[0], prompt_length, normed_BMD.shape[-1])
        return everywhere_BPD.scatter_(1, index_BM[..., None].expand_as(normed_BMD), normed_BMD)
