"""What a VISOR model is beside its base: which layers read the image, which may rework it, and what it may choose from.

It knows neither the model nor how transformers comes to know both: `visor.model.registration` ties them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

from budgets.registry import METHODS
from visor.reduction.method import Method

VISUAL_SOURCES = ("latest", "initial")
ROUTER_INPUTS = ("last", "text", "visual")


class VisorConfig(PreTrainedConfig):
    """Configuration of a VISOR model.

    Args:
        base_config: config of the base model (LLaVA, LLaVA-OneVision, ...), an object or a dict with its model_type.
        cross_layers: decoder layers with a cross-attention block (L_CA). A layer may be a slot or have a block, not
            both.
        self_layers: slots (L_SA): decoder layers that may run on the whole sequence.
        cross_kernel: width of the depth-wise convolution over the visual tokens, odd.
        visual_source: what a CROSS layer reads: the "latest" visual tokens, reworked by the SELF layers before it, or
            the "initial" ones, as they entered the decoder (the sources disagree).
        configurations: viable subsets of the slots, cheapest first; a configuration index is a place in this list.
            Default: none of the slots, and all of them.
        default_configuration: index used where a call names none; -1 is the last.
        router: None, or {"hidden_size": int, "inputs": [...]} with inputs from `ROUTER_INPUTS`.
        reduction: None, or {"method": name, "params": {...}}: an encoder-side method that leaves fewer visual tokens
            before the decoder (VISOR-TR).
        trained_from: name of the base whose own weights were trained on under these configurations; None while they are
            the base's, as after a conversion. Under "dense" only the latter is the base: training never ran all layers
            on all tokens.

    Raises:
        ValueError: what does not fit, the value, and what is allowed.
    """

    model_type = "visor"
    sub_configs: ClassVar[dict[str, Any]] = {"base_config": AutoConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # a list: the Trainer adds one to it
    before_use: ClassVar[Callable[[], None] | None] = None  # set by `registration`: it registers the model

    base_config: Any = None
    cross_layers: Any = None
    self_layers: Any = None
    cross_kernel: int = 7
    visual_source: str = "latest"
    configurations: Any = None
    default_configuration: int = -1
    router: Any = None
    reduction: Any = None
    trained_from: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.base_config is None:
            self.base_config = {"model_type": "llava"}
        if isinstance(self.base_config, dict):
            self.base_config = _config_of(self.base_config)
        self.cross_layers, self.self_layers = list(self.cross_layers or ()), list(self.self_layers or ())
        if self.configurations is None:
            self.configurations = [[], self.self_layers] if self.self_layers else [[]]
        self.configurations = [list(subset) for subset in self.configurations]
        kwargs.setdefault("tie_word_embeddings", getattr(self.base_config, "tie_word_embeddings", False))
        super().__post_init__(**kwargs)
        self.check()
        if VisorConfig.before_use is not None:
            VisorConfig.before_use()

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Of the base's decoder."""
        return self.base_config.get_text_config(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Token ids and the like, which pipelines and trainers ask of any multi-modal config, are the base's.
        base = self.__dict__.get("base_config")
        if name.startswith("_") or base is None or isinstance(base, dict):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(base, name)

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return self.base_config.get_text_config().num_hidden_layers

    def check(self) -> None:
        """Refuse what does not fit together; to be called after a change of the fields."""
        last = self.num_layers - 1
        for name in ("cross_layers", "self_layers"):
            _check_layers(name, getattr(self, name), last)
        if both := sorted(set(self.cross_layers) & set(self.self_layers)):
            raise ValueError(f"layers {both} are in cross_layers and in self_layers; a layer can only be in one")
        if not isinstance(self.cross_kernel, int) or self.cross_kernel < 1 or self.cross_kernel % 2 == 0:
            raise ValueError(f"cross_kernel must be odd and positive, got {self.cross_kernel!r}")
        if self.visual_source not in VISUAL_SOURCES:
            raise ValueError(f"visual_source must be one of {', '.join(VISUAL_SOURCES)}, got {self.visual_source!r}")
        if not self.configurations:
            raise ValueError("configurations is empty; a model needs at least one, such as [] (no SELF layer)")
        for index, subset in enumerate(self.configurations):
            _check_layers(f"configurations[{index}]", subset, last)
            if wrong := sorted(set(subset) - set(self.self_layers)):
                raise ValueError(
                    f"configurations[{index}] names layers {wrong}, no slots; the slots are {self.self_layers}"
                )
        sizes = [len(subset) for subset in self.configurations]
        if sizes != sorted(sizes):
            raise ValueError(
                f"configurations must be ordered from cheapest to costliest; they have {sizes} SELF layers"
            )
        if len({tuple(subset) for subset in self.configurations}) < len(self.configurations):
            raise ValueError(f"a configuration is listed twice: {self.configurations}")
        self.check_index(self.default_configuration, "default_configuration")
        _check_router(self.router)
        _check_reduction(self.reduction)

    def check_index(self, index: Any, name: str = "configuration") -> int:
        """A configuration index as a place from 0 on; -1 is the last.

        Raises:
            ValueError: it is no index of this model's list.
        """
        num = len(self.configurations)
        if isinstance(index, bool) or not isinstance(index, int) or not -num <= index < num:
            listed = "; ".join(f"{i}: {subset}" for i, subset in enumerate(self.configurations))
            raise ValueError(f"{name} {index!r} does not exist; this model's configurations (SELF layers): {listed}")
        return index % num

    @property
    def router_layer(self) -> int | None:
        """The layer before which configurations part: the first slot that some use and some do not.

        None if there is nothing to choose.
        """
        for layer in self.self_layers:
            if len({layer in subset for subset in self.configurations}) > 1:
                return layer
        return None


def _config_of(values: dict[str, Any]) -> PreTrainedConfig:
    values = dict(values)
    kind = values.pop("model_type", None)
    if kind is None or kind not in CONFIG_MAPPING:
        raise ValueError(f"base_config has model_type {kind!r}, which transformers does not know")
    if kind == VisorConfig.model_type:
        raise ValueError("base_config is itself a VISOR model; give the config of its base")
    return CONFIG_MAPPING[kind](**values)


def _check_layers(name: str, layers: Sequence[Any], last: int) -> None:
    wrong = [i for i in layers if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= last]
    if wrong:
        raise ValueError(f"{name} names layers {wrong}, which do not exist: the decoder has layers 0 to {last}")
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"{name} must name different layers in ascending order, got {list(layers)}")


