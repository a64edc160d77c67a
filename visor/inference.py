"""A loaded model that answers questions about images under schedules, any mix of them in one batch.

    prepare -> encode (cacheable) -> reduce and project -> generate, or prefill and decode apart for timing

Encoder-side reduction shortens the block of image tokens in the prompt and feeds the reduced features through
transformers' own `mm_encoder_outputs`, so that positions are contiguous by construction. In-decoder reduction is the
engine's. Every call is complete in itself: nothing stays on the model.

Shapes: B samples, P padded prompt length, N visual tokens before reduction, T after it, D decoder width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from budgets import geometry as geometries
from budgets.registry import METHODS, nearest_first
from budgets.schedule import LayerMode, Reduction, Schedule
from visor import chat, checkpoint, decoder
from visor.families.base import FamilyAdapter, adapter_for
from visor.method import tower_reduction
from visor.prompt import Generation, PreparedSample, Prompt, arranged, kept_over_image, running_numbers
from visor.several import SeveralImages, images_of, joined, left_of_images, reductions
from visor.stopwatch import scoring
from visor.vision import ReducedFeatures, VisionFeatures, encode_images, project

if TYPE_CHECKING:
    from PIL.Image import Image

    from visor.selection import Request, Selection

__all__ = ["Generation", "GroupState", "LoadedModel", "PreparedSample", "available_devices", "taps_of"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTION_KERNELS = ("sdpa", "eager", "flash_attention_2")


@dataclass
class GroupState:
    """Samples of one schedule structure between prefill and the tokens that follow. `members` are their places."""

    members: list[int]
    schedules: tuple[Schedule, ...]
    next_ids_B1: Tensor
    attention_mask_BP: Tensor
    next_positions_B1: Tensor
    cache: Any


def available_devices() -> list[str]:
    """Names of the devices that this process can use."""
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return names + ["mps"] if torch.backends.mps.is_available() else names


def _device(name: str) -> torch.device:
    known = available_devices()
    accepted = {*known, *(["cuda"] if "cuda:0" in known else []), "cpu:0"}
    if name not in accepted:
        listed = ", ".join(nearest_first(str(name), known))
        raise ValueError(f"unknown device {name!r}; the devices that exist here, nearest first: {listed}")
    return torch.device(name)


def taps_of(schedules: Sequence[Schedule]) -> frozenset[str]:
    """What the encoder-side methods of these schedules must see of the tower."""
    names = {schedule.encoder.method for schedule in schedules if schedule.encoder}
    return frozenset().union(*(METHODS.get(name).taps for name in names))


class LoadedModel:
    """A vision-language model with its processor, family adapter and geometry.

    Attributes:
        model: the Hugging Face model, its decoder made elastic.
        processor: its processor.
        adapter, geometry: its family and its sizes.
        name, path, checkpoint_sha256, card: which checkpoint it is; None where it was not loaded from a folder.
    """

    def __init__(self, model: torch.nn.Module, processor: Any, *, name: str | None = None) -> None:
        self.model = decoder.install(model.eval())
        self.processor = processor
        self.adapter: FamilyAdapter = adapter_for(model)
        self.geometry = geometries.from_config(model.config, name)
        self.name = name
        self.path: Path | None = None
        self.checkpoint_sha256: str | None = None
        self.card: str | None = None

    @classmethod
    def load(
        cls, name_or_path: str | Path, device: str = "cpu", dtype: str = "float32", attention: str = "sdpa"
    ) -> LoadedModel:
        """A model from a local folder, a bare name under `visor/checkpoints`, or a Hub id (`organisation/name`).

        Raises:
            ValueError: no such model, device, dtype or kernel (the message lists those that exist), or weights that
                are truncated, corrupt, not finite or incomplete (the message names the file).
        """
        target = _device(device)
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; the dtypes that exist: {', '.join(DTYPES)}")
        if attention not in ATTENTION_KERNELS:
            raise ValueError(f"unknown attention {attention!r}; the kernels that exist: {', '.join(ATTENTION_KERNELS)}")
        folder = checkpoint.resolve(name_or_path)
        checkpoint.verify_weights(folder)
        from transformers import AutoModelForImageTextToText

        try:
            model, loading = AutoModelForImageTextToText.from_pretrained(
                folder,
                dtype=DTYPES[dtype],
                attn_implementation=attention,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise ValueError(
                f"{folder}: its weights are of another base model than its config.json describes (their sizes differ; "
                f"the lines above name them): put back the config.json that the weights were saved with ({error})"
            ) from error
        if loading["missing_keys"]:
            # transformers would go on with random weights in their place.
            names = ", ".join(sorted(loading["missing_keys"])[:5])
            raise ValueError(f"{folder} lacks {len(loading['missing_keys'])} weights of its model, such as {names}")
        processor = chat.load_processor(folder)
        loaded = cls(
            model.to(target), processor, name=folder.name if Path(name_or_path).exists() else str(name_or_path)
        )
        loaded.path = folder
        loaded.checkpoint_sha256 = checkpoint.content_sha256(folder)
        loaded.card = checkpoint.read_card(folder)
        return loaded

    @cached_property
    def tower_sha256(self) -> str:
        """Hash of all that vision features come from: checkpoints that were fine-tuned around one tower share them."""
        modules = [self.adapter.tower, *([self.adapter.projector] if self.adapter.packs_tiles else [])]
        config = self.model.config
        fields = ("vision_feature_layer", "vision_feature_select_strategy")
        return checkpoint.modules_sha256(modules, repr([getattr(config, field, None) for field in fields]))

    @property
    def device(self) -> str:
        """Where the weights are: "cpu", "cuda:0", ..."""
        return str(self.model.device)

    @property
    def dtype(self) -> str:
        """What the weights are: a key of `DTYPES`."""
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
        return self.prepare_chat([{"role": "user", "content": content}])

    def prepare_chat(self, messages: Sequence[chat.Message]) -> PreparedSample:
        """A conversation of any number of turns and images, through the processor's own chat template (`visor.chat`).

        Raises:
            ValueError: something else than texts and readable images, or no question at the end.
        """
        return chat.prepare(self.processor, self.adapter, messages)

    # --- images ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def encode(
        self,
        prepared: Sequence[PreparedSample],
        taps: Collection[str] = (),
        image_scale: float = 1.0,
        inside: Reduction | None = None,
    ) -> list[VisionFeatures | SeveralImages | None]:
        """The tower's features, a row a sample (None without an image); equal images are encoded once.

        Args:
            taps: what methods must see of the tower: the union of their `taps`, or `taps_of(schedules)`.
            image_scale: that of the schedules which will use the rows.
            inside: `visor.method.tower_reduction` of those schedules; such features serve no other method.
        """
        with_image = [sample for sample in prepared if sample.image_key is not None]
        if not with_image:
            return [None] * len(prepared)
        pixels, keys = [], []
        for sample in with_image:
            inputs = {
                name: value.to(self.model.device, self.model.dtype if value.is_floating_point() else None)
                for name, value in sample.pixel_inputs.items()
            }
            if sample.num_images == 1:
                pixels, keys = [*pixels, inputs], [*keys, sample.image_key]
                continue
            pixels += self.adapter.split_images(inputs, sample.num_images)
            keys += [f"{sample.image_key}/{i}" for i in range(sample.num_images)]
        rows = iter(encode_images(self.adapter, pixels, keys, taps, image_scale, inside))
        result: list[VisionFeatures | SeveralImages | None] = []
        for sample in prepared:
            images = [next(rows) for _ in range(sample.num_images)] if sample.image_key is not None else [None]
            result.append(images[0] if len(images) == 1 else SeveralImages(tuple(images)))
        return result

    @torch.inference_mode()
    def reduce(
        self,
        vision: Sequence[VisionFeatures | None],
        schedules: Sequence[Schedule],
        prepared: Sequence[PreparedSample] = (),
    ) -> list[ReducedFeatures | None]:
        """What enters the decoder, a row (B = 1) a sample: reduced as the schedule says, and projected.

        Samples of equal shape and equal reduction are computed together. `prepared` is needed where a method reads
        the prompt's text.
        """
        vision = list(vision)
        for index, sample in enumerate(prepared):
            encoder = schedules[index].encoder
            if vision[index] is not None and encoder is not None and METHODS.get(encoder.method).reads_text:
                text = (self.embedded_text(sample),)
                images = tuple(replace(image, text=text) for image in images_of(vision[index]))
                vision[index] = images[0] if len(images) == 1 else SeveralImages(images)
        groups: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
        for index, (sample, schedule) in enumerate(zip(vision, schedules, strict=True)):
            if sample is None:
                continue
            _check_row(sample, schedule)
            images = images_of(sample)
            shares = reductions(schedule.encoder, [image.num_tokens for image in images])
            for number, (image, reduction) in enumerate(zip(images, shares, strict=True)):
                groups[image.num_tokens, image.grid, image.stage, reduction].append((index, number))
        reduced_images: dict[tuple[int, int], ReducedFeatures] = {}
        for (*_, reduction), members in groups.items():
            stack = VisionFeatures.stack([images_of(vision[index])[number] for index, number in members])
            reduced = self._reduce_stack(stack, reduction).with_levels(stack)
            reduced_images.update({member: reduced.row(place) for place, member in enumerate(members)})
        results: list[ReducedFeatures | None] = [None] * len(vision)
        for index, sample in enumerate(vision):
            if sample is not None:
                images = images_of(sample)
                own = [reduced_images[index, number] for number in range(len(images))]
                results[index] = joined(own, [image.num_tokens for image in images])
        return results

    def embedded_text(self, sample: PreparedSample) -> Tensor:
        """The prompt's tokens that are not visual, as they enter layer 0: [num_text, D]."""
        image_ids = set(self.adapter.image_token_ids)
        ids = torch.tensor([token for token in sample.input_ids if token not in image_ids], device=self.model.device)
        return self.adapter.decoder.embed_tokens(ids)

    def resolve(self, vision: Sequence[VisionFeatures | None], schedules: Sequence[Schedule]) -> list[Schedule]:
        """The schedules with the counts that the images ask for, where a method adapts them; the others as they are."""
        resolved = []
        for row, schedule in zip(vision, schedules, strict=True):
            if row is not None and schedule.encoder is not None and METHODS.get(schedule.encoder.method).adaptive:
                if isinstance(row, SeveralImages):
                    raise ValueError(
                        f"{METHODS.get(schedule.encoder.method).title}: how many tokens stay follows from the image, "
                        f"and the prompt has {len(row.images)}; give a number"
                    )
                schedule = METHODS.get(schedule.encoder.method)(**dict(schedule.encoder.params)).resolve(schedule, row)
            resolved.append(schedule)
        return resolved

    def _reduce_stack(self, stack: VisionFeatures, reduction: Reduction | None) -> ReducedFeatures:
        if reduction is None:
            everything_BN = torch.ones(stack.features_BND.shape[:2], dtype=torch.bool, device=self.model.device)
            places_BN = torch.arange(stack.num_tokens, device=self.model.device).expand(len(everything_BN), -1)
            return ReducedFeatures(project(self.adapter, stack.features_BND, stack.stage), everything_BN, places_BN)
        method = METHODS.get(reduction.method)(**dict(reduction.params))
        if stack.inside is not None:
            features_BTD = project(self.adapter, stack.features_BND, stack.stage)
            return ReducedFeatures(features_BTD, stack.inside_kept_BM)
        if method.stage == "projected":
            projected_BND = project(self.adapter, stack.features_BND, stack.stage)
            stack = replace(stack, features_BND=projected_BND, stage="projected")
        with scoring():
            reduced = method.reduce_features(stack, reduction.keep)
        num_left = reduced.features_BTD.shape[1]
        if num_left != reduction.keep:
            raise ValueError(f"{method.title} left {num_left} visual tokens where the schedule says {reduction.keep}")
        return replace(reduced, features_BTD=project(self.adapter, reduced.features_BTD, stack.stage))

    # --- prompts --------------------------------------------------------------------------------------------------

    def assemble(
        self,
        prepared: Sequence[PreparedSample],
        vision: Sequence[VisionFeatures | None],
        schedules: Sequence[Schedule],
    ) -> Prompt:
        """A left-padded batch of samples whose schedules have one structure, with reduced features.

        Raises:
            ValueError: schedules of several structures, a schedule made for another number of visual tokens, or
                features that were encoded at another scale.
        """
        if len({schedule.structure for schedule in schedules}) > 1:
            raise ValueError("samples of one batch need schedules of one structure; generate() groups them")
        for sample, schedule, row in zip(prepared, schedules, vision, strict=True):
            if schedule.source_visual != sample.num_visual:
                raise ValueError(
                    f"the schedule is made for {schedule.source_visual} visual tokens, the sample has "
                    f"{sample.num_visual}"
                )
            if (row is None) != (sample.image_key is None):
                raise ValueError("vision features are needed for exactly the samples that have an image")
        reduced = self.reduce(vision, schedules, prepared)
        image_ids, in_place = set(self.adapter.image_token_ids), self.adapter.has_grid_positions
        sources, features, levels = [], [], []
        for sample, row, own in zip(prepared, vision, reduced, strict=True):
            if own is None:
                sources.append(list(range(len(sample.input_ids))))
                continue
            images = left_of_images(row, own, sample.num_visual)
            arrangement = arranged(sample.input_ids, image_ids, images, in_place)
            order = slice(None) if arrangement.order is None else arrangement.order
            sources.append(arrangement.sources)
            features.append(own.features_BTD[0][order])
            levels.append(tuple(level[0][order] for level in own.levels))
        longest = max(map(len, sources))
        pad = self._pad_id()
        prompts = [[sample.input_ids[i] for i in each] for sample, each in zip(prepared, sources, strict=True)]
        ids = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        mask_BP = torch.tensor(mask, device=self.model.device)
        return Prompt(
            torch.tensor(ids, device=self.model.device),
            mask_BP,
            tuple(features),
            tuple(schedules),
            tuple(None if row is None or row.kept_BN is None else row.kept_BN[0] for row in reduced),
            tuple(levels),
            self._grid_positions(prepared, sources, mask_BP) if in_place else None,
        )

    def _grid_positions(
        self, prepared: Sequence[PreparedSample], sources: Sequence[Sequence[int]], mask_BP: Tensor
    ) -> Tensor:
        """M-RoPE's position ids [4, B, P]: each token keeps the one that it has in the full prompt."""
        axes = []
        for sample, kept in zip(prepared, sources, strict=True):
            images = [sample.pixel_inputs] if sample.image_key is not None else []
            positions_AP = self.adapter.position_ids(sample.input_ids, images)[:, kept]
            axes.append(torch.nn.functional.pad(positions_AP, (mask_BP.shape[1] - len(kept), 0)))
        positions_ABP = torch.stack(axes, dim=1).to(mask_BP.device)
        return torch.cat([running_numbers(mask_BP)[None], positions_ABP])

    def _image_arguments(self, prompt: Prompt) -> dict[str, Any]:
        """What stands for the images in a forward. A new object each call: transformers may change it in place."""
        if not prompt.features:
            return {}
        return {"mm_encoder_outputs": self.adapter.image_outputs(prompt.features, prompt.levels)}

    def _pad_id(self) -> int:
        for owner in (self.model.generation_config, self.processor.tokenizer):
            if isinstance(owner.pad_token_id, int):
                return owner.pad_token_id
        return 0  # masked everywhere

    def _stop_ids(self) -> set[int]:
        stop = self.model.generation_config.eos_token_id
        return set() if stop is None else {stop} if isinstance(stop, int) else set(stop)

    # --- answers --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(
        self,
        prepared: Sequence[PreparedSample],
        vision: Sequence[VisionFeatures | None],
        schedules: Sequence[Schedule],
        max_new_tokens: int,
    ) -> list[Generation]:
        """Greedy answers in the order of the samples, whatever mix of schedules they have."""
        answers: list[Generation | None] = [None] * len(prepared)
        for members, prompt in self._prompts(prepared, vision, schedules):
            for index, answer in zip(members, self._generate(prompt, max_new_tokens), strict=True):
                answers[index] = answer
        return answers

    def _prompts(
        self,
        prepared: Sequence[PreparedSample],
        vision: Sequence[VisionFeatures | None],
        schedules: Sequence[Schedule],
    ) -> Iterator[tuple[list[int], Prompt]]:
        """The samples grouped by the structure of their schedules: their places, and their batch."""
        self.check(schedules)
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for index, schedule in enumerate(schedules):
            groups[schedule.structure].append(index)
        for members in groups.values():
            yield members, self.assemble(*([items[i] for i in members] for items in (prepared, vision, schedules)))

    def _generate(self, prompt: Prompt, max_new_tokens: int) -> list[Generation]:
        from transformers import GenerationConfig

        first = FirstToken()
        # Every field that a checkpoint's own generation_config may set is set here: greedy means the same for all.
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, top_k=50,
            repetition_penalty=1.0, pad_token_id=self._pad_id(), eos_token_id=sorted(self._stop_ids()) or None,
        )  # fmt: skip
        with decoder.running(self.model, prompt.schedules):
            sequences = self.model.generate(
                input_ids=prompt.input_ids_BP,
                attention_mask=prompt.attention_mask_BP,
                generation_config=greedy,
                logits_processor=[first],
                **({} if prompt.grid_positions is None else {"position_ids": prompt.grid_positions}),
                **self._image_arguments(prompt),
            )
        reduces = any(op.reduce for op in prompt.schedules[0].layers)
        kept = kept_over_image(prompt, self.adapter.decoder.last_kept if reduces else None)
        new_ids = sequences[:, prompt.input_ids_BP.shape[1] :].tolist()
        return [self._answer(*each) for each in zip(new_ids, kept, first.confidence, strict=True)]

    def _answer(self, token_ids: list[int], kept: list[bool] | None, confidence: float | None = None) -> Generation:
        stop = self._stop_ids()
        end = next((index for index, token in enumerate(token_ids) if token in stop), len(token_ids))
        text = self.processor.tokenizer.decode(token_ids[:end], skip_special_tokens=True).strip()
        return Generation(text, tuple(token_ids[:end]), kept, confidence)

    def check(self, schedules: Sequence[Schedule]) -> None:
        """Refuse schedules that this model cannot run.

        Raises:
            ValueError: another number of layers, or CROSS layers without cross-attention blocks.
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
        vision: Sequence[VisionFeatures | None],
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
                output = self.model(
                    input_ids=prompt.input_ids_BP,
                    attention_mask=prompt.attention_mask_BP,
                    position_ids=prompt.positions_BP,
                    use_cache=True,
                    logits_to_keep=1,
                    **self._image_arguments(prompt),
                )
            next_ids_B1 = output.logits[:, -1:].argmax(-1)
            mask_BP = torch.nn.functional.pad(prompt.attention_mask_BP, (0, 1), value=1)
            next_positions_B1 = prompt.positions_BP[..., -1:] + 1
            states.append(
                GroupState(members, prompt.schedules, next_ids_B1, mask_BP, next_positions_B1, output.past_key_values)
            )
        return states

    @torch.inference_mode()
    def route(
        self,
        prepared: Sequence[PreparedSample],
        vision: Sequence[VisionFeatures | None],
        schedules: Sequence[Schedule],
    ) -> list[list[float]]:
        """What the router of a VISOR model says of each sample: a logit a configuration. Runs no further than it reads.

        Args:
            schedules: any configuration's: they say what happens before the decoder.

        Raises:
            ValueError: the model has no router.
        """
        from visor.selection import Request

        rows: list[list[float]] = [[]] * len(prepared)
        for members, prompt in self._prompts(prepared, vision, schedules):
            selection = self._select(Request(policy="router"), [prepared[i] for i in members])
            if selection.choose is None:  # there is nothing to choose
                for index in members:
                    rows[index] = [0.0] * len(self.model.config.configurations)
                continue
            with decoder.running(self.model, selection.schedules, choose=selection.choose, stop=True):
                self.model(
                    input_ids=prompt.input_ids_BP,
                    attention_mask=prompt.attention_mask_BP,
                    position_ids=prompt.positions_BP,
                    use_cache=False,
                    logits_to_keep=1,
                    **self._image_arguments(prompt),
                )
            for index, logits in zip(members, selection.router.logits.float().tolist(), strict=True):
                rows[index] = logits
        return rows

    def _select(self, request: Request, prepared: Sequence[PreparedSample]) -> Selection:
        from visor.selection import select

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
                        past_key_values=state.cache,
                        use_cache=True,
                    )
                    state.next_ids_B1 = output.logits[:, -1:].argmax(-1)
                    state.attention_mask_BP = torch.nn.functional.pad(state.attention_mask_BP, (0, 1), value=1)
                    state.next_positions_B1 = state.next_positions_B1 + 1
                    ids[state.members, step] = state.next_ids_B1[:, 0]
        return ids


class FirstToken:
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


def _check_row(row: VisionFeatures, schedule: Schedule) -> None:
    if row.image_scale != schedule.image_scale:
        raise ValueError(
            f"the vision features were encoded at image_scale={row.image_scale}, the schedule needs "
            f"{schedule.image_scale}"
        )
    if row.inside != tower_reduction(schedule):
        raise ValueError(
            f"the vision features were encoded with inside={row.inside}, the schedule needs {tower_reduction(schedule)}"
        )
    if row.inside is None and schedule.image_scale == 1.0 and row.num_tokens != schedule.source_visual:
        raise ValueError(f"the tower gave {row.num_tokens} tokens, the schedule is made for {schedule.source_visual}")
