"""The stages of the dense base model: decoder on symbols, tower on labels, then both on pixels.

Shapes: B scenes, V visual tokens, T packed text tokens, W vocabulary, D width, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from visor.embedded.architecture import TinyArchitecture, build
from visor.embedded.curriculum import Curriculum
from visor.embedded.packed_text import PackedText, TextEncoder, attention_mask
from visor.embedded.symbolic import PatchEmbeddings, PatchWords, present_patches
from visor.embedded.trainer import Stage, StepResult
from visor.embedded.vocabulary import SPACE, build_tokenizer, words
from visor.training.attention import use_float32_attention
from visor.training.auxiliary.fact_targets import FactReader, FactTargets
from visor.worlds.world import Scene

EARLY_WEIGHT = 3.0
FACTS_WEIGHT = 1.0
ORDER = ("forms", "glyphs", "connections", "charts", "scenes", "easy_vqa", "digits")


def pixels_of(scenes: Sequence[Scene]) -> torch.Tensor:
    """[B, 3, H, W] in [-1, 1], as the processor normalises."""
    array = np.stack([np.asarray(scene.image) for scene in scenes])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def answer_loss(logits_AW: torch.Tensor, text: PackedText) -> tuple[torch.Tensor, list[list[bool]]]:
    """Cross-entropy over answer tokens, and whether each whole answer is right (as greedy decoding would have it)."""
    chosen_BT = text.labels_BT >= 0
    labels_A = text.labels_BT[chosen_BT]
    early_A = text.early_BT[chosen_BT]
    loss_A = F.cross_entropy(logits_AW.float(), labels_A, reduction="none")
    loss = loss_A[~early_A].mean() + EARLY_WEIGHT * loss_A[early_A].mean()
    wrong_A = ((logits_AW.detach().argmax(-1) != labels_A) & ~early_A).numpy()
    row_A, question_A = chosen_BT.nonzero()[:, 0].numpy(), text.segment_BT[chosen_BT].numpy()
    right = [[True] * len(kinds) for kinds in text.kinds]
    for row, question in zip(row_A[wrong_A], question_A[wrong_A], strict=True):
        right[row][question] = False
    return loss, right


class TinyModel(nn.Module):
    """The LLaVA under training with the helpers that training alone needs."""

    def __init__(self, architecture: TinyArchitecture, seed: int = 0) -> None:
        super().__init__()
        self.architecture = architecture
        self.tokenizer = build_tokenizer()
        self.llava = build(architecture, self.tokenizer, seed)
        use_float32_attention(self.llava)
        self.patches = PatchEmbeddings(architecture.grid, architecture.decoder_width)
        self.tower_labels = nn.Linear(architecture.tower_width, len(self.tokenizer))
        self.facts = FactReader(
            self.llava.model.language_model,
            architecture.decoder_layers // 2,
            architecture.decoder_width,
            len(self.tokenizer),
        )
        self.text = TextEncoder(self.tokenizer)
        self.patch_words = PatchWords(self.tokenizer, architecture.grid)
        self._share_word_embeddings()

    @torch.no_grad()
    def _share_word_embeddings(self) -> None:
        # "red" in an answer or a patch and " red" in a question start as the same vector.
        table, ids = self.llava.get_input_embeddings().weight, self.tokenizer.convert_tokens_to_ids
        for word in words():
            if len(word) > 1:
                table[ids(SPACE + word)] = table[ids(word)]

    def decode(self, visual_BVD, patch_BV, valid_BV, text: PackedText) -> torch.Tensor:
        """Logits [A, W] at the answer positions, from visual embeddings and packed questions."""
        decoder = self.llava.model.language_model
        embeds_BTD = decoder.embed_tokens(text.ids_BT)
        position_BS = torch.cat([patch_BV, self.architecture.grid**2 + text.offset_BT], 1)
        mask = attention_mask(valid_BV, text)
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        hidden_BSD = decoder(
            inputs_embeds=torch.cat([visual_BVD.to(embeds_BTD.dtype), embeds_BTD], 1),
            attention_mask=bias,
            position_ids=position_BS,
            use_cache=False,
        ).last_hidden_state
        return self.llava.lm_head(hidden_BSD[:, visual_BVD.shape[1] :][text.labels_BT >= 0])

    def symbolic_target(self, scenes: Sequence[Scene]) -> torch.Tensor:
        """[B, V, D]: what the projector should yield for each patch."""
        words_BVW = self.patch_words.multi_hot(scenes, len(self.tokenizer))
        patch_BV = torch.arange(self.architecture.grid**2).expand(len(scenes), -1)
        return self.patches(words_BVW, self.llava.get_input_embeddings().weight, patch_BV)

    def tower(self, scenes: Sequence[Scene]) -> torch.Tensor:
        """[B, V, tower width] features, as LLaVA's projector receives them."""
        output = self.llava.model.vision_tower(pixels_of(scenes), output_hidden_states=True)
        return output.hidden_states[-1]


