"""A few rows of each benchmark in its data set's own schema, laid out as on the Hub, with answers and hand counts.

Nothing here is a real question: the rows are made up, and what matters is their columns, types and configurations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@dataclass(frozen=True)
class Rows:
    """The data of a benchmark.

    Args:
        columns: by (configuration, split), the values of each column. The image columns are named in `images`.
        answers: fixed answers to its documents, and `scores` what each is worth by hand.
        quoted: the figure that is quoted, by hand, out of 100.
        values: further figures of lmms-eval's, by hand, in its own unit.
    """

    dataset: str
    columns: dict[tuple[str | None, str], dict[str, list[Any]]]
    answers: tuple[str, ...]
    scores: tuple[float, ...]
    quoted: float
    values: dict[str, float] = field(default_factory=dict)
    images: tuple[str, ...] = ("image",)
    several_images: tuple[str, ...] = ()


def _mmbench() -> dict[str, list[Any]]:
    """Two questions; the first again with its choices turned, which must be right too."""
    return {
        "index": [1, 1_000_001, 2],
        "question": ["What is it?", "What is it?", "What colour?"],
        "hint": ["nan", "nan", "Look closely."],
        "answer": ["A", "B", "C"],
        "A": ["a dog", "a cat", "red"], "B": ["a cat", "a dog", "blue"], "C": ["a cow", "a cow", "green"],
        "D": ["nan", "nan", "black"],
        "category": ["identity", "identity", "attribute"], "L2-category": ["fine", "fine", "coarse"],
        "source": ["x"] * 3, "comment": ["nan"] * 3, "split": ["dev"] * 3,
        "image": [picture(30), picture(30), picture(31)],
    }  # fmt: skip


def _mmmu() -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        "id": ["validation_Art_1", "validation_Art_2", "validation_Math_1"],
        "question": ["Who made <image 1>?", "Compare <image 1> with <image 2>.", "What is the sum in <image 1>?"],
        "options": ["['Dali', 'Miro', 'Klee']", "['same', 'other']", "[]"],
        "explanation": [""] * 3,
        "answer": ["B", "A", "12"],
        "question_type": ["multiple-choice", "multiple-choice", "open"],
        "img_type": ["['Paintings']"] * 3, "topic_difficulty": ["Easy"] * 3, "subfield": ["x"] * 3,
        "image_1": [picture(40), picture(41), picture(42)],
        "image_2": [None, picture(43), None],
    }  # fmt: skip
    return columns | {f"image_{i}": [None] * 3 for i in range(3, 8)}


ROWS = {
    "pope": Rows(
        "lmms-lab-encoder/POPE",
        {(None, "test"): {
            "id": ["0", "1", "2", "3"], "question_id": ["1", "2", "3", "4"],
            "question": ["Is there a dog?", "Is there a cat?", "Is there a cow?", "Is there a pig?"],
            "answer": ["yes", "yes", "no", "no"], "image_source": ["a", "a", "b", "b"],
            "category": ["random", "random", "popular", "adversarial"],
            "image": [picture(1), picture(1), picture(2), picture(2)],
        }},
        ("Yes", "no", "no", "yes"), (1, 0, 1, 0), 50.0,
        {"pope_accuracy,none": 0.5, "pope_precision,none": 0.5, "pope_recall,none": 0.5, "pope_f1_score,none": 0.5},
    ),
    "scienceqa_img": Rows(
        "lmms-lab-encoder/ScienceQA",
        {("ScienceQA-IMG", "test"): {
            "question": ["Which is larger?", "Which is a metal?", "Which floats?"],
            "choices": [["sun", "moon"], ["iron", "wood", "clay"], ["cork", "lead"]],
            "answer": [0, 0, 1], "hint": ["", "Metals shine.", ""], "image": [picture(3), picture(4), None],
        }},
        ("A", "A. iron", "A"), (1, 1, 0), 200 / 3,
    ),
    "gqa": Rows(
        "lmms-lab-encoder/GQA",
        {
            ("testdev_balanced_instructions", "testdev"): {
                "id": ["1", "2", "3"], "imageId": ["n1", "n2", "n1"],
                "question": ["What colour?", "Which side?", "Is it big?"], "answer": ["red", "left", "yes"],
            },
            ("testdev_balanced_images", "testdev"): {"id": ["n1", "n2"], "image": [picture(5), picture(6)]},
        },
        ("Red", "left.", "no"), (1, 1, 0), 200 / 3,
    ),
    "realworldqa": Rows(
        "lmms-lab-encoder/RealWorldQA",
        {(None, "test"): {
            "question": ["How many cars?", "Which lane?\nA. left\nB. right", "Where to?"],
            "answer": ["2", "B", "Downhill"], "image": [picture(7), picture(8), picture(9)],
        }},
        ("2", "(B)", "uphill"), (1, 1, 0), 200 / 3,
    ),
    "mmbench_en_dev_static": Rows(
        "lmms-lab-encoder/MMBench", {("en", "dev"): _mmbench()}, ("A", "A", "C. green"), (1, 0, 1), 50.0
    ),
    "mme": Rows(
        "lmms-lab-encoder/MME",
        {(None, "test"): {
            "question_id": ["color/1.png", "color/1.png", "color/2.png", "color/2.png", "code/1.png", "code/1.png"],
            "question": [f"Is it {i}? Please answer yes or no." for i in range(6)],
            "answer": ["Yes", "No", "Yes", "No", "Yes", "No"],
            "category": ["color"] * 4 + ["code_reasoning"] * 2,
            "image": [picture(10 + i // 2) for i in range(6)],
        }},
        # Colour: the first pair right (100 + 100), of the second one (50 + 0): (200 + 50) / 2 = 125, / 20 = 6.25.
        ("Yes", "No", "Yes", "Yes", "No", "yes"), (1, 1, 1, 0, 0, 0), 6.25,
        {"mme_perception_score,none": 125.0, "mme_cognition_score,none": 0.0},
    ),
    "mmstar": Rows(
        "Lin-Chen/MMStar",
        {(None, "val"): {
            "index": [0, 1, 2], "question": ["Which?\nOptions: A: x, B: y, C: z, D: w"] * 3, "answer": ["A", "B", "C"],
            "category": ["math", "math", "coarse perception"],
            "l2_category": ["geometry", "geometry", "image emotion"], "meta_info": ["x"] * 3,
            "image": [picture(13), picture(14), picture(15)],
        }},
        # Geometry 1 of 2, emotion 1 of 1: the average of the categories is 0.75, not 2 of 3.
        ("A", "D", "C"), (1, 0, 1), 75.0, {"math,none": 0.5, "coarse perception,none": 1.0},
    ),
    "seedbench": Rows(
        "lmms-lab-encoder/SEED-Bench",
        {(None, "test"): {
            "question_id": ["1", "2", "3"], "question": ["What?", "Who?", "When?"],
            "choice_a": ["a"] * 3, "choice_b": ["b"] * 3, "choice_c": ["c"] * 3, "choice_d": ["d"] * 3,
            "answer": ["A", "B", "C"], "data_type": ["image", "image", "video"],
            "image": [[picture(16)], [picture(17)], [picture(18), picture(19)]],
        }},
        ("A", "c", "C. c"), (1, 0, 1), 50.0, {"seed_video,none": 1.0, "seed_all,none": 2 / 3},
        images=(), several_images=("image",),
    ),
    "mmmu_val": Rows(
        "lmms-lab-encoder/MMMU", {(None, "validation"): _mmmu()}, ("(B)", "B", "12"), (1, 0, 1), 66.667,
        images=tuple(f"image_{i}" for i in range(1, 8)),
    ),
    "docvqa_val": Rows(
        "lmms-lab-encoder/DocVQA",
        {("DocVQA", "validation"): {
            "questionId": ["1", "2", "3"], "question": ["Which name?", "Which date?", "Which sum?"],
            "question_types": [["form"], ["form"], ["table"]], "docId": [1, 1, 2],
            "answers": [["Smith", "J. Smith"], ["1 May"], ["400"]], "data_split": ["val"] * 3,
            "image": [picture(20), picture(20), picture(21)],
        }},
        ("smith", "1 Mai", "12"), (1, 0.8, 0), 60.0,
    ),
    "chartqa": Rows(
        "lmms-lab-encoder/ChartQA",
        {(None, "test"): {
            "type": ["human_test", "human_test", "augmented_test"],
            "question": ["Which bar?", "What value?", "What value?"], "answer": ["Red", "100", "40"],
            "image": [picture(22), picture(23), picture(23)],
        }},
        ("red", "104", "80"), (1, 1, 0), 200 / 3,
        {"relaxed_human_split,none": 1.0, "relaxed_augmented_split,none": 0.0},
    ),
    "infovqa_val": Rows(
        "lmms-lab-encoder/DocVQA",
        {("InfographicVQA", "validation"): {
            "questionId": ["1", "2"], "question": ["How many?", "Which?"], "answers": [["7", "seven"], ["north"]],
            "answer_type": [["single span"], ["single span"]], "image_url": ["x"] * 2, "data_split": ["val"] * 2,
            "image": [picture(24), picture(25)],
        }},
        ("seven", "nord"), (1, 0.6), 80.0,
    ),
    "ocrbench": Rows(
        "echo840/OCRBench",
        {(None, "test"): {
            "dataset": ["IIIT5K", "HME100k", "FUNSD"], "question": ["What is written?"] * 3,
            "question_type": ["Regular Text Recognition", "Handwritten Mathematical Expression Recognition",
                              "Key Information Extraction"],
            "answer": [["CENTRE"], ["x + 1"], ["12"]], "image": [picture(26), picture(27), picture(28)],
        }},
        # lmms-eval itself would say 2 / 1000.
        ("the word is Centre", "x+1", "13"), (1, 1, 0), 200 / 3,
    ),
    "textvqa_val": Rows(
        "lmms-lab-encoder/textvqa",
        {(None, "validation"): {
            "image_id": ["a", "b"], "question_id": [1, 2], "question": ["what brand?", "what number?"],
            "question_tokens": [["what"], ["what"]], "ocr_tokens": [[], []],
            "answers": [["nokia"] * 8 + ["phone"] * 2, ["10"] * 2 + ["12"] * 8],
            "image": [picture(29), picture(32)],
        }},
        # Ten annotators: with two that agree each left out in turn, (8 x 2/3 + 2 x 1/3) / 10.
        ("Nokia", "10"), (1, 0.6), 80.0,
    ),
    "ai2d": Rows(
        "lmms-lab-encoder/ai2d",
        {(None, "test"): {
            "question": ["What is A?", "What is B?", "What eats grass?"],
            "options": [["root", "leaf"], ["stem", "seed", "fruit"], ["fox", "hare"]], "answer": ["1", "2", "1"],
            "image": [picture(33), picture(34), picture(35)],
        }},
        ("B. leaf", "c", "the hare"), (1, 1, 0), 200 / 3,
    ),
}  # fmt: skip


def write(root: Path) -> Path:
    """All data sets under `root`, as on the Hub: parquet files, and a README that names the configurations."""
    from datasets import Dataset, Features, List
    from datasets import Image as ImageFeature

    for dataset in {rows.dataset for rows in ROWS.values()}:
        configurations: dict[str, list[str]] = {}
        for rows in ROWS.values():
            if rows.dataset != dataset:
                continue
            for (configuration, split), columns in rows.columns.items():
                pictures = {name: ImageFeature() for name in rows.images if name in columns}
                pictures |= {name: List(ImageFeature()) for name in rows.several_images if name in columns}
                plain = Dataset.from_dict({name: values for name, values in columns.items() if name not in pictures})
                features = Features({**plain.features, **pictures})
                table = Dataset.from_dict({name: columns[name] for name in features}, features=features)
                folder = root / dataset / (configuration or "data")
                folder.mkdir(parents=True, exist_ok=True)
                table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
                lines = configurations.setdefault(configuration or "default", [])
                lines += [f"  - split: {split}", f"    path: {folder.name}/{split}-*"]
        card = ["---", "configs:"]
        for name, lines in configurations.items():
            card += [f"- config_name: {name}", "  data_files:", *lines]
        (root / dataset / "README.md").write_text("\n".join([*card, "---", ""]))
    return root
