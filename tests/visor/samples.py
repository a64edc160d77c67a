"""Prepared samples of any family's tiny model, without a processor."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from tiny_models import make_model, make_prompt, visual_counts

from visor.inference import LoadedModel
from visor.vision.prepared import PreparedSample

NUM_LAYERS = 4  # the fewest in which every in-decoder method finds its stages
NO_PROCESSOR = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0, decode=lambda ids, **_: str(ids)))


@functools.cache
def loaded(family: str, attention: str = "sdpa") -> LoadedModel:
    """Shared by tests: none of them changes it, which is part of what they show."""
    return LoadedModel(make_model(family, attention, NUM_LAYERS), NO_PROCESSOR, name=family)


@functools.cache
def samples(family: str, count: int = 8) -> list[PreparedSample]:
    """Samples of different images, and texts of different lengths; the families decide how many visual tokens."""
    model = loaded(family)
    prompt = make_prompt(model.model, count)
    fields = {name: prompt[name] for name in (*model.adapter.image_fields, "image_sizes") if name in prompt}
    if family in ("smolvlm", "idefics3"):  # a prompt a row: two tiles side by side, and the whole image
        sizes = torch.tensor([[56, 112]])
        images = [{"pixel_values": prompt["pixel_values"][i : i + 1], "image_sizes": sizes} for i in range(count)]
    else:
        if family == "aya_vision":  # four tiles and the whole image
            fields["image_sizes"] = torch.tensor([[112, 112]] * count)
        if family == "ovis2":  # which its forward does not take
            fields["grids"] = torch.tensor([[1, 2]] * count)
        images = model.adapter.split_images(fields, count)
    prepared = []
    for row, (num_visual, image) in enumerate(zip(visual_counts(prompt), images, strict=True)):
        ids = prompt["input_ids"][row][prompt["attention_mask"][row].bool()].tolist()
        prepared.append(PreparedSample(tuple(ids), len(ids) - num_visual, num_visual, image, f"{family} {row}"))
    return prepared
