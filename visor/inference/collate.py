"""Samples become left-padded prompts: fewer image tokens where fewer visual tokens are left, and their features.

Encoder-side reduction shortens the block of image tokens in the prompt and feeds the reduced features through
transformers' own `mm_encoder_outputs`, so that positions are contiguous by construction. Under M-RoPE every token
keeps the position that it has in the full prompt.

Shapes: B samples, P padded prompt length, N visual tokens before reduction, T after it, D decoder width, A axes of
M-RoPE.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from budgets.schedule import Schedule
from visor.families.base import FamilyAdapter
from visor.inference.prompt import Prompt, reduce_prompt, sequential_positions
from visor.vision import encode
from visor.vision.encode import VisionRow
from visor.vision.multi_image import tokens_left_by_image
from visor.vision.prepared import PreparedSample


def group_by_structure(schedules: Sequence[Schedule]) -> list[list[int]]:
    """Places of the schedules that may share a batch, group by group."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for index, schedule in enumerate(schedules):
        groups[schedule.structure].append(index)
    return list(groups.values())


def collate_samples(
    adapter: FamilyAdapter,
    prepared: Sequence[PreparedSample],
    vision: Sequence[VisionRow],
    schedules: Sequence[Schedule],
    pad_id: int,
) -> Prompt:
    """A left-padded batch of samples whose schedules have one structure, with reduced features.

    Args:
        pad_id: the token in front of shorter prompts; masked, so any will do.

    Raises:
        ValueError: schedules of several structures, a schedule made for another number of visual tokens, or
            features that were encoded at another scale.
    """
    _check_fit(prepared, vision, schedules)
    reduced = encode.reduce(adapter, vision, schedules, prepared)
    image_ids, in_place = set(adapter.image_token_ids), adapter.has_grid_positions
    sources, features, levels = [], [], []
    for sample, row, own in zip(prepared, vision, reduced, strict=True):
        if own is None:
            sources.append(list(range(len(sample.input_ids))))
            continue
        images = tokens_left_by_image(row, own, sample.num_visual)
        reduced_prompt = reduce_prompt(sample.input_ids, image_ids, images, in_place)
        order = slice(None) if reduced_prompt.order is None else reduced_prompt.order
        sources.append(reduced_prompt.sources)
        features.append(own.features_BTD[0][order])
        levels.append(tuple(level[0][order] for level in own.levels))
    longest, device = max(map(len, sources)), adapter.model.device
    prompts = [[sample.input_ids[i] for i in each] for sample, each in zip(prepared, sources, strict=True)]
    ids = [[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    mask_BP = torch.tensor(mask, device=device)
    return Prompt(
        torch.tensor(ids, device=device),
        mask_BP,
        tuple(features),
        tuple(schedules),
        tuple(None if row is None or row.kept_BN is None else row.kept_BN[0] for row in reduced),
        tuple(levels),
        _grid_positions(adapter, prepared, sources, mask_BP) if in_place else None,
    )


def image_arguments(adapter: FamilyAdapter, prompt: Prompt) -> dict[str, Any]:
    """What stands for the images in a forward. A new object each call: transformers may change it in place."""
    if not prompt.features:
        return {}
    return {"mm_encoder_outputs": adapter.image_outputs(prompt.features, prompt.levels)}


def forward_arguments(adapter: FamilyAdapter, prompt: Prompt) -> dict[str, Any]:
    """The prompt as arguments of one forward. A new object each call."""
    return {
        "input_ids": prompt.input_ids_BP,
        "attention_mask": prompt.attention_mask_BP,
        "position_ids": prompt.positions_BP,
        **adapter.prompt_arguments(prompt.input_ids_BP),
        **image_arguments(adapter, prompt),
    }


def _check_fit(prepared: Sequence[PreparedSample], vision: Sequence[VisionRow], schedules: Sequence[Schedule]) -> None:
    if len({schedule.structure for schedule in schedules}) > 1:
        raise ValueError("samples of one batch need schedules of one structure; generate() groups them")
    for sample, schedule, row in zip(prepared, schedules, vision, strict=True):
        if schedule.source_visual != sample.num_visual:
            raise ValueError(
                f"the schedule is made for {schedule.source_visual} visual tokens, the sample has {sample.num_visual}"
            )
        if (row is None) != (sample.image_key is None):
            raise ValueError("vision features are needed for exactly the samples that have an image")


def _grid_positions(
    adapter: FamilyAdapter, prepared: Sequence[PreparedSample], sources: Sequence[Sequence[int]], mask_BP: Tensor
) -> Tensor:
    """M-RoPE's position ids [4, B, P]: each token keeps the one that it has in the full prompt."""
    axes = []
    for sample, kept in zip(prepared, sources, strict=True):
        images = [sample.pixel_inputs] if sample.image_key is not None else []
        positions_AP = adapter.position_ids(sample.input_ids, images)[:, kept]
        axes.append(torch.nn.functional.pad(positions_AP, (mask_BP.shape[1] - len(kept), 0)))
    positions_ABP = torch.stack(axes, dim=1).to(mask_BP.device)
    return torch.cat([sequential_positions(mask_BP)[None], positions_ABP])
