"""`python -m evaluations.data check`: what is there is counted, what is not is named with the line that fetches it."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evaluations.data import check, main
from evaluations.lmms.benchmarks import BENCHMARKS


def put(root, dataset, name, rows=3):
    path = root / dataset / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"question": ["?"] * rows}), path)
    return path


def test_everything_of_a_suite_is_missing(tmp_path, capsys):
    assert main(["check", "paper-hard", "--data-root", str(tmp_path)]) == 1
    said = capsys.readouterr()
    told = json.loads(said.out.splitlines()[-1])
    assert len(told["missing"]) == 6 and not told["present"]
    # DocVQA and InfoVQA are one data set: it is fetched once.
    assert len(told["fetch"]) == 5 and all(line in said.err for line in told["fetch"])
    folder = tmp_path / "lmms-lab-encoder" / "ChartQA"
    assert f"hf download --repo-type dataset lmms-lab-encoder/ChartQA --local-dir {folder}" in told["fetch"]


def test_files_are_counted_without_a_card_and_with(tmp_path):
    put(tmp_path, "lmms-lab-encoder/ChartQA", "data/test-00000-of-00002.parquet")
    assert "1 of 2 files of the test split" in check("lmms:chartqa", tmp_path).problems[0]
    put(tmp_path, "lmms-lab-encoder/ChartQA", "data/test-00001-of-00002.parquet", 4)
    assert check("lmms:chartqa:simple", tmp_path).num_questions == 7

    gqa = "lmms-lab-encoder/GQA"
    put(tmp_path, gqa, "testdev_balanced_instructions/testdev-0.parquet", 5)
    finding = check("lmms:gqa", tmp_path)  # without its card `datasets` does not know the configurations
    assert len(finding.problems) == 2 and finding.num_questions is None
    names = ("testdev_balanced_instructions", "testdev_balanced_images")
    entries = "".join(
        f"- config_name: {n}\n  data_files:\n  - split: testdev\n    path: {n}/testdev-*\n" for n in names
    )
    (tmp_path / gqa / "README.md").write_text(f"---\nconfigs:\n{entries}---\n")
    assert check("lmms:gqa", tmp_path).problems == (
        f"{tmp_path / gqa} has no parquet file of configuration testdev_balanced_images, split testdev",
    )
    put(tmp_path, gqa, "testdev_balanced_images/testdev-0.parquet")
    assert check("lmms:gqa", tmp_path).num_questions == 5


def test_a_pointer_in_the_place_of_a_file_is_no_data(tmp_path):
    path = put(tmp_path, "lmms-lab-encoder/POPE", "data/test-00000-of-00001.parquet")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "cannot be read as parquet" in check("lmms:pope", tmp_path).problems[0]


def test_embedded_suites_need_none_and_unknown_ones_are_refused(tmp_path, capsys):
    assert main(["check", "fine-grained", "--data-root", str(tmp_path)]) == 0
    assert main(["check", "paper", "--data-root", str(tmp_path)]) == 2
    assert main(["check", "smoke", "--tasks", "lmms:charqa", "--data-root", str(tmp_path)]) == 2
    assert "nearest first: chartqa" in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", BENCHMARKS.values(), ids=list(BENCHMARKS))
def test_the_quoted_figure_is_out_of_a_hundred(benchmark):
    best = {"mme": 2000, "mmbench_en_dev_static": 100}.get(benchmark.name, 1)
    assert best * benchmark.per_cent == pytest.approx(100)
