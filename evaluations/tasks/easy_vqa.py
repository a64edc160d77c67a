"""easy-VQA: the package's own test images and questions (PyPI `easy-vqa`, MIT; VQA accuracy)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from budgets.registry import TASKS
from evaluations.task import Kind, Sample, Task, image_id_of
from visor.worlds.easy_vqa import images_of_split, load


@TASKS.register("easy_vqa")
class EasyVQA(Task):
    """One coloured shape an image; two questions of each image in turn, of the 9,673 that the package has."""

    name: ClassVar[str] = "easy_vqa"
    title: ClassVar[str] = "easy-VQA"
    metric: ClassVar[str] = "vqa_accuracy"
    version: ClassVar[int] = 2
    kind: ClassVar[Kind] = "coarse"
    splits: ClassVar[tuple[str, ...]] = ("validation", "test")

    def stream(self, split: str = "test") -> Iterator[Sample]:
        for image_number in images_of_split(split):
            image, questions = load(split, image_number)
            image_id = image_id_of(image)
            # A question that asks for a colour or shape says more than one of the many yes/no ones: take one of each.
            direct = min(questions, key=lambda q: q.kind == "easy_vqa/yes_no")
            asked = [direct, questions[image_number % len(questions)]]
            for question in asked:
                yield Sample.make(self.name, image, image_id, question.text, (question.answer,))
