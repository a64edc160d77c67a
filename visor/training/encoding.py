"""From an example to token ids: one shared prefix up to the image, and a segment of text for each conversation.

Prompt and answer are tokenised apart, as at inference the prompt stands alone when the answer begins. Labels say the
next token where it is part of an answer; questions and visual tokens have none.

Shapes: B rows, P prefix tokens, T packed text tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

from torch import Tensor

from visor.training.auxiliary.scene_targets import TargetsOf, with_targets
from visor.training.data import BadRow, Example
from visor.training.rows import IGNORED, Row, Segment


class Encoder:
    """Examples to rows, through the processor's own chat template.

    Args:
        processor: of the model that is trained.
        image_token_ids: ids that stand for visual tokens.
        pixel_names: what the family's forward takes of an image.
        max_text_tokens: longer rows are skipped.
        hint_tokens: so many tokens before a prompt's last one are asked for the answer's first token too: a lookup by
            a key is then two steps from the key itself, before the answer has to fetch it from there. With such hints
            small models learned lookups within 350 steps, without them not in 1,500.
        targets_of: what the auxiliary losses ask of examples with a scene; None asks nothing.
    """

    def __init__(
        self,
        processor: Any,
        image_token_ids: Sequence[int],
        pixel_names: Sequence[str] = ("pixel_values",),
        max_text_tokens: int = 2048,
        hint_tokens: int = 0,
        targets_of: TargetsOf | None = None,
    ) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.image_ids, self.pixel_names = frozenset(image_token_ids), (*pixel_names, "image_sizes")
        self.max_text_tokens, self.hint_tokens, self.targets_of = max_text_tokens, hint_tokens, targets_of
        self._pieces: dict[tuple, tuple[list[int], list[list[int]]]] = {}
        self._prefixes: dict[tuple, tuple[int, ...]] = {}

    def encode(self, example: Example) -> Row:
        """The row of an example.

        Raises:
            BadRow: the text is too long, holds a special token, or the image tokens form no single block.
        """
        pixel_inputs, prefix = self._prefix(example)
        segments = tuple(self._segment(conversation) for conversation in example.conversations)
        num_visual = sum(token in self.image_ids for token in prefix)
        row = Row(example.key, prefix, num_visual, segments, pixel_inputs, example.kinds)
        if self.targets_of is not None and example.scene is not None:
            row = with_targets(row, self.targets_of(example.scene, isqrt(num_visual)))
        if row.num_text > self.max_text_tokens:
            raise BadRow(f"{row.num_text} text tokens, more than {self.max_text_tokens} (max_text_tokens)")
        return row

    def _prefix(self, example: Example) -> tuple[dict[str, Tensor], tuple[int, ...]]:
        """Pixels, and the token ids up to the last image token."""
        text = self._render([self._user(example.conversations[0][0][0], with_image=True)], prompt=True)
        mark = getattr(self.processor, "image_token", None)
        if mark and text.count(mark) > 1:
            raise BadRow(f"{text.count(mark)} image marks in the rendered prompt for one image")
        if not mark or mark not in text:
            inputs = self.processor(text=[text], images=[example.image], return_tensors="pt")
            return self._pixels(inputs), self._up_to_image(inputs["input_ids"])
        # How many tokens an image takes depends on its size alone, so the whole processor need not run again.
        key = example.image.size, text[: text.rindex(mark)]
        if key not in self._prefixes:
            inputs = self.processor(text=[text], images=[example.image], return_tensors="pt")
            self._prefixes[key] = self._up_to_image(inputs["input_ids"])
        return self._pixels(
            self.processor.image_processor(images=[example.image], return_tensors="pt")
        ), self._prefixes[key]

    def _pixels(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: inputs[name] for name in self.pixel_names if inputs.get(name) is not None}

    def _up_to_image(self, input_ids_1P: Tensor) -> tuple[int, ...]:
        ids = input_ids_1P[0].tolist()
        slots = [i for i, token in enumerate(ids) if token in self.image_ids]
        if not slots:
            raise BadRow("the processor put no image tokens into the prompt; is this its model's processor?")
        return tuple(ids[: slots[-1] + 1])

    def _user(self, text: str, with_image: bool) -> dict[str, Any]:
        image = [{"type": "image"}] if with_image else []
        return {"role": "user", "content": [*image, {"type": "text", "text": text}]}

    def _render(self, messages: list[dict[str, Any]], prompt: bool) -> str:
        return self.processor.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _segment(self, conversation: tuple[tuple[str, str], ...]) -> Segment:
        prompts, answers = self._conversation(conversation)
        ids: list[int] = []
        labels: list[int] = []
        hints: list[bool] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            num_hints = min(self.hint_tokens, len(prompt) - 1)
            quiet = len(prompt) - 1 - num_hints
            # The token before each answer token carries its label; the last answer token is no input of its own
            # unless another turn follows.
            ids += prompt + answer
            labels += [IGNORED] * quiet + [answer[0]] * num_hints + answer + [IGNORED]
            hints += [False] * quiet + [True] * num_hints + [False] * (len(answer) + 1)
        return Segment(tuple(ids[:-1]), tuple(labels[:-1]), tuple(hints[:-1]), len(prompts[0]) - 1)

    def _conversation(self, conversation: tuple[tuple[str, str], ...]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of each prompt and each answer (with its end); cached, as phrasings and words repeat."""
        if conversation in self._pieces:
            return self._pieces[conversation]
        messages: list[dict[str, Any]] = []
        prompts, answers, before = [], [], ""
        for turn, (question, answer) in enumerate(conversation):
            messages.append(self._user(question, with_image=turn == 0))
            asked = self._render(messages, prompt=True)
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
            said = self._render(messages, prompt=False)
            if not said.startswith(asked):  # a template without roles: the answer follows what inference asks with
                said = asked + answer
            if not asked.startswith(before):
                raise BadRow("the chat template renders a second turn so that it does not continue the first")
            prompt = self._tokens(asked[len(before) :])
            if turn == 0:
                slots = [i for i, token in enumerate(prompt) if token in self.image_ids]
                if len(slots) != 1:
                    raise BadRow(f"{len(slots)} image marks in the rendered prompt for one image")
                prompt = prompt[slots[0] + 1 :]
            spoken = self._tokens(said[len(asked) :])
            end = self.tokenizer.eos_token_id
            if end is not None and end not in spoken:
                spoken.append(end)
            if any(token in self.image_ids for token in (*prompt, *spoken)):
                raise BadRow("an image mark inside the text of a conversation")
            if not prompt or len(spoken) < 2:
                raise BadRow("an exchange has no tokens")
            prompts.append(prompt)
            answers.append(spoken)
            before = said
        if len(self._pieces) > 200_000:
            self._pieces.clear()
        self._pieces[conversation] = prompts, answers
        return prompts, answers
