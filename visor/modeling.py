"""`VisorForConditionalGeneration`: a Hugging Face model of a supported family that runs VISOR's configurations.

The base stays the real model, at `.base`; its decoder is made elastic and holds the cross-attention blocks. A call
says which configuration runs: an index (or one a sample), a share of the dense FLOPs, or the router's choice.

Shapes: B batch, P prompt length, A labelled positions, W vocabulary, D hidden width, C configurations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from budgets.schedule import LayerMode, LayerOp, Schedule, dense
from visor.configuration import VisorConfig
from visor.decoder import install, running
from visor.families.base import FamilyAdapter, adapter_for
from visor.router import Router

IGNORED = -100
POLICIES = ("router",)


@dataclass
class VisorOutput(ModelOutput):
    """What a forward returns.

    Args:
        loss: mean cross-entropy over the labelled text positions.
        logits: [B, P, W], or [A, W] of the labelled positions in reading order with `logits_to_keep="labels"`.
        configurations: [B], the configuration that each sample ran; -1 is the dense model.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    configurations: Tensor | None = None


class VisorForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A base model with cross-attention blocks, selectable SELF layers and, if configured, a router.

    `forward` and `generate` take, beside what the base takes, one of

        configuration: index in `config.configurations`, or one a sample; "dense" runs every layer on every token.
        budget: decoder prefill FLOPs relative to dense: the costliest configuration within it, per sample.
        policy: "router"; with `cost_weight=lambda` the cost-aware one.

    and without any of them run `config.default_configuration`.
    """

    config_class = VisorConfig
    config: VisorConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: VisorConfig) -> None:
        super().__init__(config)
        config.check()
        base = AutoModelForImageTextToText.from_config(config.base_config, dtype=torch.get_default_dtype())
        self._take(base)
        self.post_init()

    @classmethod
    def around(cls, base: nn.Module, config: VisorConfig) -> VisorForConditionalGeneration:
        """A VISOR model of a base that is there already; it is taken over, not copied."""
        config._attn_implementation = base.config._attn_implementation
        config.dtype = base.config.dtype
        model = cls.__new__(cls)
        PreTrainedModel.__init__(model, config)
        model._take(base)
        for module in model.modules():  # what the base has learned must not start anew
            module._is_hf_initialized = True
        model.post_init()
        return model.train(base.training)

    def _take(self, base: nn.Module) -> None:
        """Make a model the base, and add what VISOR adds."""
        config = self.config
        config.base_config = base.config  # one object: a resized vocabulary shows in both
        self.base = install(
            base, config.cross_layers, cross_kernel=config.cross_kernel, visual_source=config.visual_source
        )
        if config.router is not None:
            weight = next(base.parameters())
            width, inputs = base.config.get_text_config().hidden_size, config.router.get("inputs", ROUTER_DEFAULT)
            router = Router(width, inputs, config.router["hidden_size"], len(config.configurations))
            self.router = router.to(weight.device, weight.dtype)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Router):
            module.initialise()
        elif not any(module is inner for inner in getattr(self, "router", nn.Module()).modules()):
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

    def schedules(self, configurations: Sequence[int], num_visual: Sequence[int]) -> list[Schedule]:
        """The schedule of each sample.

        Raises:
            ValueError: an index that does not exist.
        """
        return [schedule_of(self.config, index, count) for index, count in zip(configurations, num_visual, strict=True)]

    @contextmanager
    def _running(self, inputs: dict[str, Any], configuration: Any) -> Iterator[None]:
        """Run the base under what the caller has asked for; inside an outer `visor.decoder.running`, under that."""
        decoder = self.get_decoder()
        if decoder._run is not None and configuration is None:
            yield
            return
        index = self.config.default_configuration if configuration is None else configuration
        with running(self.base, schedule_of(self.config, index, 0)):
            yield

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        configuration: Any = None,
        logits_to_keep: int | Tensor = 0,
        **inputs: Any,
    ) -> VisorOutput:
        """See the class."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **inputs}
        with self._running(inputs, configuration):
            outputs = self.adapter.inner(**inputs)
        hidden_BPD = outputs[0]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.get_output_embeddings()(hidden_BPD[:, kept])
        return VisorOutput(logits=logits, past_key_values=outputs.past_key_values)

    def generate(self, inputs: Tensor | None = None, *args: Any, configuration: Any = None, **kwargs: Any) -> Any:
        """The base's `generate`."""
        with self._running(kwargs, configuration):
            return self.base.generate(inputs, *args, **kwargs)


def schedule_of(config: VisorConfig, index: int | str, num_visual: int) -> Schedule:
    """The schedule of a configuration, by its index, or "dense"."""
    if index == "dense":
        return dense(config.num_layers, num_visual)
    chosen = config.configurations[config.check_index(index)]
    ops = [LayerOp(LayerMode.TEXT)] * config.num_layers
    for mode, layers in ((LayerMode.CROSS, config.cross_layers), (LayerMode.SELF, chosen)):
        for layer in layers:
            ops[layer] = LayerOp(mode)
    return Schedule(tuple(ops), num_visual)


ROUTER_DEFAULT = ("last", "text", "visual")
AutoModelForImageTextToText.register(VisorConfig, VisorForConditionalGeneration, exist_ok=True)
