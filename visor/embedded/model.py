"""The small LLaVA under training, with the helpers that training alone needs: labels, symbols, packed text.

Shapes: B scenes, V visual tokens, M of them shown, T packed text tokens, S = V + T, A labelled positions, W vocabulary,
D width, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from visor.embedded.architecture import TinyArchitecture, build
from visor.embedded.packed_text import PackedText, TextEncoder, attention_mask
from visor.embedded.scene_tokens import SceneTokens
from visor.embedded.symbolic import PatchEmbeddings, PatchWords
from visor.embedded.vocabulary import SPACE, build_tokenizer, words
from visor.training.attention import use_float32_attention
from visor.training.auxiliary.fact_targets import FactTargets, LayerFactHead
from visor.worlds.world import SLOTS, Scene


def pixels_of(scenes: Sequence[Scene]) -> torch.Tensor:
    """[B, 3, H, W] in [-1, 1], as the processor normalises."""
    array = np.stack([np.asarray(scene.image) for scene in scenes])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1.0


class TinyModel(nn.Module):
    """The LLaVA under training with what is trained beside it and left behind.

    Args:
        architecture: sizes.
        seed: of the first weights.
    """

    def __init__(self, architecture: TinyArchitecture, seed: int = 0) -> None:
        super().__init__()
        self.architecture = architecture
        self.tokenizer = build_tokenizer()
        self.llava = build(architecture, self.tokenizer, seed)
        use_float32_attention(self.llava)
        self.patches = PatchEmbeddings(architecture.grid, architecture.decoder_width)
        self.tower_labels = nn.Linear(architecture.tower_width, len(self.tokenizer))
        self.facts = LayerFactHead(
            self.llava.model.language_model, architecture.decoder_layers // 2, len(SLOTS), len(self.tokenizer)
        )
        self.text = TextEncoder(self.tokenizer)
        self.patch_words = PatchWords(self.tokenizer, architecture.grid)
        self.scene_tokens = SceneTokens(self.tokenizer)
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
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
        hidden_BSD = decoder(
            inputs_embeds=torch.cat([visual_BVD.to(embeds_BTD.dtype), embeds_BTD], 1),
            attention_mask=bias,
            position_ids=position_BS,
            use_cache=False,
        ).last_hidden_state
        return self.llava.lm_head(hidden_BSD[:, visual_BVD.shape[1] :][text.labels_BT >= 0])

    def words_in_patches(self, scenes: Sequence[Scene]) -> torch.Tensor:
        """[B, V, W] float: 1 where a word stands in a patch."""
        return self.patch_words.multi_hot(scenes, len(self.tokenizer)).to(self.device)

    def all_patches(self, num: int) -> torch.Tensor:
        """[num, V]: every patch, in order."""
        return torch.arange(self.architecture.grid**2, device=self.device).expand(num, -1)

    def symbolic_target(self, words_BVW: torch.Tensor) -> torch.Tensor:
        """[B, V, D]: what the projector should yield for each patch."""
        table_WD = self.llava.get_input_embeddings().weight
        return self.patches(words_BVW, table_WD, self.all_patches(len(words_BVW)))

    def fact_targets(self, scenes: Sequence[Scene], patch_BM: torch.Tensor, text: PackedText) -> FactTargets:
        """The facts of scenes whose visual tokens are the patches `patch_BM`."""
        targets = [self.scene_tokens(scene, self.architecture.grid) for scene in scenes]
        return FactTargets.of(targets, patch_BM, text.ids_BT)

    def tower(self, scenes: Sequence[Scene]) -> torch.Tensor:
        """[B, V, tower width] features, as LLaVA's projector receives them."""
        output = self.llava.model.vision_tower(pixels_of(scenes).to(self.device), output_hidden_states=True)
        return output.hidden_states[-1]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.tower_labels.weight.device
