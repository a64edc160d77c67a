"""What the report says of the training behind each model, and when it warns that the reference has seen less."""

import json
import re
import shutil

import pytest

from reports import training
from reports.build import build
from reports.data import load
from visor.inference.checkpoint import CHECKPOINTS, read_card
from visor.inference.training_facts import read_training


def stage(name, steps, examples=None, seconds=None):
    return {"name": name, "steps": steps, "examples": examples, "seconds": seconds}


def facts(*stages, base=None, base_steps=None, data=None, stated=None):
    return {"stated": stated, "data": data, "base": base, "base_steps": base_steps, "stages": list(stages)}


def checkpoint(name, training, trained=True):
    return {"name": name, "sha256": name, "trained": trained, "training": training, "card": None}


REFERENCE = facts(stage("decoder", 5000, 160000, 3600), stage("dense", 3400, 54400, 1800), data="Forms and charts.")
METHODS = {"methods": ("dense", "fastv", "visor"), "tasks": ("forms",), "budgets": (0.5,), "timings": False}


@pytest.fixture
def run(make_run_folder):
    def make(reference, its, **options):
        entries = {"visor": checkpoint("visor-tiny", its, **options)}
        return load(make_run_folder(training=reference, checkpoints=entries, **METHODS))

    return make


def lines(run):
    return [training.sentence(model) for model in training.models(run)]


def test_each_model_says_what_it_was_trained_on_and_how_long(run):
    its = facts(stage("universal", 25550, 408800, 600), base="dense-tiny", base_steps=8400, data="The same worlds.")
    assert lines(run(REFERENCE, its)) == [
        "dense-tiny: 8,400 steps (decoder 5,000, dense 3,400); 214,400 examples; 1.5 hours. Data: Forms and charts.",
        "visor-tiny (VISOR): dense-tiny at 8,400 steps, and 25,550 steps more; 408,800 examples; 10 minutes. "
        "Data: The same worlds.",
    ]


def test_what_is_not_stated_is_said_not_to_be(run):
    assert lines(run(None, None)) == ["dense-tiny: training not stated.", "visor-tiny (VISOR): training not stated."]
    assert lines(run(facts(stage("a", 5)), None, trained=False)) == [
        "dense-tiny: 5 steps.",
        "visor-tiny (VISOR): not trained.",
    ]
    assert lines(run(facts(data="Photos."), facts(stated="3 epochs of LLaVA-665k"))) == [
        "dense-tiny: steps not stated. Data: Photos.",
        "visor-tiny (VISOR): 3 epochs of LLaVA-665k.",
    ]


@pytest.mark.parametrize(
    ("reference", "its", "head", "text"),
    [
        (REFERENCE, facts(stage("u", 9), base="dense-tiny"), "Trained further", r"tiny \(VISOR\) by 9 steps: a part"),
        (None, facts(stage("u", 9), base="dense-tiny"), "Trained further", r"by 9 steps"),
        # The reference went on since: 8,400 steps now, of which VISOR's base had seen 3,400.
        (REFERENCE, facts(stage("u", 6000), base="dense-tiny", base_steps=3400), "Trained further", "by 1,000 steps"),
        (REFERENCE, facts(stage("u", 5000), base="dense-tiny", base_steps=3400), None, None),
        (REFERENCE, facts(stage("u", 8401)), "Trained further", "by 1 steps"),
        (REFERENCE, facts(stage("u", 8000)), None, None),
        (REFERENCE, facts(stage("u", 9), base="another"), "Training not stated", "Whether visor-tiny .* more steps"),
        (REFERENCE, None, "Training not stated", "Whether visor-tiny .* than dense-tiny is not stated"),
    ],
)  # fmt: skip
def test_the_warning_counts_what_the_reference_has_not_seen(run, reference, its, head, text):
    found = training.caveat(run(reference, its))
    if head is None:
        assert found is None
    else:
        assert found[0].startswith(head)
        assert re.search(text, found[1])


def test_methods_on_the_reference_itself_need_no_warning(make_run_folder):
    folder = make_run_folder(training=REFERENCE, methods=("dense", "fastv"), tasks=("forms",), budgets=(0.5,))
    assert len(training.models(load(folder))) == 1 and training.caveat(load(folder)) is None


def test_it_stands_beside_the_verdict_in_the_same_bytes(make_run_folder):
    entries = {"visor": checkpoint("visor-<b>", facts(stage("u", 9), base="dense-tiny"))}
    folder = make_run_folder(training=REFERENCE, checkpoints=entries, **METHODS)
    html = build(folder).read_text()
    after = html[html.index('<p class="verdict">') :]
    assert after.index("dense-tiny: 8,400 steps") < after.index("visor-&lt;b&gt; (VISOR): dense-tiny") < 3000
    assert after.index("Trained further than dense-tiny") < 3000
    document = json.loads((folder / "results.json").read_text())
    assert document["training"][0].startswith("dense-tiny: 8,400 steps") and "9 steps" in document["training_caveat"]
    assert build(folder).read_text() == html


def test_older_runs_have_no_facts(make_run_folder):
    folder = make_run_folder(**METHODS)
    record = json.loads((folder / "run.json").read_text())
    del record["provenance"]["checkpoint"]["training"], record["provenance"]["checkpoints"]
    (folder / "run.json").write_text(json.dumps(record))
    assert lines(load(folder)) == ["dense-tiny: training not stated."]


# --- what a checkpoint says ----------------------------------------------------------------------------------------


def test_shipped_models_say_what_their_cards_say():
    found = {name: read_training(CHECKPOINTS / name, read_card(CHECKPOINTS / name)) for name in
             ("dense-tiny", "visor-tiny", "m3-tiny")}  # fmt: skip
    for name, training_of in found.items():
        card = read_card(CHECKPOINTS / name)
        assert training_of["data"] and training_of["stages"]
        for one in training_of["stages"]:
            assert f"{one['steps']:,} | " in card and f"{one['examples']:,} | " in card, (name, one)
    assert found["dense-tiny"]["base"] is None
    assert found["visor-tiny"]["base"] == found["m3-tiny"]["base"] == "dense-tiny"


def test_a_model_of_ones_own(tmp_path):
    assert read_training(tmp_path, None) is None and read_training(None, "# A card\ntraining: much\n") is None
    assert read_training(tmp_path, "---\ntraining: 3 epochs\n---\n# Mine")["stated"] == "3 epochs"
    card = "# Mine\n\n## Training data\nPhotos of\nroads. Taken by `us`.\n\n## Other\nThings"
    assert read_training(tmp_path, card)["data"] == "Photos of roads."
    (tmp_path / "training_facts.md").write_text("We trained it for a week.")
    assert read_training(tmp_path, None) is None
    shutil.copy(CHECKPOINTS / "visor-tiny" / "training_facts.md", tmp_path)
    assert [one["name"] for one in read_training(tmp_path, None)["stages"]] == ["blocks", "everything", "universal"]
