"""Greedy decoding of one prompt by transformers' own generate(): its arguments, and what is kept of its output.

Shapes: B samples, W vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from visor.engine import decoder
from visor.families.base import FamilyAdapter
from visor.inference import collate
from visor.inference.prompt import Generation, Prompt, kept_over_image


class FirstTokenProbability:
    """A logits processor that changes nothing and remembers how likely the first token was."""

    def __init__(self) -> None:
        self._probability_B: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores_BW: Tensor) -> Tensor:
        if self._probability_B is None:
            self._probability_B = scores_BW.float().softmax(-1).amax(-1)
        return scores_BW

    @property
    def confidence(self) -> list[float]:
        """By sample."""
        return self._probability_B.tolist()


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


def truncate_at_stop(ids: list[int], stop: set[int]) -> list[int]:
    """The tokens before the first that ends an answer; behind it stands padding, where a batch went on."""
    return ids[: next((index for index, token in enumerate(ids) if token in stop), len(ids))]


def answer_prompt(
    model: nn.Module, adapter: FamilyAdapter, tokenizer: Any, prompt: Prompt, max_new_tokens: int
) -> list[Generation]:
    """The answers to a batch, each up to its stop token."""
    from transformers import GenerationConfig

    first, stop, pad = FirstTokenProbability(), stop_ids(model), pad_id(model, tokenizer)
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
            **({} if prompt.grid_positions is None else {"position_ids": prompt.grid_positions}),
            **adapter.prompt_arguments(prompt.input_ids_BP),
            **collate.image_arguments(adapter, prompt),
        )
    reduces = any(op.reduce for op in prompt.schedules[0].layers)
    kept = kept_over_image(prompt, adapter.decoder.last_kept if reduces else None)
    new_ids = [truncate_at_stop(ids, stop) for ids in sequences[:, prompt.input_ids_BP.shape[1] :].tolist()]
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new_ids]
    return [Generation(*each) for each in zip(texts, map(tuple, new_ids), kept, first.confidence, strict=True)]