def _check_router(router: Any) -> None:
    if router is None:
        return
    if not isinstance(router, dict) or set(router) - {"hidden_size", "inputs"}:
        raise ValueError(f'router must be None or {{"hidden_size": ..., "inputs": [...]}}, got {router!r}')
    hidden, inputs = router.get("hidden_size"), router.get("inputs", list(ROUTER_INPUTS))
    if isinstance(hidden, bool) or not isinstance(hidden, int) or hidden < 1:
        raise ValueError(f"router: hidden_size must be a positive integer, got {hidden!r}")
    if not inputs or [name for name in ROUTER_INPUTS if name in inputs] != list(inputs):
        raise ValueError(f"router: inputs must be some of {list(ROUTER_INPUTS)}, in this order, got {inputs!r}")


def reduction_method(reduction: Mapping[str, Any]) -> Method:
    """The method that a config's `reduction` names.

    Raises:
        ValueError: it is unknown, has no such options, or does not act between tower and decoder.
    """
    method = METHODS.get(reduction["method"])
    try:
        method = method(**reduction.get("params", {}))
    except TypeError as error:
        raise ValueError(f"reduction {reduction['method']!r}: {error}") from error
    if (
        type(method).reduce_features is Method.reduce_features
        or method.stage not in ("tower", "projected")
        or method.reads_text
    ):
        raise ValueError(
            f"reduction {reduction['method']!r} ({method.title}) does not act between tower and decoder on the image "
            "alone; a model can carry one that does, such as pooling or visionzip"
        )
    return method


def _check_reduction(reduction: Any) -> None:
    if reduction is None:
        return
    if not isinstance(reduction, dict) or set(reduction) - {"method", "params"} or "method" not in reduction:
        raise ValueError(f'reduction must be None or {{"method": ..., "params": {{...}}}}, got {reduction!r}')
    reduction_method(reduction)
