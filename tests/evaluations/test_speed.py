"""`python -m evaluations.speed` on a tiny geometry: what is measured, what is modelled, and what the report shows."""

import json

import pytest
import torch

from budgets.presets import load, preset
from budgets.registry import UnknownNameError
from budgets.roofline import device, floors
from evaluations.noise import Spread
from evaluations.random_model import RandomModel, build, hub_config
from evaluations.records import RunFolder
from evaluations.speed import configure, main, make_parser
from evaluations.speed_config import parse_settings, split_methods
from reports.__main__ import main as reports_main
from reports.speed import tables

TEXT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=100, model_type="qwen2")  # fmt: skip
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=56,
             patch_size=14, model_type="siglip_vision_model", vision_use_head=False)  # fmt: skip
FEATURES = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
METHODS = "dense,visor[self_layers=1],fastv,visionzip"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A config.json of a LLaVA-OneVision with 16 visual tokens a tile."""
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    path.write_text(
        json.dumps({"model_type": "llava_onevision", "text_config": TEXT, "vision_config": TOWER, **FEATURES})
    )
    return str(path)


def run(tiny, out, *more):
    return main(["--geometry", tiny, "--text-tokens", "8", "--methods", METHODS, "--new-tokens", "3", "--min-runs", "2",
                 "--min-seconds", "0", "--out", str(out), *more])  # fmt: skip


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("measured") / "run"
    threads = torch.get_num_threads()
    assert run(tiny, out, "--visual-tokens", "16,40", "--batch-sizes", "1,2") == 0
    assert torch.get_num_threads() == threads
    return out


def test_every_setting_is_measured_at_every_length_and_batch_size(measured):
    rows = RunFolder.open(measured).timings()
    assert {(row.num_visual, row.batch_size) for row in rows} == {(16, 1), (16, 2), (40, 1), (40, 2)}
    assert len(rows) == 4 * 4 * 2 and not any(row.modelled for row in rows)
    for row in rows:
        assert row.num_text == 8 and row.num_new_tokens == 3
        assert row.tower_ms > 0 and row.prefill_ms > 0 and row.cpu_prefill_ms > 0 and row.decode_ms_per_token > 0
        chooses = row.method in ("fastv", "visionzip")
        assert (row.scoring_ms > 0) == chooses, row.setting_id


def test_the_cache_holds_what_the_accountant_says(measured):
    """Measured from the cache, after the prefill, in every setting: KV bytes are the priced ones."""
    run_ = RunFolder.open(measured).read_run()
    priced = {(row["setting_id"], row["num_visual"]): row["kv_bytes"] for row in run_["prices"]}
    for row in RunFolder.open(measured).timings():
        assert row.kv_bytes == row.batch_size * priced[row.setting_id, row.num_visual]


def test_the_report_shows_the_tables(measured, capsys):
    assert reports_main([str(measured)]) == 0  # as any run folder
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    html = (measured / "report.html").read_text()
    assert "40 visual and 8 text tokens, batch 2" in html and "visor[self_layers=1]" in html
    assert "http" not in html.replace("http-equiv", "")
    assert said["timings.csv"].endswith("timings.csv") and "samples.parquet" not in said
    cells = json.loads((measured / "results.json").read_text())["cells"]
    assert len(cells) == 16
    visor = next(c for c in cells if c["method"] == "visor" and c["num_visual"] == 40)
    assert visor["saving_causal"] > 1 and visor["prefill_speed_up"]["num_rounds"] == 2
    assert visor["share_of_causal_saving"] == pytest.approx(
        visor["prefill_speed_up"]["median"] / visor["saving_causal"]
    )
    assert len((measured / "timings.csv").read_text().splitlines()) == 1 + 32


def test_the_same_command_measures_nothing_again_and_more_methods_only_add(measured, tiny, capsys):
    before = (measured / "timings.jsonl").read_text()
    assert run(tiny, measured, "--visual-tokens", "16,40", "--batch-sizes", "1,2", "--no-report") == 0
    assert (measured / "timings.jsonl").read_text() == before
    assert main(["--geometry", tiny, "--text-tokens", "9", "--new-tokens", "3", "--out", str(measured)]) == 2
    assert "holds another run (other text_tokens)" in capsys.readouterr().err


def test_conditions_are_recorded(measured):
    run_ = RunFolder.open(measured).read_run()
    assert run_["kind"] == "speed" and run_["modelled"] is None
    assert run_["machine"]["cores"] >= 1 and run_["machine"]["start"].keys() == run_["machine"]["end"].keys()
    assert run_["provenance"]["packages"]["torch"] and run_["config"]["dtype"] == "float32"


def test_without_the_device_the_roofline_speaks_and_says_so(tiny, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(tiny, out, "--visual-tokens", "40", "--device", "meta", "--roofline", "a100") == 0
    printed = capsys.readouterr()
    assert "MODELLED by the roofline" in printed.out
    assert json.loads(printed.out.splitlines()[-1])["modelled"] is True
    html = (out / "report.html").read_text()
    assert "Modelled, not measured." in html and "NVIDIA A100" in html
    geometry = load(tiny)
    for row in RunFolder.open(out).timings():
        assert row.modelled and row.cpu_prefill_ms is None and "roofline" in row.not_measured["cpu_prefill_ms"]
    dense_row = RunFolder.open(out).timings()[0]
    schedule = parse_settings(["dense"], [])[0].method.schedule(geometry, 40)
    expected = floors(geometry, schedule, 8, device("a100"), "bfloat16")
    assert dense_row.prefill_ms == expected["prefill"].ms and dense_row.decode_ms_per_token == expected["decode"].ms


@pytest.mark.slow
def test_a_process_of_its_own_for_each(tiny, tmp_path):
    out = tmp_path / "run"
    arguments = ["--geometry", tiny, "--visual-tokens", "16", "--methods", "dense,fastv", "--min-runs", "1",
                 "--min-seconds", "0", "--out", str(out), "--isolate"]  # fmt: skip
    assert main(arguments) == 0
    rows = RunFolder.open(out).timings()
    assert [row.setting_id for row in rows] == ["dense", "fastv"]


def test_settings():
    texts = split_methods("dense, visor[self_layers=2;cross_layers=1,4],fastv")
    assert texts == ["dense", "visor[self_layers=2;cross_layers=1,4]", "fastv"]
    labels = [setting.id for setting in parse_settings(texts, [0.5, 0.25])]
    assert labels == ["dense", "visor[self_layers=2;cross_layers=1,4]", "fastv@0.5", "fastv@0.25"]
    with pytest.raises(ValueError, match="no option 'selflayers'; its options, nearest first: self_layers"):
        parse_settings(["visor[selflayers=2]"], [])
    with pytest.raises(UnknownNameError, match="fastv"):
        parse_settings(["fastvv"], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--visual-tokens", "0"], "--visual-tokens takes different numbers of at least 1"),
        (["--device", "tpu"], "unknown device 'tpu'; the devices that exist"),
        (["--roofline", "b200"], "unknown device of the roofline 'b200'"),
        (["--methods", "dense,dense"], "different settings"),
        (["--geometry", "llava-onevision-70b"], "nearest first: llava-onevision-7"),
        (["--new-tokens", "1"], "new_tokens must be an integer of at least 2"),
    ],
)
def test_bad_requests(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("evaluations.speed_config.memory_bytes", lambda: 8 * 10**9)
    assert main(["--geometry", "llava-1.5-7b", "--out", str(tmp_path / "run")]) == 2
    assert "GB of weights, cpu has 8.0 GB of memory; try --dtype bfloat16, or --device meta" in capsys.readouterr().err


def test_random_models_have_the_geometry_they_are_made_from(tiny):
    """Counting back from the Hugging Face config gives the preset; names, window sizes and dtype aside."""
    from budgets.geometry import from_config

    for geometry in (load(tiny), preset("llava-onevision-0.5b"), preset("llava-1.5-7b")):
        assert from_config(hub_config(geometry), geometry.name) == geometry
    with pytest.raises(ValueError, match="are built for LLaVA and LLaVA-OneVision"):
        hub_config(preset("qwen2.5-vl-3b"))
    with pytest.raises(ValueError, match="has 576 visual tokens an image, always; got"):
        meta = build(preset("llava-1.5-7b"), "meta", "bfloat16")
        RandomModel(preset("llava-1.5-7b"), meta).sample(600, 8)


def test_noise_is_flagged(measured):
    opened = RunFolder.open(measured)
    table = tables(opened.read_run(), opened.timings())[0]
    restless = Spread(5, 10.0, 8.0, 12.0, 0.2)
    row = table.rows[0]
    object.__setattr__(row, "times", {**row.times, "prefill_ms": restless})
    object.__setattr__(row, "cpu_times", {})
    assert "Prefill" in row.noisy_stages
    assert configure(make_parser().parse_args([])).out.name == "speed-llava-onevision-0.5b-cpu"
