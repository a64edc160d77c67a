"""Choosing tokens is cheap beside what it saves: at 576 visual tokens of LLaVA-1.5-7B, by FLOPs."""

import json
from dataclasses import replace

from budgets.overhead import LARGE, main, rows
from budgets.presets import preset
from budgets.registry import METHODS


def test_every_method_scores_for_under_five_percent():
    table = rows(preset("llava-1.5-7b"), 576, 64, None)
    assert [row["method"] for row in table] == METHODS.names()
    for row in table:
        assert "reason" not in row, row
        assert row["scoring_relative_to_dense"] < LARGE, row
        assert row["decoder_prefill_relative_to_dense"] <= 1


def test_what_is_large_or_cannot_be_had_is_said():
    table = {row["method"]: row for row in rows(preset("llava-onevision-0.5b"), 729, 64, 0.25)}
    assert all("reason" in table[name] for name in ("tome", "flowcut", "downsample"))
    assert not table["hired"]["is_large"]
    # One text token and one layer's worth of decoder: the tower's scores weigh more than the little they save.
    small = replace(preset("llava-onevision-0.5b"), num_layers=4, hidden_size=64, intermediate_size=64)
    assert next(iter(rows(small, 729, 1, 0.9, ["hired"])))["is_large"]


def test_scoring_is_free_where_nothing_is_scored():
    table = {row["method"]: row for row in rows(preset("llava-1.5-7b"), 576, 64, 0.5)}
    for name in ("dense", "random", "pooling", "downsample", "vtw", "blind", "visor"):
        assert table[name]["scoring_flops"] == 0
    assert table["tome"]["tower_relative_to_dense"] < 1 and table["random"]["tower_relative_to_dense"] == 1


def test_the_command_prints_a_table_and_one_document(capsys):
    assert main(["--methods", "fastv,divprune", "--budget", "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].startswith("fastv") and lines[4].startswith("divprune")
    assert json.loads(lines[-1])["methods"][0]["scoring_flops"] > 0
    assert main(["--model", "no-such-model"]) == 2
    assert "no-such-model" in capsys.readouterr().err