class DecoderStage(Stage):
    """Stage 0a: the decoder learns to look things up on symbolic scenes."""

    name = "decoder"

    def __init__(self, model: TinyModel) -> None:
        self.model, self.curriculum = model, Curriculum(ORDER)
        llava = model.llava
        self.module = nn.ModuleDict(
            {
                "decoder": llava.model.language_model,
                "head": llava.lm_head,
                "patches": model.patches,
                "facts": model.facts,
            }
        )

    def hold_embeddings(self) -> None:
        """Train on, but leave what `align` aims at as it is: the embeddings of words and patches."""
        for parameter in (self.model.llava.get_input_embeddings().weight, *self.model.patches.parameters()):
            parameter.register_hook(torch.zeros_like)

    def kinds(self, scene: Scene) -> list[str]:
        return [question.kind for question in scene.questions]

    def step(self, scenes: list[Scene], generator: torch.Generator) -> StepResult:
        model, text = self.model, self.model.text.pack(scenes)
        words_BVW = model.patch_words.multi_hot(scenes, len(model.tokenizer))
        # Empty patches join now and then, so that the decoder will not be surprised by the full grid.
        keep_empty = (0.0, 0.0, 0.0, 0.3)[int(torch.randint(4, (), generator=generator))]
        patch_BM, valid_BM = present_patches(words_BVW, keep_empty, generator)
        words_BMW = words_BVW.gather(1, patch_BM[..., None].expand(-1, -1, words_BVW.shape[-1]))
        with torch.autocast("cpu", torch.bfloat16):
            visual = model.patches(words_BMW, model.llava.get_input_embeddings().weight, patch_BM)
            logits = model.decode(visual, patch_BM, valid_BM, text)
            facts, measures = model.facts.loss(FactTargets.of(scenes, model.patch_words, patch_BM, text))
        loss, right = answer_loss(logits, text)
        return StepResult(loss + FACTS_WEIGHT * facts, right, measures)


def label_loss(logits_BVW: torch.Tensor, target_BVW: torch.Tensor, empty: int) -> torch.Tensor:
    """Cross-entropy per patch against its words in equal shares; an empty patch says `empty` and weighs a tenth."""
    num_words_BV = target_BVW.sum(-1)
    share_BVW = target_BVW / num_words_BV.clamp(min=1)[..., None]
    share_BVW[..., empty] = (num_words_BV == 0).float()
    loss_BV = -(share_BVW * logits_BVW.float().log_softmax(-1)).sum(-1)
    weight_BV = torch.where(num_words_BV == 0, 0.1, 1.0)
    return (loss_BV * weight_BV).sum() / weight_BV.sum()


