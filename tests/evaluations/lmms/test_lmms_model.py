"""Our models in lmms-eval: the same prompts, answers and figures as in our own suites; cache, policies, no network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from benchmark_rows import ROWS

pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("lmms_eval")]

ROOT = Path(__file__).parents[3]
BOTH = [*ROWS]
NOT_THE_SAME = {"ocrbench": "always divided by 1,000", "mmmu_val": "guesses where it cannot parse"}
"""Whose figures of lmms-eval's differ on three rows and a model that knows nothing; their answers do not."""


@pytest.fixture
def few_tokens(monkeypatch):
    """Answers of at most six tokens, both ways."""
    from evaluations.lmms import model, tasks

    limits = lambda options, name, own=tasks.generation_limits: (6, own(options, name)[1])
    monkeypatch.setattr(tasks, "generation_limits", limits)
    monkeypatch.setattr(model, "generation_limits", limits)


def tiny(family, sha="tiny"):
    import family_processors

    loaded = family_processors.load(family)
    loaded.checkpoint_sha256 = sha
    return loaded


def listened(loaded):
    """The conversations that the model is asked, as texts and sizes and pixels of images."""
    heard, prepare = [], loaded.prepare_chat

    def listen(messages):
        parts = [part for message in messages for part in message["content"]]
        heard.append(tuple(part.get("text") or part["image"].convert("RGB").tobytes() for part in parts))
        return prepare(messages)

    loaded.prepare_chat = listen
    return heard


def evaluate(model, tasks, tmp_path, **options):
    """lmms-eval's own evaluation, as its command line sets it up."""
    from lmms_eval.evaluator import simple_evaluate

    as_cli = SimpleNamespace(
        process_with_media=False, reasoning_tags='[["<think>","</think>"]]', agentic_trace_mode="basic",
        output_path=str(tmp_path / "lmms-eval"),
    )  # fmt: skip
    return simple_evaluate(model=model, tasks=tasks, cli_args=as_cli, bootstrap_iters=0, **options)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_both_ways_are_the_same(data_root, tmp_path, monkeypatch, few_tokens, family):
    """Dense: our suites and lmms-eval's evaluator ask the same, hear the same, and score it alike, all 15."""
    from evaluations.config import RunConfig
    from evaluations.job import execute
    from evaluations.lmms.model import Visor
    from evaluations.records import RunFolder
    from evaluations.suite import load_suite

    loaded = tiny(family)
    heard = listened(loaded)
    config = RunConfig.of(
        load_suite("smoke"), tasks=[f"lmms:{name}" for name in BOTH], methods=["dense"], data_root=data_root,
        out=tmp_path / "ours", batch_size=1, timing=False,
    )  # fmt: skip
    assert execute(config, "test", load=lambda _: loaded, report=False) == 0
    ours = set(heard)
    heard.clear()

    monkeypatch.chdir(data_root)
    theirs = evaluate(Visor(loaded, batch_size=1), BOTH, tmp_path)
    assert set(heard) == ours and len(heard) == sum(len(rows.answers) for rows in ROWS.values())

    folder = RunFolder.open(tmp_path / "ours")
    for manifest in folder.manifests():
        name = manifest.task.removeprefix("lmms:")
        samples = theirs["samples"][name]
        assert sorted(record.answer for record in folder.samples(manifest.key)) == sorted(
            resp[0] if isinstance(resp, list) else resp for each in samples for resp in each["resps"]
        )
        if name not in NOT_THE_SAME:
            figures = {key: theirs["results"][name][key] for key in manifest.aggregate["values"]}
            assert figures == pytest.approx(manifest.aggregate["values"]), name


def test_a_method_runs_and_says_what_it_saves(data_root, tmp_path, monkeypatch, few_tokens):
    from evaluations.lmms.model import Visor

    monkeypatch.chdir(data_root)
    model = Visor(tiny("llava_onevision"), method="fastv", budget=0.9, batch_size=4)
    first = evaluate(model, ["chartqa", "scienceqa_img"], tmp_path)
    again = evaluate(model, ["chartqa", "scienceqa_img"], tmp_path)  # the same object: nothing of it was cleared away
    throughput = first["throughput"]
    assert throughput["total_gen_tokens"] > 0 and throughput["avg_prefill_seconds"] > 0
    assert 0.5 < throughput["avg_of_dense"] <= 0.95  # one of the six questions has no image and saves nothing
    counts = [each["token_counts"][0] for each in first["samples"]["chartqa"]]
    assert all(each["input_tokens"] > 30 and 0 < each["output_tokens"] <= 6 for each in counts)
    answers = lambda run: [each["resps"] for name in run["samples"] for each in run["samples"][name]]
    assert answers(first) == answers(again)


