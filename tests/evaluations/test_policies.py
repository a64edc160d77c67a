"""Policies in a sweep: what is run, what is derived from it, that it says what running it would have said."""

import json
from dataclasses import replace

import numpy as np
import pytest
from fakes import CONFIGURATIONS, VISOR, FakeModel, make_config, make_task
from test_sweep import contents

from budgets import policies
from budgets.schedule import LayerMode
from evaluations.batches import Lengths, plan_task
from evaluations.job import execute
from evaluations.models import Models, checkpoint_for
from evaluations.policies import Table
from evaluations.records import RunFolder
from evaluations.settings import Planner

pytestmark = pytest.mark.usefixtures("with_fake_tasks")
ALL = ["fixed", "per-task", "router", "cascade", "random", "oracle"]
OPTIONS = dict(methods=("dense", "visor"), visor=True, policies=ALL, cost_weights=[0.5], thresholds=[0.6])


def run(config, **options):
    """(exit status, base, VISOR checkpoint)."""
    base, visor = FakeModel(), FakeModel(visor=VISOR)
    load = lambda each: visor if each.model.endswith("visor") else base
    status = execute(config, "test", report=False, load=load, **options)
    return status, base, visor


@pytest.fixture(scope="module")
def swept(with_fake_tasks, tmp_path_factory):
    out = tmp_path_factory.mktemp("policies") / "run"
    status, base, visor = run(make_config(out, timing=False, **OPTIONS))
    assert status == 0
    return out, base, visor


def manifests(out, task="fake_a"):
    return {m.setting_id: m for m in RunFolder(out).manifests() if m.task == task}


def records(out, setting, task="fake_a"):
    return {r.sample_id: r for r in RunFolder(out).samples(manifests(out, task)[setting].key)}


def table(out, task="fake_a"):
    rows = [records(out, f"visor:fixed({i})", task) for i in range(4)]
    return Table({i: tuple(row[i] for row in rows) for i in rows[0]}, {})


def test_only_the_configurations_are_run_and_only_on_their_checkpoint(swept):
    out, base, visor = swept
    num_test, num_validation = 10 + 6, 10 + 6
    assert base.generated == num_test  # dense
    assert visor.generated == 4 * (num_test + num_validation) and visor.routed == num_test + num_validation
    assert len({key for key, _ in visor.encoded} & {key for key, _ in base.encoded}) == 0, "one tower, one look"
    found = manifests(out)
    assert set(found) == {"dense", "visor@0.5", "visor:router", "visor:router(0.5)", "visor:cascade(0.6)",
                          "visor:random", "visor:oracle", "visor:per-task",
                          *(f"visor:fixed({i})" for i in range(4))}  # fmt: skip
    assert all(m.status == "ok" and m.trained for i, m in found.items() if i != "dense")
    assert found["visor:fixed(2)"].params == {"configuration": 2, "self_layers": "4,7", "cross_layers": "0,3,6,9"}
    assert found["visor:router"].params == {"cost_weight": None}
    assert found["visor:router(0.5)"].params == {"cost_weight": 0.5} and found["visor:router"].policy == "router"
    assert found["visor:random"].params == {"matches": "router"}
    assert [each["self_layers"] for each in found["visor:oracle"].configurations] == ["", "4", "4,7", "1,4,7,10"]


def test_a_derived_record_is_the_chosen_configurations(swept):
    out, *_ = swept
    source = table(out)
    for setting in ("visor:router", "visor:oracle", "visor:random", "visor:per-task", "visor@0.5"):
        for sample_id, record in records(out, setting).items():
            original = source.records[sample_id][record.configuration]
            router = 0 if "router" not in setting else VISOR.router_flops
            assert (record.answer, record.score, record.visual_tokens) == (
                original.answer, original.score, original.visual_tokens,
            )  # fmt: skip
            assert record.decoder_flops == original.decoder_flops + router
            assert record.flops["router"] == router and record.routing is None
            assert sum(record.layer_flops) + router == record.decoder_flops


