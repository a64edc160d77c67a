"""A loaded model that answers questions about images under schedules, any mix of them in one batch.

    prepare -> encode (cacheable) -> generate, or prefill and decode apart for timing

`LoadedModel` is the door; behind it, `visor.inference.loading` reads the checkpoint, `visor.inference.chat` prepares
samples, `visor.vision.encode` encodes and reduces, `visor.inference.collate` makes prompts,
`visor.inference.generation` answers them, and `visor.engine.decoder` runs schedules. Every call is complete in itself:
nothing stays on the model.

Shapes: B samples, P padded prompt length, T visual tokens after reduction, D decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from budgets import geometry as geometries
from budgets.registry import METHODS
from budgets.schedule import LayerMode, Reduction, Schedule
from visor.engine import decoder
from visor.engine.compat import CACHE, cache_of, feature_layers
from visor.families.base import FamilyAdapter, adapter_for
from visor.inference import chat, checkpoint, collate, generation
from visor.inference.loading import load_model
from visor.inference.prompt import Generation, Prompt
from visor.vision import encode
from visor.vision.encode import VisionRow
from visor.vision.features import ReducedFeatures
from visor.vision.image import MAX_PIXELS
from visor.vision.prepared import PreparedSample

if TYPE_CHECKING:
    from PIL.Image import Image

    from visor.model.selection import Request, Selection


@dataclass
class GroupState:
    """Samples of one schedule structure between prefill and the tokens that follow. `members` are their places."""

    members: list[int]
    schedules: tuple[Schedule, ...]
    next_ids_B1: Tensor
    attention_mask_BP: Tensor
    next_positions_B1: Tensor
    cache: Any


class LoadedModel:
    """A vision-language model with its processor, family adapter and geometry.

    Attributes:
        model: the Hugging Face model, its decoder made elastic.
        processor: its processor.
        adapter, geometry: its family and its sizes.
        max_pixels: larger images are refused.
        name, path, checkpoint_sha256, card: which checkpoint it is; None where it was not loaded from a folder.
        generation: settings of transformers' GenerationConfig that answers are made with, beside greedy decoding.
        own_generation: what the checkpoint asks for there. It is told, and not followed.
        system: text of the turn before each question; None for what the chat template does by itself.
    """

    def __init__(self, model: torch.nn.Module, processor: Any, *, name: str | None = None) -> None:
        self.model = decoder.install(model.eval())
        self.processor = processor
        self.adapter: FamilyAdapter = adapter_for(model)
        self.geometry = geometries.from_config(model.config, name)
        self.max_pixels = MAX_PIXELS
        self.name = name
        self.generation: Mapping[str, Any] = {}
        self.own_generation = generation.own_settings(model)
        self.system: str | None = None
        self.path: Path | None = None
        self.checkpoint_sha256: str | None = None
        self.card: str | None = None

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        attention: str = "sdpa",
        generation_settings: Mapping[str, Any] | None = None,
        system: str | None = None,
    ) -> LoadedModel:
        """A model from a local folder, a bare name under `visor/checkpoints`, or a Hub id (`organisation/name`).

        Raises:
            ValueError: see `visor.inference.loading.load_model`; a setting that cannot be asked for; or a system text
                that the chat template leaves out.
        """
        generation.check_settings(generation_settings or {})
        model, folder = load_model(name_or_path, device, dtype, attention)
        name = folder.name if Path(name_or_path).exists() else str(name_or_path)
        loaded = cls(model, chat.load_processor(folder), name=name)
        loaded.path = folder
        loaded.checkpoint_sha256 = checkpoint.content_sha256(folder)
        loaded.card = checkpoint.read_card(folder)
        loaded.generation, loaded.system = dict(generation_settings or {}), system
        if system is not None:
            chat.check_system(loaded.processor, system)
        return loaded

    @cached_property
    def tower_sha256(self) -> str:
        """Hash of all that vision features come from: checkpoints that were fine-tuned around one tower share them."""
        modules = [self.adapter.tower, *([self.adapter.projector] if self.adapter.packs_tiles else [])]
        config = self.model.config
        strategy = getattr(config, "vision_feature_select_strategy", None)
        return checkpoint.modules_sha256(modules, repr([feature_layers(config), strategy]))

    @property
    def device(self) -> str:
        """Where the weights are: "cpu", "cuda:0", ..."""
        return str(self.model.device)

    @property
    def dtype(self) -> str:
        """What the weights are: a name of `visor.inference.loading.DTYPES`."""
        return str(self.model.dtype).removeprefix("torch.")

    # --- one sample -----------------------------------------------------------------------------------------------

    def prepare(self, image: Image | None, question: str) -> PreparedSample:
        """A user turn with the image and the question, through the processor's own chat template.

        Raises:
            ValueError: the question is empty or holds the image placeholder, or the image cannot be read.
        """
        if not isinstance(question, str):
            raise ValueError("the question is empty")
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if image is not None:
            content.insert(0, {"type": "image", "image": image})
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return self.prepare_chat([*system, {"role": "user", "content": content}])

    def prepare_chat(self, messages: Sequence[chat.Message]) -> PreparedSample:
        """A conversation of any number of turns and images, through the processor's own chat template
        (`visor.inference.chat`).

        Raises:
            ValueError: something else than texts and readable images, or no question at the end.
        """
        return chat.prepare(self.processor, self.adapter, messages, self.max_pixels)

    # --- from images to prompts -----------------------------------------------------------------------------------

    def encode(
        self,
        prepared: Sequence[PreparedSample],
        taps: Collection[str] = (),
        image_scale: float = 1.0,
        inside: Reduction | None = None,
    ) -> list[VisionRow]:
        """The tower's features, a row a sample (None without an image); equal images are encoded once.

        Args:
            taps: what methods must see of the tower: the union of their `taps`, or `encode.taps_of(schedules)`.
            image_scale: that of the schedules which will use the rows.
            inside: `visor.reduction.method.tower_reduction` of those schedules; such features serve no other method.
        """
        return encode.encode(self.adapter, prepared, taps, image_scale, inside)

    def resolve(self, vision: Sequence[VisionRow], schedules: Sequence[Schedule]) -> list[Schedule]:
        """The schedules with the counts that the images ask for, where a method adapts them; the others as they are.

        Raises:
            ValueError: such a method and a prompt of several images.
        """
        return encode.resolve(vision, schedules)

    def reduce(
        self,
        vision: Sequence[VisionRow],
        schedules: Sequence[Schedule],
        prepared: Sequence[PreparedSample] = (),
    ) -> list[ReducedFeatures | None]:
        """What enters the decoder, a row [1, T, D] a sample: reduced as the schedule says, and projected.

        Args:
            prepared: needed where a method reads the prompt's text.

        Raises:
            ValueError: features that were encoded for another schedule, or a method that leaves another number of
                tokens than its schedule says.
        """
        return encode.reduce(self.adapter, vision, schedules, prepared)

    def collate(
        self, prepared: Sequence[PreparedSample], vision: Sequence[VisionRow], schedules: Sequence[Schedule]
    ) -> Prompt:
        """A left-padded batch of samples whose schedules have one structure, with reduced features.

        Raises:
            ValueError: see `visor.inference.collate.collate_samples`.
        """
        pad_id = generation.pad_id(self.model, self.processor.tokenizer)
        return collate.collate_samples(self.adapter, prepared, vision, schedules, pad_id)

    def _prompts(
        self, prepared: Sequence[PreparedSample], vision: Sequence[VisionRow], schedules: Sequence[Schedule]
    ) -> Iterator[tuple[list[int], Prompt]]:
        """The samples grouped by the structure of their schedules: their places, and their batch."""
        self.check(schedules)
        for sample, schedule in zip(prepared, schedules, strict=True):
            self.check_length(sample, schedule)
        for members in collate.group_by_structure(schedules):
            yield members, self.collate(*([items[i] for i in members] for items in (prepared, vision, schedules)))

    # --- answers --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        prepared: Sequence[PreparedSample],
        vision: Sequence[VisionRow],
        schedules: Sequence[Schedule],
        max_new_tokens: int,
        stop_strings: Sequence[str] = (),
        on_first_token: Callable[[], None] | None = None,
    ) -> list[Generation]:
        """Answers in the order of the samples, whatever mix of schedules they have.

        Args:
            stop_strings: an answer ends before the first of them.
            on_first_token: called when the prefill of each group of equal structure is over.

        Raises:
            ValueError: a prompt that is longer than the decoder's context (`check_length`).
        """
        answers: list[Generation | None] = [None] * len(prepared)
        tokenizer = self.processor.tokenizer
        for members, prompt in self._prompts(prepared, vision, schedules):
            own = generation.answer_prompt(
                self.model, self.adapter, tokenizer, prompt, max_new_tokens, self.generation, stop_strings,
                on_first_token,
            )
            for index, answer in zip(members, own, strict=True):
                answers[index] = answer
        return answers

    def check_length(self, prepared: PreparedSample, schedule: Schedule) -> None:
        """Refuse a prompt that does not fit the decoder.

        Raises:
            ValueError: more tokens enter the decoder than it was made for; the message has both numbers.
        """
        length, context = prepared.num_text + schedule.decoder_visual, self.context_length
        if context is not None and length > context:
            raise ValueError(
                f"the prompt is longer than the decoder's context: {length} tokens enter it ({prepared.num_text} of "
                f"text, {schedule.decoder_visual} visual), it has positions for {context}"
            )

    @cached_property
    def context_length(self) -> int | None:
        """Positions that the decoder was made for, RoPE scaling included; None where its config does not say."""
        return chat.context_length(self.model.config.get_text_config())

    def check(self, schedules: Sequence[Schedule]) -> None:
        """Refuse schedules that this model cannot run.

        Raises:
            ValueError: another number of layers, CROSS layers without cross-attention blocks, or layers on visual
                tokens that a VISOR checkpoint was trained without.
        """
        for schedule in set(schedules):
            if schedule.num_layers != self.geometry.num_layers:
                raise ValueError(
                    f"the schedule has {schedule.num_layers} layers, the decoder {self.geometry.num_layers}"
                )
            needed = schedule.encoder and METHODS.get(schedule.encoder.method).needs_config
            if needed and not getattr(self.model.config, needed, None):
                raise ValueError(
                    f"{METHODS.get(schedule.encoder.method).title} runs on models trained for it, whose config says so "
                    f"by {needed!r}; this model's does not. `pooling` is the same without training"
                )
            trained = getattr(self.model.config, "trained_from", None)
            if trained is not None and schedule.decoder_visual:
                if untrained := sorted(set(schedule.layers_in(LayerMode.SELF)) - set(self.model.config.self_layers)):
                    raise ValueError(
                        f"layers {untrained} of this model never ran on visual tokens in training: run dense "
                        f"schedules, and reductions of a dense model, on its base {trained!r}"
                    )
            blocks = {int(layer) for layer in getattr(self.adapter.decoder, "cross_blocks", {})}
            missing = set(schedule.layers_in(LayerMode.CROSS)) - blocks
            if missing:
                raise ValueError(
                    f"this model has no trained cross-attention blocks at layers {sorted(missing)}: VISOR runs on "
                    "models trained for it; on others it can only be priced (python -m budgets.cost)"
                )

    # --- pieces, for timing ---------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prefill(
        self,
        prepared: Sequence[PreparedSample],
        vision: Sequence[VisionRow],
        schedules: Sequence[Schedule],
        num_new_tokens: int | None = None,
        request: Request | None = None,
    ) -> list[GroupState]:
        """From vision features to the first token: reduce, project, run the prompts.

        Args:
            request: what a VISOR model is to choose for each sample; `schedules` then only say what happens before the
                decoder.
            num_new_tokens: how many tokens will be asked for. The cache grows as it needs to; this is for backends
                that must reserve it.
        """
        states = []
        for members, prompt in self._prompts(prepared, vision, schedules):
            running = decoder.running(self.model, prompt.schedules)
            if request is not None:
                selection = self._select(request, [prepared[i] for i in members])
                running = decoder.running(self.model, selection.schedules, choose=selection.choose)
            with running:
                output = self.model(use_cache=True, logits_to_keep=1, **collate.forward_arguments(self.adapter, prompt))
            next_ids_B1 = output.logits[:, -1:].argmax(-1)
            mask_BP = torch.nn.functional.pad(prompt.attention_mask_BP, (0, 1), value=1)
            next_positions_B1 = prompt.positions_BP[..., -1:] + 1
            states.append(
                GroupState(members, prompt.schedules, next_ids_B1, mask_BP, next_positions_B1, cache_of(output))
            )
        return states

    @torch.inference_mode()
    def route(
        self,
        prepared: Sequence[PreparedSample],
        vision: Sequence[VisionRow],
        schedules: Sequence[Schedule],
    ) -> list[list[float]]:
        """What the router of a VISOR model says of each sample: a logit a configuration. Runs no further than it reads.

        Args:
            schedules: any configuration's: they say what happens before the decoder.

        Raises:
            ValueError: the model has no router.
        """
        from visor.model.selection import Request

        rows: list[list[float]] = [[]] * len(prepared)
        for members, prompt in self._prompts(prepared, vision, schedules):
            selection = self._select(Request(policy="router"), [prepared[i] for i in members])
            if selection.choose is None:  # there is nothing to choose
                for index in members:
                    rows[index] = [0.0] * len(self.model.config.configurations)
                continue
            with decoder.running(self.model, selection.schedules, choose=selection.choose, stop=True):
                self.model(use_cache=False, logits_to_keep=1, **collate.forward_arguments(self.adapter, prompt))
            for index, logits in zip(members, selection.router.logits.float().tolist(), strict=True):
                rows[index] = logits
        return rows

    def _select(self, request: Request, prepared: Sequence[PreparedSample]) -> Selection:
        from visor.model.selection import select

        if self.geometry.visor is None:
            raise ValueError(f"{self.name} has no configurations to choose from; a VISOR model has")
        lengths = [sample.num_visual for sample in prepared], [sample.num_text for sample in prepared]
        return select(self.model.config, self.geometry, getattr(self.model, "router", None), request, *lengths)

    @torch.inference_mode()
    def decode(self, states: Sequence[GroupState], num_tokens: int) -> Tensor:
        """The tokens after the first: ids [B, num_tokens] in the order of the samples, greedily, without stopping.

        `states` move on and may be continued.
        """
        num_samples = sum(len(state.members) for state in states)
        ids = torch.zeros((num_samples, num_tokens), dtype=torch.long, device=self.model.device)
        for state in states:
            with decoder.running(self.model, state.schedules):
                for step in range(num_tokens):
                    output = self.model(
                        input_ids=state.next_ids_B1,
                        attention_mask=state.attention_mask_BP,
                        position_ids=state.next_positions_B1,
                        use_cache=True,
                        **{CACHE: state.cache},
                    )
                    state.next_ids_B1 = output.logits[:, -1:].argmax(-1)
                    state.attention_mask_BP = torch.nn.functional.pad(state.attention_mask_BP, (0, 1), value=1)
                    state.next_positions_B1 = state.next_positions_B1 + 1
                    ids[state.members, step] = state.next_ids_B1[:, 0]
        return ids
