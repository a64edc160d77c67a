"""The stages of the dense base model: decoder on symbols, tower on labels, then both on pixels.

Shapes: B scenes, V visual tokens, M of them shown, A labelled positions, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visor.embedded.packed_text import PackedText
from visor.embedded.scene_stage import Drawn, Outcome, SceneStage
from visor.embedded.symbolic import present_patches
from visor.training.auxiliary.fact_targets import FactTargets
from visor.worlds.world import SLOTS, Label, Scene

EMPTY_WEIGHT = 0.1  # of a patch without words in the loss of the labels


def answer_losses(logits_AW: Tensor, text: PackedText) -> tuple[Tensor, Tensor, list[list[bool]]]:
    """Cross-entropy summed over answer tokens and over hints, and whether each whole answer is right.

    Right is what greedy decoding would say; a hint is no part of an answer.
    """
    labelled_BT = text.labels_BT >= 0
    labels_A, hint_A = text.labels_BT[labelled_BT], text.hint_BT[labelled_BT]
    loss_A = F.cross_entropy(logits_AW.float(), labels_A, reduction="none")
    wrong_A = ((logits_AW.detach().argmax(-1) != labels_A) & ~hint_A).cpu()
    row_A, question_A = labelled_BT.nonzero()[:, 0].cpu(), text.segment_BT[labelled_BT].cpu()
    right = [[True] * len(kinds) for kinds in text.kinds]
    for row, question in zip(row_A[wrong_A].tolist(), question_A[wrong_A].tolist(), strict=True):
        right[row][question] = False
    return loss_A[~hint_A].sum(), loss_A[hint_A].sum(), right


def label_weights(words_BVW: Tensor) -> Tensor:
    """[B, V]: an empty patch weighs a tenth of one with words."""
    return torch.where(words_BVW.any(-1), 1.0, EMPTY_WEIGHT)


def label_loss(logits_BVW: Tensor, words_BVW: Tensor, empty: int) -> Tensor:
    """Cross-entropy per patch against its words in equal shares, summed by weight; an empty patch says `empty`."""
    num_words_BV = words_BVW.sum(-1)
    share_BVW = words_BVW / num_words_BV.clamp(min=1)[..., None]
    share_BVW[..., empty] = (num_words_BV == 0).float()
    loss_BV = -(share_BVW * logits_BVW.float().log_softmax(-1)).sum(-1)
    return (loss_BV * label_weights(words_BVW)).sum()


def facts_by_slot(targets: FactTargets, right: list[bool]) -> dict[str, list[bool]]:
    """Which facts were right, by where they were asked and by slot."""
    found: dict[str, list[bool]] = {}
    for number, (slot, ok) in enumerate(zip(targets.slot_N.tolist(), right, strict=True)):
        where = "visual facts" if number < targets.num_visual else "question facts"
        found.setdefault(f"{where}/{SLOTS[slot]}", []).append(ok)
    return found


@dataclass
class Asked:
    """Questions behind visual tokens.

    Args:
        scenes: whose questions they are.
        text: these.
        patch_BM, valid_BM: which patches the visual tokens are, and which of them are real.
        words_BVW: 1 where a word stands in a patch, all V of them.
        facts: that the decoder should know half-way.
    """

    scenes: list[Scene]
    text: PackedText
    patch_BM: Tensor
    valid_BM: Tensor
    words_BVW: Tensor
    facts: FactTargets


class DecoderStage(SceneStage[Asked]):
    """The decoder learns to look things up on symbolic scenes."""

    parts = ("llava.model.language_model", "llava.lm_head", "patches", "facts")
    counted = ("answers", "hints", "facts")

    def prepare(self, drawn: Drawn) -> Asked:
        model = self.model
        words_BVW = model.words_in_patches(drawn.scenes)
        # Empty patches join now and then, so that the decoder will not be surprised by the full grid. The numbers are
        # drawn for the whole step, and each process takes those of its scenes.
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + drawn.step)
        keep_empty = (0.0, 0.0, 0.0, 0.3)[int(torch.randint(4, (), generator=generator))]
        drawn_BV = torch.rand(len(drawn.worlds), words_BVW.shape[1], generator=generator)[drawn.places]
        patch_BM, valid_BM = present_patches(words_BVW, keep_empty, drawn_BV.to(words_BVW.device))
        text = model.text.pack(drawn.scenes).to(words_BVW.device)
        facts = model.fact_targets(drawn.scenes, patch_BM, text)
        return Asked(drawn.scenes, text, patch_BM, valid_BM, words_BVW, facts)

    def counts(self, batch: Asked) -> tuple[float, ...]:
        return batch.text.num_answer_tokens, batch.text.num_hints, len(batch.facts)

    def loss(self, batch: Asked, counts: Mapping[str, float]) -> Outcome:
        model = self.model
        words_BMW = batch.words_BVW.gather(1, batch.patch_BM[..., None].expand(-1, -1, batch.words_BVW.shape[-1]))
        with self.processes.autocast():
            visual_BMD = model.patches(words_BMW, model.llava.get_input_embeddings().weight, batch.patch_BM)
            return self.answered(batch, visual_BMD, counts)

    def answered(self, batch: Asked, visual_BMD: Tensor, counts: Mapping[str, float]) -> Outcome:
        """The loss of answers, hints and facts, once the visual tokens are known."""
        options, model = self.recipe.optimisation, self.model
        logits_AW = model.decode(visual_BMD, batch.patch_BM, batch.valid_BM, batch.text)
        answers, hints, right = answer_losses(logits_AW, batch.text)
        facts, found = model.facts.loss_sum(batch.facts)
        loss = answers / max(1, counts["answers"]) + options.hint_weight * hints / max(1, counts["hints"])
        loss = loss + options.fact_supervision_weight * facts / max(1, counts["facts"])
        return Outcome(loss, right, facts_by_slot(batch.facts, found))


@dataclass
class Labelled:
    """Scenes with the words that stand in their patches, 1 where one stands."""

    scenes: list[Scene]
    words_BVW: Tensor


class TowerStage(SceneStage[Labelled]):
    """The tower names what stands in each patch (this project's stand-in for SigLIP pre-training)."""

    parts = ("llava.model.vision_tower", "tower_labels")
    counted = ("label_weight",)

    def kinds(self, one: Scene) -> list[str]:
        return ["label/" + ("word" if len(label.words[0]) > 1 else "glyph") for label in self._labels(one)]

    def _labels(self, one: Scene) -> list[Label]:
        return [label for label in one.labels if label.words]

    def prepare(self, drawn: Drawn) -> Labelled:
        return Labelled(drawn.scenes, self.model.words_in_patches(drawn.scenes))

    def counts(self, batch: Labelled) -> tuple[float, ...]:
        return (float(label_weights(batch.words_BVW).sum()),)

    def loss(self, batch: Labelled, counts: Mapping[str, float]) -> Outcome:
        model, words_BVW = self.model, batch.words_BVW
        with self.processes.autocast():
            logits_BVW = model.tower_labels(model.tower(batch.scenes))
        loss = label_loss(logits_BVW, words_BVW, model.tokenizer.pad_token_id) / counts["label_weight"]
        # A patch of k words is right if they are the k likeliest.
        order_BVW = logits_BVW.detach().topk(2).indices
        first_BVW = torch.zeros_like(words_BVW).scatter(-1, order_BVW[..., :1], 1.0)
        both_BVW = torch.zeros_like(words_BVW).scatter(-1, order_BVW, 1.0)
        top_BVW = torch.where(words_BVW.sum(-1, keepdim=True) > 1, both_BVW, first_BVW)
        exact_BV = (top_BVW == words_BVW).all(-1).tolist()
        right = [
            [exact_BV[b][model.patch_words.patch_of(label)] for label in self._labels(one)]
            for b, one in enumerate(batch.scenes)
        ]
        return Outcome(loss, right, {})


@dataclass
class Aligned(Labelled):
    """The same with the embeddings that the patches should have."""

    target_BVD: Tensor


class AlignStage(SceneStage[Aligned]):
    """Tower and projector learn to yield the embeddings that the decoder knows; the decoder stands still.

    The tower takes part: labels need no position, so it has not learned to keep one, and the decoder needs it.
    """

    parts = ("llava.model.vision_tower", "llava.model.multi_modal_projector", "tower_labels")
    counted = ("labelled", "empty", "label_weight", "numbers", "sum", "squares")

    def kinds(self, one: Scene) -> list[str]:
        return []

    def prepare(self, drawn: Drawn) -> Aligned:
        words_BVW = self.model.words_in_patches(drawn.scenes)
        with torch.no_grad():
            return Aligned(drawn.scenes, words_BVW, self.model.symbolic_target(words_BVW))

    def counts(self, batch: Aligned) -> tuple[float, ...]:
        labelled_BV, target = batch.words_BVW.any(-1), batch.target_BVD.double()
        return (
            float(labelled_BV.sum()),
            float((~labelled_BV).sum()),
            float(label_weights(batch.words_BVW).sum()),
            float(target.numel()),
            float(target.sum()),
            float(target.square().sum()),
        )

    def loss(self, batch: Aligned, counts: Mapping[str, float]) -> Outcome:
        model = self.model
        with self.processes.autocast():
            features = model.tower(batch.scenes)
            visual_BVD = model.llava.model.multi_modal_projector(features)
            labels_BVW = model.tower_labels(features)
        # Relative to the targets' variance in the whole step; patches with words count as much as all the empty ones.
        variance = (counts["squares"] - counts["sum"] ** 2 / counts["numbers"]) / (counts["numbers"] - 1)
        error_BV = (visual_BVD.float() - batch.target_BVD).square().mean(-1) / variance
        labelled_BV = batch.words_BVW.any(-1)
        distance = error_BV[labelled_BV].sum() / counts["labelled"]
        distance = distance + error_BV[~labelled_BV].sum() / max(1, counts["empty"])
        labels = label_loss(labels_BVW, batch.words_BVW, model.tokenizer.pad_token_id) / counts["label_weight"]
        return Outcome(distance + self.recipe.label_weight * labels, [[] for _ in batch.scenes], {})


class DenseStage(DecoderStage):
    """Tower, projector and decoder on pixels: answers, hints and facts, with the patch labels beside them."""

    parts = ("llava", "tower_labels", "facts")
    counted = (*DecoderStage.counted, "label_weight")

    def prepare(self, drawn: Drawn) -> Asked:
        model = self.model
        patch_BV, words_BVW = model.all_patches(len(drawn.scenes)), model.words_in_patches(drawn.scenes)
        text = model.text.pack(drawn.scenes).to(words_BVW.device)
        facts = model.fact_targets(drawn.scenes, patch_BV, text)
        return Asked(drawn.scenes, text, patch_BV, torch.ones_like(patch_BV, dtype=torch.bool), words_BVW, facts)

    def counts(self, batch: Asked) -> tuple[float, ...]:
        return (*super().counts(batch), float(label_weights(batch.words_BVW).sum()))

    def loss(self, batch: Asked, counts: Mapping[str, float]) -> Outcome:
        model = self.model
        with self.processes.autocast():
            features = model.tower(batch.scenes)
            outcome = self.answered(batch, model.llava.model.multi_modal_projector(features), counts)
            labels_BVW = model.tower_labels(features)
        labels = label_loss(labels_BVW, batch.words_BVW, model.tokenizer.pad_token_id) / counts["label_weight"]
        outcome.loss = outcome.loss + self.recipe.label_weight * labels
        return outcome


STAGES: dict[str, type[SceneStage]] = {
    "decoder": DecoderStage,
    "tower": TowerStage,
    "align": AlignStage,
    "dense": DenseStage,
}
