"""docs/savings.md says what the accountant says: its tables are computed anew."""

from pathlib import Path

import pytest

from budgets.costs import price
from budgets.presets import preset
from budgets.registry import METHODS
from budgets.schedule import dense

PAGE = (Path(__file__).parents[2] / "docs" / "savings.md").read_text(encoding="utf-8")
GEOMETRY = preset("llava-onevision-0.5b")
SELF_LAYERS = (0, 1, 2, 3, 4, 8)


def tables():
    """The rows of each table of the page, as lists of texts."""
    found = [[]]
    for line in PAGE.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip().strip("`") for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [table[2:] for table in found if table]


def cost(method, self_layers, num_visual, num_text):
    schedule = METHODS.get(method)(self_layers=self_layers).schedule(GEOMETRY, num_visual)
    return price(GEOMETRY, schedule, num_text).decoder_prefill


def full(num_visual, num_text):
    return price(GEOMETRY, dense(24, num_visual), num_text).decoder_prefill


def test_savings():
    rows = tables()[0]
    assert len(rows) == 21
    for visual, text, method, *savings in rows:
        lengths = int(visual), int(text)
        for count, saving in zip(SELF_LAYERS, savings, strict=True):
            assert f"{full(*lengths) / cost(method, count, *lengths):.1f}" == saving, (visual, text, method, count)


@pytest.mark.parametrize(
    ("column", "method", "saving"), [(2, "visor", 8.6), (3, "visor_tr2", 18), (4, "visor_tr4", 35)]
)
def test_mean_number_of_self_layers(column, method, saving):
    rows = tables()[1]
    assert len(rows) == 6
    for row in rows:
        lengths = int(row[0]), int(row[1])
        none, eight = cost(method, 0, *lengths), cost(method, 8, *lengths)
        mean = (full(*lengths) / saving - none) / ((eight - none) / 8)
        assert f"{mean:.2f} SELF" == row[column]


def test_what_the_figures_leave_out():
    dense_cost = price(GEOMETRY, dense(24, 5103), 64)
    assert f"takes {dense_cost.parts['tower'] / 1e12:.2f} TFLOPs" in PAGE
    assert f"the dense decoder {dense_cost.decoder_prefill / 1e12:.2f} TFLOPs" in PAGE
    ours = cost("visor", 2, 5103, 64)
    whole = (dense_cost.parts["tower"] + dense_cost.decoder_prefill) / (dense_cost.parts["tower"] + ours)
    assert f"saves {whole:.1f}x and not {dense_cost.decoder_prefill / ours:.1f}x" in PAGE