def test_new_weights_are_not_answered_from_the_cache(data_root, tmp_path, monkeypatch, few_tokens):
    from lmms_eval import evaluator

    from evaluations.lmms.model import Visor

    monkeypatch.chdir(data_root)
    asked = []

    def run(sha, **options):
        loaded = tiny("llava_onevision", sha)
        heard = listened(loaded)
        evaluate(Visor(loaded, batch_size=2, **options), ["chartqa"], tmp_path, use_cache=str(tmp_path / "cache"))
        asked.append(len(heard))
        # By name it is the same: lmms-eval knows no more of the model than its arguments.
        create = evaluator.ResponseCache.create
        return create(str(tmp_path / "other"), model="visor", model_args="pretrained=x", task_dict={}).model_fingerprint

    named = [run("a"), run("a"), run("b"), run("a", method="fastv", budget=0.9)]
    assert asked == [3, 0, 3, 3]
    assert named[0] == named[1] and len(set(named)) == 3


def test_simple_prompts_both_ways(data_root, tmp_path, monkeypatch, few_tokens):
    """`--force_simple` asks what `lmms:NAME:simple` asks."""
    from evaluations.lmms.model import SimpleVisor
    from evaluations.task import open_task, prepare_sample

    loaded = tiny("llava_onevision")
    heard = listened(loaded)
    samples = open_task("lmms:mmmu_val:simple", data_root).samples()
    for sample in samples:
        prepare_sample(loaded, sample)
    ours = set(heard)
    heard.clear()
    monkeypatch.chdir(data_root)
    evaluate(SimpleVisor(loaded), ["mmmu_val"], tmp_path)
    assert set(heard) == ours and len(ours) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"method": "fastvv"}, "nearest first: fastv"),
        ({"method": "fastv", "layers": 3}, "unknown option of fastv 'layers'"),
        ({"budget": 1.5, "method": "fastv"}, "in \\(0, 1\\]"),
        ({"policy": "router"}, "no configurations to choose from"),
        ({"policy": "oracle"}, "unknown policy"),
        ({"threshold": 0.5}, "does not go with policy=None"),
        ({"batch_size": "many"}, "whole number or auto"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    from evaluations.lmms.model import Visor

    with pytest.raises(ValueError, match=message):
        Visor(tiny("llava"), **arguments)


def test_policies_of_a_visor_model_answer_request_by_request(few_tokens):
    """Each policy's answers are those of the configurations that it chose."""
    from evaluations.lmms.engine import Engine
    from evaluations.task import open_task
    from visor.inference import LoadedModel

    loaded = LoadedModel.load("visor-tiny")
    talk = [[{"role": "user", "content": [{"type": "image", "image": s.image}, {"type": "text", "text": s.question}]}]
            for s in open_task("digits").samples(3)]  # fmt: skip
    last = len(loaded.geometry.visor.configurations) - 1
    engine = lambda **options: Engine(loaded, "visor", **options)
    texts = lambda made: [each.text for each in made.answer(talk, 4)]
    fixed = {i: texts(engine(policy="fixed", value=float(i))) for i in (0, last)}
    assert texts(engine()) == fixed[last]  # without a policy, the largest
    eager, patient = engine(policy="cascade", value=0.0), engine(policy="cascade", value=1.1)
    assert texts(eager) == fixed[0] and texts(patient) == fixed[last]
    assert patient.totals.decoder_flops > eager.totals.decoder_flops and patient.totals.num_samples == 3
    routed = engine(policy="router")
    assert len(texts(routed)) == 3 and 0 < routed.totals.figures()["of_dense"] < 1.5
    assert len({engine(policy="fixed", value=float(i)).identity for i in (0, last)}) == 2
    with pytest.raises(ValueError, match="configurations 0 to"):
        engine(policy="fixed", value=99.0)


# --- as commands ------------------------------------------------------------------------------------------------------

WATCHED = """
import runpy, sys
def watch(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        raise RuntimeError(f"a socket: {event} {arguments}")
sys.addaudithook(watch)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that makes this tree look installed, entry points and all, as pyproject.toml has them."""
    tomllib = pytest.importorskip("tomllib")
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    folder = tmp_path_factory.mktemp("installed")
    info = folder / "visor-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: visor\nVersion: 0.1.0\n")
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in named.items()) for group, named in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def run(installed, folder, *arguments, **environment):
    """A module as a command in a process that may open no socket."""
    import os

    paths = os.pathsep.join([str(ROOT), str(installed)])
    own = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1",
           "HF_HOME": str(installed / "hf"), **environment}  # fmt: skip
    command = [sys.executable, "-c", WATCHED, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_command_lines_need_no_network(installed, data_root, tmp_path):
    """`--model visor` by its entry point, and our own command, on a shipped checkpoint and local data."""
    done = run(
        installed, data_root, "lmms_eval", "eval", "--model", "visor", "--model_args",
        "pretrained=dense-tiny,method=fastv,budget=0.5", "--tasks", "chartqa", "--batch_size", "2",
        "--output_path", tmp_path / "theirs", "--log_samples", "--verbosity", "DEBUG",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next((tmp_path / "theirs").rglob("*_results.json")).read_text())
    assert results["n-samples"]["chartqa"]["effective"] == 3 and "a socket" not in done.stderr

    done = run(
        installed, tmp_path, "evaluations.run", "--tasks", "lmms:chartqa", "--data-root", data_root, "--methods",
        "dense,fastv", "--budgets", "0.5", "--no-timing", "--no-report", "--out", tmp_path / "ours",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["failed_samples"] == 0


@pytest.mark.slow
def test_two_processes_share_the_questions(installed, data_root, tmp_path):
    """As under `accelerate launch` on two GPUs, here on the CPU: each answers a share, and the figures are of all."""
    import os

    own = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(installed)]),
           "OMP_NUM_THREADS": "1", "HF_HOME": str(installed / "hf"), "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "lmms_eval",
        "eval", "--model", "visor", "--model_args", "pretrained=dense-tiny,device=cpu", "--tasks", "pope",
        "--batch_size", "2", "--output_path", str(tmp_path), "--log_samples", "--verbosity", "DEBUG",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=data_root, env=own, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(tmp_path.rglob("*_results.json")).read_text())
    lines = next(tmp_path.rglob("*_samples_pope.jsonl")).read_text().splitlines()
    assert sorted(json.loads(line)["doc_id"] for line in lines) == [0, 1, 2, 3]
    assert results["throughput"]["avg_num_samples"] == 2  # what the first of them answered


