"""How a stage is optimised: steps, rate, batch, precision, weights of the auxiliary losses."""

from __future__ import annotations

from dataclasses import dataclass

PRECISIONS = ("bf16", "fp32")


def rate_at(step: int, steps: int, peak_rate: float, warmup: int, decay: float) -> float:
    """Learning rate: linear warm-up, constant, linear decay to a tenth over the last `decay` share of the steps."""
    start_decay = steps * (1 - decay)
    done = max(0.0, step - start_decay) / max(1.0, steps - start_decay)
    return peak_rate * min(1.0, (step + 1) / warmup) * max(0.1, 1 - 0.9 * done)


@dataclass(frozen=True)
class Optimisation:
    """How a stage is optimised. Rate: linear warm-up, constant, linear decay to a tenth over the last `decay` share.

    Args:
        steps: optimiser steps.
        batch_size: examples a step, over all processes.
        micro_batch: examples a process runs at once; the rest of its share accumulates.
        peak_rate, warmup, decay: see above; `warmup` in steps.
        clip: largest gradient norm.
        weight_decay: of AdamW, on matrices (the paper: none).
        precision: "bf16" (autocast, float32 weights) or "fp32".
        ema: decay of an exponential moving average of the weights, which then is what the stage yields; 0 is off.
        hint_weight: weight of the hints in the loss (`visor.training.encoding`).
        fact_supervision_weight: weight of a fact, or of a word in an averaged window, in the loss
            (`visor.training.auxiliary`: `visual_facts`, `question_facts`, `window_words`); 0 is off.
        attention_supervision_weight: weight of an attention target in the loss
            (`visor.training.auxiliary.attention_supervision`); 0 is off.
        seed: of data order and random choices.
        workers: processes that read and encode data ahead; 0 reads in the training process.
        log_every: steps between log lines.
        save_every: seconds between checkpoints.
        max_skipped: share of unusable rows at which the run stops.
    """

    steps: int
    batch_size: int = 16
    micro_batch: int = 16
    peak_rate: float = 5e-4
    warmup: int = 100
    decay: float = 0.3
    clip: float = 1.0
    weight_decay: float = 0.0
    precision: str = "bf16"
    ema: float = 0.0
    hint_weight: float = 0.0
    fact_supervision_weight: float = 0.0
    attention_supervision_weight: float = 0.0
    seed: int = 0
    workers: int = 0
    log_every: int = 20
    save_every: float = 110.0
    max_skipped: float = 0.5

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch", "warmup", "log_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name in ("peak_rate", "clip", "save_every"):
            if not isinstance(getattr(self, name), (int, float)) or not getattr(self, name) > 0:
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)!r}")
        for name in ("decay", "ema", "max_skipped"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)!r}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return rate_at(step, self.steps, self.peak_rate, self.warmup, self.decay)
