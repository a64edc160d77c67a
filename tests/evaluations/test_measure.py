"""The timing pass: its sample list, its turns, what it keeps and what it says it cannot measure."""

import time
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeModel, make_config
from test_sweep import run

from evaluations.batches import plan_task
from evaluations.cells import make_plan
from evaluations.measure import TimingPass, synchroniser, timed, timing_samples
from evaluations.memory import ResidentMemory, measure_memory, resident_bytes, weights_bytes
from evaluations.models import Models
from evaluations.records import RunFolder
from evaluations.settings import Planner
from evaluations.suite import TimingPlan
from visor.engine.stopwatch import scoring

pytestmark = pytest.mark.usefixtures("with_fake_tasks")
PLAN = TimingPlan(num_samples=2, throughput_batch=3, new_tokens=5, min_runs=4, min_seconds=0, max_runs=4)


class Silent:
    def advance(self, units=1, detail=""):
        pass

    say = print


def make_pass(tmp_path, timing=PLAN, model=None, methods=("dense", "fastv", "pooling")):
    from budgets.registry import TASKS

    config, model = make_config(tmp_path / "run", methods=methods), model or FakeModel()
    planner = Planner(model.geometry, config.dtype)
    tasks = [plan_task(n, TASKS.get(n)(), TASKS.get(n)().samples(6), 4, model) for n in ("fake_a", "fake_b")]
    plan = make_plan(config, tasks, planner, Models(model))
    return TimingPass(model, plan, planner, RunFolder(tmp_path / "run"), timing)


def test_every_setting_is_measured_in_turns_and_every_run_is_kept(tmp_path):
    timing = make_pass(tmp_path)
    assert timing.run(timing.pending(), Silent()) == {}
    rows = timing.folder.timings()
    settings = ["dense", "fastv@0.5", "pooling@0.5"]
    for size in (1, 3):
        ids = [row.setting_id for row in rows if row.batch_size == size]
        assert len(ids) == 3 * PLAN.min_runs
        for start in range(0, len(ids), 3):
            assert sorted(ids[start : start + 3]) == settings  # a round measures each once
        assert {ids[0], ids[3], ids[6]} == set(settings)  # and each comes first in turn
        assert ids[:3] != ids[3:6]
    assert {row.round for row in rows} == set(range(PLAN.min_runs))


def test_rows_say_what_was_measured(tmp_path):
    timing = make_pass(tmp_path)
    timing.run(timing.pending(), Silent())
    by_round = defaultdict(set)
    for row in timing.folder.timings():
        assert row.num_new_tokens == 5 and row.num_visual == 144 and row.device == "cpu"
        assert row.prefill_ms > 0 and row.cpu_prefill_ms >= 0
        assert row.end_to_end_ms == pytest.approx(row.tower_ms + row.prefill_ms + 4 * row.decode_ms_per_token)
        assert row.scoring_ms == 0.0  # this model never chooses a token
        assert row.kv_bytes is None and "does not show its cache" in row.not_measured["kv_bytes"]
        assert row.cpu_end_to_end_ms >= row.cpu_prefill_ms + row.cpu_tower_ms
        assert row.peak_memory_bytes - row.peak_memory_without_weights_bytes == 20 * 4
        by_round[row.batch_size, row.round].add(row.num_text)
    assert all(len(lengths) == 1 for lengths in by_round.values())  # all settings see the same samples in a round


def test_the_towers_work_is_never_taken_from_a_cache(tmp_path):
    timing = make_pass(tmp_path, methods=("dense",))
    timing.run(timing.pending(), Silent())
    runs = PLAN.min_runs + 2  # warm-up, memory
    assert len(timing.loaded.encoded) == runs * 1 + runs * 3


def test_only_what_is_missing_is_measured(tmp_path):
    timing = make_pass(tmp_path, methods=("dense",))
    timing.run(timing.pending(), Silent())
    again = make_pass(tmp_path, methods=("dense", "fastv"))
    assert {size: [s.id for s in settings] for size, settings in again.pending().items()} == {
        1: ["fastv@0.5"],
        3: ["fastv@0.5"],
    }


def test_a_setting_that_fails_does_not_stop_the_others(tmp_path):
    model = FakeModel()
    model.fails_on = lambda schedule: any(op.reduce for op in schedule.layers)
    timing = make_pass(tmp_path, model=model)
    failed = timing.run(timing.pending(), Silent())
    assert failed == {"fastv@0.5": "RuntimeError: the kernel exploded"}
    assert {row.setting_id for row in timing.folder.timings()} == {"dense", "pooling@0.5"}


