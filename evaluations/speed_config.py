"""What the speed job is asked for: settings, lengths, batch sizes, a device; and whether that can be measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from budgets.geometry import ModelGeometry
from budgets.roofline import DEVICES, decoder_weights, tower_weights
from budgets.schedule import LayerMode
from evaluations.config import ATTENTIONS, DTYPES, check_name
from evaluations.machine import memory_bytes
from evaluations.settings import DTYPE_BYTES, Setting
from evaluations.suite import TimingPlan


@dataclass(frozen=True)
class SpeedSetting(Setting):
    """A method with options; `label` tells settings of one method apart."""

    label: str = ""

    @property
    def id(self) -> str:
        return self.label


@dataclass(frozen=True)
class SpeedConfig:
    """What is measured. Building one checks it.

    Args:
        device: cpu, cuda, cuda:N, or meta; the last measures nothing.
        model_as: device of the roofline where there is nothing to measure on.
        isolate: every (setting, number of visual tokens, batch size) in a process of its own, not in turns.
    """

    geometry: ModelGeometry
    settings: tuple[SpeedSetting, ...]
    visual_tokens: tuple[int, ...]
    text_tokens: int
    batch_sizes: tuple[int, ...]
    device: str
    dtype: str
    attention: str
    timing: TimingPlan
    out: Path
    model_as: str = "h100"
    threads: int | None = None
    isolate: bool = False

    def __post_init__(self) -> None:
        check_name("device", re.sub(r"^cuda:\d+$", "cuda", self.device), ("cpu", "cuda", "meta"))
        check_name("dtype", self.dtype, DTYPES)
        check_name("attention", self.attention, ATTENTIONS)
        check_name("device of the roofline", self.model_as, (*DEVICES, "cpu"))
        numbers = {"visual-tokens": self.visual_tokens, "batch-sizes": self.batch_sizes,
                   "text-tokens": (self.text_tokens,), "threads": (self.threads or 1,)}  # fmt: skip
        for name, values in numbers.items():
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise ValueError(f"--{name} takes different numbers of at least 1, got {values}")
        labels = [setting.label for setting in self.settings]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"--methods takes different settings, at least one, got {labels}")
        if self.geometry.vision is None:
            raise ValueError(f"{self.geometry.name} has no vision tower")

    @property
    def cross_layers(self) -> tuple[int, ...]:
        """Layers that need a cross-attention block for any of the settings."""
        schedules = [setting.method.schedule(self.geometry, self.visual_tokens[0]) for setting in self.settings]
        return tuple(sorted({i for schedule in schedules for i in schedule.layers_in(LayerMode.CROSS)}))


def parse_settings(texts: Sequence[str], budgets: Sequence[float]) -> tuple[SpeedSetting, ...]:
    """ "visor[self_layers=2;cross_layers=8]" or "fastv" to settings; those without options once at every budget."""
    from budgets.cost import build_method

    settings = []
    for text in texts:
        match = re.fullmatch(r"([\w.+-]+)(?:\[(.*)\])?", text)
        if match is None:
            raise ValueError(f"--methods takes names like fastv or visor[self_layers=2;cross_layers=8], got {text!r}")
        name, options = match[1], [part for part in (match[2] or "").split(";") if part.strip()]
        method = build_method(name, options)
        if options or name == "dense" or not budgets:
            label = f"{name}[{';'.join(options)}]" if options else name
            settings.append(SpeedSetting(name=name, method=method, label=label))
        else:
            at = lambda budget, name=name, method=method: SpeedSetting(
                name=name, method=method, budget=budget, label=f"{name}@{budget:g}"
            )
            settings += [at(budget) for budget in budgets]
    return tuple(settings)


def split_methods(text: str) -> list[str]:
    """ "a,b[c=1;d=2,3]" to ["a", "b[c=1;d=2,3]"]: commas inside brackets belong to an option."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def why_not_measured(config: SpeedConfig) -> str | None:
    """Why nothing can be measured here, or None.

    Raises:
        ValueError: the model does not fit into the memory of the device that was asked for.
    """
    kind = config.device.partition(":")[0]
    if kind == "meta":
        return "nothing runs on the device meta"
    needed, available = model_bytes(config), memory_bytes()
    if kind == "cuda":
        import torch

        if not torch.cuda.is_available():
            return "there is no CUDA device"
        available = torch.cuda.get_device_properties(config.device).total_memory
    if available is not None and needed > 0.9 * available:
        raise ValueError(
            f"{config.geometry.name} in {config.dtype} has {needed / 1e9:.1f} GB of weights, {config.device} has "
            f"{available / 1e9:.1f} GB of memory; try --dtype bfloat16, or --device meta for the roofline"
        )
    return None


def model_bytes(config: SpeedConfig) -> int:
    """Bytes of all matrices of the model: decoder, embeddings and head, tower."""
    geometry = config.geometry
    weights = decoder_weights(geometry) + 2 * geometry.vocab_size * geometry.hidden_size
    return (weights + tower_weights(geometry)) * DTYPE_BYTES[config.dtype]
