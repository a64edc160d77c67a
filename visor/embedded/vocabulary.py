"""The embedded models' tokenizer and processor: whole words for phrasing, one token a character for what images show.

One token a character makes "find this key in the image" a copy instead of a translation. Any other
word falls back to its letters.
"""

from __future__ import annotations

import re
import string

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordPiece
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from visor.worlds import canvas, charts, connections, digits, easy_vqa, forms, glyphs, scenes
from visor.worlds.world import IMAGE_SIZE

PAD, UNKNOWN, END, IMAGE, ASSISTANT = "<pad>", "<unk>", "<eos>", "<image>", "<assistant>"
SPACE = "▁"
CHARACTERS = string.ascii_uppercase + string.digits + string.ascii_lowercase + "?.,:!'-/%$"

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<assistant>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
EASY_VQA_PHRASINGS = (
    "is a shape present no does the image contain is there not in what color is the shape of the what shape",
)


def words() -> list[str]:
    """Every lower-case word that a phrasing or a word answer uses."""
    texts = [*canvas.COLORS, *scenes.SHAPES, *easy_vqa.SHAPES, "yes", "no", "bar", "line", "left", "right"]
    for module in (forms, glyphs, charts, scenes, connections, digits):
        texts += [t for value in vars(module).values() if isinstance(value, tuple) for t in value if isinstance(t, str)]
    return sorted(set(re.findall(r"\b[a-z]+\b", " ".join([*texts, *EASY_VQA_PHRASINGS]))))


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer: words with or without a leading space, single characters, five special tokens."""
    pieces = [PAD, UNKNOWN, END, IMAGE, ASSISTANT, SPACE, *CHARACTERS]
    pieces += [w for w in words() if len(w) > 1] + [SPACE + w for w in words()]
    model = WordPiece({p: i for i, p in enumerate(pieces)}, unk_token=UNKNOWN, continuing_subword_prefix="")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never"),
            pre_tokenizers.Split(Regex(r"[A-Z0-9?.,:!'\-/%$]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="never")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[IMAGE, ASSISTANT],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def build_processor(patch_size: int) -> LlavaProcessor:
    """Tokenizer and PIL image processor behind one call, as AutoProcessor loads them."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=3,
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )
