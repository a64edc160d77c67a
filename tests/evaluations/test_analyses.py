"""`python -m visor.analysis`: what it writes, that it continues, and that a failed task does not stop the others."""

import json
import sys
from types import SimpleNamespace

import pytest
from fakes import FakeModel

from budgets.schedule import LayerMode
from evaluations.analyses import analysis_path, main

pytestmark = pytest.mark.usefixtures("with_fake_tasks")


@pytest.fixture
def analyses(monkeypatch):
    """The two observations that need a real model, replaced; the layers without the image run on the fake one."""
    from visor.analysis.attention import AttentionMass
    from visor.analysis.cka import LayerSimilarity

    calls = []

    def mass(loaded, prepared, vision):
        calls.append(prepared.question)
        return AttentionMass((0.1 * len(prepared.question.split()),) * 12, (0.5,) * 12)

    similar = lambda loaded, prepared, vision: LayerSimilarity((1.0, *(0.7,) * 11), (1.0,) * 12, 1.0)
    monkeypatch.setattr("visor.analysis.attention.attention_mass", mass)
    monkeypatch.setattr("visor.analysis.cka.similarity_to_first", similar)
    return calls


class Model(FakeModel):
    def encode(self, prepared, taps=(), image_scale=1.0):
        return super().encode(prepared, taps, image_scale)


def run(tmp_path, *arguments, model=None):
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    model = model or Model()
    options = ["--model", str(tmp_path / "model"), "--suite", "smoke", "--tasks", "fake_a,fake_b", "--limit", "8",
               "--out", str(tmp_path / "run"), *arguments]  # fmt: skip
    return main(options, load=lambda _: model), model


def document(tmp_path):
    return json.loads(analysis_path(tmp_path / "run", str(tmp_path / "model")).read_text())


def test_every_task_gets_every_analysis(tmp_path, analyses, capsys):
    status, model = run(tmp_path)
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert status == 0 and last["failed"] == {} and last["analyses"].endswith(".json")
    made = document(tmp_path)
    assert made["num_layers"] == 12 and made["trained"] is False and set(made["tasks"]) == {"fake_a", "fake_b"}
    task = made["tasks"]["fake_a"]
    assert task["attention"]["num_samples"] == 8 and task["attention"]["num_images"] == 4
    assert task["attention"]["text"]["low"][0] <= task["attention"]["text"]["mean"][0] == pytest.approx(0.45)
    assert task["cka"]["num_samples"] == 4, "one sample an image: visual tokens do not see the question"
    assert task["cka"]["visual"]["mean"] == pytest.approx([1, *[0.7] * 11])
    drop = task["layer-drop"]
    assert len(drop["layers"]) == 12 and model.generated == 2 * 13 * 8
    for layer in drop["layers"]:
        assert layer["difference"] == pytest.approx(layer["score"] - drop["dense"]["score"])
        assert layer["difference_low"] <= layer["difference"] <= layer["difference_high"]


def test_it_continues_and_refuses_another_model(tmp_path, analyses, capsys):
    run(tmp_path, "--only", "attention", "--tasks", "fake_a")
    assert len(analyses) == 8
    _, model = run(tmp_path, "--only", "attention,layer-drop")
    assert len(analyses) == 16 and model.generated == 2 * 13 * 8
    assert run(tmp_path, "--only", "attention,layer-drop")[1].generated == 0
    other = Model()
    other.checkpoint_sha256 = "decaf"
    assert run(tmp_path, model=other)[0] == 2
    assert "holds other analyses: checkpoint_sha256 was c0ffee, now decaf" in capsys.readouterr().err


def test_a_failed_analysis_is_said_and_the_others_are_written(tmp_path, analyses, capsys):
    model = Model()
    model.fails_on = lambda schedule: bool(schedule.layers_in(LayerMode.TEXT))
    assert run(tmp_path, model=model)[0] == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(last["failed"]) == {"fake_a, layer-drop", "fake_b, layer-drop"}
    assert set(document(tmp_path)["tasks"]["fake_a"]) >= {"attention", "cka"}
    assert "layer-drop" not in document(tmp_path)["tasks"]["fake_a"]
    assert run(tmp_path)[0] == 0


def test_the_report_of_the_run_folder_is_rebuilt(tmp_path, analyses, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"schema_version": 1}')
    built = SimpleNamespace(build=lambda folder: folder / "report.html")
    monkeypatch.setitem(sys.modules, "reports.build", built)
    assert run(tmp_path, "--only", "cka")[0] == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["report"].endswith("report.html")


def test_unknown_names_are_refused(tmp_path, capsys):
    assert run(tmp_path, "--only", "attenton")[0] == 2
    assert "unknown analysis 'attenton'; the analyses that exist, nearest first: attention" in capsys.readouterr().err