def test_minimum_runs_and_seconds(tmp_path):
    plan = TimingPlan(num_samples=1, throughput_batch=1, new_tokens=2, min_runs=2, min_seconds=0.03, max_runs=500)
    timing = make_pass(tmp_path, plan, methods=("dense",))
    timing.run(timing.pending(), Silent())
    rows = timing.folder.timings()
    assert len(rows) >= 2 and sum(row.end_to_end_ms for row in rows) >= 30
    assert sum(row.end_to_end_ms for row in rows[:-1]) < 30


def test_timed_samples_have_different_images_of_all_tasks(tmp_path):
    timing = make_pass(tmp_path)
    samples = timing_samples(timing.plan, TimingPlan(num_samples=4, throughput_batch=5))
    assert len(samples) == 5 == len({sample.image_id for sample in samples})
    assert {sample.task for sample in samples[:2]} == {"fake_a", "fake_b"}
    # Six images in all: a batch of 40 shrinks to them, and the rows would say 6.
    wide = make_pass(tmp_path, TimingPlan(throughput_batch=40))
    assert wide.batch_sizes == [1, 6]


def test_no_timing_leaves_no_rows(tmp_path):
    run(make_config(tmp_path / "run", timing=False))
    assert RunFolder(tmp_path / "run").timings() == []


def test_timed_gives_wall_and_processor_time():
    result, sleeping = timed(lambda: time.sleep(0.02) or 7, lambda: None)
    assert result == 7 and sleeping.wall_ms >= 20 and sleeping.cpu_ms < 15
    _, working = timed(lambda: [hash(str(i)) for i in range(100_000)], lambda: None)
    assert working.cpu_ms > 5


@pytest.mark.skipif(resident_bytes() is None, reason="this system does not tell the resident memory of a process")
@pytest.mark.parametrize("can_reset", [True, False])
def test_a_passing_allocation_shows_in_the_peak(monkeypatch, can_reset):
    if not can_reset:
        monkeypatch.setattr("evaluations.memory._reset_high_water_mark", lambda: False)
    with ResidentMemory() as memory:
        block = np.ones(64 << 17)  # 64 MiB
        time.sleep(0.02)
        del block
    assert 60 << 20 < memory.growth_bytes < 80 << 20
    with ResidentMemory() as memory:
        pass
    assert memory.growth_bytes < 4 << 20  # the earlier peak is forgotten


def test_memory_that_cannot_be_measured_says_why(monkeypatch):
    assert measure_memory(lambda: None, "mps", 5).reason == "peak memory is not measured on mps"
    monkeypatch.setattr("evaluations.memory.resident_bytes", lambda: None)
    peak = measure_memory(lambda: None, "cpu", 5)
    assert peak.total_bytes is None and "does not tell" in peak.reason


def test_tied_weights_count_once():
    layer = torch.nn.Linear(4, 4, bias=False)
    assert weights_bytes(torch.nn.Sequential(layer, layer)) == 64


@pytest.mark.parametrize("change", [{"new_tokens": 1}, {"min_runs": 0}, {"max_runs": 1}, {"min_seconds": -1}])
def test_a_timing_plan_must_make_sense(change):
    with pytest.raises(ValueError, match="timing"):
        TimingPlan(**change)


class Chooser(FakeModel):
    """Takes 5 ms to choose tokens in the tower and 10 ms in the prefill."""

    def encode(self, prepared, taps, image_scale):
        with scoring("tower"):
            time.sleep(0.005)
        return super().encode(prepared, taps, image_scale)

    def prefill(self, prepared, vision, schedules, num_new_tokens):
        with scoring("features"):
            time.sleep(0.01)
        super().prefill(prepared, vision, schedules, num_new_tokens)
        layer = SimpleNamespace(keys=torch.zeros(2, 3), values=torch.zeros(2, 3))
        return [SimpleNamespace(cache=SimpleNamespace(layers=[layer, layer]))]


def test_choosing_tokens_is_timed_apart_wherever_it_happens(tmp_path):
    timing = make_pass(tmp_path, model=Chooser(), methods=("dense",))
    timing.run(timing.pending(), Silent())
    for row in timing.folder.timings():
        assert 15 <= row.scoring_ms <= row.tower_ms + row.prefill_ms
        assert row.tower_ms >= 5 and row.prefill_ms >= 10  # it stays a part of both
        assert row.kv_bytes == 2 * 2 * 6 * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_time_is_the_devices():
    synchronise = synchroniser("cuda")
    x = torch.ones(4096, 4096, device="cuda")
    _, clock = timed(lambda: [x @ x for _ in range(20)], synchronise)
    assert clock.wall_ms > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_memory_is_what_torch_allocated():
    peak = measure_memory(lambda: torch.zeros(1 << 20, device="cuda"), "cuda", 0)
    assert peak.without_weights_bytes == 4 << 20
