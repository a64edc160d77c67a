"""CDPruner: a determinantal point process over tokens: relevant to the question, and unlike one another.

Kernel L = rel_i cos(f_i, f_j) rel_j over projected tokens; T tokens by greedy MAP inference with an incremental
Cholesky factor. rel is text relevance, min-max normalised to (0, 1] in each image. The authors take it from the text
tower that belongs to the vision tower (as the negated mean CLIP similarity); the Hugging Face checkpoints of all our
families ship without one, so relevance is an option, and every record's parameters say which it was:
"text-embeddings", the mean cosine to the embeddings of the prompt's text as they enter the decoder (template included),
or "none", rel = 1. Output in the order of the image. A token of which the chosen ones leave less than `SPANNED` of its
squared length counts as that much: beyond the kernel's rank relevance decides, not rounding. Of equals
the earlier comes first.

Shapes: B samples, N visual tokens, T kept ones, W text tokens, D decoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from budgets.registry import METHODS
from budgets.schedule import Schedule
from visor.reduction._arithmetic import after_tower, check_choice, check_integer, is_reduced_by
from visor.reduction.method import Method

if TYPE_CHECKING:
    import torch

    from budgets.geometry import ModelGeometry
    from visor.vision.features import ReducedFeatures, VisionFeatures

SPANNED = 1e-4


@METHODS.register("cdpruner")
@dataclass(frozen=True)
class CDPruner(Method):
    """Options: `keep` tokens (a sample that has fewer keeps all); `relevance`: "text-embeddings" or "none"."""

    keep: int = 64
    relevance: str = "text-embeddings"

    title: ClassVar[str] = "CDPruner"
    paper: ClassVar[str] = (
        "Zhang et al., Beyond Attention or Similarity: Maximizing Conditional Diversity, NeurIPS 2025"
    )
    stage: ClassVar[str] = "projected"
    reads_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_integer(self.title, "keep", self.keep, 1)
        check_choice(self.title, "relevance", self.relevance, ("text-embeddings", "none"))

    def schedule(self, geometry: ModelGeometry, num_visual: int) -> Schedule:
        return after_tower(geometry.num_layers, num_visual, "cdpruner", self.keep, {"relevance": self.relevance})

    def settings(self, geometry: ModelGeometry, num_visual: int) -> Sequence[CDPruner]:
        return [replace(self, keep=keep) for keep in range(1, num_visual + 1)]

    def scoring_flops(self, geometry: ModelGeometry, schedule: Schedule, num_text: int) -> int:
        """All cosines once, the text's mean direction against all tokens, and in step t of the greedy loop one row of t
        entries against t x N."""
        if not is_reduced_by(schedule, "cdpruner"):
            return 0
        num_visual, keep = schedule.source_visual, schedule.encoder.keep
        flops = 2 * num_visual**2 * geometry.hidden_size + (keep - 1) * (keep - 2) * num_visual
        return flops + (2 * num_visual * geometry.hidden_size if self.relevance != "none" else 0)

    def reduce_features(self, vision: VisionFeatures, keep: int) -> ReducedFeatures:
        from visor.reduction._tokens import chosen, cosines

        kernel_BNN = cosines(vision.features_BND)
        if self.relevance != "none":
            if len(vision.text) != len(kernel_BNN):
                raise ValueError(
                    f"{self.title}: {len(kernel_BNN)} samples but {len(vision.text)} texts; give VisionFeatures.text, "
                    "or relevance='none'"
                )
            relevance_BN = text_relevance(vision.features_BND, vision.text)
            kernel_BNN = relevance_BN[:, :, None] * kernel_BNN * relevance_BN[:, None]
        return chosen(vision, greedy_map(kernel_BNN, keep))


def text_relevance(features_BND: torch.Tensor, text: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean cosine of each token to the text tokens [W, D] of its sample, scaled to (0, 1] over the image: [B, N]."""
    import torch

    normalize = torch.nn.functional.normalize
    # The mean of cosines is the product with the mean direction: one vector a sample, however long the text.
    direction_BD = torch.stack([normalize(words_WD.float(), dim=-1).mean(0) for words_WD in text])
    relevance_BN = (normalize(features_BND.float(), dim=-1) @ direction_BD[:, :, None])[..., 0]
    low_B1, high_B1 = relevance_BN.amin(1, keepdim=True), relevance_BN.amax(1, keepdim=True)
    return (relevance_BN - low_B1 + 1e-6) / (high_B1 - low_B1 + 1e-6)


def greedy_map(kernel_BNN: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Indices [B, T] that greedily maximise the determinant of the kernel's principal minor (Chen et al., 2018)."""
    import torch

    from visor.reduction._tokens import first_equal

    batch, num_tokens, _ = kernel_BNN.shape
    rows_B = torch.arange(batch, device=kernel_BNN.device)
    factor_BTN = kernel_BNN.new_zeros(batch, num_kept, num_tokens)
    gain_BN = kernel_BNN.diagonal(dim1=1, dim2=2).clamp(min=1e-12)  # what each would multiply the determinant by
    first_BN = first_equal(kernel_BNN)
    least_BN = (gain_BN * SPANNED).gather(1, first_BN)
    is_first_BN = first_BN == torch.arange(num_tokens, device=first_BN.device)
    gain_BN = torch.where(is_first_BN, gain_BN, least_BN)  # behind its equal a token adds nothing
    picks = []
    for step in range(num_kept):
        pick_B = gain_BN.argmax(1)
        picks.append(pick_B)
        if step + 1 == num_kept:
            break
        row_BN = kernel_BNN[rows_B, pick_B]
        if step:
            known_B1s = factor_BTN[rows_B, :step, pick_B][:, None]
            row_BN = row_BN - (known_B1s @ factor_BTN[:, :step])[:, 0]
        row_BN = row_BN / gain_BN[rows_B, pick_B].sqrt()[:, None]
        factor_BTN[:, step] = row_BN
        least_BN = least_BN.scatter(1, pick_B[:, None], -torch.inf)
        gain_BN = torch.maximum(gain_BN - row_BN.square(), least_BN).scatter(1, pick_B[:, None], -torch.inf)
    return torch.stack(picks, dim=1)