def test_each_policy_chooses_as_it_says(swept):
    out, *_ = swept
    source = table(out)
    chosen = lambda setting: [records(out, setting)[i].configuration for i in source.ids]
    assert chosen("visor:oracle") == policies.oracle(source.scores, source.costs).tolist()
    assert chosen("visor:router") == source.logits.argmax(1).tolist()
    success = policies.success(source.logits)
    assert chosen("visor:router(0.5)") == (success - 0.5 * source.relative_costs).argmax(1).tolist()
    validation = Table.read(RunFolder(out), [c for c in _cells(out, "fake_a@validation")])
    best = policies.best_per_task(validation.scores, validation.costs, ["a"] * len(validation.ids))["a"]
    assert set(chosen("visor:per-task")) == {best}


def _cells(out, task):
    """Stand-ins of the cells of the configurations on a split."""
    from types import SimpleNamespace

    found = manifests(out, task)
    return [SimpleNamespace(key=found[f"visor:fixed({i})"].key, setting=None, task=None) for i in range(4)]


def test_random_deals_out_the_routers_choices_over_the_suite(swept):
    out, *_ = swept
    count = lambda setting: np.bincount(
        [r.configuration for task in ("fake_a", "fake_b") for r in records(out, setting, task).values()], minlength=4
    )
    assert count("visor:random").tolist() == count("visor:router").tolist()
    order = lambda setting: [r.configuration for r in records(out, setting).values()]
    assert order("visor:random") != order("visor:router")


def test_a_cascade_pays_for_every_attempt(swept):
    out, *_ = swept
    source = table(out)
    rungs = policies.ladder(source.costs.mean(0))
    climbed = 0
    for sample_id, record in records(out, "visor:cascade(0.6)").items():
        row = source.records[sample_id]
        attempts = record.attempts or [record.configuration]
        assert attempts == rungs[: len(attempts)] and attempts[-1] == record.configuration
        assert all(row[i].confidence < 0.6 for i in attempts[:-1])
        assert record.configuration == rungs[-1] or row[record.configuration].confidence >= 0.6
        assert record.decoder_flops == sum(row[i].decoder_flops for i in attempts)
        assert record.flops["tower"] == row[0].flops["tower"]
        climbed += len(attempts) > 1
    assert 0 < climbed < 10, "the test must see both"


def test_a_budget_takes_the_dearest_configuration_within_it(swept):
    out, *_ = swept
    source = table(out)
    for sample_id, record in records(out, "visor@0.5").items():
        costs = [r.decoder_flops / r.dense_decoder_flops for r in source.records[sample_id]]
        within = [i for i, cost in enumerate(costs) if cost <= 0.5]
        assert record.configuration == max(within, key=lambda i: costs[i])


def test_the_same_command_again_does_nothing_and_more_policies_only_add(swept, tmp_path):
    out, *_ = swept
    before = contents(out)
    status, base, visor = run(make_config(out, timing=False, **OPTIONS))
    assert (status, base.generated, visor.generated, visor.routed) == (0, 0, 0, 0) and contents(out) == before
    fewer = tmp_path / "run"
    run(make_config(fewer, timing=False, **{**OPTIONS, "policies": ["oracle"]}))
    status, base, visor = run(make_config(fewer, timing=False, **OPTIONS))
    assert status == 0 and base.generated == 0 and visor.generated == 4 * 16  # the validation splits
    assert contents(fewer)[0] == contents(out)[0]


def test_a_failed_configuration_fails_what_is_derived_from_it(tmp_path, capsys):
    out = tmp_path / "run"
    config = make_config(out, timing=False, **{**OPTIONS, "policies": ["oracle"]})
    base, visor = FakeModel(), FakeModel(visor=VISOR)
    visor.fails_on = lambda schedule: len(schedule.layers_in(LayerMode.SELF)) == 2
    assert execute(config, "t", report=False, load=lambda c: visor if c.model.endswith("visor") else base) == 1
    found = manifests(out)
    assert found["visor:oracle"].status == "failed" and "visor:fixed(2) on fake_a has no" in found["visor:oracle"].error
    assert found["visor:fixed(1)"].status == "ok"
    assert run(config)[0] == 0 and manifests(out)["visor:oracle"].status == "ok"


def test_timing_runs_routers_and_leaves_out_what_is_composed(tmp_path):
    out = tmp_path / "run"
    assert run(make_config(out, **OPTIONS))[0] == 0
    timed = {row.setting_id for row in RunFolder(out).timings()}
    assert {"dense", "visor:fixed(0)", "visor@0.5", "visor:router", "visor:router(0.5)"} <= timed
    assert not timed & {"visor:oracle", "visor:random", "visor:per-task", "visor:cascade(0.6)"}


