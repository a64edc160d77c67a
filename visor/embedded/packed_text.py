"""Many questions behind one image: each sees the image and itself, at the positions it would have alone.

Training then costs one pass over the image for all its questions, and matches inference exactly: a question's
tokens stand directly behind the image, whatever else is packed in the row.

Shapes: B scenes, V visual slots, T packed text tokens, S = V + T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from visor.embedded.vocabulary import ASSISTANT
from visor.training.rows import IGNORED
from visor.worlds.world import Scene

HINT_TOKENS = 2  # the last word of a question and its mark


@dataclass
class PackedText:
    """The text side of a batch.

    Args:
        ids_BT: token ids, right-padded.
        labels_BT: the next token where it is part of an answer (or its end), else -100. Already shifted.
        segment_BT: number of the question a token belongs to, -1 for padding.
        offset_BT: position of a token within its question.
        hint_BT: True where the label is a hint: the last words of a question, too, are asked for the answer's first
            token. Looking up by a key is then two steps from the key itself, before the answer has to fetch it from
            there. With the hint a lookup formed within 350 steps, without it not in 1,500.
        kinds: for each scene, the kind of each question in order.
    """

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    segment_BT: torch.Tensor
    offset_BT: torch.Tensor
    hint_BT: torch.Tensor
    kinds: list[list[str]]

    def to(self, device: torch.device) -> PackedText:
        """The same on another device."""
        tensors = self.ids_BT, self.labels_BT, self.segment_BT, self.offset_BT, self.hint_BT
        return PackedText(*(x.to(device) for x in tensors), self.kinds)

    @property
    def num_answer_tokens(self) -> int:
        """Labels that are part of an answer."""
        return int(((self.labels_BT != IGNORED) & ~self.hint_BT).sum())

    @property
    def num_hints(self) -> int:
        """Labels that are hints."""
        return int(self.hint_BT.sum())


class TextEncoder:
    """Questions and answers to token ids, with a cache: phrasings and words repeat."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.assistant = tokenizer.convert_tokens_to_ids(ASSISTANT)
        self._cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids of a text."""
        if text not in self._cache:
            if len(self._cache) > 200_000:
                self._cache.clear()
            self._cache[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._cache[text]

    def pack(self, scenes: Sequence[Scene]) -> PackedText:
        """All questions of all scenes; the answer's first token is predicted from the assistant token."""
        rows = []
        for scene in scenes:
            ids, labels, segments, offsets, hints = [], [], [], [], []
            for number, question in enumerate(scene.questions):
                prompt = [*self.ids(question.text), self.assistant]
                answer = [*self.ids(question.answer), self.tokenizer.eos_token_id]
                tokens = prompt + answer[:-1]
                ids += tokens
                labels += [IGNORED] * (len(prompt) - 1 - HINT_TOKENS) + [answer[0]] * HINT_TOKENS + answer
                hints += [False] * (len(prompt) - 1 - HINT_TOKENS) + [True] * HINT_TOKENS + [False] * len(answer)
                segments += [number] * len(tokens)
                offsets += range(len(tokens))
            rows.append((ids, labels, segments, offsets, hints))
        length = max(len(row[0]) for row in rows)
        length += -length % 8  # few distinct shapes: kernels and allocators are warm
        fills = (self.tokenizer.pad_token_id, IGNORED, -1, 0, False)
        packed = [
            torch.tensor(np.array([np.pad(row[k], (0, length - len(row[k])), constant_values=fill) for row in rows]))
            for k, fill in enumerate(fills)
        ]
        return PackedText(*packed, [[q.kind for q in scene.questions] for scene in scenes])


def attention_mask(visual_valid_BV: torch.Tensor, text: PackedText) -> torch.Tensor:
    """[B, 1, S, S], True where a query may look: causally, at the image and at its own question."""
    num_visual, num_text = visual_valid_BV.shape[1], text.ids_BT.shape[1]
    total, device = num_visual + num_text, visual_valid_BV.device
    causal_SS = torch.ones(total, total, dtype=torch.bool, device=device).tril()
    key_visual_BS = torch.nn.functional.pad(visual_valid_BV, (0, num_text))
    segment_BS = torch.nn.functional.pad(text.segment_BT, (num_visual, 0), value=-2)
    same_BSS = (segment_BS[:, :, None] == segment_BS[:, None, :]) & (segment_BS[:, None, :] >= 0)
    mask_BSS = causal_SS & (same_BSS | key_visual_BS[:, None, :])
    # Padding rows look at themselves: a row that may look nowhere gives NaN in some kernels.
    mask_BSS |= torch.eye(total, dtype=torch.bool, device=device)
    return mask_BSS[:, None]
