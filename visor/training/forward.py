"""The forward pass of training: packed text behind one image, under any subset of SELF layers, on the engine.

Vision features are computed once a batch and fed to as many passes as are wanted (scales, configurations). The engine
tells segments apart by its block mask, so what a segment computes is what it would compute alone.

Shapes: B rows, S sequence, D width, A labelled positions, W vocabulary, Q segments, R routing vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from budgets.schedule import LayerMode, LayerOp, Schedule, dense
from visor.engine.decoder import install, running
from visor.engine.streams import PromptStreams, take
from visor.families.base import FamilyAdapter, adapter_for
from visor.training.auxiliary.attention_supervision import AttentionSupervision
from visor.training.auxiliary.question_facts import QuestionFactHead
from visor.training.auxiliary.visual_facts import Features, VisualFactHead
from visor.training.auxiliary.window_words import WindowWordHead
from visor.training.batch import PADDING, SHARED, Batch
from visor.training.rows import IGNORED

TRAINABLE_FAMILIES = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl")


class PackedModel:
    """A VISOR model, or a base model, as training runs it.

    Raises:
        ValueError: a family or an attention kernel that packed training does not work with.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.visor = model if model.config.model_type == "visor" else None
        self.base = model.base if self.visor else install(model)
        family = self.base.config.model_type
        if family not in TRAINABLE_FAMILIES:
            raise ValueError(f"packed training knows the families {', '.join(TRAINABLE_FAMILIES)}, not {family!r}")
        self.adapter: FamilyAdapter = adapter_for(self.base)
        self.decoder: nn.Module = self.adapter.decoder
        self.num_layers = len(self.decoder.layers)
        # Auxiliary losses; their heads are no part of the model and are left behind when it is saved.
        self.visual_facts: VisualFactHead | None = None
        self.question_facts: QuestionFactHead | None = None
        self.window_words: WindowWordHead | None = None
        self.attention_supervision: AttentionSupervision | None = None
        kernel = getattr(self.decoder.config, "_attn_implementation", "sdpa")
        if kernel not in ("sdpa", "float32_sdpa", "eager"):
            raise ValueError(f"packed training needs a kernel that takes block masks (sdpa), the model uses {kernel!r}")

    def add_fact_heads(self, vocabulary: int) -> None:
        """From now on, predict facts from visual tokens as an auxiliary loss.

        VISOR: behind every SELF slot that a CROSS layer follows, and from the text that reads them there. A base model:
        behind its lower half; in the upper one text does the reading.
        """
        if self.visor is None:
            self.visual_facts = VisualFactHead(self.decoder, range(self.num_layers // 2), vocabulary)
            return
        config = self.visor.config
        read = [layer for layer in config.self_layers if layer < max(config.cross_layers, default=0)]
        self.visual_facts = VisualFactHead(self.decoder, read, vocabulary)
        self.question_facts = QuestionFactHead(self.decoder, config.cross_layers, vocabulary)

    def add_window_word_head(self, vocabulary: int) -> None:
        """From now on, predict the words in each part of averaged windows, as an auxiliary loss."""
        self.window_words = WindowWordHead(self.decoder.config.hidden_size, vocabulary)

    def supervise_attention(self) -> None:
        """From now on, supervise where text attends while it reads the image, as an auxiliary loss."""
        self.attention_supervision = AttentionSupervision(self.decoder.cross_blocks, self.visor.config.cross_layers)

    def schedule(self, self_layers: Iterable[int] | None) -> Schedule:
        """TEXT, CROSS and SELF layers of a subset of the slots; None is dense. It holds for any number of tokens."""
        if self_layers is None:
            return dense(self.num_layers, 0)
        assert self.visor is not None
        ops = [LayerOp(LayerMode.TEXT)] * self.num_layers
        for mode, layers in ((LayerMode.CROSS, self.visor.config.cross_layers), (LayerMode.SELF, self_layers)):
            for layer in layers:
                ops[layer] = LayerOp(mode)
        return Schedule(tuple(ops), 0)

    def image_features(self, batch: Batch) -> list[Features]:
        """What the decoder gets of each row's image."""
        output = self.adapter.inner.get_image_features(**batch.pixel_inputs, return_dict=True)
        levels = getattr(output, "deepstack_features", None) or ()
        return [tuple(each) for each in zip(output.pooler_output, *levels, strict=True)]

    def mismatched(self, batch: Batch, features: Sequence[Features]) -> list[tuple[int, str]]:
        """Rows whose number of image tokens is not that of their features, with the reason."""
        if len(features) != len(batch.rows):
            return [(i, f"{len(features)} images for {len(batch.rows)} rows") for i in range(len(batch.rows))]
        return [
            (index, f"{row.num_visual} image tokens in the prompt, but {len(one[0])} visual features")
            for index, (row, one) in enumerate(zip(batch.rows, features, strict=True))
            if row.num_visual != len(one[0])
        ]

    def position_ids(self, batch: Batch) -> Tensor:
        """[B, S], or [axes, B, S] under M-RoPE: every segment continues behind the image, as it would alone."""
        if not self.adapter.has_grid_positions:
            return batch.position_BS
        rows = []
        for index, row in enumerate(batch.rows):
            pixels = self._pixels_of(batch, index)
            prefix_AP = self.adapter.position_ids(row.prefix, [pixels])
            behind_S = batch.position_BS[index].cpu() - len(row.prefix) + int(prefix_AP.max()) + 1
            rows.append(torch.cat([prefix_AP, behind_S[len(row.prefix) :].expand(len(prefix_AP), -1)], 1).clamp(min=0))
        return torch.stack(rows, 1).to(batch.position_BS.device)

    def _pixels_of(self, batch: Batch, index: int) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in batch.rows[index].pixel_inputs.items()}

    def _run(self, batch: Batch, features: Sequence[Features], schedules: Schedule | list[Schedule], **how) -> Tensor:
        levels = [one[1:] for one in features]
        outputs = self.adapter.image_outputs([one[0] for one in features], levels)
        with running(self.base, schedules, segments=batch.segment_BS, **how):
            return self.adapter.inner(
                input_ids=batch.input_ids_BS,
                attention_mask=(batch.segment_BS != PADDING).long(),
                position_ids=self.position_ids(batch),
                mm_encoder_outputs=outputs,
                use_cache=False,
            )[0]

    def logits(self, batch: Batch, features: Sequence[Features], self_layers: Iterable[int] | None) -> Tensor:
        """Logits [A, W] at the labelled positions, in reading order, under a subset of the slots (None: dense)."""
        hidden_BSD = self._run(batch, features, self.schedule(self_layers))
        return self.base.get_output_embeddings()(hidden_BSD[batch.labels_BS != IGNORED])

    def routing_vectors(
        self, batch: Batch, features: Sequence[Features], configurations: Sequence[Sequence[int]], parts: Sequence[str]
    ) -> Tensor:
        """[B, Q, R]: what the router would read if the prompt of each segment stood alone.

        Args:
            parts: of the vector, as in `visor.model.router.Router.vector`.
        """
        seen: list[Tensor] = []

        def look(streams: PromptStreams) -> list[int]:
            seen.append(_vectors(parts, batch, streams))
            return [0] * len(batch.rows)

        alternatives = [self.schedule(subset) for subset in configurations]
        self._run(batch, features, alternatives, choose=look, stop=True)
        return seen[0]


def _vectors(parts: Sequence[str], batch: Batch, streams: PromptStreams) -> Tensor:
    full_BND = streams.full_stream().hidden_BND
    places_BT, valid_BT = streams.slots(streams.valid_BN & ~streams.visual_BN, streams.num_text)
    text = take(full_BND, places_BT)
    segment_BT = take(batch.segment_BS, places_BT)
    if valid_BT is not None:
        segment_BT = segment_BT.masked_fill(~valid_BT, PADDING)
    num_segments = batch.prompt_end_BQ.shape[1]
    numbers_Q1 = torch.arange(1, num_segments + 1, device=text.device)[:, None]
    own_BQT = segment_BT[:, None] == numbers_Q1
    end_BQ1 = batch.prompt_end_BQ[..., None]
    vectors = []
    for part in parts:
        if part == "last":
            vectors.append((own_BQT & (places_BT[:, None] == end_BQ1)).to(text.dtype) @ text)
        elif part == "text":
            # Prompt tokens only: at inference no answer stands behind them yet.
            seen_BQT = own_BQT & (places_BT[:, None] <= end_BQ1) | (segment_BT == SHARED)[:, None]
            weight_BQT = seen_BQT.to(text.dtype)
            vectors.append(weight_BQT @ text / weight_BQT.sum(-1, keepdim=True).clamp(min=1))
        else:
            visual_BVD, valid_BV, _ = streams.visual_tokens()
            weight_BV = torch.ones_like(visual_BVD[..., 0]) if valid_BV is None else valid_BV.to(text.dtype)
            mean_BD = (visual_BVD * weight_BV[..., None]).sum(1) / weight_BV.sum(1, keepdim=True).clamp(min=1)
            vectors.append(mean_BD[:, None].expand(-1, num_segments, -1))
    return torch.cat(vectors, -1)


# --- losses and scores ------------------------------------------------------------------------------------------------


@dataclass
class Answers:
    """What a pass made of the answers of a batch.

    Args:
        loss_sum: summed cross-entropy of answer tokens, and of hints times their weight.
        right: for each row, for each of its segments, whether its whole answers are what greedy decoding would say;
            nothing where the pass asked no question.
        likelihood: the same, geometric mean probability of the answer tokens.
    """

    loss_sum: Tensor
    right: list[list[bool]]
    likelihood: list[list[float]]


def answers_of(logits_AW: Tensor, batch: Batch, hint_weight: float = 0.0) -> Answers:
    """Loss and scores from the logits at the labelled positions."""
    labelled_BS = batch.labels_BS != IGNORED
    labels_A = batch.labels_BS[labelled_BS]
    hint_A = batch.hint_BS[labelled_BS]
    loss_A = F.cross_entropy(logits_AW.float(), labels_A, reduction="none")
    weight_A = torch.where(hint_A, hint_weight, 1.0)
    wrong_A = ((logits_AW.detach().argmax(-1) != labels_A) & ~hint_A).cpu()
    row_A = labelled_BS.nonzero()[:, 0].cpu()
    segment_A = batch.segment_BS[labelled_BS].cpu() - 1
    most = batch.prompt_end_BQ.shape[1]
    slot_A, num_slots = row_A * most + segment_A, len(batch.rows) * most
    count = lambda value: torch.zeros(num_slots).index_add_(0, slot_A, value.float())
    num_wrong, num_tokens = count(wrong_A), count((~hint_A).cpu())
    nll = count(loss_A.detach().float().cpu() * (~hint_A).cpu())
    right = (num_wrong == 0).view(-1, most).tolist()
    likelihood = (-nll / num_tokens.clamp(min=1)).exp().view(-1, most).tolist()
    nums = [len(row.segments) for row in batch.rows]
    return Answers(
        (loss_A * weight_A).sum(),
        [one[:n] for one, n in zip(right, nums, strict=True)],
        [one[:n] for one, n in zip(likelihood, nums, strict=True)],
    )
