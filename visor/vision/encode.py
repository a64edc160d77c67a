"""From the images of a batch of samples to what enters the decoder: encoded, reduced as the schedules say, projected.

A sample has a row: its image's features, those of several images, or None. Images of equal shape and equal reduction
are computed together, whichever samples they belong to. How one image is encoded is `visor.vision.features`; how a
sample's images share its tokens, `visor.vision.multi_image`.

Shapes: B samples, N visual tokens before reduction, T after it, D decoder width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from budgets.registry import METHODS
from budgets.schedule import Reduction, Schedule
from visor.engine.stopwatch import scoring
from visor.families.base import FamilyAdapter
from visor.reduction.method import Method, tower_reduction
from visor.vision.features import ReducedFeatures, VisionFeatures, encode_images, project
from visor.vision.multi_image import MultiImageFeatures, concatenate, images_of, reductions_by_image
from visor.vision.prepared import PreparedSample

VisionRow = VisionFeatures | MultiImageFeatures | None
"""The tower's features of one sample; None without an image."""


def taps_of(schedules: Sequence[Schedule]) -> frozenset[str]:
    """What the encoder-side methods of these schedules must see of the tower."""
    reductions = {schedule.encoder for schedule in schedules if schedule.encoder}
    return frozenset().union(*(method_of(reduction).taps for reduction in reductions))


def method_of(reduction: Reduction) -> Method:
    """The method of a reduction, with the parameters that it gives."""
    return METHODS.get(reduction.method)(**dict(reduction.params))


@torch.inference_mode()
def encode(
    adapter: FamilyAdapter,
    prepared: Sequence[PreparedSample],
    taps: Collection[str] = (),
    image_scale: float = 1.0,
    inside: Reduction | None = None,
) -> list[VisionRow]:
    """The tower's features, a row a sample; equal images are encoded once. See `LoadedModel.encode`."""
    model = adapter.model
    with_image = [sample for sample in prepared if sample.image_key is not None]
    if not with_image:
        return [None] * len(prepared)
    pixels, keys = [], []
    for sample in with_image:
        inputs = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in sample.pixel_inputs.items()
        }
        if sample.num_images == 1:
            pixels, keys = [*pixels, inputs], [*keys, sample.image_key]
            continue
        pixels += adapter.split_images(inputs, sample.num_images)
        keys += [f"{sample.image_key}/{i}" for i in range(sample.num_images)]
    encoded = iter(encode_images(adapter, pixels, keys, taps, image_scale, inside))
    rows: list[VisionRow] = []
    for sample in prepared:
        images = [next(encoded) for _ in range(sample.num_images)] if sample.image_key is not None else [None]
        rows.append(images[0] if len(images) == 1 else MultiImageFeatures(tuple(images)))
    return rows


def resolve(vision: Sequence[VisionRow], schedules: Sequence[Schedule]) -> list[Schedule]:
    """The schedules with the counts that the images ask for, where a method adapts them; the others as they are.

    Raises:
        ValueError: such a method and a prompt of several images.
    """
    resolved = []
    for row, schedule in zip(vision, schedules, strict=True):
        method = method_of(schedule.encoder) if row is not None and schedule.encoder is not None else None
        if method is not None and method.adaptive:
            if isinstance(row, MultiImageFeatures):
                raise ValueError(
                    f"{method.title}: how many tokens stay follows from the image, and the prompt has "
                    f"{len(row.images)}; give a number"
                )
            with scoring("features"):
                schedule = method.resolve(schedule, row)
        resolved.append(schedule)
    return resolved


