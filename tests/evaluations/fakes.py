"""A model that answers by hashing, and tasks of coloured squares: the harness without any network.

Its answers depend on *everything* that real arithmetic may depend on, the other samples of the batch included. Only a
harness that runs the very same batches gets the very same records from it.

As a script it runs a sweep, to be killed: `python fakes.py OUT SECONDS_PER_CALL METHODS`.
"""

from __future__ import annotations

import hashlib
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image

from budgets.geometry import ModelGeometry, VisionGeometry, VisorGeometry
from budgets.registry import TASKS
from budgets.schedule import LayerMode
from evaluations.config import RunConfig
from evaluations.suite import Suite, SuiteTask, TimingPlan
from evaluations.task import Task

TOWER = VisionGeometry(2, 32, 64, 2, 4, 48, ((32, 64), (64, 64)))
GEOMETRY = ModelGeometry("fake", 12, 64, 128, 4, 2, 16, 100, TOWER)
NUM_VISUAL = 144
CONFIGURATIONS = ((), (4,), (4, 7), (1, 4, 7, 10))
VISOR = VisorGeometry((0, 3, 6, 9), (1, 4, 7, 10), CONFIGURATIONS, 3, ((192, 8), (8, 4)))


def hashed(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class FakeSample:
    task: str
    image: Image.Image
    question: str
    references: tuple[str, ...]
    image_id: str
    sample_id: str
    difficulty: int = 1
    messages: None = None


class BrokenImage:
    """What Pillow gives for a damaged file: an image until its pixels are asked for."""

    size, mode = (8, 8), "RGB"

    def load(self):
        raise OSError("image file is truncated")


def make_task(name: str, num_samples: int = 10, questions_an_image: int = 2, max_new_tokens: int = 3):
    def samples(self, limit, split="test"):
        made = []
        for i in range(num_samples):
            shade = 20 * (i // questions_an_image) + 10 * (split == "validation")
            image = Image.new("RGB", (8, 8), (shade, ord(name[-1]), 7))
            image_id = hashed(name, shade)[:12]
            question = "what is it " + "please " * (i % 4)
            made.append(FakeSample(name, image, question, (f"{i % 3}",), image_id, hashed(image_id, i)[:12]))
        return made[:limit]

    return type(
        name,
        (Task,),
        {
            "name": name, "title": name.title(), "version": 1, "metric": "exact_match", "kind": "coarse",
            "max_new_tokens": max_new_tokens, "samples": samples, "stream": None, "__module__": "fakes",
            "__qualname__": name,
        },
    )  # fmt: skip


@contextmanager
def fake_tasks():
    """The tasks fake_a and fake_b exist within it, and no longer: other tests go through all tasks there are."""
    TASKS.names()  # a registry is filled when first asked
    for name in ("fake_a", "fake_b"):
        TASKS.register(name)(make_task(name))
    yield
    for name in ("fake_a", "fake_b"):
        del TASKS._objects[name]


class FakeModel:
    """As `visor.inference.loaded_model.LoadedModel`, as far as the harness sees it."""

    def __init__(self, seconds_per_call: float = 0.0, visor: VisorGeometry | None = None) -> None:
        self.geometry, self.checkpoint_sha256, self.dtype = GEOMETRY, "c0ffee", "torch.float32"
        if visor is not None:
            self.geometry, self.checkpoint_sha256 = replace(GEOMETRY, visor=visor), "ca11ab1e"
        self.tower_sha256, self.routed = "70e4", 0
        self.device, self.path, self.card = torch.device("cpu"), Path("nowhere"), "trained: false"
        self.model = torch.nn.Linear(4, 4)
        self.seconds_per_call = seconds_per_call
        self.encoded: list[tuple[str, float]] = []
        self.generated = 0
        self.fails_on = lambda schedule: False
        self.faults: dict[str, str] = {}  # by question, why there is no answer
        self.context_length = 10**6

    def check(self, schedules):
        for schedule in schedules:
            if schedule.layers_in(LayerMode.CROSS) and self.geometry.visor is None:
                raise ValueError("this model has no trained cross-attention blocks")

    def check_length(self, prepared, schedule):
        if prepared.num_text + schedule.decoder_visual > self.context_length:
            raise ValueError(f"the prompt has more than {self.context_length} tokens")

    def prepare(self, image, question):
        image.load()
        key = hashed(image.tobytes())
        return SimpleNamespace(
            num_visual=NUM_VISUAL, num_text=10 + len(question.split()), image_key=key, question=question
        )

    def encode(self, prepared, taps, image_scale):
        keys = [each.image_key for each in prepared]
        self.encoded += [(key, image_scale) for key in keys]
        side = round(12 * image_scale)
        row = lambda key: SimpleNamespace(
            value=hashed(keys, key, image_scale), num_bytes=1000, grid=(side, side), image_scale=image_scale
        )
        return [row(key) for key in keys]

    def generate(self, prepared, vision, schedules, max_new_tokens):
        time.sleep(self.seconds_per_call)
        self.generated += len(prepared)
        if any(map(self.fails_on, schedules)):
            raise RuntimeError("the kernel\nexploded")
        batch = [(p.question, v.value, s.to_json()) for p, v, s in zip(prepared, vision, schedules, strict=True)]
        answer = lambda i, s: SimpleNamespace(
            text=str(int(hashed(batch, i)[:8], 16) % 3),
            token_ids=(1,),
            confidence=int(hashed(batch, i)[8:12], 16) / 0xFFFF,
            kept=[j < s.decoder_visual for j in range(NUM_VISUAL)],
            error=self.faults.get(prepared[i].question),
        )
        return [answer(i, schedule) for i, schedule in enumerate(schedules)]

    def route(self, prepared, vision, schedules):
        self.routed += len(prepared)
        number = lambda p, c: int(hashed(p.question, p.image_key, c)[:8], 16) / 0xFFFFFFFF
        return [[number(p, c) * 8 - 4 for c in range(len(self.geometry.visor.configurations))] for p in prepared]

    def prefill(self, prepared, vision, schedules, num_new_tokens, request=None):
        if any(map(self.fails_on, schedules)):
            raise RuntimeError("the kernel\nexploded")
        time.sleep(1e-4)
        return schedules

    def decode(self, state, num_tokens):
        time.sleep(1e-4 * num_tokens)


def make_config(
    out: Path, methods=("dense", "fastv"), budgets=(0.5,), asked=None, asked_methods=None, visor=False, **changes
) -> RunConfig:
    suite = Suite(
        "fakes", "Fakes", "Two tasks.", (SuiteTask("fake_a"), SuiteTask("fake_b", 6)), tuple(methods), tuple(budgets),
        TimingPlan(num_samples=2, throughput_batch=3, new_tokens=3, min_runs=2, min_seconds=0, max_runs=2),
    )  # fmt: skip
    # `--model` is looked up before it is loaded, and this folder stands in for a model.
    for folder in ("model", "visor"):
        (out.parent / folder).mkdir(parents=True, exist_ok=True)
        (out.parent / folder / "config.json").write_text("{}")
    if visor:
        changes["checkpoints"] = [("visor", str(out.parent / "visor"))]
    return RunConfig.of(
        suite, out=out, batch_size=4, budgets=asked, methods=asked_methods, model=str(out.parent / "model"), **changes
    )


if __name__ == "__main__":
    from evaluations.job import execute

    with fake_tasks():
        config = make_config(Path(sys.argv[1]), methods=sys.argv[3].split(","))
        sys.exit(execute(config, "fakes.py", report=False, load=lambda _: FakeModel(float(sys.argv[2]))))
