"""The benchmarks of the suites `paper-easy` and `paper-hard`: where their data is, and the figure that papers quote.

What a benchmark asks and how it scores is lmms-eval's. This table says which of lmms-eval's figures is *the* figure,
and in which unit; it also serves to check data on a machine without lmms-eval. Needs no package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Benchmark:
    """One of lmms-eval's tasks.

    Args:
        name: lmms-eval's, and in `title` the paper's.
        dataset: data set on the Hub, "<org>/<name>".
        configuration: of the data set, None where it has one only.
        split: of the data set.
        metric: the one of lmms-eval's metrics that is quoted.
        quoted: what the figure is called where papers quote it.
        per_cent: what lmms-eval's figure is multiplied with to give the quoted one, out of 100.
        kind: as `evaluations.task.Task.kind`.
        also: further configurations of the data set that it reads.
    """

    name: str
    title: str
    dataset: str
    configuration: str | None
    split: str
    metric: str
    quoted: str
    per_cent: float
    kind: Literal["coarse", "fine-grained", "reasoning"]
    also: tuple[tuple[str, str], ...] = ()

    @property
    def parts(self) -> tuple[tuple[str | None, str], ...]:
        """(configuration, split) of all that it reads."""
        return ((self.configuration, self.split), *self.also)


_LMMS = "lmms-lab-encoder"
BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("pope", "POPE", f"{_LMMS}/POPE", None, "test", "pope_f1_score", "F1 over all three subsets", 100,
                  "coarse"),
        Benchmark("scienceqa_img", "ScienceQA (image)", f"{_LMMS}/ScienceQA", "ScienceQA-IMG", "test", "exact_match",
                  "accuracy", 100, "coarse"),
        Benchmark("gqa", "GQA", f"{_LMMS}/GQA", "testdev_balanced_instructions", "testdev", "exact_match", "accuracy",
                  100, "coarse", (("testdev_balanced_images", "testdev"),)),
        Benchmark("realworldqa", "RealWorldQA", f"{_LMMS}/RealWorldQA", None, "test", "exact_match", "accuracy", 100,
                  "coarse"),
        Benchmark("mmbench_en_dev_static", "MMBench (EN, dev)", f"{_LMMS}/MMBench", "en", "dev", "gpt_eval_score",
                  "circular accuracy, answers matched without a judge", 1, "coarse"),
        Benchmark("mme", "MME (perception)", f"{_LMMS}/MME", None, "test", "mme_perception_score",
                  "perception score / 20", 1 / 20, "coarse"),
        Benchmark("mmstar", "MMStar", "Lin-Chen/MMStar", None, "val", "average", "average of the categories", 100,
                  "reasoning"),
        Benchmark("seedbench", "SEED-Bench", f"{_LMMS}/SEED-Bench", None, "test", "seed_image", "image accuracy", 100,
                  "coarse"),
        Benchmark("mmmu_val", "MMMU (validation)", f"{_LMMS}/MMMU", None, "validation", "mmmu_acc", "accuracy", 100,
                  "reasoning"),
        Benchmark("docvqa_val", "DocVQA (validation)", f"{_LMMS}/DocVQA", "DocVQA", "validation", "anls", "ANLS", 100,
                  "fine-grained"),
        Benchmark("chartqa", "ChartQA", f"{_LMMS}/ChartQA", None, "test", "relaxed_overall", "relaxed accuracy", 100,
                  "fine-grained"),
        Benchmark("infovqa_val", "InfoVQA (validation)", f"{_LMMS}/DocVQA", "InfographicVQA", "validation", "anls",
                  "ANLS", 100, "fine-grained"),
        Benchmark("ocrbench", "OCRBench", "echo840/OCRBench", None, "test", "ocrbench_accuracy", "score / 10", 100,
                  "fine-grained"),
        Benchmark("textvqa_val", "TextVQA (validation)", f"{_LMMS}/textvqa", None, "validation", "exact_match",
                  "VQA accuracy", 100, "fine-grained"),
        Benchmark("ai2d", "AI2D", f"{_LMMS}/ai2d", None, "test", "exact_match", "accuracy", 100, "fine-grained"),
    )
}  # fmt: skip
