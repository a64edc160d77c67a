"""Processors for the tiny models of all families: letters for a tokenizer, and the families' own image processors.

The image processors are transformers' own (the PIL ones); those of Qwen-VL, OneVision, InternVL and SmolVLM cannot be
used through their processor classes without torchvision, which those need for video. So the text half is ours: it puts
as many image tokens as the family does, in as many blocks.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tiny_models import IMAGE_TOKEN, INDICATORS, QWEN_LIKE, family_of, make_model
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from visor.inference import LoadedModel

ROLES = {"system": 5, "user": 6, "assistant": 7}
ANSWER, TILE = 8, 9  # the turn to be answered, and the text that names a tile


def make_image(seed: int, width: int = 100, height: int = 60) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def image_processor(family: str):
    square = {"height": 56, "width": 56}
    if family in ("llava", "vipllava"):
        return CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=square)
    if family == "llava_next":
        pinpoints = [[56, 112], [112, 56], [112, 112]]
        return LlavaNextImageProcessorPil(size={"shortest_edge": 56}, crop_size=square, image_grid_pinpoints=pinpoints)
    if family == "llava_onevision":
        pinpoints = [[56, 56], [56, 112], [112, 112]]
        return LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=pinpoints)
    if family in QWEN_LIKE:
        patch = 16 if family.startswith("qwen3") else 14
        bounds = {"shortest_edge": 9 * patch**2 * 4, "longest_edge": 20 * patch**2 * 4}
        kind = Glm4vImageProcessorPil if family.startswith("glm") else Qwen2VLImageProcessorPil
        if kind is Glm4vImageProcessorPil:  # it counts both frames of a doubled still image
            bounds = {edge: 2 * pixels for edge, pixels in bounds.items()}
        return kind(size=bounds, patch_size=patch)
    if family in ("internvl", "aya_vision"):
        return GotOcr2ImageProcessorPil(size=square, crop_to_patches=True, min_patches=1, max_patches=4)
    if family in ("pixtral", "mistral3"):
        side = 14 if family == "pixtral" else 28
        return PixtralImageProcessorPil(size={"longest_edge": 112}, patch_size={"height": side, "width": side})
    if family == "ovis2":
        return Ovis2ImageProcessorPil(size=square, crop_to_patches=True, min_patches=1, max_patches=4)
    if family == "gemma3":
        return Gemma3ImageProcessorPil(size={"height": 112, "width": 112}, do_pan_and_scan=False)
    return Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})


class TinyProcessor:
    """What `LoadedModel` asks of a processor."""

    image_token = "<image>"

    def __init__(self, model) -> None:
        self.family, self.model = family_of(model), model
        self.image_processor = image_processor(self.family)
        self.tokenizer = SimpleNamespace(pad_token_id=0, decode=lambda ids, **_: " ".join(map(str, ids)))

    def _images(self, images):
        """The image processor's output, and for each image the lengths of its blocks of image tokens."""
        if self.family in ("smolvlm", "idefics3"):
            output = self.image_processor([images], return_tensors="pt", return_row_col_info=True)
            shapes = zip(output.pop("rows")[0], output.pop("cols")[0], strict=True)
            return output, [[4] * (rows * columns + 1) for rows, columns in shapes]
        nested = [images] if self.family == "llava_onevision" else images
        output = self.image_processor(nested, return_tensors="pt")
        if self.family == "internvl":
            return output, [[4 * n] for n in output.pop("num_patches").tolist()]
        if self.family == "aya_vision":
            return output, [[4] * n for n in output.pop("num_patches").tolist()]
        if self.family == "ovis2":  # the whole image first
            parts = output["grids"].prod(-1).tolist()
            return output, [[4] * (n + 1 if n > 1 else 1) for n in parts]
        if self.family in ("pixtral", "mistral3"):
            side = 14 if self.family == "pixtral" else 28
            return output, [[w // side] * (h // side) for h, w in torch.as_tensor(output["image_sizes"]).tolist()]
        if self.family == "gemma3":
            output.pop("num_crops")
            return output, [[16]] * len(images)
        if self.family in QWEN_LIKE:
            return output, [[n // 4] for n in output["image_grid_thw"].prod(-1).tolist()]
        with torch.no_grad():
            packed = self.model.get_image_features(**output, return_dict=True).pooler_output
        return output, [[len(features)] for features in packed]

    def apply_chat_template(self, messages, **_):
        images = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        output, blocks = self._images(images) if images else ({}, [])
        blocks, ids = iter(blocks), []
        for message in messages:
            ids.append(ROLES[message["role"]])
            for part in message["content"]:
                if part["type"] == "text":
                    ids += [20 + ord(letter) % 200 for letter in part["text"]]
                else:
                    between = INDICATORS[1] if self.family == "ovis2" else TILE
                    ids += [token for n in next(blocks) for token in (between, *[IMAGE_TOKEN] * n)]
        return {"input_ids": torch.tensor([[*ids, ANSWER]]), **output}


def load(family: str) -> LoadedModel:
    model = make_model(family)
    return LoadedModel(model, TinyProcessor(model), name=family)