# --- easy-VQA ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_easy_vqa_both_ways(tmp_path):
    """500 questions: our task in our sweep, and the exported task in lmms-eval, give the same answers and score."""
    from lmms_eval.tasks import TaskManager

    from evaluations.config import RunConfig
    from evaluations.job import execute
    from evaluations.lmms.exported import export
    from evaluations.lmms.model import Visor
    from evaluations.records import RunFolder
    from evaluations.suite import load_suite

    config = RunConfig.of(
        load_suite("smoke"), tasks=["easy_vqa"], methods=["dense"], limit=500, out=tmp_path / "ours", timing=False
    )
    assert execute(config, "test", report=False) == 0
    folder = RunFolder.open(tmp_path / "ours")
    records = folder.samples(folder.manifests()[0].key)

    export("easy_vqa", tmp_path / "exported", 500)
    manager = TaskManager(include_path=str(tmp_path / "exported"), include_defaults=False, model_name="visor")
    model = Visor("dense-tiny", batch_size=16)
    theirs = evaluate(model, ["visor_easy_vqa"], tmp_path, task_manager=manager)
    samples = {each["doc"]["sample_id"]: each for each in theirs["samples"]["visor_easy_vqa"]}
    assert len(records) == len(samples) == 500
    assert {r.sample_id: r.answer for r in records} == {i: each["resps"][0] for i, each in samples.items()}
    mean = sum(record.score for record in records) / 500
    assert theirs["results"]["visor_easy_vqa"]["vqa_accuracy,none"] == pytest.approx(mean) and mean > 0.9