@torch.inference_mode()
def reduce(
    adapter: FamilyAdapter,
    vision: Sequence[VisionRow],
    schedules: Sequence[Schedule],
    prepared: Sequence[PreparedSample] = (),
) -> list[ReducedFeatures | None]:
    """What enters the decoder, a row (B = 1) a sample. See `LoadedModel.reduce`."""
    vision = _with_text(adapter, vision, schedules, prepared) if prepared else list(vision)
    groups: dict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for index, (row, schedule) in enumerate(zip(vision, schedules, strict=True)):
        if row is None:
            continue
        _check_row(row, schedule)
        images = images_of(row)
        shares = reductions_by_image(schedule.encoder, [image.num_tokens for image in images])
        for number, (image, reduction) in enumerate(zip(images, shares, strict=True)):
            groups[image.num_tokens, image.grid, image.stage, reduction].append((index, number))
    reduced_images: dict[tuple[int, int], ReducedFeatures] = {}
    for (*_, reduction), members in groups.items():
        stack = VisionFeatures.stack([images_of(vision[index])[number] for index, number in members])
        reduced = reduce_stack(adapter, stack, reduction).with_levels(stack)
        reduced_images.update({member: reduced.row(place) for place, member in enumerate(members)})
    results: list[ReducedFeatures | None] = [None] * len(vision)
    for index, row in enumerate(vision):
        if row is not None:
            images = images_of(row)
            own = [reduced_images[index, number] for number in range(len(images))]
            results[index] = concatenate(own, [image.num_tokens for image in images])
    return results


def reduce_stack(adapter: FamilyAdapter, stack: VisionFeatures, reduction: Reduction | None) -> ReducedFeatures:
    """Images [B, N, d] of equal shape, reduced in the same way and projected to [B, T, D].

    Raises:
        ValueError: the method left another number of tokens than the reduction says.
    """
    device = stack.features_BND.device
    if reduction is None:
        everything_BN = torch.ones(stack.features_BND.shape[:2], dtype=torch.bool, device=device)
        places_BN = torch.arange(stack.num_tokens, device=device).expand(len(everything_BN), -1)
        return ReducedFeatures(project(adapter, stack.features_BND, stack.stage), everything_BN, places_BN)
    method = method_of(reduction)
    if stack.inside is not None:
        features_BTD = project(adapter, stack.features_BND, stack.stage)
        return ReducedFeatures(features_BTD, stack.inside_kept_BM)
    if method.stage == "projected":
        projected_BND = project(adapter, stack.features_BND, stack.stage)
        stack = replace(stack, features_BND=projected_BND, stage="projected")
    with scoring("features"):
        reduced = method.reduce_features(stack, reduction.keep)
    num_left = reduced.features_BTD.shape[1]
    if num_left != reduction.keep:
        raise ValueError(f"{method.title} left {num_left} visual tokens where the schedule says {reduction.keep}")
    return replace(reduced, features_BTD=project(adapter, reduced.features_BTD, stack.stage))


def _with_text(
    adapter: FamilyAdapter,
    vision: Sequence[VisionRow],
    schedules: Sequence[Schedule],
    prepared: Sequence[PreparedSample],
) -> list[VisionRow]:
    """The rows with the embeddings of their prompts' text, where a method reads it."""
    rows = list(vision)
    for index, (sample, row, schedule) in enumerate(zip(prepared, vision, schedules, strict=True)):
        if row is not None and schedule.encoder is not None and METHODS.get(schedule.encoder.method).reads_text:
            with scoring("features"):
                text = (_embedded_text(adapter, sample),)
            images = tuple(replace(image, text=text) for image in images_of(row))
            rows[index] = images[0] if len(images) == 1 else MultiImageFeatures(images)
    return rows


def _embedded_text(adapter: FamilyAdapter, sample: PreparedSample) -> Tensor:
    """The prompt's tokens that are not visual, as they enter layer 0: [num_text, D]."""
    image_ids = set(adapter.image_token_ids)
    ids = torch.tensor([token for token in sample.input_ids if token not in image_ids], device=adapter.model.device)
    return adapter.decoder.embed_tokens(ids)


def _check_row(row: VisionFeatures | MultiImageFeatures, schedule: Schedule) -> None:
    if row.image_scale != schedule.image_scale:
        raise ValueError(
            f"the vision features were encoded at image_scale={row.image_scale}, the schedule needs "
            f"{schedule.image_scale}"
        )
    if row.inside != tower_reduction(schedule):
        raise ValueError(
            f"the vision features were encoded with inside={row.inside}, the schedule needs {tower_reduction(schedule)}"
        )
    if row.inside is None and schedule.image_scale == 1.0 and row.num_tokens != schedule.source_visual:
        raise ValueError(f"the tower gave {row.num_tokens} tokens, the schedule is made for {schedule.source_visual}")
