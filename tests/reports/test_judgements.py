"""What the report concludes: the verdict's claim, marks, frontier, missing tasks, tables for papers."""

import numpy as np
import pytest

from budgets import pareto
from evaluations.records import RunFolder
from reports import explorer, latex, tables
from reports.comparisons import AVERAGE, analyse
from reports.data import load
from reports.style import KNOWN, flops, method_style, points, size
from reports.verdict import tiles, verdict


@pytest.fixture(scope="module")
def analysis(run_folder):
    return analyse(load(run_folder))


def test_settings_are_ordered_and_grouped(analysis):
    ids = [s.id for s in analysis.run.settings]
    assert ids[0] == "dense" and ids[-1] == "random@0.11"
    assert [g.budget for g in analysis.groups] == [0.5, 0.25, 0.11]


def test_best_is_the_highest_of_its_budget(analysis):
    for group in analysis.groups:
        scores = {s.id: analysis.average(s).estimate for s in group.settings}
        best = [s for s in scores if analysis.marks.get((s, AVERAGE)) == "best"]
        assert best == [max(scores, key=scores.get)]
    assert ("dense", AVERAGE) not in analysis.marks


def test_frontier_is_exact(analysis):
    ids = list(analysis.frontier)
    cost = [analysis.costs[i].flops_relative for i in ids]
    score = [analysis.intervals[i, AVERAGE].estimate for i in ids]
    for i, (on, probability) in analysis.frontier.items():
        mine = ids.index(i)
        beaten = any(pareto.dominates(cost[j], score[j], cost[mine], score[mine]) for j in range(len(ids)))
        assert on is not beaten and 0 <= probability <= 1


def test_verdict_claims_only_what_is_shown(analysis, make_run_folder):
    text = verdict(analysis)
    assert text.startswith("No setting is shown to be within 1 point of dense"), text
    assert "n\u00a0=\u00a0180" in text and "CI" in text
    good = analyse(load(make_run_folder(methods=("dense", "visor"), num_images=500, tasks=("glyphs", "easy_vqa"))))
    text = verdict(good)
    assert text.startswith("VISOR is within 1 point of dense on the average of 2 tasks at 11 % of its decoder FLOPs"), (
        text
    )
    assert any(tile.title == "Its prefill" and "times" in tile.unit for tile in tiles(good))


def test_blind_is_the_floor_and_no_winner(make_run_folder):
    """It costs least of all, so it would always be on the frontier, and here it is within a point of dense."""
    folder = make_run_folder(methods=("dense", "random", "blind"), tasks=("easy_vqa",), num_images=400)
    analysis = analyse(load(folder))
    blind, costs = next(s for s in analysis.run.settings if s.is_blind), analysis.costs
    assert costs["blind"].flops_relative == min(c.flops_relative for c in costs.values())
    assert "blind" not in analysis.frontier and "random@0.11" in analysis.frontier
    assert [s.id for s in analysis.run.settings][-1] == "blind"
    assert analysis.against_dense["blind", AVERAGE] is not None and "Blind" not in verdict(analysis)
    assert not any(tile.method == "blind" for tile in tiles(analysis))
    row = next(row for group in tables.accuracy_table(analysis).groups for row in group.rows if row.setting == blind)
    assert row.cells[-1].text == "floor"


def test_token_budgets_stand_beside_shares_of_flops(make_run_folder):
    analysis = analyse(load(make_run_folder(methods=("dense", "fastv", "random"), budgets=(64.0, 0.25))))
    assert [g.title for g in analysis.groups] == [
        "Budget 64 visual tokens, mean over the layers", "Budget 25 % of dense decoder FLOPs"
    ]  # fmt: skip
    assert {s.label for s in analysis.run.settings if s.method == "fastv"} == {"FastV at 64 tokens", "FastV at 25 %"}
    costs = analysis.costs["fastv@64"]
    assert costs.flops_relative == pytest.approx(64 / 144, abs=0.01) and costs.visual_tokens is not None


