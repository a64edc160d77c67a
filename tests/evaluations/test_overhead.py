"""`python -m evaluations.overhead` on a tiny LLaVA: where each method's time goes, and what it is held against."""

import json

import pytest
import torch
from test_speed import TEXT, TOWER

from budgets import overhead as by_flops
from budgets.presets import load, preset
from budgets.registry import METHODS
from evaluations.overhead import configure, main, make_parser
from evaluations.overhead_job import Pass, settings, shares
from evaluations.random_model import RandomModel

PLACE = {
    "fastv": {"decoder"}, "dart": {"decoder"}, "pyramiddrop": {"decoder"}, "sparsevlm": {"decoder"},
    "sparsevlm-v2": {"decoder"},
    "flowcut": {"tower"}, "tome": {"tower"},
    "visionzip": {"tower", "features"}, "hired": {"tower", "features"}, "prumerge": {"tower", "features"},
    "prumerge+": {"tower", "features"}, "fastervlm": {"tower", "features"}, "vispruner": {"tower", "features"},
    "divprune": {"features"}, "cdpruner": {"features"}, "random": {"features"}, "pooling": {"features"},
    "pooling_by": {"features"}, "downsample": {"features"}, "visor_tr2": {"features"}, "visor_tr4": {"features"},
    "dense": set(), "visor": set(), "vtw": set(), "blind": set(),  # nothing is chosen
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A LLaVA of 12 decoder layers whose image has 256 visual tokens: more than any method keeps by default."""
    path = tmp_path_factory.mktemp("tiny") / "config.json"
    text = {**TEXT, "num_hidden_layers": 12, "num_key_value_heads": 4, "model_type": "llama"}
    tower = {**TOWER, "num_hidden_layers": 4, "image_size": 224, "model_type": "clip_vision_model"}
    path.write_text(json.dumps({"model_type": "llava", "text_config": text, "vision_config": tower}))
    return str(path)


def run(tiny, *more):
    return main(["--geometry", tiny, "--visual-tokens", "256", "--text-tokens", "9", "--rounds", "2", *more])


def said(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("measured") / "overhead.json"
    threads = torch.get_num_threads()
    assert run(tiny, "--layers", "4", "--out", str(out)) == 0
    assert torch.get_num_threads() == threads
    return json.loads(out.read_text())


def test_every_method_takes_its_time_where_it_chooses(measured):
    rows = {row["method"]: row for row in measured["methods"]}
    assert rows.keys() == set(METHODS.names())
    assert "m3_sides" in rows.pop("m3")["reason"]
    assert {name: {place for place, ms in row["scoring_ms"].items() if ms} for name, row in rows.items()} == PLACE


def test_the_raw_values_say_what_the_table_says(measured):
    assert measured["layers"] == 4 and measured["layers_of_model"] == 12 and measured["rounds"] == 2
    assert measured["machine"]["start"] and measured["packages"]["torch"]
    dense = measured["passes"]["dense"]
    row = next(row for row in measured["methods"] if row["method"] == "sparsevlm")
    ratios = [
        sum(own["scoring_ms"].values()) / (3 * full["prefill_ms"])  # 12 layers of which 4 ran
        for own, full in zip(measured["passes"]["sparsevlm"], dense, strict=True)
    ]
    assert row["share"]["median"] == pytest.approx(sum(ratios) / 2) and row["share"]["num_rounds"] == 2
    assert row["is_large"] == (row["share"]["median"] > 0.05)
    assert all(each["prefill_ms"] is None for each in measured["passes"]["visionzip"])  # chosen before the prefill


def test_the_flops_are_those_of_all_layers(measured, tiny):
    table = {row["method"]: row for row in by_flops.rows(load(tiny), 256, 9, None)}
    for row in measured["methods"]:
        if "reason" not in row:
            assert row["flops_share"] == table[row["method"]]["scoring_relative_to_dense"]
            assert row["options"] == table[row["method"]]["options"]


def test_four_layers_of_a_7b_model_stand_for_all():
    """By FLOPs nothing that is scored depends on how many layers follow, so the time may be held against all 32."""
    options = make_parser().parse_args(["--layers", "4", "--device", "meta"])
    whole, config = configure(options)
    assert whole == preset("llava-1.5-7b") and config.geometry.num_layers == 4
    rows = by_flops.rows(whole, 576, 64, None)
    kept, reasons = settings(config, rows)
    assert (
        kept[0].id == "dense"
        and {each.id for each in kept} == set(METHODS.names()) - {"m3"}
        and reasons.keys() == {"m3"}
    )
    other = [{**row, "scoring_flops": row["scoring_flops"] + (row["method"] == "fastv")} for row in rows]
    _, reasons = settings(config, other)
    assert reasons["fastv"] == "scores otherwise in 4 layers; choose more --layers"


def test_too_few_layers_leave_methods_out(tiny, capsys):
    assert run(tiny, "--layers", "2", "--methods", "pyramiddrop,divprune") == 0
    rows = {row["method"]: row for row in said(capsys)["methods"]}
    assert "do not fit into 2 decoder layers" in rows["pyramiddrop"]["reason"]
    assert rows["divprune"]["scoring_ms"]["features"] > 0 and "dense" not in rows


def test_shares():
    scoring = {"tower": 2.0, "features": 0.0, "decoder": 3.0}
    nothing = dict.fromkeys(scoring, 0.0)
    passes = {"dense": [Pass(10.0, 12.5, nothing)] * 2, "a": [Pass(15.0, None, scoring)] * 2}
    row = {"title": "A", "options": {}, "scoring_relative_to_dense": 0.01}
    table = [{"method": "a", **row}, {"method": "absent", **row}]
    (share,) = shares(passes, table, 8.0)
    assert share.share.median == pytest.approx(0.05) and share.tower.median == 1.5 and share.flops_share == 0.01
    assert not share.is_large and "more than" not in share.line()
    (share,) = shares(passes, table[:1], 7.9)
    assert share.is_large and share.line().endswith("more than 5%")


def test_the_tower_runs_once_a_round_for_all_that_see_the_same(tiny, monkeypatch, capsys):
    seen, encode = [], RandomModel.encode

    def counted(self, prepared, taps, *more):
        seen.append(frozenset(taps))
        return encode(self, prepared, taps, *more)

    monkeypatch.setattr(RandomModel, "encode", counted)
    assert run(tiny, "--layers", "4", "--methods", "fastv,random,divprune,fastervlm,vispruner") == 0
    assert sorted(map(len, seen)) == [0, 0, 0, 1, 1]  # the warm-up; and twice nothing and the salience
    rows = {row["method"]: row for row in said(capsys)["methods"]}
    assert rows["fastervlm"]["scoring_ms"]["tower"] == rows["vispruner"]["scoring_ms"]["tower"] > 0


def test_a_run_that_is_stopped_leaves_its_rounds(tiny, monkeypatch, tmp_path):
    from evaluations.overhead_job import Round

    out, runs, once = tmp_path / "overhead.json", [], Round.run

    def stopped(self, schedule):
        runs.append(schedule)
        if len(runs) > 4:  # the warm-up, a round of two, and the first of the next
            raise KeyboardInterrupt
        return once(self, schedule)

    monkeypatch.setattr(Round, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, "--layers", "4", "--methods", "divprune", "--out", str(out))
    assert json.loads(out.read_text())["rounds"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0"], "layers, got 0"),
        (["--layers", "13"], "--layers takes 1 to 12"),
        (["--rounds", "0"], "--rounds and --threads must be at least 1, got 0 and 1"),
        (["--threads", "0"], "--rounds and --threads must be at least 1, got 2 and 0"),
        (["--methods", "fastvv"], "fastv"),
        (["--device", "meta"], "nothing runs on the device meta, and a time cannot be modelled"),
        (["--text-tokens", "0"], "--text-tokens takes"),
        (["--visual-tokens", "255"], "has 256 visual tokens an image, always"),
    ],
)
def test_bad_requests(tiny, arguments, message, capsys):
    assert run(tiny, *arguments) == 2
    assert message in capsys.readouterr().err
