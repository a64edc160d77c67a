"""`VisorForConditionalGeneration`: a Hugging Face model of a supported family that runs VISOR's configurations.

The base stays the real model, at `.base`; its decoder is made elastic and holds the cross-attention blocks. A call
says which configuration runs: an index (or one a sample), a share of the dense FLOPs, or the router's choice.

Shapes: B batch, P prompt length, A labelled positions, W vocabulary, D hidden width, C configurations, R routing
vector.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationMixin, PreTrainedModel

from budgets.geometry import ModelGeometry, from_config
from budgets.schedule import Schedule
from visor.engine.cache import ElasticCache
from visor.engine.compat import (
    CACHE,
    CausalLMOutputWithPast,
    cache_argument,
    cache_of,
    one_cache,
    start_weights,
)
from visor.engine.cross_attention import weight_placement
from visor.engine.decoder import install, running
from visor.families.base import FamilyAdapter, adapter_for
from visor.model.configuration import ROUTER_INPUTS, VisorConfig
from visor.model.router import Router, RouterOutput
from visor.model.selection import Request, Selection, schedule_of, select
from visor.model.token_reduction import reduce_inputs

IGNORED = -100


@dataclass
class VisorOutput(CausalLMOutputWithPast):
    """What a forward returns: transformers' own fields, `cache` or `past_key_values` among them, and the choices.

    Args:
        loss: cross-entropy over the labelled text positions: their mean, or their sum over `num_items_in_batch`.
        logits: [B, P, W]; [A, W] of the labelled positions in reading order with `logits_to_keep="labels"`; None while
            training with labels, unless asked for.
        configurations: [B], the configuration that each sample ran; -1 is the dense model, None a later token.
    """

    configurations: Tensor | None = None


class VisorForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A base model with cross-attention blocks, selectable SELF layers and, if configured, a router.

    `forward` and `generate` take, beside what the base takes, one of

        configuration: index in `config.configurations`, or one a sample; "dense" runs every layer on every token, which
            is the base to the bit, and refused where `config.trained_from` says that it no longer is.
        budget: decoder prefill FLOPs relative to dense: the costliest configuration within it, per sample.
        policy: "router"; with `cost_weight=lambda` the cost-aware one.

    and without any of them run `config.default_configuration`. Samples of one batch may differ: what their
    configurations share runs once. With `config.reduction`, prompts are shortened on the way in: logits and positions
    are those of the shortened prompt (the last is still the last), `generate` returns the ids that it was given.

    Training: give `labels` (or `shift_labels`, already shifted). The loss is taken of text that text predicts, never at
    visual tokens. Several texts behind one image: `segment_ids` (see `visor.engine.decoder.running`) with
    `position_ids` and `use_cache=False`.
    """

    config_class = VisorConfig
    config: VisorConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _keep_in_fp32_modules = None
    _skip_keys_device_placement = [CACHE]  # layers on several devices each keep their own part of it

    def __init__(self, config: VisorConfig) -> None:
        super().__init__(config)
        config.check()
        base = AutoModelForImageTextToText.from_config(config.base_config, dtype=torch.get_default_dtype())
        self._attach_base(base)
        self.post_init()

    @classmethod
    def from_base(cls, base: nn.Module, config: VisorConfig) -> VisorForConditionalGeneration:
        """A VISOR model of a base that exists already; the base becomes part of it and is not copied."""
        config._attn_implementation = base.config._attn_implementation
        config.dtype = base.config.dtype
        model = cls.__new__(cls)
        PreTrainedModel.__init__(model, config)
        model._attach_base(base)
        for module in model.modules():  # what the base has learned must not start anew
            module._is_hf_initialized = True
        model.post_init()
        return model.train(base.training)

    def _attach_base(self, base: nn.Module) -> None:
        """Make a model the base, and add cross-attention blocks and, if configured, a router."""
        config = self.config
        config.base_config = base.config  # one object: a resized vocabulary shows in both
        self.base = install(
            base, config.cross_layers, cross_kernel=config.cross_kernel, visual_source=config.visual_source
        )
        if config.router is not None:
            self._make_router()

    def _make_router(self) -> None:
        config = self.config
        width, inputs = config.get_text_config().hidden_size, config.router.get("inputs", ROUTER_INPUTS)
        router = Router(width, inputs, config.router["hidden_size"], len(config.configurations))
        self.router = router.to(*weight_placement(self.get_output_embeddings(), self.get_decoder().norm))

    def _init_weights(self, module: nn.Module) -> None:
        if not start_weights(module):
            super()._init_weights(module)

    # --- parts, as transformers asks for them ---------------------------------------------------------------------

    @property
    def adapter(self) -> FamilyAdapter:
        """The view on the base's family."""
        return adapter_for(self.base)

    @property
    def generation_config(self) -> Any:
        """The base's own: it is the base that generates."""
        base = self._modules.get("base")
        return self.__dict__.get("_generation_config") if base is None else base.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        base = self._modules.get("base")
        if base is None:  # while transformers constructs this model
            self.__dict__["_generation_config"] = value
        else:
            base.generation_config = value

    def get_decoder(self) -> nn.Module:
        return self.base.get_decoder()

    def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.base.get_encoder(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.base.set_output_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.base.resize_token_embeddings(*args, **kwargs)

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        return self.base.get_image_features(*args, **kwargs)

    # --- configurations -------------------------------------------------------------------------------------------

    @cached_property
    def _geometry(self) -> ModelGeometry:
        return from_config(self.config.to_dict())

    def schedules(self, configurations: Sequence[int], num_visual: Sequence[int]) -> list[Schedule]:
        """The schedule of each sample.

        Raises:
            ValueError: an index that does not exist.
        """
        return [schedule_of(self.config, index, n) for index, n in zip(configurations, num_visual, strict=True)]

    def set_configurations(self, configurations: Sequence[Sequence[int]], default: int = -1) -> None:
        """Put a list of viable configurations in the place of the present one. A router starts anew.

        Raises:
            ValueError: a layer that is no slot, or another order than cheapest first.
        """
        before = self.config.configurations, self.config.default_configuration
        self.config.configurations = [list(subset) for subset in configurations]
        self.config.default_configuration = default
        try:
            self.config.check()
        except ValueError:
            self.config.configurations, self.config.default_configuration = before
            raise
        self.__dict__.pop("_geometry", None)
        if self.config.router is not None:
            self._make_router()

    def add_router(self, hidden_size: int, inputs: Sequence[str] = ROUTER_INPUTS) -> Router:
        """A new router over the present configurations, instead of one that there may be."""
        before, self.config.router = self.config.router, {"hidden_size": hidden_size, "inputs": list(inputs)}
        try:
            self.config.check()
        except ValueError:
            self.config.router = before
            raise
        self.__dict__.pop("_geometry", None)
        self._make_router()
        return self.router

    @torch.no_grad()
    def routing_vectors(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """What the router reads of each sample, [B, R]: the layers before the first choice run, and no other.

        Raises:
            ValueError: there is no router, or nothing to choose.
        """
        if self.config.router is None or self.config.router_layer is None:
            what = "no router" if self.config.router is None else "one configuration only"
            raise ValueError(f"this model has {what}; see add_router and set_configurations")
        vectors: list[Tensor] = []

        def record_vector(streams: Any) -> list[int]:
            vectors.append(self.router.vector(streams))
            return [0] * len(streams.num_text)

        inputs = self._prepared({"input_ids": input_ids, "attention_mask": attention_mask, **inputs})
        alternatives = self.schedules(range(len(self.config.configurations)), [0] * len(self.config.configurations))
        with running(self.base, alternatives, choose=record_vector, stop=True):
            self.adapter.inner(**inputs, use_cache=False)
        return vectors[0]

    @torch.no_grad()
    def route(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any) -> RouterOutput:
        """What the router says about each sample."""
        vectors = self.routing_vectors(input_ids, attention_mask, **inputs)
        return RouterOutput(self.router(vectors))

    # --- running --------------------------------------------------------------------------------------------------

    def _prepared(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The forward's arguments, with fewer visual tokens if the config says so."""
        fed = any(inputs.get(name) is not None for name in self.adapter.raw_image_inputs)
        if self.config.reduction is None or not fed or inputs.get("input_ids") is None:
            return inputs
        cache = cache_argument(inputs)
        if cache is not None and cache.get_seq_length() > 0:
            return inputs  # a later turn: the images of the prompt are in the cache
        return reduce_inputs(self.adapter, self._geometry, self.config.reduction, inputs).inputs

    def _lengths(self, inputs: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Visual and text tokens of each sample, on the host."""
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if ids is None:
            embeds = inputs["inputs_embeds"]
            return [0] * len(embeds), [embeds.shape[1]] * len(embeds)
        ids = ids.to("cpu")
        real_BP = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to("cpu").bool()
        visual_BP = self._visual(ids, inputs) & real_BP
        return visual_BP.sum(1).tolist(), (real_BP & ~visual_BP).sum(1).tolist()

    def _visual(self, ids_BP: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Which tokens of a prompt are visual, [B, P]."""
        if not self.adapter.images_are_fed(inputs):
            return torch.zeros_like(ids_BP, dtype=torch.bool)
        return torch.isin(ids_BP, torch.tensor(self.adapter.image_token_ids, device=ids_BP.device))

    @contextmanager
    def _running(self, request: Request, inputs: dict[str, Any], segments: Tensor | None = None) -> Iterator[Any]:
        """Run the base under what the caller has asked for; inside an outer `visor.engine.running`, under that."""
        cache = cache_argument(inputs)
        goes_on = cache is not None and cache.get_seq_length() > 0
        if goes_on and not request.is_empty:
            raise ValueError("later tokens of a sequence run as its prompt has; give the configuration with the prompt")
        if goes_on or (self.get_decoder()._run is not None and request.is_empty):
            yield None
            return
        router = self.router if self.config.router is not None else None
        geometry = self._geometry if request.needs_prices else None
        selection = select(self.config, geometry, router, request, *self._lengths(inputs))
        with running(self.base, selection.schedules, choose=selection.choose, segments=segments):
            yield selection

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        shift_labels: Tensor | None = None,
        segment_ids: Tensor | None = None,
        configuration: Any = None,
        budget: float | None = None,
        policy: str | None = None,
        cost_weight: float | None = None,
        logits_to_keep: int | str | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        return_dict: bool | None = None,
        past_key_values: Any = None,
        **inputs: Any,
    ) -> VisorOutput | tuple:
        """See the class.

        Raises:
            ValueError: what is asked for does not exist, or tokens and images do not match.
        """
        request = Request(configuration, budget, policy, cost_weight)
        inputs |= {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
                   CACHE: one_cache(cache, past_key_values), "inputs_embeds": inputs_embeds}  # fmt: skip
        aligned = {"labels": labels, "shift_labels": shift_labels, "segment_ids": segment_ids}
        inputs = self._prepared({**inputs, **aligned})
        labels, shift_labels, segment_ids = (inputs.pop(name) for name in aligned)
        with self._running(request, inputs, segment_ids) as selection:
            outputs = self.adapter.inner(**inputs)
        hidden_BPD, head = outputs[0], self.get_output_embeddings()
        result = VisorOutput(
            **{CACHE: cache_of(outputs)},
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            configurations=_chosen(selection, hidden_BPD),
        )
        only_labels = isinstance(logits_to_keep, str)
        if only_labels and (logits_to_keep != "labels" or (labels is None and shift_labels is None)):
            raise ValueError(f'logits_to_keep is a number, positions, or "labels" with labels, got {logits_to_keep!r}')
        if labels is not None or shift_labels is not None:
            target_BP = self._targets(inputs, labels, shift_labels, segment_ids)
            labelled_BP = target_BP != IGNORED
            logits_AW = head(hidden_BPD[labelled_BP])
            total = F.cross_entropy(logits_AW.float(), target_BP[labelled_BP], reduction="sum")
            result.loss = total / (labelled_BP.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
            if only_labels:
                result.logits = logits_AW
        logits_unused = isinstance(logits_to_keep, int) and logits_to_keep == 0 and self.training
        if not only_labels and not (logits_unused and result.loss is not None):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            result.logits = head(hidden_BPD[:, kept])
        return result.to_tuple() if return_dict is False else result

    def _targets(
        self, inputs: dict[str, Any], labels: Tensor | None, shift_labels: Tensor | None, segment_ids: Tensor | None
    ) -> Tensor:
        """What each position is to predict, [B, P]: text predicts text, and of its own segment."""
        if labels is not None and shift_labels is not None:
            raise ValueError("give labels, or shift_labels (already shifted), not both")
        ids_BP = inputs["input_ids"]
        if ids_BP is None:
            raise ValueError("labels need input_ids: they tell which positions are text")
        text_BP = ~self._visual(ids_BP, inputs)
        if inputs.get("attention_mask") is not None:
            text_BP &= inputs["attention_mask"].bool()
        if shift_labels is not None:
            return shift_labels.masked_fill(~text_BP, IGNORED)
        follows_BP = text_BP[:, :-1] & text_BP[:, 1:]
        if segment_ids is not None:
            follows_BP &= segment_ids[:, :-1] == segment_ids[:, 1:]
        return F.pad(labels[:, 1:].masked_fill(~follows_BP, IGNORED), (0, 1), value=IGNORED)

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        *,
        configuration: Any = None,
        budget: float | None = None,
        policy: str | None = None,
        cost_weight: float | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's `generate`: caches, beams, sampling, streamers, as it has them."""
        request = Request(configuration, budget, policy, cost_weight)
        if inputs is not None:
            kwargs["input_ids"] = inputs
        given, given_ids = kwargs, kwargs.get("input_ids")
        kwargs = self._prepared(kwargs)
        if given_ids is None or kwargs["input_ids"] is given_ids:
            with self._running(request, kwargs):
                return self.base.generate(generation_config=generation_config, **kwargs)
        num_gone = given_ids.shape[1] - kwargs["input_ids"].shape[1]
        generation_config = self._total_lengths(generation_config, kwargs, num_gone)
        with self._running(request, kwargs):
            output = self.base.generate(generation_config=generation_config, **kwargs)
        num_real = lambda mask_BP: mask_BP.sum(1, keepdim=True)
        given_mask = given.get("attention_mask")
        real_B1 = num_real(torch.ones_like(given_ids) if given_mask is None else given_mask.long())
        shift_B1 = real_B1 - num_real(kwargs["attention_mask"])
        return _with_prompt(output, given_ids, kwargs["input_ids"].shape[1], shift_B1)

    def _total_lengths(self, generation_config: Any, kwargs: dict[str, Any], num_gone: int) -> Any:
        """The settings of a shortened prompt: total lengths count the prompt as it was given, so they fall with it.

        Changes `kwargs`, and returns the generation config to use.

        Raises:
            ValueError: a total length that the prompt alone exceeds.
        """
        own = self.generation_config
        shorter = copy.deepcopy(generation_config)
        for name in ("max_length", "min_length"):
            if kwargs.get(name) is not None:
                holder, value = "kwargs", kwargs[name]
            else:
                holder = "config"
                value = getattr(generation_config, name, None)
                value = getattr(own, name, None) if value is None else value
            if value is None:
                continue
            left = value - num_gone
            given = kwargs["input_ids"].shape[1] + num_gone
            if name == "max_length" and value <= given and not _says_new_tokens(kwargs, generation_config, own):
                raise ValueError(f"max_length is {value}, the prompt has {given} tokens; give max_new_tokens")
            if holder == "config" and generation_config is not None:
                setattr(shorter, name, max(left, 0))
            else:
                kwargs[name] = max(left, 0)
        return shorter


def _chosen(selection: Selection | None, like: Tensor) -> Tensor | None:
    return None if selection is None else torch.tensor(selection.chosen, device=like.device)


def _says_new_tokens(*settings: Any) -> bool:
    """True if one of these says how many new tokens are wanted, which goes before any total length."""
    name = "max_new_tokens"
    return any((s.get(name) if isinstance(s, dict) else getattr(s, name, None)) is not None for s in settings)


def _with_prompt(output: Any, prompt_ids: Tensor, reduced_length: int, shift_B1: Tensor) -> Any:
    """What was generated behind the prompt as it was given, in the place of the shortened one.

    The cache then counts the given prompt too: a second turn repeats these ids, and transformers feeds what the cache
    has not seen of them.

    Args:
        shift_B1: how many real tokens of each row are gone.
    """
    ids = output if isinstance(output, Tensor) else output.sequences
    repeats = len(ids) // len(prompt_ids)  # beams that are returned
    ids = torch.cat([prompt_ids.repeat_interleave(repeats, 0), ids[:, reduced_length:]], 1)
    if isinstance(output, Tensor):
        return ids
    output.sequences = ids
    cache = cache_of(output)
    if isinstance(cache, ElasticCache):
        cache.count_as(prompt_ids.shape[1] - reduced_length, shift_B1)
    elif cache is not None:
        raise ValueError(
            f"a {type(cache).__name__} cannot count tokens that a reduction left out, and a second turn would feed it "
            "the wrong ones; leave cache_implementation unset, or return_dict_in_generate"
        )
    return output