def test_oracle_is_no_winner(make_run_folder):
    analysis = analyse(load(make_run_folder(methods=("dense", "visor"), policies=("oracle",), num_images=200)))
    assert "visor:oracle" not in analysis.frontier
    assert "oracle" not in verdict(analysis)


def test_average_needs_every_task(run_folder, tmp_path):
    analysis = analyse(load(run_folder))
    removed = next(m for m in RunFolder(run_folder).manifests() if m.setting_id == "fastv@0.5" and m.task == "forms")
    manifests = {k: m for k, m in analysis.run.manifests.items() if m != removed}
    run = analysis.run
    samples = run.samples[~((run.samples.setting_id == "fastv@0.5") & (run.samples.task == "forms"))]
    partial = type(run)(run.folder, run.run, run.settings, run.tasks, manifests, samples, run.timings, 0)
    partial = analyse(partial)
    assert ("fastv@0.5", AVERAGE) not in partial.intervals and ("fastv@0.5", "glyphs") in partial.intervals
    table = tables.accuracy_table(partial)
    cell = next(r for g in table.groups for r in g.rows if r.setting.id == "fastv@0.5").cells[1]
    assert cell.text == "not measured" and "has not been run" in cell.note
    assert any("has not been run" in reason for reason in table.not_measured)


def test_a_newer_cell_supersedes(make_run_folder):
    """A run with --limit and then without in one folder: the cell that run.json names is shown."""
    folder = make_run_folder(methods=("dense", "fastv"), tasks=("forms",), budgets=(0.5,))
    run = load(folder)
    assert run.num_left_out == 0
    make_run_folder(methods=("dense",), tasks=("glyphs",), budgets=(0.5,))
    again = load(folder)
    assert [t.name for t in again.tasks] == ["glyphs"] and again.num_left_out == 2


def test_latex_is_balanced_and_escaped(analysis):
    text = latex.latex_table(analysis)
    assert text.count("{") == text.count("}")
    assert text.count(r"\begin{") == text.count(r"\end{")
    assert r"\textbf{" in text and "fine-grained" in text
    assert latex.escape("50% & a_b <x>") == r"50\% \& a\_b \textless{}x\textgreater{}"
    assert "2403.06764" in latex.bibtex(analysis)


def test_veil_marks_dropped_tokens():
    import base64
    import io

    from PIL import Image

    from evaluations.records import pack_bits

    kept = np.zeros(12, bool)
    kept[[0, 5]] = True
    uri = explorer.veil(pack_bits(kept), [3, 4], 12)
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGBA")
    assert image.size == (4, 3)
    assert (np.array(image)[..., 3] > 0).ravel().tolist() == (~kept).tolist()
    assert explorer.veil(pack_bits(kept), [2, 4], 12) is None


def test_explorer_keeps_to_its_rule_and_cap(analysis):
    cards = explorer.cards(analysis, per_task=3, picture_bytes=900)
    assert [c.sample_id for c in cards[:3]] == ["forms-000-0", "forms-000-1", "forms-000-2"]
    assert all(len(c.picture) < 1400 for c in cards)
    assert {a.setting.method for a in cards[0].answers["budget-0.5"]} == {
        "fastv", "visionzip", "pooling", "downsample", "random",
    }  # fmt: skip


def test_known_methods_look_different_and_unknown_ones_are_stable():
    assert len({(s.colour, s.marker) for s in KNOWN.values()}) == len(KNOWN)
    assert method_style("somebody-else's") == method_style("somebody-else's")


def test_numbers_are_written_with_units():
    assert flops(2.61e9) == "2.61\u00a0GFLOPs" and size(1_800_000) == "1.72\u00a0MiB"
    assert size(193 * 1024, 1_800_000) == "0.188\u00a0MiB"
    assert points(-0.0321) == "\u22123.2" and points(0.0001) == "0.0" and points(0.004) == "+0.4"
