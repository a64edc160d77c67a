"""The sweep: what is recorded, what a kill leaves behind, and what continuing makes of it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from fakes import NUM_VISUAL, VISOR, BrokenImage, FakeModel, FakeSample, make_config, make_task
from PIL import Image

from budgets.registry import METHODS
from evaluations.batches import Lengths, make_batches, plan_task
from evaluations.cells import make_plan
from evaluations.job import dry_run_table, execute
from evaluations.models import Models
from evaluations.records import RunFolder, unpack_bits
from evaluations.settings import Planner
from visor.vision.image import as_rgb

pytestmark = pytest.mark.usefixtures("with_fake_tasks")
FAKES = Path(__file__).parent / "fakes.py"


def run(config, model=None, capsys=None, **options):
    model = model or FakeModel()
    status = execute(config, "test", report=False, load=lambda _: model, **options)
    return status, model


def contents(out):
    """The bytes of all samples files by cell, and the manifests without what depends on time and history."""
    folder = RunFolder(out)
    samples = {path.parent.name: path.read_bytes() for path in out.glob("cells/*/samples.jsonl")}
    manifests = [m.to_dict() for m in folder.manifests()]
    for manifest in manifests:
        del manifest["seconds"], manifest["num_resumed"]
    return samples, manifests


@pytest.fixture(scope="module")
def unbroken(with_fake_tasks, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "run"
    assert run(make_config(out))[0] == 0
    return out


def test_every_cell_has_a_record_a_sample(unbroken):
    folder = RunFolder.open(unbroken)
    manifests = folder.manifests()
    assert [(m.task, m.setting_id, m.num_samples) for m in manifests] == [
        ("fake_a", "dense", 10), ("fake_a", "fastv@0.5", 10), ("fake_b", "dense", 6), ("fake_b", "fastv@0.5", 6),
    ]  # fmt: skip
    for manifest in manifests:
        records = folder.samples(manifest.key)
        assert len({r.sample_id for r in records}) == manifest.num_samples
        assert (manifest.status, manifest.error, manifest.num_failed) == ("ok", None, 0)
        for record in records:
            relative = record.decoder_flops / record.dense_decoder_flops
            assert (relative == 1) if manifest.method == "dense" else (0.4 < relative <= 0.5)
            assert record.grid == [12, 12] and len(unpack_bits(record.kept, record.num_visual)) == 144
            assert len(record.visual_tokens) == 12 and record.kv_bytes > 0 and record.flops["tower"] > 0


def test_params_are_those_that_ran(unbroken):
    by_setting = {m.setting_id: m for m in RunFolder.open(unbroken).manifests()}
    assert by_setting["dense"].params == {}
    low, high = by_setting["fastv@0.5"].params["drop"]  # longer questions leave less to the visual tokens
    assert 0 < low < high < 1 and by_setting["fastv@0.5"].params["layer"] == 2


def test_run_json_says_what_and_where(unbroken):
    data = RunFolder.open(unbroken).read_run()
    assert data["suite"]["name"] == "fakes" and [t["num_samples"] for t in data["suite"]["tasks"]] == [10, 6]
    assert data["config"]["batch_size"] == 4 and data["limit"] is None
    assert data["provenance"]["checkpoint"]["training"] is None  # a model that states nothing
    provenance = data["provenance"]
    assert provenance["checkpoint"]["trained"] is False and provenance["checkpoint"]["sha256"] == "c0ffee"
    assert provenance["packages"]["torch"] and provenance["threads"] >= 1


def test_explorer_images_are_saved(unbroken):
    folder = RunFolder.open(unbroken)
    for manifest in folder.manifests():
        assert all(folder.image_path(record.image_id).exists() for record in folder.samples(manifest.key))


def test_the_tower_runs_once_an_image_however_many_methods(tmp_path):
    config = make_config(tmp_path / "run", methods=["dense", "fastv", "random", "visionzip"], timing=False)
    _, model = run(config)
    assert len(model.encoded) == len(set(model.encoded)) == 5 + 3  # two questions an image, two tasks
    assert model.generated == 4 * 16


def test_the_same_command_again_does_nothing(unbroken, tmp_path):
    before = contents(unbroken)
    timings = RunFolder(unbroken).timings_file.path.read_bytes()
    status, model = run(make_config(unbroken))
    assert (status, model.generated, model.encoded) == (0, 0, [])
    assert contents(unbroken) == before and RunFolder(unbroken).timings_file.path.read_bytes() == timings


@pytest.mark.parametrize("lose", [0, 1, 200, 2500, 6000])
def test_a_torn_file_is_continued_to_the_same_bytes(unbroken, tmp_path, lose):
    out = tmp_path / "run"
    assert run(make_config(out))[0] == 0
    victim = next(m for m in RunFolder(out).manifests() if m.setting_id == "fastv@0.5")
    path = out / "cells" / victim.key / "samples.jsonl"
    path.write_bytes(path.read_bytes()[: path.stat().st_size - lose])
    (path.parent / "manifest.json").unlink()
    status, model = run(make_config(out))
    assert status == 0 and (0 < model.generated <= 10 if lose else model.generated == 0)
    assert contents(out) == contents(unbroken)


@pytest.mark.parametrize("kill_after", [3])
def test_killed_and_started_again_it_ends_as_an_unbroken_run(unbroken, tmp_path, kill_after):
    out = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [FAKES.parents[2], *sys.path]))}
    command = [sys.executable, str(FAKES), str(out), "0.1", "dense,fastv"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    count = lambda: sum(path.read_bytes().count(b"\n") for path in out.glob("cells/*/samples.jsonl"))
    deadline = time.monotonic() + 60
    while count() < 4 * kill_after and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    recorded = count()
    assert 4 * kill_after <= recorded < 32
    status, model = run(make_config(out))
    assert status == 0 and model.generated == 32 - recorded
    assert contents(out) == contents(unbroken)


def test_more_methods_only_add_work(unbroken, tmp_path):
    out = tmp_path / "run"
    run(make_config(out, methods=["fastv"], timing=False))
    before, _ = contents(out)
    status, model = run(make_config(out, methods=["dense", "fastv"], timing=False))
    after, _ = contents(out)
    assert status == 0 and model.generated == 16
    assert after.items() >= before.items() and contents(unbroken)[0] == after


def test_the_order_of_methods_changes_nothing(unbroken, tmp_path):
    run(make_config(tmp_path / "run", methods=["fastv", "dense"], timing=False))
    assert contents(tmp_path / "run")[0] == contents(unbroken)[0]


def test_another_run_is_not_mixed_into_a_folder(unbroken, tmp_path):
    with pytest.raises(ValueError, match=r"another run: .*seed was 0, now 1"):
        run(make_config(unbroken, seed=1))
    model = FakeModel()
    model.checkpoint_sha256 = "decaf"
    with pytest.raises(ValueError, match=r"checkpoint was c0ffee, now decaf"):
        run(make_config(unbroken), model)


def test_a_failed_cell_is_a_record_and_the_others_go_on(unbroken, tmp_path, capsys):
    out = tmp_path / "run"
    model = FakeModel()
    model.fails_on = lambda schedule: not schedule.is_dense
    status, _ = run(make_config(out), model)
    assert status == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["cells"], last["failed"]) == (4, 2) and "exploded" in last["not_timed"]["fastv@0.5"]
    failed = [m for m in RunFolder(out).manifests() if m.status == "failed"]
    assert {m.setting_id for m in failed} == {"fastv@0.5"} and failed[0].error == "RuntimeError: the kernel exploded"
    assert "Traceback" in (out / "cells" / failed[0].key / "error.txt").read_text()
    assert {m.setting_id for m in RunFolder(out).manifests() if m.status == "ok"} == {"dense"}
    # Once the cause is gone, the same command completes the run.
    assert run(make_config(out))[0] == 0
    assert contents(out) == contents(unbroken)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": "  "}, "the question is empty"),
        ({"image": BrokenImage()}, "image file is truncated"),
        ({"image": Image.new("RGB", (0, 0))}, "its size is 0 x 0"),
        ({"image": Image.new("RGB", (90, 90))}, "90 x 90 pixels, and the limit is 8,000"),
        ({"image_id": "no\0name"}, "its image cannot be saved for the report"),
    ],
)
def test_a_bad_sample_is_a_recorded_failure(tmp_path, monkeypatch, capsys, change, message):
    from budgets.registry import TASKS

    task, made = TASKS.get("fake_a"), make_task("fake_a")
    good = made().samples(None)
    bad = FakeSample(**{**vars(good[0]), **change})
    monkeypatch.setattr(task, "samples", lambda self, limit: [bad, *good[1:]])
    status, _ = run(make_config(tmp_path / "run", tasks=["fake_a"], max_pixels=8000))
    assert status == 1
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["failed"], last["samples"], last["failed_samples"]) == (0, 20, 2)
    for manifest in RunFolder(tmp_path / "run").manifests():
        assert (manifest.status, manifest.num_failed) == ("ok", 1)
        records = {r.sample_id: r for r in RunFolder(tmp_path / "run").samples(manifest.key)}
        assert message in records[bad.sample_id].error and records[bad.sample_id].answer is None
        assert sum(r.error is None for r in records.values()) == 9
    again = make_config(tmp_path / "run", tasks=["fake_a"], max_pixels=8000)
    assert run(again)[0] == 1  # it still failed when nothing is left to do


def test_images_of_any_mode_are_saved_as_the_model_saw_them(tmp_path, monkeypatch):
    from budgets.registry import TASKS

    task, made = TASKS.get("fake_a"), make_task("fake_a")
    modes = ("CMYK", "F", "LA", "I;16", "HSV", "1", "RGBA")
    samples = [replace(s, image=Image.new(m, (3, 3)), image_id=f"of{m[0]}{len(m)}") for m, s in zip(
        modes, made().samples(None), strict=False)]  # fmt: skip
    monkeypatch.setattr(task, "samples", lambda self, limit: samples)
    assert run(make_config(tmp_path / "run", tasks=["fake_a"]))[0] == 0
    for sample in samples:
        with Image.open(RunFolder(tmp_path / "run").image_path(sample.image_id)) as saved:
            assert saved.mode == "RGB" and saved.tobytes() == as_rgb(sample.image).tobytes(), sample.image.mode


def test_another_limit_of_pixels_is_another_run(unbroken):
    with pytest.raises(ValueError, match="max_pixels was 89478485, now 100"):
        run(make_config(unbroken, max_pixels=100))


def test_batches_keep_an_image_together_and_depend_on_the_samples_alone():
    samples = make_task("fake_a", 23, 3)().samples(None)
    batches = make_batches(samples, 4)
    assert make_batches(samples[::-1], 4) == batches
    assert all(len(batch) <= 4 for batch in batches) and sum(map(len, batches)) == 23
    homes = [{number for number, batch in enumerate(batches) for s in batch if s.image_id == i} for i in
             {s.image_id for s in samples}]  # fmt: skip
    assert all(len(home) == 1 for home in homes)
    assert [len(batch) for batch in make_batches(make_task("fake_a", 5, 5)().samples(None), 2)] == [2, 2, 1]


def test_questions_of_a_batch_are_about_equally_long():
    made = make_task("fake_a", 24)().samples(None)
    samples = [replace(s, question="why " * (1 + i * 7 % 24), image_id=f"{i:02}") for i, s in enumerate(made)]
    batches = make_batches(samples, 4)
    padding = lambda batch: sum(max(len(s.question) for s in batch) - len(s.question) for s in batch)
    in_any_order = [samples[i : i + 4] for i in range(0, 24, 4)]
    assert sum(map(padding, batches)) < 0.3 * sum(map(padding, in_any_order))


def plan_of(config, model=None):
    model = model or FakeModel()
    planner = Planner(model.geometry, config.dtype)
    tasks = [plan_task("fake_a", make_task("fake_a")(), make_task("fake_a")().samples(None), config.batch_size, model)]
    return make_plan(config, tasks, planner, Models(model)), planner


def test_a_key_changes_with_all_that_can_change_the_output(tmp_path):
    key = lambda **changes: plan_of(make_config(tmp_path / "r", methods=["random"], **changes))[0].cells[0].key
    keys = [key(), key(seed=1), key(dtype="bfloat16"), key(device="cuda"), key(attention="eager"), key(budgets=[0.4])]
    assert len(set(keys)) == len(keys) and key() == keys[0]
    assert key(timing=False) == keys[0]
    asked = [key(generation=[("num_beams", 3)]), key(generation=[("num_beams", 2)]), key(system="be short")]
    assert len({*keys, *asked}) == len(keys) + len(asked)


def test_a_run_with_other_generation_settings_is_another_run(unbroken):
    for changes, message in [
        ({"generation": [("num_beams", 3)]}, "generation was "),
        ({"system": "be short"}, "system was None, now be short"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(make_config(unbroken, **changes))
    with pytest.raises(ValueError, match="--generation num_beams is given twice"):
        make_config(unbroken, generation=[("num_beams", 3), ("num_beams", 2)])


@pytest.mark.parametrize("fault", ["logits", "length", "router"])
def test_what_cannot_be_answered_is_one_failed_sample(tmp_path, fault):
    """NaN logits, a prompt beyond the context, a router that says NaN: the others are scored, no NaN is written."""
    model = FakeModel(visor=VISOR)
    if fault == "logits":
        model.faults = {"what is it please ": "the logits of answer token 0 are NaN or infinite"}
    elif fault == "length":
        model.context_length = NUM_VISUAL + 15  # the questions have 13 to 16 tokens
    else:
        model.route = lambda prepared, vision, schedules: [
            [float("nan") if p.question == "what is it please " else 0.5] * 4 for p in prepared
        ]
    config = make_config(tmp_path / "run", tasks=["fake_a"], methods=["visor"], timing=False, visor=True)
    assert execute(config, "test", report=False, load=lambda _: model) == 1
    failed = 0
    for path in (tmp_path / "run").glob("cells/*/samples.jsonl"):
        assert "NaN" not in path.read_text().replace("are NaN", "").replace("NaN or", "")
        for record in RunFolder(tmp_path / "run").samples(path.parent.name):
            if record.error is not None:
                failed += 1
                assert record.answer is None and record.confidence is None and record.routing is None
    assert failed


def test_an_unreachable_budget_is_left_out_of_a_default_list_and_an_error_when_asked_for(tmp_path):
    config = make_config(tmp_path / "r", budgets=(0.5, 0.11))
    plan, _ = plan_of(config)
    assert [s.id for s in plan.settings] == ["dense", "fastv@0.5"]
    (left_out,) = plan.unreachable
    assert (left_out["method"], left_out["budget"]) == ("fastv", 0.11) and "reaches 0." in left_out["reason"]
    assert 0.11 < left_out["least"] < 0.5
    with pytest.raises(ValueError, match=r"fastv@0.11: FastV cannot meet a budget of 0.11 .* reaches 0\.\d+ to"):
        plan_of(make_config(tmp_path / "r", asked=(0.5, 0.11)))


def test_token_budgets_run_beside_the_others_and_change_no_key(tmp_path):
    methods = ["dense", "fastv", "pooling", "random"]
    config = make_config(tmp_path / "r", methods=methods, tokens=[64, 72])
    plan, planner = plan_of(config)
    ids = [s.id for s in plan.settings]
    assert ids == ["dense", *(f"{name}@{budget}" for name in methods[1:] for budget in ("0.5", "72", "64"))]
    for setting in plan.settings:
        if setting.budget > 1:
            schedule = planner.fitted(setting, Lengths(144, 20))[1]
            assert 50 < planner.cost(schedule, 20).visual_tokens_mean <= setting.budget
    without, _ = plan_of(make_config(tmp_path / "r", methods=methods))
    keys = {cell.setting.id: cell.key for cell in plan.cells}
    assert {cell.setting.id: cell.key for cell in without.cells}.items() <= keys.items()
    assert len(set(keys.values())) == len(ids)
    table = dry_run_table(plan, planner)
    row = next(line.split() for line in table.splitlines() if "random@64" in line)
    assert "64.0" in row and any(part.endswith("%") for part in row)  # tokens and FLOPs, both
    with pytest.raises(ValueError, match="a budget of 144 tokens leaves nothing out: the images have at most 144"):
        plan_of(make_config(tmp_path / "r", methods=methods, tokens=[144]))


def test_records_of_an_earlier_rule_are_not_taken_for_those_of_a_new_one(tmp_path, monkeypatch):
    plan, _ = plan_of(make_config(tmp_path / "r", methods=["random"]))
    monkeypatch.setattr(METHODS.get("random"), "version", 2)
    later, _ = plan_of(make_config(tmp_path / "r", methods=["random"]))
    assert plan.cells[0].key != later.cells[0].key


def test_a_method_that_the_model_cannot_run_is_left_out_or_refused(tmp_path):
    plan, _ = plan_of(make_config(tmp_path / "r", methods=["dense", "visor"]))
    assert [s.id for s in plan.settings] == ["dense"]
    assert "no trained cross-attention blocks" in plan.unreachable[0]["reason"]
    assert plan.unreachable[0]["least"] is None
    with pytest.raises(ValueError, match="visor cannot be run: this model has no trained cross-attention"):
        plan_of(make_config(tmp_path / "r", asked_methods=["dense", "visor"]))
    with pytest.raises(ValueError, match="nothing to run: .* reaches 0.2"):
        plan_of(make_config(tmp_path / "r", methods=["fastv"], budgets=[0.01]))


def test_schedules_meet_the_budget_for_every_length(tmp_path):
    plan, planner = plan_of(make_config(tmp_path / "r", methods=["fastv", "pooling", "downsample"], budgets=[0.5]))
    for setting in plan.settings:
        for num_text in (8, 20, 60):
            assert 0 < planner.relative_cost(setting, Lengths(144, num_text)) <= 0.5


def test_dry_run_prints_the_cells_and_writes_nothing(tmp_path, capsys):
    status, model = run(make_config(tmp_path / "run"), dry_run=True)
    out = capsys.readouterr().out
    assert status == 0 and model.generated == 0 and not (tmp_path / "run").exists()
    assert "fastv@0.5" in out and "100.0%" in out and json.loads(out.splitlines()[-1])["cells"] == 4


@pytest.mark.parametrize("breaks", [False, True])
def test_the_last_line_says_where_the_report_is_or_why_there_is_none(unbroken, monkeypatch, capsys, breaks):
    def build(folder):
        if breaks:
            raise OSError("the disk is full")
        return folder / "report.html"

    monkeypatch.setitem(sys.modules, "reports.build", SimpleNamespace(build=build))
    status = execute(make_config(unbroken), "test", load=lambda _: FakeModel())
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["run_folder"] == str(unbroken) and last["cells"] == 4
    if breaks:
        assert (status, last["report"], last["report_error"]) == (1, None, "OSError: the disk is full")
    else:
        assert (status, last["report"], last["report_error"]) == (0, str(unbroken / "report.html"), None)
