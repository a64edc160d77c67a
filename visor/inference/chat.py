"""From a conversation to a prepared sample: the processor's own chat template and image processor, checked.

A conversation is transformers' own form: messages of a role and content, content a text or a list of parts
`{"type": "text", "text": ...}` and `{"type": "image", "image": PIL image}`. Earlier turns stand in the prompt with
their answers; any number of images may be in any turn. Video, sound and tools are refused: nothing here measures them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visor.families.base import FamilyAdapter
from visor.vision.image import MAX_PIXELS, as_rgb
from visor.vision.prepared import PreparedSample, pixel_hash

Message = Mapping[str, Any]
ROLES = ("system", "user", "assistant")


def load_processor(folder: Path) -> Any:
    """The processor of a local checkpoint.

    Raises:
        ValueError: a package is missing that this processor needs, even for images alone.
    """
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (ImportError, AttributeError) as error:  # without torchvision, some versions trip over a name instead
        if isinstance(error, AttributeError) and find_spec("torchvision") is not None:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the processor of {folder} needs a package that is not installed: {reason} Processors that also take "
            "video (Qwen-VL, LLaVA-OneVision, InternVL, SmolVLM) need torchvision in the release that fits torch "
            "(pip install torchvision), SmolVLM's also num2words (pip install num2words)"
        ) from error


def check_system(processor: Any, system: str) -> None:
    """Refuse a system text that the chat template leaves out, as some do without a word.

    Raises:
        ValueError: with what the template makes of it.
    """
    ask = [{"role": "user", "content": [{"type": "text", "text": "?"}]}]
    given = [{"role": "system", "content": [{"type": "text", "text": system}]}, *ask]
    try:
        rendered = processor.apply_chat_template(given, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise errors of their own (jinja2)
        raise ValueError(f"the chat template takes no system turn: {error}") from error
    if system.strip() not in rendered:
        raise ValueError(f"the chat template leaves the system text {system!r} out: it makes {rendered!r}")


def context_length(config: Any) -> int | None:
    """Positions that a decoder was made for; None where its config does not say.

    RoPE scaling stretches what the decoder was first trained on. Configs write the stretched length, the first one, or
    both; the longest that they mean counts, so that no prompt is refused that may run.
    """
    first = getattr(config, "max_position_embeddings", None)
    if first is None:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Decoders with layers of several kinds have one set of parameters a kind.
    kinds = [each for each in scaling.values() if isinstance(each, Mapping)] or [scaling]
    lengths = [first]
    for each in kinds:
        kind, factor = each.get("rope_type", each.get("type")), each.get("factor")
        original = each.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None
        )
        if factor and (original or kind in ("linear", "dynamic")):
            lengths.append(int(factor * (original or first)))
    return max(lengths)


def check_messages(
    messages: Sequence[Message], placeholder: str | None, max_pixels: int = MAX_PIXELS
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The messages with their images in RGB (`visor.vision.image`), and these images in order.

    Raises:
        ValueError: an unknown role, a part that is neither text nor image, an empty question, a text that holds the
            placeholder of an image, an image that cannot be read, or a last turn that is not the user's.
    """
    if not messages or messages[-1].get("role") != "user":
        raise ValueError("a conversation must end with a turn of the user, which is to be answered")
    images, result = [], []
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ValueError(f"message {number}: unknown role {role!r}; the roles that exist: {', '.join(ROLES)}")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
        checked_parts = []
        for part in parts:
            kind = part.get("type")
            if kind == "text" and isinstance(part.get("text"), str):
                if placeholder and placeholder in part["text"]:
                    where = "question" if number == len(messages) - 1 else f"text of message {number}"
                    raise ValueError(
                        f"the {where} holds {placeholder!r}, which stands for an image; write it another way"
                    )
                checked_parts.append({"type": "text", "text": part["text"]})
            elif kind == "image" and part.get("image") is not None:
                images.append(as_rgb(part["image"], max_pixels))
                checked_parts.append({"type": "image", "image": images[-1]})
            else:
                raise ValueError(f"message {number}: a part must be a text or an image, got {kind!r}")
        if number == len(messages) - 1 and not any(p["type"] == "text" and p["text"].strip() for p in checked_parts):
            raise ValueError("the question is empty")
        result.append({"role": role, "content": checked_parts})
    return result, images


def prepare(
    processor: Any, adapter: FamilyAdapter, messages: Sequence[Message], max_pixels: int = MAX_PIXELS
) -> PreparedSample:
    """A conversation, ready for the model.

    Args:
        max_pixels: larger images are refused.

    Raises:
        ValueError: see `check_messages`; or the chat template did not place the images.
    """
    messages, images = check_messages(messages, getattr(processor, "image_token", None), max_pixels)
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    input_ids = inputs["input_ids"][0].tolist()
    image_ids = set(adapter.image_token_ids)
    num_visual = sum(token in image_ids for token in input_ids)
    if bool(num_visual) != bool(images):
        raise ValueError(f"the chat template put {num_visual} image tokens for {len(images)} images")
    pixel_inputs: dict[str, Tensor] = {}
    if images:
        wanted = (*adapter.image_fields, *adapter.sample_fields)
        pixel_inputs = {name: torch.as_tensor(inputs[name]) for name in wanted if inputs.get(name) is not None}
        pixel_inputs |= adapter.describe_images(processor, images)
    key = pixel_hash(pixel_inputs) if images else None
    return PreparedSample(
        tuple(input_ids), len(input_ids) - num_visual, num_visual, pixel_inputs, key, max(1, len(images))
    )
