"""A tiny checkpoint on disk and a LLaVA-format data set beside it."""

import json

import pytest
import torch
from llava_rows import conversation
from tiny_checkpoint import make_image, make_llava, make_processor

from visor.embedded.vocabulary import CHAT_TEMPLATE

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """A LLaVA checkpoint as it would ship."""
    folder = tmp_path_factory.mktemp("base")
    make_llava().save_pretrained(folder)
    processor = make_processor()
    processor.chat_template = CHAT_TEMPLATE
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava_data(tmp_path_factory):
    """(JSON file, image folder): 24 good rows, then the bad ones."""
    folder = tmp_path_factory.mktemp("data")
    for index in range(24):
        make_image(index).save(folder / f"{index}.png")
    (folder / "broken.png").write_bytes(b"no image")
    rows = [
        {
            "id": i,
            "image": f"{i}.png",
            "conversations": conversation(f"how many {i}?", str(i)),
            "kind": ("odd", "even")[i % 2],
        }
        for i in range(24)
    ]
    good = folder / "good.json"
    good.write_text(json.dumps(rows))
    two_marks = conversation("a <image> b", "c")
    bad = [
        {"conversations": conversation("where?", "nowhere")},
        {"image": ["1.png", "2.png"], "conversations": conversation("which?", "both")},
        {"image": "missing.png", "conversations": conversation("where?", "gone")},
        {"image": "broken.png", "conversations": conversation("what?", "broken")},
        {"image": "1.png", "conversations": two_marks},
        {"image": "1.png", "conversations": [{"from": "human", "value": "no mark"}, {"from": "gpt", "value": "x"}]},
        {"image": "1.png", "conversations": conversation("q", "a")[:1]},
        {"image": "1.png", "conversations": conversation("q", "")},
        {"image": "1.png"},
        "not a row",
    ]
    (folder / "mixed.json").write_text(json.dumps([*rows, *bad]))
    return good, folder
