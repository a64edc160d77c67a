"""Run folders: what is written can be read, and a kill costs at most the torn line."""

import json
import random

import pytest

from evaluations.records import (
    JsonLines,
    Manifest,
    RecordsError,
    RunFolder,
    SampleRecord,
    TimingRecord,
    pack_bits,
    setting_id,
    unpack_bits,
)


def sample(i=0, **changes):
    return SampleRecord(
        **{
            "sample_id": f"s{i}", "image_id": f"i{i}", "question": 'what "is" it?\n<script>', "references": ["ä", "b"],
            "answer": "ü\u2028", "score": 1.0, "difficulty": 1, "grid": [2, 3], "flops": {"tower": 10**15}, **changes,
        }
    )  # fmt: skip


def manifest(key="abc", **changes):
    return Manifest(
        **{
            "key": key, "method": "fastv", "title": "FastV", "params": {"layer": 2, "keep": [3, 9]}, "trained": False,
            "budget": 0.5, "policy": None, "suite": "smoke", "task": "forms", "metric": "anls", "num_samples": 3,
            "num_failed": 0, "status": "ok", "error": None, "seconds": 1.5, "setting_id": "fastv@0.5", **changes,
        }
    )  # fmt: skip


def test_samples_come_back_as_written(tmp_path):
    folder = RunFolder(tmp_path)
    records = [sample(i) for i in range(5)]
    folder.samples_file("k").append(r.to_dict() for r in records)
    assert folder.samples("k") == records
    assert folder.samples("another") == []


@pytest.mark.parametrize("cut", [1, 7, 30])
def test_a_torn_last_line_is_dropped_and_cut_before_the_next_append(tmp_path, cut):
    file = RunFolder(tmp_path).samples_file("k")
    file.append([sample(0).to_dict(), sample(1).to_dict()])
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-cut])
    assert [r["sample_id"] for r in file.read()] == ["s0"]
    file.drop_torn_line()
    file.append([sample(1).to_dict()])
    assert file.path.read_bytes() == whole


def test_a_broken_line_that_is_not_the_last_is_an_error_naming_file_and_line(tmp_path):
    file = JsonLines(tmp_path / "samples.jsonl")
    file.path.write_text('{"a":1}\n{"a":\n{"a":3}\n')
    with pytest.raises(RecordsError, match=r"samples.jsonl, line 2"):
        list(file.read())


def test_cut_keeps_the_first_records(tmp_path):
    file = JsonLines(tmp_path / "x.jsonl")
    file.cut(3)  # no file yet: nothing to cut
    file.append({"n": n} for n in range(5))
    file.cut(2)
    assert [r["n"] for r in file.read()] == [0, 1]
    file.cut(9)
    assert [r["n"] for r in file.read()] == [0, 1]


def test_a_value_that_json_cannot_hold_is_refused(tmp_path):
    file = JsonLines(tmp_path / "x.jsonl")
    with pytest.raises(ValueError):
        file.append([{"n": float("nan")}])
    assert not file.path.exists()


def test_a_cell_without_manifest_is_not_done(tmp_path):
    folder = RunFolder(tmp_path)
    folder.samples_file("k").append([sample().to_dict()])
    assert folder.manifest("k") is None and folder.manifests() == []
    folder.write_manifest(manifest("k"))
    assert folder.manifest("k") == manifest("k")
    assert [m.key for m in folder.manifests()] == ["k"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_manifests_stand_in_the_order_of_the_run(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_run({"cells": ["z", "a"]})
    for key in ("a", "m", "z"):
        folder.write_manifest(manifest(key))
    assert [m.key for m in folder.manifests()] == ["z", "a", "m"]


def test_open_refuses_what_is_no_run_folder(tmp_path):
    with pytest.raises(RecordsError, match="no run folder"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RecordsError, match="run.json is not valid JSON"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(RecordsError, match="schema 99"):
        RunFolder.open(tmp_path)
    RunFolder(tmp_path).write_run({"command": "x"})
    assert RunFolder.open(tmp_path).read_run() == {"schema_version": 1, "command": "x"}


def test_timings_come_back_as_written(tmp_path):
    row = TimingRecord("dense", "dense", 1.0, None, 1, 0, 30, 144, 8, 5.0, None, 9.0, 1.5, 30.0, 17.0, None, None,
                       "cpu", {"scoring_ms": "this method scores nothing"})  # fmt: skip
    folder = RunFolder(tmp_path)
    folder.timings_file.append([row.to_dict()])
    assert folder.timings() == [row]


@pytest.mark.parametrize("num_visual", [1, 7, 8, 9, 144, 577])
def test_masks_survive_packing(num_visual):
    kept = [random.Random(num_visual + i).random() < 0.3 for i in range(num_visual)]
    assert unpack_bits(pack_bits(kept), num_visual) == kept
    with pytest.raises(RecordsError):
        unpack_bits(pack_bits(kept), num_visual + 8)
    assert pack_bits(None) is None


def test_setting_ids():
    assert setting_id("dense", 1.0) == setting_id("dense") == "dense"
    assert setting_id("fastv", 0.5) == "fastv@0.5"
    assert setting_id("visor", None, "router") == "visor:router"


def test_one_writer_at_a_time(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.locked():
        with pytest.raises(RecordsError, match="another process"):
            with RunFolder(tmp_path).locked():
                pass
    with folder.locked():
        pass


def test_an_image_is_written_once(tmp_path):
    from PIL import Image

    folder = RunFolder(tmp_path)
    folder.save_image("a", Image.new("RGB", (4, 4), "red"))
    folder.save_image("a", Image.new("RGB", (4, 4), "blue"))
    with Image.open(folder.image_path("a")) as image:
        assert image.convert("RGB").getpixel((0, 0)) == (255, 0, 0)


def test_a_manifest_has_a_known_status():
    with pytest.raises(RecordsError, match="status"):
        manifest(status="fine")
