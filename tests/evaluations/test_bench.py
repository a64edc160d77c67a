"""`make bench`: ratios with their targets, things compared in turns, and an exit status that follows."""

import json

import pytest
import torch
from test_speed import FEATURES, TEXT, TOWER

from budgets.presets import load
from evaluations import bench
from evaluations.noise import Ratio


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "config.json"
    config = {"model_type": "llava_onevision", "text_config": TEXT, "vision_config": TOWER, **FEATURES}
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(
    ("low", "median", "high", "at_most", "verdict"),
    [
        (0.96, 0.98, 1.00, True, "met"),
        (0.96, 1.05, 1.10, True, "within noise"),
        (1.03, 1.05, 1.10, True, "MISSED"),
        (1.03, 1.05, 1.10, False, "met"),
        (0.90, 0.99, 1.10, False, "within noise"),
        (0.90, 0.95, 0.99, False, "MISSED"),
    ],
)
def test_a_target_is_missed_by_more_than_the_noise_or_not_at_all(low, median, high, at_most, verdict):
    promise = bench.Promise("x", Ratio(5, median, low, high), 1.02 if at_most else 1.0, at_most)
    assert promise.verdict == verdict and promise.is_missed == (verdict == "MISSED")
    assert verdict in promise.line()


def test_every_round_runs_everything_once_and_begins_elsewhere():
    order = []
    items = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = bench.interleaved(items, 3)
    assert "".join(order) == "abcbcacab"
    assert all(len(values) == 3 for values in seconds.values())


def test_the_engine_part(tiny, tmp_path, capsys):
    threads = torch.get_num_threads()
    out = tmp_path / "bench.json"
    status = bench.main(["--only", "prefill,decode", "--geometry", tiny, "--visual-tokens", "16,32", "--rounds", "2",
                         "--out", str(out)])  # fmt: skip
    written = json.loads(out.read_text())
    assert status == (1 if written["missed"] else 0)
    names = [promise["name"] for promise in written["promises"]]
    assert len(names) == 2 * 3 + 1 and names[-1] == "dense decode / transformers, 16 visual tokens"
    rounds = {name: len(values) for name, values in written["processor_seconds"].items()}
    assert all(n == 2 * (bench.DECODE_REPEATS if " decode" in name else 1) for name, n in rounds.items()), rounds
    assert written["machine"]["start"] and written["packages"]["torch"] and torch.get_num_threads() == threads
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["missed"] == written["missed"] and said["ratios"].keys() == set(names)


def test_decoding_leaves_the_cache_as_it_was(tiny):
    engine = bench.Engine(load(tiny), "float32")
    for schedule in (None, bench.dense(6, 16)):
        cache = engine.prefill(schedule, 16)
        before = cache.get_seq_length()
        engine.decode(cache, schedule)
        assert cache.get_seq_length() == before


def test_the_sweep_part_compares_twelve_runs_with_one_of_the_same_cells():
    asked = []

    def spent(arguments):
        asked.append(dict(zip(arguments[::2], arguments[1::2], strict=True)))
        return 10.0 if "," not in asked[-1]["--methods"] else 48.0

    promises, seconds = bench.bench_sweep("dense-tiny", 4, 2, spent)
    assert seconds == {"12 runs": [120.0, 120.0], "sweep of 12 cells": [48.0, 48.0]}
    assert promises[0].ratio.median == 0.4 and not promises[0].is_missed
    whole = [each for each in asked if "," in each["--methods"]]
    cells = {(e["--tasks"], e["--methods"], e["--budgets"]) for e in asked if "," not in e["--methods"]}
    assert len(cells) == 12 and len(whole) == 2
    count = lambda name: whole[0][name].count(",") + 1
    assert count("--tasks") * count("--methods") * count("--budgets") == 12
    assert len({each["--out"] for each in asked[:12]}) == 12  # nothing is continued


def test_the_questions_part():
    promises, seconds = bench.bench_questions("dense-tiny", 1, 4)
    assert promises[0].name.startswith("4 questions, batch 16 / ") and promises[0].target == 0.5
    assert len(seconds) == 2 and all(len(each) == 1 and each[0] > 0 for each in seconds.values())


def test_the_harness_part():
    promises, seconds = bench.bench_harness("dense-tiny", 4, 1)
    assert promises[0].name.startswith("harness") and set(seconds) == {"bare loop", "sweep of one cell"}


def test_bad_requests(capsys):
    assert bench.main(["--only", "prefil"]) == 2
    assert "--only takes some of prefill, decode, harness, questions, sweep, got 'prefil'" in capsys.readouterr().err
    assert bench.main(["--rounds", "0"]) == 2