def test_dry_run_counts_what_is_derived(tmp_path, capsys):
    status, base, visor = run(make_config(tmp_path / "run", **OPTIONS), dry_run=True)
    out = capsys.readouterr().out
    assert status == 0 and base.generated == visor.generated == 0
    last = json.loads(out.splitlines()[-1])
    assert (last["cells"], last["derived"]) == (2 * 12 + 2 * 4, 2 * 7)
    assert "by sample" in out and "fake_a@validation" in out


def test_what_cannot_be_had_is_refused_with_its_reason(tmp_path, capsys):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match="no method of this run has configurations to choose from"):
        run(make_config(out, methods=("dense", "fastv"), policies=["oracle"]))
    no_router = FakeModel(visor=replace(VISOR, router=()))
    load = lambda c: no_router if c.model.endswith("visor") else FakeModel()
    config = make_config(out, timing=False, **{**OPTIONS, "policies": ["router"]})
    with pytest.raises(ValueError, match="policy 'router': VISOR: the checkpoint has no router"):
        execute(config, "test", report=False, load=load)
    config = make_config(out, methods=("dense", "visor"), visor=True, timing=False)  # the default policies
    assert execute(config, "test", report=False, load=load) == 0
    assert "left out: visor:router" in capsys.readouterr().err
    assert manifests(out)["visor:random"].params == {"matches": "nothing: uniform"}


def test_a_checkpoint_of_another_base_is_refused(tmp_path):
    other = FakeModel(visor=VISOR)
    other.geometry = replace(other.geometry, hidden_size=128)
    load = lambda c: other if c.model.endswith("visor") else FakeModel()
    with pytest.raises(ValueError, match="of another base than 'fake': its hidden_size is 128, not 64"):
        execute(make_config(tmp_path / "run", **OPTIONS), "test", load=load)


def test_which_checkpoint_a_method_runs_on(tmp_path, monkeypatch):
    for shipped in ("dense-tiny", "m3-tiny", "visor-tiny"):
        (tmp_path / "shipped" / shipped).mkdir(parents=True)
        (tmp_path / "shipped" / shipped / "config.json").write_text("{}")
    monkeypatch.setattr("visor.inference.checkpoint.CHECKPOINTS", tmp_path / "shipped")
    config = replace(make_config(tmp_path / "run"), model="dense-tiny")
    names = {m: checkpoint_for(m, config) for m in ("dense", "fastv", "visor", "visor+visionzip", "visor_tr2", "m3")}
    assert names == {"dense": "", "fastv": "", "visor": "visor-tiny", "visor+visionzip": "visor-tiny",
                     "visor_tr2": "visor-tiny", "m3": "m3-tiny"}  # fmt: skip
    assert checkpoint_for("visor", replace(config, model="visor-tiny")) == ""
    named = make_config(tmp_path / "run", methods=("dense", "visor", "visor_tr4"), visor=True)
    assert checkpoint_for("visor_tr4", named) == str(tmp_path / "visor")
    with pytest.raises(ValueError, match="a checkpoint is given for 'visor', but the methods are dense, fastv"):
        make_config(tmp_path / "run", visor=True)


def test_relative_costs_are_those_of_the_base(tmp_path):
    models = Models(FakeModel(), {"v": FakeModel(visor=VISOR)}, {"visor": "v"})
    planner = Planner.of(models, "float32")
    task = plan_task("fake_a", make_task("fake_a")(), make_task("fake_a")().samples(None), 4, models.base)
    from evaluations.settings import make_settings

    config = make_config(tmp_path / "run", **OPTIONS)
    settings, _ = make_settings(config, planner, task.lengths, models)
    fixed = [s for s in settings if s.policy == "fixed"]
    costs = [planner.relative_cost(s, Lengths(144, 20)) for s in fixed]
    assert costs == planner.relative_costs(fixed[0], Lengths(144, 20)) == sorted(costs)
    assert len(costs) == len(CONFIGURATIONS) and 0 < costs[0] < costs[-1] < 1
