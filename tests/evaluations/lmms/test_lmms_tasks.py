"""All benchmarks over local data through our suites: scores of fixed answers equal hand counts, traps are handled."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmark_rows import ROWS

from evaluations.lmms.benchmarks import BENCHMARKS
from evaluations.suite import load_suite
from evaluations.task import open_task

pytestmark = pytest.mark.filterwarnings("default")  # lmms-eval's own warnings are not ours to answer for


def records_of(task, samples, answers):
    """What the sweep would record, as far as the aggregate looks at it."""
    scored = [task.score(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
    records = [
        SimpleNamespace(sample_id=sample.sample_id, error=None, values=json.loads(json.dumps(each.values)))
        for sample, each in zip(samples, scored, strict=True)
    ]
    return scored, records


@pytest.fixture(scope="module")
def tasks(data_root):
    """Each benchmark's task and samples, opened once."""
    opened = {name: open_task(f"lmms:{name}", data_root) for name in ROWS}
    return {name: (task, task.samples()) for name, task in opened.items()}


def test_suites_name_the_fifteen_benchmarks():
    named = [task.name for suite in ("paper-easy", "paper-hard") for task in load_suite(suite).tasks]
    assert sorted(named) == sorted(f"lmms:{name}" for name in BENCHMARKS) and len(named) == 15
    assert set(ROWS) == set(BENCHMARKS)


@pytest.mark.parametrize("name", ROWS)
def test_scores_of_fixed_answers_equal_hand_counts(tasks, name):
    (task, samples), rows = tasks[name], ROWS[name]
    scored, records = records_of(task, samples, rows.answers)
    assert [each.score for each in scored] == pytest.approx(rows.scores)
    aggregate = task.aggregate(records[::-1])  # a cell's records stand in the order of its batches
    assert aggregate["quoted"] == {"name": BENCHMARKS[name].quoted, "value": pytest.approx(rows.quoted)}
    assert {key: aggregate["values"][key] for key in rows.values} == pytest.approx(rows.values)


@pytest.mark.parametrize("name", ROWS)
def test_the_table_says_what_the_task_files_say(tasks, name):
    task, benchmark = tasks[name][0].task, BENCHMARKS[name]
    config = task.config
    assert (config.dataset_path, config.dataset_name) == (benchmark.dataset, benchmark.configuration)
    assert config.test_split == benchmark.split and benchmark.metric in task.aggregation()


@pytest.mark.parametrize("name", ROWS)
def test_samples_know_their_documents(tasks, name):
    task, samples = tasks[name]
    assert len({sample.sample_id for sample in samples}) == len(samples)
    again = open_task(f"lmms:{name}", task.data_root).samples()
    assert [sample.sample_id for sample in again] == [sample.sample_id for sample in samples]
    for sample in samples:
        parts = [part for message in sample.messages for part in message["content"]]
        texts = [part["text"].strip() for part in parts if part["type"] == "text"]
        assert sample.question == "\n".join(text for text in texts if text)
        assert all(part["image"].size == (40, 30) for part in parts if part["type"] == "image")
        assert sample.references and all(isinstance(each, str) for each in sample.references)


def test_one_image_is_one_cluster(tasks):
    pope = [sample.image_id for sample in tasks["pope"][1]]
    assert pope[0] == pope[1] and pope[2] == pope[3] and pope[0] != pope[2]
    # The same picture in another benchmark's data would be the same file; other pictures are other clusters.
    assert len({sample.image_id for sample in tasks["mme"][1]}) == 3


def test_several_images_and_none(tasks):
    images = lambda sample: sum(part["type"] == "image" for part in sample.messages[0]["content"])
    assert [images(sample) for sample in tasks["mmmu_val"][1]] == [1, 2, 1]
    assert [images(sample) for sample in tasks["seedbench"][1]] == [1, 1, 2]
    blind = tasks["scienceqa_img"][1][2]
    assert images(blind) == 0 and blind.image is None


def test_generation_arguments_and_stop_strings(tasks):
    limits = {name: (task.max_new_tokens, task.stop_strings) for name, (task, _) in tasks.items()}
    assert limits["chartqa"] == (16, ("\n\n",)) and limits["docvqa_val"] == (32, ("\n\n",))
    assert limits["textvqa_val"] == (1024, ("ASSISTANT:",))
    assert limits["mmbench_en_dev_static"] == (1024, ("ASSISTANT:",))


def test_simple_prompts_put_one_text_behind_the_images(data_root, tasks):
    simple = open_task("lmms:chartqa:simple", data_root)
    first, chat = simple.samples(1)[0], tasks["chartqa"][1][0]
    assert [part["type"] for part in first.messages[0]["content"]] == ["image", "text"]
    assert first.question == chat.question and simple.version != tasks["chartqa"][0].version


# --- traps ------------------------------------------------------------------------------------------------------------


def test_unparsable_answers_are_guessed_alike_and_counted(tasks):
    task, samples = tasks["mmmu_val"]
    first = task.score(samples[0], "who knows")
    random.seed(17)  # whatever was drawn before
    before = random.getstate()
    assert task.score(samples[0], "who knows") == first and first.values["guessed"] is True
    assert random.getstate() == before
    _, records = records_of(task, samples, ("who knows", "A", "12"))
    assert task.aggregate(records)["guesses"] == 1
    _, records = records_of(task, samples, ("B", "A", "12"))
    assert "guesses" not in task.aggregate(records)


