"""What one `running(...)` asks for, checked before anything runs, and the record of what it kept.

Shapes: B batch, P prompt length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from budgets.registry import METHODS
from budgets.schedule import LayerMode, Positions, Schedule, dense
from visor.engine.compat import attends_to_window
from visor.engine.context import Selection
from visor.engine.streams import PromptLayout, PromptStreams

KeepMasks = Mapping[int, Sequence[Tensor]]
Choose = Callable[[PromptStreams], Sequence[int]]


def first_differing_layer(schedules: Sequence[Schedule], start: int = 0) -> int:
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
    def is_plain(self) -> bool:
        """True if the run asks for nothing that the family's own forward does not do: dense, to the end, one text."""
        return self.is_dense and self.choose is None and self.segment_BP is None and not self.stop

    @property
    def positions(self) -> Positions:
        return self.schedules[0].positions

    def layout(self, noted: PromptLayout | None, shape: Sequence[int], attention_mask: Tensor | None) -> PromptLayout:
        """The prompt's layout: what the caller of `running` gave, else what was noted from input_ids.

        Raises:
            ValueError: neither is there, and the schedule needs to know; or `visual` has another shape.
        """
        if noted is not None and self.visual_BP is None:
            return noted
        if self.visual_BP is None and not self.is_dense:
            # Embeddings look alike: taken for text, images would run as under a dense schedule, without a word.
            raise ValueError(
                "a schedule finds the visual tokens in input_ids, and there are none: pass input_ids and the pixels, "
                "or say which tokens of inputs_embeds are visual: running(..., visual=mask), bool [batch, length], all "
                "False for a prompt of text"
            )
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

    def check_lengths(
        self, rows: Sequence[Schedule], layout: PromptLayout, held: Sequence[int], cross: Sequence[int]
    ) -> None:
        """Compare what the layers have cached of a prompt with what the schedules say.

        Args:
            rows: the schedule of each row.
            held, cross: by layer, the tokens that it holds, and the visual ones that its cross-attention block read.

        Raises:
            ValueError: they differ; the message names the first such layer.
        """
        visual, padded = list(layout.num_visual), layout.visual_BP.shape[1]
        for layer in range(len(held)):
            ops = [row.layers[layer] for row in rows]
            visual = [min(op.reduce.keep, n) if op.reduce else n for op, n in zip(ops, visual, strict=True)]
            if any(op.reduce for op in ops):
                padded = 0  # what is left of the rows is padded to the longest of them, no further
            lengths = [
                text + n * (op.mode is LayerMode.SELF) for op, text, n in zip(ops, layout.num_text, visual, strict=True)
            ]
            read = [n * (op.mode is LayerMode.CROSS) for op, n in zip(ops, visual, strict=True)]
            # Until a reduction, a layer on a whole prompt also holds the columns that are padding in all rows.
            whole = any(op.mode is LayerMode.SELF or not n for op, n in zip(ops, visual, strict=True))
            expected = {max(lengths), *([padded] if whole and padded else [])}
            if held[layer] not in expected or cross[layer] != max(read):
                raise ValueError(
                    f"the schedule did not run as it says: after the prefill layer {layer} holds {held[layer]} tokens "
                    f"and {cross[layer]} visual ones to read, expected {max(lengths)} and {max(read)} (layers hold "
                    f"{list(held)}). Something between the engine and the layers, such as a hook or a patch of the "
                    "cache, changes what is cached"
                )

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
class HeldChoices:
    """What the reductions of a prompt chose, for when it runs again with more text behind it and no cache.

    The attention is causal, so what a rule did to the prompt's tokens does not depend on what follows them.

    Attributes:
        embedded_BPD: the prompt as it entered layer 0, by which it is known again.
        selections: by layer, what its method chose.
    """

    embedded_BPD: Tensor
    selections: dict[int, Selection] = field(default_factory=dict)

    def holds_for(self, embedded_BND: Tensor) -> bool:
        """True if these rows begin with the prompt, to the bit. Waits for the device only where one is longer."""
        batch, length, _ = self.embedded_BPD.shape
        if embedded_BND.shape[0] != batch or embedded_BND.shape[1] <= length:
            return False
        return torch.equal(embedded_BND[:, :length], self.embedded_BPD)

    def add(self, layer: int, selection: Selection) -> None:
        self.selections[layer] = selection

    def selection(self, layer: int, streams: PromptStreams) -> Selection | None:
        """The choice before a layer over the tokens that are alive now; None if there is none yet.

        New text stands behind the prompt's tokens in every row, and stays as it is.
        """
        first = self.selections.get(layer)
        if first is None:
            return None
        batch, before = first.kept_BN.shape
        num_new = streams.visual_BN.shape[1] - before
        kept_BN = F.pad(first.kept_BN, (0, num_new))
        if first.hidden_BND is None:
            return Selection(kept_BN)
        new = torch.arange(before, before + num_new, device=kept_BN.device).expand(batch, num_new)
        hidden_BND = torch.cat([first.hidden_BND, streams.full_stream().hidden_BND[:, before:]], 1)
        return Selection(kept_BN, hidden_BND, torch.cat([first.source_BN, new], 1))


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
