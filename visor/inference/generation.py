"""Answers to one prompt: what transformers' generate() is told, and what is kept of what it says.

Greedy, from an empty generation config with the checkpoint's token ids: `no_repeat_ngram_size` and the like in a
checkpoint change answers, and a comparison must not depend on what its author wrote there. What a run wants otherwise
it asks for by name.

Shapes: B samples, W vocabulary, S steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from budgets.registry import check_name
from visor.engine import decoder
from visor.families.base import FamilyAdapter
from visor.inference import collate
from visor.inference.prompt import Generation, Prompt, kept_over_image

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NO_ANSWER = ("transformers_version", "use_cache")  # fields that change no answer
NOT_ASKED = {
    **dict.fromkeys(TOKEN_IDS, "token ids are the checkpoint's"),
    "stop_strings": "an answer ends at the checkpoint's stop tokens",
    **dict.fromkeys(("max_new_tokens", "max_length"), "a task says how long its answers may be"),
    **dict.fromkeys(("do_sample", "num_return_sequences"), "answers are deterministic, one a sample: a run that is "
                    "continued gives the same bytes"),
    **dict.fromkeys(("cache_implementation", "cache_config", "prefill_chunk_size"), "schedules have a cache of their "
                    "own, and take a prompt in one piece"),
    **dict.fromkeys(("return_dict_in_generate", "output_logits", "output_scores", "output_attentions",
                     "output_hidden_states"), "it changes what is returned, not the answer"),
}  # fmt: skip
"""Settings that a run cannot ask for, and why."""


def own_settings(model: nn.Module) -> dict[str, Any]:
    """What a checkpoint's own generation config asks for beside token ids. It is recorded, and not followed."""
    found = model.generation_config.to_diff_dict()
    asks = lambda name: not name.startswith(("_", "output_")) and name not in (*TOKEN_IDS, *NO_ANSWER)
    return {name: value for name, value in found.items() if asks(name)}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse generation settings that transformers does not have, or that a run cannot ask for.

    Raises:
        ValueError: with the reason.
    """
    from transformers import GenerationConfig

    known = [name for name in GenerationConfig().to_dict() if not name.startswith("_")]
    for name in settings:
        check_name("generation setting", name, known)
        if name in NOT_ASKED:
            raise ValueError(f"generation setting {name!r} cannot be asked for: {NOT_ASKED[name]}")
    beams = settings.get("num_beams", 1)
    if isinstance(beams, bool) or not isinstance(beams, int) or beams < 1:
        raise ValueError(f"num_beams must be a positive integer, got {beams!r}")
    try:
        GenerationConfig(**settings).validate(strict=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"generation settings {dict(settings)}: {' '.join(str(error).split())}") from error


@contextmanager
def without_own_settings(model: nn.Module) -> Iterator[None]:
    """Within it, the model's own generation config holds its token ids and nothing else.

    generate() takes from there every field that the config it is given leaves open.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in TOKEN_IDS})
    try:
        yield
    finally:
        model.generation_config = own