def test_ocrbench_counts_what_was_asked_every_time(tasks):
    task, samples = tasks["ocrbench"]
    for _ in range(3):  # lmms-eval's own would say 0.001, 0.002, 0.003
        _, records = records_of(task, samples, ("nothing", "x+1", "13"))
        assert task.aggregate(records)["quoted"]["value"] == pytest.approx(100 / 3)


def test_mme_asks_whole_pairs(tasks):
    task, samples = tasks["mme"]
    assert [s.sample_id for s in task.samples(3)] == [s.sample_id for s in samples[:2]]
    with pytest.raises(ValueError, match="at least 2"):
        task.samples(1)


def test_a_control_character_does_not_reach_a_metric(tasks):
    task, samples = tasks["mmbench_en_dev_static"]
    scored = task.score(samples[0], "A\x00\x1b\x85")
    assert scored.score == 1 and scored.values["gpt_eval_score,none"]["prediction"] == "A"


def test_what_a_metric_cannot_score_fails_at_once_with_its_cause(tasks, monkeypatch):
    task, samples = tasks["pope"]

    def process(doc, results):
        raise KeyError("no such column")

    monkeypatch.setattr(task.task.config, "process_results", process)
    with pytest.raises(ValueError, match="cannot score the answer 'yes': KeyError: 'no such column'"):
        task.score(samples[0], "yes")


def test_a_failed_sample_leaves_no_aggregate(tasks):
    task, samples = tasks["chartqa"]
    _, records = records_of(task, samples, ROWS["chartqa"].answers)
    records[1].error = "out of memory"
    assert task.aggregate(records) == {"error": "1 of 3 samples failed; the benchmark's figure needs all of them"}


def test_nothing_is_written_to_the_working_directory(tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("textvqa_val", "mmbench_en_dev_static", "ocrbench"):
        task, samples = tasks[name]
        task.aggregate(records_of(task, samples, ROWS[name].answers)[1])
    assert list(tmp_path.iterdir()) == []


def test_the_judge_groups_and_unknown_names_are_refused(data_root):
    with pytest.raises(ValueError, match="use mmbench_en_dev_static"):
        open_task("lmms:mmbench_en_dev", data_root)
    with pytest.raises(ValueError, match="nearest first: chartqa"):
        open_task("lmms:chartqq", data_root)
    with pytest.raises(ValueError, match="not a single task"):
        open_task("lmms:mmmu_pro", data_root)


def test_absent_data_is_said_at_once(data_root, tmp_path):
    with pytest.raises(ValueError, match="evaluations.data check"):
        open_task("lmms:chartqa", tmp_path)
    with pytest.raises(ValueError, match=r"lmms-lab-encoder/ChartQA\) cannot be read on the Hub or in its cache"):
        open_task("lmms:chartqa")


def test_without_lmms_eval_it_says_how_to_get_it(monkeypatch):
    from evaluations.lmms import library

    monkeypatch.setattr(library, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        open_task("lmms:chartqa")


def test_registration_is_light():
    """lmms-eval reads it on every start; asking our commands for help must not read lmms-eval."""
    code = "import sys; from evaluations.lmms.registration import manifests; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True, timeout=60)
    code = (
        "import sys\nfrom evaluations import run, data\nfrom evaluations.lmms import __main__ as lmms\n"
        "for module in (run, data, lmms):\n    module.make_parser().format_help()\n"
        "heavy = {'torch', 'lmms_eval', 'transformers', 'datasets'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=True, timeout=60)


# --- the whole way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_suites_run_to_a_report(data_root, tmp_path, monkeypatch, family):
    """The tiny models of the real classes answer all 15 under two methods; the aggregate of a cell is lmms-eval's."""
    import family_processors

    from evaluations.config import RunConfig
    from evaluations.job import execute
    from evaluations.lmms import tasks as lmms_tasks
    from evaluations.records import RunFolder

    monkeypatch.setattr(lmms_tasks, "DEFAULT_MAX_NEW_TOKENS", 12)
    loaded = family_processors.load(family)
    loaded.checkpoint_sha256 = "tiny"
    for suite in ("paper-easy", "paper-hard"):
        config = RunConfig.of(
            load_suite(suite), data_root=data_root, out=tmp_path / suite, methods=["dense", "fastv"], budgets=[0.95],
            timing=False,
        )  # fmt: skip
        assert execute(config, "test", load=lambda _: loaded) == 0
        folder = RunFolder.open(tmp_path / suite)
        manifests = folder.manifests()
        assert len(manifests) == 2 * len(config.tasks)
        for manifest in manifests:
            name = manifest.task.removeprefix("lmms:")
            records = folder.samples(manifest.key)
            assert (manifest.status, manifest.num_failed, len(records)) == ("ok", 0, len(ROWS[name].answers))
            task = open_task(manifest.task, data_root)
            task.samples()
            again = task.aggregate([replace(record, values=record.values) for record in records])
            assert manifest.aggregate == again and "quoted" in again
        page = (tmp_path / suite / "report.html").read_text()
        assert "As the benchmarks count" in page
        assert all(BENCHMARKS[task.name.removeprefix("lmms:")].quoted in page for task in config.tasks)
