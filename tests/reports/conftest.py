"""A synthetic run folder, written with the harness's own writers, so that reports are tested without a model.

`python tests/reports/conftest.py OUT` writes one to look at.
"""

from __future__ import annotations

import re
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from evaluations.records import (
    Manifest,
    RunFolder,
    SampleRecord,
    TimingRecord,
    pack_bits,
    setting_id,
    write_json_atomically,
)

LAYERS, SIDE = 12, 12
TASKS = {
    "forms": ("Forms", "anls", "fine-grained", 0.55),
    "glyphs": ("Glyph grids", "exact_match", "fine-grained", 0.8),
    "easy_vqa": ("easy-VQA", "exact_match", "coarse", 0.05),
}
# title, trained, accuracy lost per unit of budget saved (times the task's sensitivity), has a kept mask
METHODS = {
    "dense": ("Dense", False, 0.0, False),
    "fastv": ("FastV", False, 0.9, True),
    "visionzip": ("VisionZip", False, 0.8, True),
    "pooling": ("Average pooling", False, 0.7, False),
    "downsample": ("Image down-sampling", False, 1.0, False),
    "random": ("Random", False, 1.3, True),
    "blind": ("Blind", False, 0.9, False),
    "visor": ("VISOR", True, 0.005, False),
}
CONFIGURATIONS = ("", "4", "4,8")  # SELF layers
SWEEPS = {"router": (None, 0.1, 0.4), "cascade": (0.5, 0.9)}
DIALS = {"fixed": "configuration", "router": "cost_weight", "cascade": "threshold"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def write_run_folder(
    path: Path,
    methods=("dense", "fastv", "visionzip", "pooling", "downsample", "random"),
    tasks=tuple(TASKS),
    budgets=(0.5, 0.25, 0.11),
    num_images: int = 60,
    questions_per_image: int = 3,
    limit: int | None = None,
    trained_checkpoint: bool = True,
    policies: tuple[str, ...] = (),
    failed: tuple[str, ...] = (),
    timings: bool = True,
    seed: int = 0,
    training: dict | None = None,
    checkpoints: dict | None = None,
) -> Path:
    """A folder in the schema of evaluations.records with seeded, plausible records."""
    random = np.random.default_rng(seed)
    folder, keys = RunFolder(path), []
    num_visual, family = SIDE * SIDE, [{"self_layers": each} for each in CONFIGURATIONS] if policies else None
    for task in tasks:
        title, metric, kind, sensitivity = TASKS[task]
        image_ids = [f"{task}{i:03d}" for i in range(num_images)]
        ability = random.beta(12, 1.0, num_images)
        questions = [
            (
                image,
                q,
                f"{task}-{image:03d}-{q}",
                f"What is written in row {q + 1} of picture {image}?",
                f"{random.integers(100, 999)}",
            )
            for image in range(num_images)
            for q in range(questions_per_image)
        ]
        luck = random.random(len(questions))
        shown = sorted(questions, key=lambda question: question[2])[:12]
        for image, *_ in shown:
            canvas = Image.new("RGB", (192, 192), (250, 248, 240))
            draw = ImageDraw.Draw(canvas)
            for row in range(questions_per_image):
                draw.rectangle((12, 20 + row * 50, 180, 58 + row * 50), outline=(40, 60, 120))
                draw.text((20, 32 + row * 50), f"{task} {image} row {row}", fill=(20, 20, 30))
            folder.save_image(image_ids[image], canvas)
        settings = [("dense", 1.0, None, None)]
        settings += [(m, b, None, None) for m in methods if m not in ("dense", "blind") for b in budgets]
        settings += [("blind", None, None, None) for m in methods if m == "blind"]
        settings += [("visor", None, "fixed", i) for i in range(len(CONFIGURATIONS)) if policies]
        settings += [("visor", None, p, v) for p in policies for v in SWEEPS.get(p, (None,))]
        fixed: list[list[SampleRecord]] = []  # records of the configurations, which policies choose among
        for method, budget, policy, value in settings if "dense" in methods else settings[1:]:
            name, trained, slope, has_mask = METHODS[method]
            identity = setting_id(method, budget, policy, value)
            key = re.sub(r"[^a-z_0-9.-]", "-", f"{identity}-{task}")
            keys.append(key)
            common = dict(
                key=key,
                method=method,
                title=name,
                params={DIALS[policy]: value} if policy in DIALS else {"keep": [14, 40]} if method != "dense" else {},
                configurations=family if method == "visor" else None,
                trained=trained,
                budget=budget,
                policy=policy,
                suite="fine-grained",
                task=task,
                metric=metric,
                setting_id=identity,
                seconds=3.5,
            )
            if identity in failed:
                folder.write_manifest(
                    Manifest(
                        **common, num_samples=0, num_failed=0, status="failed", error="RuntimeError: out of memory"
                    )
                )
                continue
            records = []
            for number, (image, q, sample_id, question, reference) in enumerate(questions):
                if policy not in (None, "fixed"):
                    records.append(chosen_record([each[number] for each in fixed], policy, value, sample_id).to_dict())
                    continue
                configuration = value
                fraction = (budget or 0.05) if policy is None else 0.1 + 0.1 * configuration
                fraction = fraction if fraction <= 1 else fraction / num_visual  # a number of tokens
                slope = slope if policy is None else 0.5 - 0.24 * configuration
                right = ability[image] * (1 - slope * sensitivity * (1 - fraction) ** 1.5)
                wobble = 0.08 * random.normal() if fraction < 1 and method != "visor" else 0.0
                score = float(luck[number] < right + wobble)
                if metric == "anls" and not score and random.random() < 0.3:
                    score = 0.5
                hostile = number == 0 and method == "fastv"
                answer = HOSTILE if hostile else reference if score == 1 else f"{random.integers(100, 999)}"
                keep = max(1, round(num_visual * fraction))
                mask = np.zeros(num_visual, bool)
                mask[random.choice(num_visual, keep, replace=False)] = True
                dense_flops = 2_600_000_000 + 4_000_000 * (number % 5)
                flops = round(dense_flops * fraction)
                records.append(
                    SampleRecord(
                        sample_id=sample_id,
                        image_id=image_ids[image],
                        question=question,
                        references=[reference],
                        answer=answer,
                        score=score,
                        difficulty=1 + q,
                        num_text=18 + number % 5,
                        num_visual=num_visual,
                        grid=[SIDE, SIDE],
                        decoder_flops=flops,
                        dense_decoder_flops=dense_flops,
                        kv_bytes=round(1_800_000 * fraction),
                        flops={
                            "tower": 900_000_000,
                            "projector": 40_000_000,
                            "decoder_projections": round(flops * 0.4),
                            "decoder_attention": round(flops * 0.1),
                            "decoder_mlp": round(flops * 0.5),
                            "cross_projections": 0,
                            "cross_attention": 0,
                            "scoring": 1_000_000 if has_mask else 0,
                            "router": 0,
                            "lm_head": 3_000_000,
                        },
                        visual_tokens=[num_visual] * 2 + [keep] * (LAYERS - 2)
                        if method == "fastv"
                        else [keep] * LAYERS,
                        layer_flops=[round(flops / LAYERS)] * LAYERS,
                        confidence=0.3 + 0.6 * score,
                        routing=[float(x) for x in random.normal(size=3)] if value == 0 else None,
                        configuration=configuration,
                        kept=pack_bits(mask) if has_mask else None,
                    ).to_dict()
                )
            folder.samples_file(key).append(records)
            if policy == "fixed":
                fixed.append([SampleRecord.from_dict(record) for record in records])
            folder.write_manifest(Manifest(**common, num_samples=len(records), num_failed=0, status="ok", error=None))
            if timings and task == tasks[0] and policy in (None, "fixed", "router"):
                for batch_size in (1, 8):
                    for turn in range(8):
                        fraction = budget or 0.2
                        prefill = (4 + 30 * fraction) * batch_size * (1 + 0.05 * random.random())
                        folder.timings_file.append(
                            [
                                TimingRecord(
                                    setting_id=identity,
                                    method=method,
                                    budget=budget,
                                    policy=policy,
                                    batch_size=batch_size,
                                    round=turn,
                                    num_text=22,
                                    num_visual=num_visual,
                                    num_new_tokens=8,
                                    tower_ms=11.0 * batch_size,
                                    scoring_ms=None,
                                    prefill_ms=prefill,
                                    decode_ms_per_token=2.0 + 0.5 * fraction,
                                    end_to_end_ms=prefill + 30,
                                    cpu_prefill_ms=prefill * 1.9,
                                    peak_memory_bytes=None,
                                    peak_memory_without_weights_bytes=None,
                                    device="cpu",
                                    not_measured={"peak_memory_bytes": "a CPU process has no per-run peak"},
                                ).to_dict()
                            ]
                        )
    folder.write_run(
        {
            "created": "2026-01-02T03:04:05+00:00",
            "command": "python -m evaluations.run --suite fine-grained",
            "config": {"suite": "fine-grained", "seed": 0, "batch_size": 16},
            "suite": {
                "name": "fine-grained",
                "title": "Fine-grained reading",
                "tasks": [
                    dict(
                        name=t,
                        title=TASKS[t][0],
                        version=1,
                        metric=TASKS[t][1],
                        kind=TASKS[t][2],
                        num_samples=num_images * questions_per_image,
                    )
                    for t in tasks
                ],
            },
            "provenance": {
                "git_commit": "0123456789abcdef0123456789abcdef01234567",
                "git_dirty": False,
                "python": "3.11.2",
                "packages": {"torch": "2.13.0", "transformers": "5.23.0"},
                "platform": "Linux x86_64",
                "cpu": "2 cores",
                "threads": 2,
                "device": "cpu",
                "dtype": "float32",
                "attention": "sdpa",
                "load_average": [0.4, 0.3, 0.2],
                "checkpoint": {
                    "name": "dense-tiny",
                    "path": "visor/checkpoints/dense-tiny",
                    "sha256": "ab" * 32,
                    "trained": trained_checkpoint,
                    "training": training,
                    "card": None,
                },
                "checkpoints": checkpoints or {},
            },
            "limit": limit,
            "unreachable": [{"method": "hired", "budget": 0.01, "reason": "hired reaches 0.2 to 1"}] if failed else [],
            "not_timed": {each: "RuntimeError: out of memory" for each in failed},
            "cells": keys,
        }
    )
    return path


def chosen_record(row: list[SampleRecord], policy: str, value: float | None, sample_id: str) -> SampleRecord:
    """A policy's record from those of the configurations: right more often than chance, as a router would be."""
    draw = np.random.default_rng([zlib.crc32(f"{policy}{sample_id}".encode())])
    cheapest = next((i for i, record in enumerate(row) if record.score == max(r.score for r in row)), 0)
    guess = int(draw.integers(3))
    choice = {"oracle": cheapest, "random": guess, "per-task": 1}.get(
        policy, cheapest if draw.random() < 0.7 else guess
    )
    if policy == "router" and value is not None:
        choice = min(choice, 2 if value < 0.2 else 1)
    return replace(row[choice], configuration=choice, routing=None)


def write_analyses(folder: Path, hostile: str = "") -> None:
    """analyses/<model>.json as `evaluations.analyses` writes it."""
    curve = lambda start: {
        "mean": [start / (1 + 0.1 * i) for i in range(LAYERS)],
        "low": [start / (1 + 0.1 * i) - 0.05 for i in range(LAYERS)],
        "high": [start / (1 + 0.1 * i) + 0.03 for i in range(LAYERS)],
    }
    drop = lambda i: {"score": 0.6, "difference": -0.3 / (i + 1), "difference_low": -0.3 / (i + 1) - 0.05,
                      "difference_high": 0.05, "p_value_holm": 0.01 if i == 0 else 1.0}  # fmt: skip
    numbers = {"num_samples": 20, "num_images": 10, "limit": 20}
    write_json_atomically(
        folder / "analyses" / "dense-tiny.json",
        {
            "schema_version": 1, "model": "dense-tiny" + hostile, "trained": True, "num_layers": LAYERS,
            "tasks": {
                name: {
                    "title": title, "kind": kind, "metric": metric, "version": 1,
                    "attention": {"text": curve(0.9), "last": curve(0.5), **numbers},
                    "cka": {"visual": curve(0.95), **numbers},
                    "layer-drop": {"dense": {"score": 0.7, "low": 0.6, "high": 0.8},
                                   "layers": [drop(i) for i in range(LAYERS)], **numbers},
                }
                for name, (title, metric, kind, _) in TASKS.items()
            },
        },
    )  # fmt: skip


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """The full grid, small."""
    return write_run_folder(tmp_path_factory.mktemp("run") / "folder", num_images=20)


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory) -> Path:
    """A method with three configurations under all policies."""
    kinds = ("router", "cascade", "per-task", "random", "oracle")
    folder = tmp_path_factory.mktemp("policies") / "folder"
    return write_run_folder(folder, methods=("dense", "visor"), policies=kinds)


@pytest.fixture
def add_analyses():
    """Writes analyses of a model with a hostile name into a run folder."""
    return lambda folder: write_analyses(folder, HOSTILE)


@pytest.fixture
def make_run_folder(tmp_path):
    """Factory for special folders."""
    return lambda **options: write_run_folder(tmp_path / "folder", **{"num_images": 8, **options})


if __name__ == "__main__":
    everything = {"methods": tuple(METHODS), "policies": ("router", "cascade", "per-task", "oracle", "random")}
    made = write_run_folder(Path(sys.argv[1]), num_images=160, **(everything if "--full" in sys.argv else {}))
    write_analyses(made)