class TowerStage(Stage):
    """Stage 0b: the tower names what stands in each patch (this project's stand-in for SigLIP pre-training)."""

    name = "tower"

    def __init__(self, model: TinyModel) -> None:
        self.model = model
        order = (*ORDER, "pages")
        self.curriculum = Curriculum(order, len(order), grow_at=0.5, step=0.25, emphasis={"pages": 10.0})
        self.module = nn.ModuleDict({"tower": model.llava.model.vision_tower, "labels": model.tower_labels})

    def kinds(self, scene: Scene) -> list[str]:
        return ["label/" + ("word" if len(label.words[0]) > 1 else "glyph") for label in self._labels(scene)]

    def _labels(self, scene: Scene):
        return [label for label in scene.labels if label.words]

    def step(self, scenes: list[Scene], generator: torch.Generator) -> StepResult:
        model = self.model
        target_BVW = model.patch_words.multi_hot(scenes, len(model.tokenizer))
        with torch.autocast("cpu", torch.bfloat16):
            logits_BVW = model.tower_labels(model.tower(scenes))
        loss = label_loss(logits_BVW, target_BVW, model.tokenizer.pad_token_id)
        # A patch of k words is right if they are the k likeliest.
        order_BVW = logits_BVW.detach().topk(2).indices
        first_BVW = torch.zeros_like(target_BVW).scatter(-1, order_BVW[..., :1], 1.0)
        both_BVW = torch.zeros_like(target_BVW).scatter(-1, order_BVW, 1.0)
        top_BVW = torch.where(target_BVW.sum(-1, keepdim=True) > 1, both_BVW, first_BVW)
        exact_BV = (top_BVW == target_BVW).all(-1)
        right = [
            [bool(exact_BV[b, model.patch_words.patch_of(label)]) for label in self._labels(one)]
            for b, one in enumerate(scenes)
        ]
        return StepResult(loss, right)


class DenseStage(Stage):
    """Stages 1 and 2: tower, projector and decoder on pixels; answers, with the patch labels as a side loss."""

    name = "dense"

    def __init__(self, model: TinyModel, side_weight: float = 1.0) -> None:
        self.model, self.side_weight = model, side_weight
        self.curriculum = Curriculum.full_size(ORDER, smaller=0.5)
        self.module = model

    def kinds(self, scene: Scene) -> list[str]:
        return [question.kind for question in scene.questions]

    def step(self, scenes: list[Scene], generator: torch.Generator) -> StepResult:
        model, text = self.model, self.model.text.pack(scenes)
        grid_size = model.architecture.grid**2
        patch_BV = torch.arange(grid_size).expand(len(scenes), -1)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.tower(scenes)
            visual = model.llava.model.multi_modal_projector(features)
            logits = model.decode(visual, patch_BV, torch.ones_like(patch_BV, dtype=torch.bool), text)
            side_logits = model.tower_labels(features)
            facts, measures = model.facts.loss(FactTargets.of(scenes, model.patch_words, patch_BV, text))
        loss, right = answer_loss(logits, text)
        side = label_loss(
            side_logits,
            model.patch_words.multi_hot(scenes, len(model.tokenizer)),
            model.tokenizer.pad_token_id,
        )
        return StepResult(loss + self.side_weight * side + FACTS_WEIGHT * facts, right, measures)


class AlignStage(Stage):
    """Stage 1: tower and projector learn to yield the embeddings that the decoder knows; the decoder stands still.

    The tower takes part: labels need no position, so it has not learned to keep one, and the decoder needs it.
    """

    name = "align"

    def __init__(self, model: TinyModel) -> None:
        self.model = model
        self.curriculum = Curriculum.full_size(ORDER, smaller=0.2)
        llava = model.llava.model
        self.module = nn.ModuleDict(
            {"tower": llava.vision_tower, "projector": llava.multi_modal_projector, "labels": model.tower_labels}
        )

    def kinds(self, scene: Scene) -> list[str]:
        return []

    def step(self, scenes: list[Scene], generator: torch.Generator) -> StepResult:
        model = self.model
        with torch.no_grad():
            target = model.symbolic_target(scenes)
        with torch.autocast("cpu", torch.bfloat16):
            features = model.tower(scenes)
            visual, labels_BVW = model.llava.model.multi_modal_projector(features), model.tower_labels(features)
        words_BVW = model.patch_words.multi_hot(scenes, len(model.tokenizer))
        # Relative to the targets' variance, and patches with words count as much as all the empty ones.
        error_BV = (visual.float() - target).square().mean(-1) / target.var()
        labelled_BV = words_BVW.any(-1)
        distance = error_BV[labelled_BV].mean() + error_BV[~labelled_BV].mean()
        side = label_loss(labels_BVW, words_BVW, model.tokenizer.pad_token_id)
        return StepResult(distance + 0.3 * side, [[] for _ in scenes])