class FiniteLogits:
    """Remembers, while it is attached, which samples had NaN or infinite logits at which step."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self._finite_B: list[Tensor] = []

    @contextmanager
    def attached(self, head: nn.Module) -> Iterator[None]:
        """Look at what the output embeddings say, before any logits processor writes infinities of its own."""
        handle = head.register_forward_hook(lambda _module, _args, logits_BPW: self._look(logits_BPW))
        try:
            yield
        finally:
            handle.remove()

    def _look(self, logits_BPW: Tensor) -> None:
        finite = torch.isfinite(logits_BPW[:, -1]).all(-1)
        self._finite_B.append(finite.view(self.num_samples, -1).all(1))  # beams of a sample stand next to each other

    def fault(self, sample: int, num_tokens: int) -> str | None:
        """What was wrong with a sample up to its stop token; None if nothing was. Behind it stands padding."""
        steps = torch.stack(self._finite_B[: num_tokens + 1], 1)[sample].tolist()
        if all(steps):
            return None
        return (
            f"the logits of answer token {steps.index(False)} are NaN or infinite: weights or activations out of the "
            "range of the dtype; try --dtype float32 or bfloat16"
        )


class FirstTokenProbability:
    """A logits processor that changes nothing and remembers how likely the first token was.

    Args:
        num_beams: rows of one sample, which begin alike.
        then: called once when the first tokens are known: the prefill is over.
    """

    def __init__(self, num_beams: int = 1, then: Callable[[], None] | None = None) -> None:
        self.num_beams = num_beams
        self._probability_B: Tensor | None = None
        self._then = then

    def __call__(self, input_ids: Tensor, scores_BW: Tensor) -> Tensor:
        if self._probability_B is None:
            self._probability_B = scores_BW[:: self.num_beams].float().softmax(-1).amax(-1)
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


def truncate_at_stop(ids: list[int], stop: set[int]) -> list[int]:
    """The tokens before the first that ends an answer; behind it stands padding, where a batch went on."""
    return ids[: next((index for index, token in enumerate(ids) if token in stop), len(ids))]


def answer_prompt(
    model: nn.Module,
    adapter: FamilyAdapter,
    tokenizer: Any,
    prompt: Prompt,
    max_new_tokens: int,
    settings: Mapping[str, Any] | None = None,
    stop_strings: Sequence[str] = (),
    on_first_token: Callable[[], None] | None = None,
) -> list[Generation]:
    """The answers to a batch, each up to its stop token or the first of the stop strings.

    One whose logits are not finite has an `error` and no text.

    Args:
        settings: of transformers' GenerationConfig, beside greedy decoding (`check_settings`).
        on_first_token: called between the prefill and the tokens after the first.
    """
    from transformers import GenerationConfig

    settings, stop, pad = dict(settings or {}), stop_ids(model), pad_id(model, tokenizer)
    num_samples, num_prompt = prompt.input_ids_BP.shape
    num_beams = settings.get("num_beams") or 1
    asked = {"do_sample": False, "pad_token_id": pad, "eos_token_id": sorted(stop) or None, **settings}
    first, finite = FirstTokenProbability(num_beams, on_first_token), FiniteLogits(num_samples)
    # Beams change places from step to step, so a row is no answer yet: theirs are cut once they are whole.
    stops_early = bool(stop_strings) and num_beams == 1
    stopping = StopStrings(tokenizer, stop_strings, num_prompt) if stops_early else None
    with (
        decoder.running(model, prompt.schedules),
        without_own_settings(model),
        finite.attached(model.get_output_embeddings()),
    ):
        sequences = model.generate(
            input_ids=prompt.input_ids_BP,
            attention_mask=prompt.attention_mask_BP,
            generation_config=GenerationConfig(max_new_tokens=max_new_tokens, **asked),
            logits_processor=[first],
            **({} if stopping is None else {"stopping_criteria": [stopping]}),
            **({} if prompt.grid_positions is None else {"position_ids": prompt.grid_positions}),
            **adapter.prompt_arguments(prompt.input_ids_BP),
            **collate.image_arguments(adapter, prompt),
        )
    reduces = any(op.reduce for op in prompt.schedules[0].layers)
    kept = kept_over_image(prompt, adapter.decoder.last_kept[::num_beams] if reduces else None)
    answers = []
    for index, ids in enumerate(sequences[:, num_prompt:].tolist()):
        new_ids = truncate_at_stop(ids, stop)
        if stopping is not None:  # what follows is padding, where a batch went on
            new_ids = new_ids[: stopping.num_tokens.get(index, len(new_ids))]
        if error := finite.fault(index, len(new_ids)):
            answers.append(Generation("", (), None, error=error))
            continue
        text = cut_at(tokenizer.decode(new_ids, skip_special_tokens=True), stop_strings)
        answers.append(Generation(text, tuple(new_ids), kept[index], first.confidence[index]))
    return answers
