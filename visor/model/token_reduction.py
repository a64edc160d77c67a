"""Token reduction before the decoder, inside a model's own forward (VISOR-TR): fewer features, fewer image tokens.

The harness does the same for any method and caches features (`visor.vision.encode`, `visor.inference.collate`); this
is for a model that carries its reduction in its config, so that `forward`, `generate`, training and pipelines need not
know. Gradients reach the tower.

Shapes: B batch, P prompt length, N visual tokens of an image, K of them that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from budgets.geometry import ModelGeometry
from visor.families.base import FamilyAdapter
from visor.model.configuration import reduction_method
from visor.vision.encode import reduce_stack
from visor.vision.features import encode_images
from visor.vision.prepared import pixel_hash

PADDING = {"attention_mask": 0, "labels": -100, "shift_labels": -100, "segment_ids": -1, "position_ids": 0}


@dataclass(frozen=True)
class ReducedInputs:
    """Forward arguments of a batch with fewer visual tokens.

    Args:
        inputs: forward arguments, pixels replaced by features.
        index_BP: for each token of the shortened prompt its place in the given one; padding stands on the left.
    """

    inputs: dict[str, Any]
    index_BP: Tensor


def reduce_inputs(
    adapter: FamilyAdapter, geometry: ModelGeometry, reduction: Mapping[str, Any], inputs: Mapping[str, Any]
) -> ReducedInputs:
    """Reduce the images of a batch.

    Args:
        reduction: the method and its parameters, as in `VisorConfig`.
        inputs: forward arguments with `input_ids` and pixels, and what has one entry a token (`PADDING`).

    Raises:
        ValueError: a sample with several images, tokens that do not match the images, or a family whose position ids
            or features need more than this does.
    """
    if adapter.has_grid_positions:
        raise ValueError(
            f"{type(adapter).__name__}: positions of this family follow the image's grid, and the model's own forward "
            "cannot reduce its tokens; use visor.inference.loaded_model.LoadedModel with the method visor+"
            f"{reduction['method']}"
        )
    method = reduction_method(reduction)
    ids = inputs["input_ids"].to("cpu")
    visual_BP = torch.isin(ids, torch.tensor(adapter.image_token_ids))
    counts = visual_BP.sum(1).tolist()
    for row, count in enumerate(counts):
        places = visual_BP[row].nonzero().flatten()
        if count and int(places[-1] - places[0]) + 1 != count:
            raise ValueError(f"row {row} has several blocks of image tokens; a reduction takes one image a sample")
    features, kept = _reduced_images(adapter, geometry, method, inputs, [n for n in counts if n])
    kept_by_row = iter(kept)
    keep_BP = torch.ones_like(visual_BP)
    for row, count in enumerate(counts):
        if count:
            keep_BP[row, visual_BP[row].nonzero().flatten()[next(kept_by_row) :]] = False
    mask = inputs.get("attention_mask")
    if mask is not None:
        keep_BP &= mask.to("cpu").bool()
    longest = int(keep_BP.sum(1).max())
    # Tokens that go sort to the front: a shorter row's padding points at them.
    index_BP = keep_BP.to(torch.uint8).argsort(dim=1, stable=True)[:, -longest:]
    real_BP = keep_BP.gather(1, index_BP)
    device = inputs["input_ids"].device
    index_BP, real_BP = index_BP.to(device), real_BP.to(device)
    shorter = {name: x for name, x in inputs.items() if name not in (*adapter.image_fields, "image_sizes")}
    shorter["attention_mask"] = real_BP.long()
    # Position ids stay one running number a token: those behind the image fall by what has gone.
    if inputs.get("position_ids") is not None:
        gone_BP = (~keep_BP).long().cumsum(1).to(device) - (0 if mask is None else (mask == 0).long().cumsum(1))
        shorter["position_ids"] = inputs["position_ids"] - gone_BP
    for name in ("input_ids", *PADDING):
        if shorter.get(name) is not None and name != "attention_mask":
            fill = inputs["input_ids"].gather(1, index_BP) if name == "input_ids" else PADDING[name]
            values = shorter[name].expand(len(ids), -1).gather(1, index_BP)
            shorter[name] = torch.where(real_BP, values, fill)
    # What a padding slot points at may be an image token, which transformers would count.
    padding = torch.isin(shorter["input_ids"], torch.tensor(adapter.image_token_ids, device=device)) & ~real_BP
    shorter["input_ids"] = shorter["input_ids"].masked_fill(padding, 0)
    shorter["mm_encoder_outputs"] = adapter.image_outputs(features)
    return ReducedInputs(shorter, index_BP)


def _reduced_images(
    adapter: FamilyAdapter, geometry: ModelGeometry, method: Any, inputs: Mapping[str, Any], counts: list[int]
) -> tuple[list[Tensor], list[int]]:
    """Projected features of each image, and how many there are of each."""
    names = (*adapter.image_fields, "image_sizes")
    pixels = adapter.split_images({n: inputs[n] for n in names if inputs.get(n) is not None}, len(counts))
    schedules = [method.schedule(geometry, count) for count in counts]
    scales = {schedule.image_scale for schedule in schedules}
    assert len(scales) == 1, "a scale follows from the method's options alone"
    # What draws at random draws by the image, whatever the batch; hashing waits for the device, so others do not.
    draws = any(field.name == "seed" for field in fields(method))
    cpu = lambda image: {name: value.cpu() for name, value in image.items()}
    keys = [pixel_hash(cpu(image)) if draws else str(index) for index, image in enumerate(pixels)]
    rows = encode_images(adapter, pixels, keys, method.taps, scales.pop())
    features = []
    for row, schedule, count in zip(rows, schedules, counts, strict=True):
        if schedule.image_scale == 1.0 and row.num_tokens != count:
            raise ValueError(f"an image gives {row.num_tokens} visual tokens, its prompt holds {count} image tokens")
        features.append(reduce_stack(adapter, row, schedule.encoder).features_BTD[0])
    return features, [len(each) for each in features]
