"""What one `running(...)` asks for, checked before anything runs, and the record of what it kept.

Shapes: B batch, P prompt length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from budgets.registry import METHODS
from budgets.schedule import LayerMode, Positions, Schedule, dense
from visor.engine.compat import attends_to_window
from visor.engine.streams import PromptLayout, PromptStreams

KeepMasks = Mapping[int, Sequence[Tensor]]
Choose = Callable[[PromptStreams], Sequence[int]]


def parting_layer(schedules: Sequence[Schedule], start: int = 0) -> int:
    """The first layer from `start` on whose mode is not the same in all schedules; the number of layers if none."""
    first = schedules[0]
    for layer in range(start, first.num_layers):
        if any(schedule.layers[layer].mode is not first.layers[layer].mode for schedule in schedules):
            return layer
    return first.num_layers


@dataclass(frozen=True)
class Run:
    """Schedules, and the methods that choose tokens in them.

    Attributes:
        schedules: one for all samples, or one a sample; with `choose`, the alternatives.
        methods: by layer, the method whose reduction stands before it.
        unmodified: True if the family's own forward must run (a dense schedule on sliding-window layers).
        keep_masks, visual_BP, segment_BP, choose, stop: see `visor.engine.decoder.running`.
        unpadded: the layout that `visual_BP` stands for where nothing is padding.
    """

    schedules: tuple[Schedule, ...]
    methods: Mapping[int, Any] = field(default_factory=dict)
    unmodified: bool = False
    keep_masks: KeepMasks | None = None
    visual_BP: Tensor | None = None
    segment_BP: Tensor | None = None
    choose: Choose | None = None
    stop: bool = False
    unpadded: PromptLayout | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # Here and not in the forward: counts are values of tensors, which torch.compile cannot ask for.
        if self.visual_BP is not None:
            object.__setattr__(self, "unpadded", PromptLayout.of(self.visual_BP, None))

    @classmethod
    def unscheduled(cls, num_layers: int) -> Run:
        """The unmodified model."""
        return cls((dense(num_layers, 0),))

    @classmethod
    def of(
        cls,
        decoder: nn.Module,
        schedules: tuple[Schedule, ...],
        keep_masks: KeepMasks | None = None,
        visual: Tensor | None = None,
        segments: Tensor | None = None,
        choose: Choose | None = None,
        stop: bool = False,
    ) -> Run:
        """Check the schedules against a decoder.

        Raises:
            ValueError: what does not fit, and what would.
        """
        if not schedules:
            raise ValueError("running() needs at least one schedule")
        first, num_layers = schedules[0], len(decoder.layers)
        reduces = any(op.reduce for schedule in schedules for op in schedule.layers)
        if reduces and any(schedule.structure != first.structure for schedule in schedules):
            raise ValueError(
                "schedules of one batch that reduce inside the decoder must share their structure (counts may differ); "
                "group the samples"
            )
        if wrong := [schedule.num_layers for schedule in schedules if schedule.num_layers != num_layers]:
            raise ValueError(f"the schedule has {wrong[0]} layers, the decoder has {num_layers}")
        blocks = {int(i) for i in getattr(decoder, "cross_blocks", {})}
        cross_layers = sorted({i for schedule in schedules for i in schedule.layers_in(LayerMode.CROSS)})
        if missing := [i for i in cross_layers if i not in blocks]:
            raise ValueError(
                f"layers {missing} are CROSS, but have no cross-attention block (layers with one: {sorted(blocks)}); "
                f"call install(model, cross_layers={missing})"
            )
        reductions = {i: op.reduce for i, op in enumerate(first.layers) if op.reduce}
        if unknown := sorted(set(keep_masks or ()) - set(reductions)):
            raise ValueError(f"keep_masks for layers {unknown}, the schedule reduces before {sorted(reductions)}")
        methods = {i: METHODS.get(r.method)(**dict(r.params)) for i, r in reductions.items()}
        run = cls(schedules, methods, False, keep_masks, visual, segments, choose, stop)
        if not attends_to_window(decoder):
            return run
        # The family's own forward makes the masks of such layers; the engine makes the causal mask only.
        if run.is_dense and segments is None:
            return cls(schedules, unmodified=True)
        raise ValueError(
            f"{type(decoder).__name__} has sliding-window layers (or chunked ones): their window counts cached tokens, "
            "and dropped tokens would widen it. Only dense schedules run on it."
        )

    @property
    def is_dense(self) -> bool:
        """True if every layer runs on every token."""
        ops = (op for schedule in self.schedules for op in schedule.layers)
        return all(op.mode is LayerMode.SELF and op.reduce is None for op in ops)

    @property
    def positions(self) -> Positions:
        return self.schedules[0].positions

    def layout(self, noted: PromptLayout | None, shape: Sequence[int], attention_mask: Tensor | None) -> PromptLayout:
        """The prompt's layout: what the caller of `running` gave, else what was noted from input_ids, else all text."""
        if noted is not None and self.visual_BP is None:
            return noted
        if self.visual_BP is None and attention_mask is None:
            return PromptLayout.of_text(*shape)
        visual_BP = torch.zeros(*shape, dtype=torch.bool) if self.visual_BP is None else self.visual_BP
        if visual_BP.shape != tuple(shape):
            raise ValueError(f"visual must have the prompt's shape {tuple(shape)}, got {tuple(visual_BP.shape)}")
        return self.unpadded if attention_mask is None else PromptLayout.of(visual_BP, attention_mask)

    def rows(self, layout: PromptLayout) -> list[Schedule]:
        """One schedule a row. Beam search repeats each sample, next to itself.

        Raises:
            ValueError: the number of schedules or their numbers of visual tokens do not fit the batch.
        """
        batch, num = len(layout.num_visual), len(self.schedules)
        if self.choose is not None:  # until they part, the alternatives are one
            return [self.schedules[0]] * batch
        if batch % num:
            raise ValueError(f"{num} schedules for a batch of {batch}: give one for all samples, or one a sample")
        rows = [schedule for schedule in self.schedules for _ in range(batch // num)]
        if self.methods:  # without reductions a schedule holds for any number of tokens
            for i, (row, found) in enumerate(zip(rows, layout.num_visual, strict=True)):
                if found not in (0, row.decoder_visual):
                    raise ValueError(
                        f"row {i}: its schedule is for {row.decoder_visual} visual tokens, the prompt has {found}; "
                        "give each sample its own schedule"
                    )
        return rows

    def segments(self, layout: PromptLayout) -> Tensor | None:
        """The packed texts of each row, [B, P]; None where a row is one text.

        Raises:
            ValueError: another shape, or visual tokens outside segment 0, which is seen by all.
        """
        if self.segment_BP is None:
            return None
        if self.segment_BP.shape != layout.visual_BP.shape:
            shapes = tuple(layout.visual_BP.shape), tuple(self.segment_BP.shape)
            raise ValueError(f"segments must have the prompt's shape {shapes[0]}, got {shapes[1]}")
        hidden = (self.segment_BP.to("cpu") != 0) & layout.visual_BP
        if hidden.any():
            rows = hidden.any(1).nonzero().flatten().tolist()
            raise ValueError(f"rows {rows} have visual tokens outside segment 0; every text of a row sees its image")
        return self.segment_BP

    def num_fixed(self, layout: PromptLayout) -> int:
        """How many first tokens of the prompt decide what the cache holds: all that methods' scores have looked at."""
        if set(self.methods) - set(self.keep_masks or ()):
            return layout.visual_BP.shape[1]
        return layout.end_visual

    def forced_keep(self, layer: int, layout: PromptLayout, counts: Sequence[int]) -> Tensor | None:
        """The visual tokens that `keep_masks` fixes before a layer, a mask [B, P] on the host, or None."""
        if not self.keep_masks or layer not in self.keep_masks:
            return None
        masks, batch = self.keep_masks[layer], len(counts)
        if not masks or batch % len(masks):
            raise ValueError(f"keep_masks[{layer}] has {len(masks)} masks for a batch of {batch}")
        forced_BP = torch.zeros_like(layout.visual_BP)
        for row, count in enumerate(counts):
            mask = torch.as_tensor(masks[row // (batch // len(masks))], dtype=torch.bool).to("cpu")
            if mask.numel() != layout.num_visual[row] or int(mask.sum()) != count:
                raise ValueError(
                    f"keep_masks[{layer}], row {row}: expected {count} of {layout.num_visual[row]} visual tokens, got "
                    f"{int(mask.sum())} of {mask.numel()}"
                )
            forced_BP[row, layout.visual_BP[row]] = mask
        return forced_BP


@dataclass
class KeepRecord:
    """Which visual tokens were alive after each reduction. Stays on the device until somebody asks."""

    layout: PromptLayout
    alive_BP: dict[int, Tensor] = field(default_factory=dict)

    def add(self, layer: int, alive_BP: Tensor) -> None:
        self.alive_BP[layer] = alive_BP

    def _by_sample(self, alive_BP: Tensor) -> list[Tensor]:
        return [row[visual] for row, visual in zip(alive_BP.cpu(), self.layout.visual_BP, strict=True)]

    def by_layer(self) -> dict[int, list[Tensor]]:
        return {layer: self._by_sample(alive_BP) for layer, alive_BP in self.alive_BP.items()}

    def last(self) -> list[Tensor]:
        """After the last reduction; all tokens if there was none."""
        return self._by_sample([*self.alive_BP.values()][-1] if self.alive_BP else self.layout.visual_BP)
