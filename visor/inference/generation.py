"""Greedy answers to one prompt: what transformers' generate() is told, and what is kept of what it says.

Shapes: B samples, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visor.engine import decoder
from visor.families.base import FamilyAdapter
from visor.inference import collate
from visor.inference.prompt import Generation, Prompt, kept_over_image


class FirstToken:
    """A logits processor that changes nothing and remembers how likely the first token was.

    Args:
        then: called once when the first tokens are known: the prefill is over.
    """

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self._probability_B: Tensor | None = None
        self._then = then

    def __call__(self, input_ids: Tensor, scores_BW: Tensor) -> Tensor:
        if self._probability_B is None:
            self._probability_B = scores_BW.float().softmax(-1).amax(-1)
            if self._then is not None:
                self._then()
        return scores_BW

    @property
    def confidence(self) -> list[float]:
        """By sample."""
        return self._probability_B.tolist()


class StopStrings:
    """A stopping criterion of transformers: an answer is over once it holds one of some strings.

    Args:
        strings: not empty.
        num_prompt: tokens of the prompt, padding included.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str], num_prompt: int) -> None:
        self.tokenizer, self.strings, self.num_prompt = tokenizer, tuple(strings), num_prompt
        # A character is at most four tokens (its bytes), so a string that was just completed lies in so many.
        self._window = 4 * max(map(len, self.strings))
        self.num_tokens: dict[int, int] = {}
        """By row, the tokens of an answer that was stopped."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        done = []
        for row, ids in enumerate(input_ids[:, self.num_prompt :].tolist()):
            text = self.tokenizer.decode(ids[-self._window :], skip_special_tokens=True).lstrip()
            if row not in self.num_tokens and any(string in text for string in self.strings):
                self.num_tokens[row] = len(ids)
            done.append(row in self.num_tokens)
        return torch.tensor(done, device=input_ids.device)


def cut_at(text: str, strings: Sequence[str]) -> str:
    """An answer up to the first of the strings; white space in front of it says nothing, and never stops it."""
    text = text.strip()
    return text[: min((place for string in strings if (place := text.find(string)) >= 0), default=len(text))].strip()


def pad_id(model: nn.Module, tokenizer: Any) -> int:
    """The token in front of shorter prompts."""
    for owner in (model.generation_config, tokenizer):
        if isinstance(owner.pad_token_id, int):
            return owner.pad_token_id
    return 0  # masked everywhere


def stop_ids(model: nn.Module) -> set[int]:
    """The tokens that end an answer."""
    stop = model.generation_config.eos_token_id
    return set() if stop is None else {stop} if isinstance(stop, int) else set(stop)


def until_stop(ids: list[int], stop: set[int]) -> list[int]:
    """The tokens before the first that ends an answer; behind it stands padding, where a batch went on."""
    return ids[: next((index for index, token in enumerate(ids) if token in stop), len(ids))]


def answer(
    model: nn.Module,
    adapter: FamilyAdapter,
    tokenizer: Any,
    prompt: Prompt,
    max_new_tokens: int,
    stop_strings: Sequence[str] = (),
    on_first_token: Callable[[], None] | None = None,
) -> list[Generation]:
    """The answers to a batch, each up to its stop token or the first of the stop strings.

    Args:
        on_first_token: called between the prefill and the tokens after the first.
    """
    from transformers import GenerationConfig

    first, stop, pad = FirstToken(on_first_token), stop_ids(model), pad_id(model, tokenizer)
    num_prompt = prompt.input_ids_BP.shape[1]
    stopping = StopStrings(tokenizer, stop_strings, num_prompt) if stop_strings else None
    # Every field that a checkpoint's own generation_config may set is set here: greedy means the same for all.
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50,
        repetition_penalty=1.0, pad_token_id=pad, eos_token_id=sorted(stop) or None,
    )  # fmt: skip
    with decoder.running(model, prompt.schedules):
        sequences = model.generate(
            input_ids=prompt.input_ids_BP,
            attention_mask=prompt.attention_mask_BP,
            generation_config=greedy,
            logits_processor=[first],
            **({} if stopping is None else {"stopping_criteria": [stopping]}),
            **({} if prompt.grid_positions is None else {"position_ids": prompt.grid_positions}),
            **collate.image_arguments(adapter, prompt),
        )
    reduces = any(op.reduce for op in prompt.schedules[0].layers)
    kept = kept_over_image(prompt, adapter.decoder.last_kept if reduces else None)
    new_ids = [until_stop(ids, stop) for ids in sequences[:, num_prompt:].tolist()]
    if stopping is not None:  # what follows is padding, where a batch went on
        new_ids = [ids[: stopping.num_tokens.get(row, len(ids))] for row, ids in enumerate(new_ids)]
    texts = [cut_at(tokenizer.decode(ids, skip_special_tokens=True), stop_strings) for ids in new_ids]
    return [Generation(*each) for each in zip(texts, map(tuple, new_ids), kept, first.confidence, strict=True)]
