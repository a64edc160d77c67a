"""The parts of a model that a recipe may train, and what else gets gradients beside them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from visor.training.forward import PackedModel


def parts_of(packed: PackedModel) -> dict[str, list[nn.Module]]:
    """The parts of a model that a recipe may train, by name."""
    decoder, adapter = packed.decoder, packed.adapter
    parts = {
        "tower": [adapter.tower],
        "projector": [adapter.projector],
        "decoder": [decoder.layers, decoder.norm, decoder.embed_tokens, packed.base.get_output_embeddings()],
    }
    if hasattr(decoder, "cross_blocks"):
        parts["cross"] = [decoder.cross_blocks]
    return parts


def freeze_all_but(packed: PackedModel, trainable: Sequence[str]) -> dict[str, nn.Parameter]:
    """Let gradients flow to the named parts only; their parameters by name.

    Raises:
        ValueError: no such part.
    """
    parts = parts_of(packed)
    if not trainable or (unknown := [name for name in trainable if name not in parts]):
        raise ValueError(f"train must name parts of {', '.join(parts)}; got {list(trainable)}" + (
            f", of which {unknown} do not exist here" if trainable and unknown else ""))  # fmt: skip
    packed.model.requires_grad_(False)
    for name in trainable:
        for module in parts[name]:
            module.requires_grad_(True)
    found = {name: p for name, p in packed.model.named_parameters() if p.requires_grad}
    for prefix, head in auxiliary_heads(packed).items():
        found |= {f"{prefix}.{name}": p for name, p in head.named_parameters()}
    return found


def auxiliary_heads(packed: PackedModel) -> dict[str, nn.Module]:
    """The heads of the auxiliary losses, which are trained beside the model and left behind, by name."""
    heads = {
        "visual_facts": packed.visual_facts,
        "question_facts": packed.question_facts,
        "window_words": packed.window_words,
    }
    return {name: head for name, head in heads.items() if head is not None}
