"""The report from a run folder: what is written, that it is safe, honest, small, and the same every time."""

import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from reports.build import MAX_BYTES, build, css_name

ROOT = Path(__file__).parents[2]
FIELDS = """method budget policy suite task num_samples score score_low score_high metric decoder_flops
    flops_relative_to_dense visual_tokens_mean kv_bytes prefill_ms_median decode_ms_per_token_median peak_memory_bytes
    trained status error not_measured""".split()


class Page(HTMLParser):
    """Tags, ids and visible text of a page; unbalanced tags are an error."""

    VOID = {"meta", "input", "img", "br", "link", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.ids, self.open, self.text, self.urls = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.urls += [attrs[name] for name in ("src", "href", "xlink:href", "action") if attrs.get(name)]
        assert not [name for name in attrs if name.startswith("on")], f"an event handler in <{tag}>"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


@pytest.fixture(scope="module")
def built(run_folder):
    return build(run_folder)


@pytest.fixture(scope="module")
def html(built):
    return built.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_writes_everything(built, run_folder):
    assert built == run_folder / "report.html"
    for name in ("results.json", "cells.csv", "samples.parquet"):
        assert (run_folder / name).stat().st_size > 0
    for figure in ("pareto", "tasks_absolute", "tasks_relative", "flops_by_part", "visual_tokens"):
        for suffix in ("svg", "pdf", "png"):
            assert (run_folder / "figures" / f"{figure}.{suffix}").stat().st_size > 1000
    assert built.stat().st_size <= MAX_BYTES


def test_results_follow_the_schema(built, run_folder):
    document = json.loads((run_folder / "results.json").read_text())
    assert {"schema_version", "provenance", "cells"} <= set(document)
    cells = document["cells"]
    assert len(cells) == (1 + 5 * 3) * (3 + 1)
    for cell in cells:
        assert set(FIELDS) <= set(cell)
        assert 0 <= cell["score_low"] <= cell["score"] <= cell["score_high"] <= 1
        nulls = {k for k, v in cell.items() if v is None} - {"budget", "policy", "error"}
        assert nulls == set(cell["not_measured"]), "every null has its reason, and nothing else has one"
    dense = [c for c in cells if c["method"] == "dense"]
    assert all(c["flops_relative_to_dense"] == 1.0 and c["budget"] == 1.0 for c in dense)
    tasks = [c["score"] for c in dense if c["task"] != "average"]
    average = next(c for c in dense if c["task"] == "average")
    assert average["score"] == pytest.approx(sum(tasks) / 3) and average["num_samples"] == 3 * 60
    fastv = next(c for c in cells if c["method"] == "fastv" and c["budget"] == 0.25 and c["task"] == "average")
    assert fastv["flops_relative_to_dense"] == pytest.approx(0.25, abs=1e-3)
    assert fastv["not_measured"]["peak_memory_bytes"] == "a CPU process has no per-run peak"


def test_csv_and_parquet_say_the_same(built, run_folder):
    cells = json.loads((run_folder / "results.json").read_text())["cells"]
    rows = list(csv.DictReader(io.StringIO((run_folder / "cells.csv").read_text())))
    assert [row["task"] for row in rows] == [cell["task"] for cell in cells]
    assert float(rows[0]["score"]) == cells[0]["score"]
    samples = pd.read_parquet(run_folder / "samples.parquet")
    assert len(samples) == 16 * 3 * 60
    part = samples[(samples.method == "fastv") & (samples.budget == 0.5) & (samples.task == "glyphs")]
    cell = next(c for c in cells if (c["method"], c["budget"], c["task"]) == ("fastv", 0.5, "glyphs"))
    assert part.score.mean() == pytest.approx(cell["score"])


def test_model_output_is_text(html, page):
    assert page.tags.count("script") == 1, "only our own script"
    assert "alert(1)" in " ".join(page.text), "the hostile answer is shown, as text"
    assert "<img src=x" not in html and "onerror=alert(2)&gt;" in html
    assert "</script><script>" not in html


def test_page_loads_nothing(html, page):
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html).group(1)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert all(url.startswith(("#", "data:")) for url in page.urls)
    assert not re.findall(r"url\((?!#|data:)", html)


def test_markup_is_sound(page):
    assert not page.open
    assert len(page.ids) == len(set(page.ids)), "ids are unique, those inside the figures too"
    inside = {url[1:] for url in page.urls if url.startswith("#")}
    assert inside <= set(page.ids)


def test_figures_follow_the_theme(html):
    svg = html[html.index('<svg viewBox="0 0 763') :]
    svg = svg[: svg.index("</svg>")]
    assert "var(--ink)" in svg and "var(--blue)" in svg
    assert not re.findall(r"(?:fill|stroke): #(?!000000)", svg), "no fixed colour is left in a figure"
    assert 'data-method="fastv"' in svg and "<title>" in svg


def test_same_records_same_bytes(make_run_folder, tmp_path):
    run_folder = make_run_folder(methods=("dense", "fastv"), tasks=("forms",), budgets=(0.5, 0.25))
    build(run_folder)
    copy = tmp_path / "elsewhere"
    shutil.copytree(
        run_folder, copy, ignore=shutil.ignore_patterns("report.html", "figures", "results.json", "cells.csv")
    )
    build(copy)
    files = [p.relative_to(run_folder) for p in run_folder.rglob("*") if p.is_file()]
    digest = lambda root: {str(f): hashlib.sha256((root / f).read_bytes()).hexdigest() for f in files}
    assert digest(copy) == digest(run_folder)


def test_subset_and_untrained_weights_are_marked(make_run_folder):
    folder = make_run_folder(
        limit=20, trained_checkpoint=False, methods=("dense", "fastv"), tasks=("forms",), budgets=(0.5,)
    )
    html = build(folder).read_text()
    assert html.count("SUBSET (--limit 20), UNTRAINED WEIGHTS") >= 2, "over the page and in the figures"
    assert "SUBSET" in (folder / "figures" / "pareto.svg").read_text()
    assert "No verdict: the weights are untrained" in html
    document = json.loads((folder / "results.json").read_text())
    assert document["limit"] == 20 and document["untrained_weights"] is True


def test_failed_cell_and_missing_timings_are_said(make_run_folder):
    folder = make_run_folder(failed=("fastv@0.5",), timings=False, methods=("dense", "fastv"), budgets=(0.5,))
    html = build(folder).read_text()
    assert "RuntimeError: out of memory" in html and "What failed" in html
    assert "Times were not measured" in html
    cells = json.loads((folder / "results.json").read_text())["cells"]
    average = next(c for c in cells if (c["method"], c["budget"], c["task"]) == ("fastv", 0.5, "average"))
    assert average["status"] == "failed" and average["score"] is None
    assert "out of memory" in average["not_measured"]["score"]
    assert average["not_measured"]["prefill_ms_median"].startswith("timing failed: RuntimeError")
    assert "hired reaches 0.2 to 1" in html
    dense = next(c for c in cells if c["method"] == "dense")
    assert dense["not_measured"]["prefill_ms_median"].startswith("no timing run")


def test_a_budget_below_a_methods_reach_is_a_row_and_no_failure(make_run_folder):
    folder = make_run_folder(methods=("dense", "fastv", "pooling"), budgets=(0.25,))
    run = json.loads((folder / "run.json").read_text())
    entry = {"policy": None, "reason": "it reaches 0.2017 to 0.98"}
    run["unreachable"] = [{"method": "fastv", "budget": budget, "least": 0.2017, **entry} for budget in (0.25, 0.11)]
    (folder / "run.json").write_text(json.dumps(run))
    html = build(folder).read_text()
    assert "Not everything ran" not in html and "What failed" not in html
    assert html.count("reaches 20.2 %") == 4, "two budgets, in the table of accuracies and in that of costs"
    assert html.count("Budget 11 % of dense decoder FLOPs") == 2, "a group of its own where none reaches it"
    run["unreachable"] = [{"method": "hired", "budget": None, "least": None, **entry}]
    (folder / "run.json").write_text(json.dumps(run))
    assert "Not everything ran" in build(folder).read_text(), "what the model cannot run is not its rule's doing"


def test_sparse_run_json(make_run_folder):
    """A run.json with nothing but its schema still gives a report."""
    folder = make_run_folder(methods=("dense",), tasks=("forms",))
    (folder / "run.json").write_text('{"schema_version": 1}')
    assert "Dense alone was measured" in build(folder).read_text()


def test_no_dense_reference(make_run_folder):
    html = build(make_run_folder(methods=("fastv", "pooling"), tasks=("forms",), budgets=(0.5,))).read_text()
    assert "No verdict: this run has no complete dense reference" in html


def test_policy_section_when_there_are_policies(make_run_folder):
    folder = make_run_folder(
        methods=("dense", "visor"), policies=("router", "random", "oracle"), budgets=(0.5,), tasks=("forms",)
    )
    html = build(folder).read_text()
    Page(html)
    assert "What the policies chose" in html and "VISOR router policy against the pseudo-labels" in html
    for name in ("policy_visor", "policy_curve_visor", "layer_flops"):
        assert (folder / "figures" / f"{name}.svg").exists() and f'id="figure-{name}"' in html
    cells = [c for c in json.loads((folder / "results.json").read_text())["cells"] if c["task"] == "average"]
    routers = {c["setting_id"]: c for c in cells if c["policy"] == "router"}
    assert {i: c["params"]["cost_weight"] for i, c in routers.items()} == {
        "visor:router": None, "visor:router(0.1)": 0.1, "visor:router(0.4)": 0.4,
    }  # fmt: skip
    assert all(c["budget"] is None and c["num_visual_mean"] == 144 for c in routers.values())
    fixed = [c for c in cells if c["policy"] == "fixed"]
    assert [c["params"]["configuration"] for c in fixed] == [0, 1, 2]


def test_figures_of_an_earlier_build_go(make_run_folder):
    folder = make_run_folder(methods=("dense", "visor"), policies=("oracle",), budgets=(0.5,), tasks=("forms",))
    (folder / "figures").mkdir()
    for name in ("policy_m3.svg", "looks_other.png", "mine.svg"):
        (folder / "figures" / name).write_text("old")
    build(folder)
    left = {path.name for path in (folder / "figures").iterdir()}
    assert "mine.svg" in left and not left & {"policy_m3.svg", "looks_other.png"}


def test_analyses_are_shown_if_the_folder_holds_them(make_run_folder, add_analyses):
    folder = make_run_folder(methods=("dense",), tasks=("forms",))
    add_analyses(folder)
    html = build(folder).read_text()
    page = Page(html)
    assert "How the model uses its visual tokens" in html and page.tags.count("script") == 1
    figures = [d for d in page.ids if d.startswith("figure-observations_dense-tiny")]
    assert len(figures) == 1 and "Layers without the image" in html


def test_broken_analyses_are_named(make_run_folder):
    folder = make_run_folder(methods=("dense",), tasks=("forms",))
    (folder / "analyses").mkdir()
    (folder / "analyses" / "x.json").write_text('{"schema_version": 9}')
    with pytest.raises(ValueError, match=r"x.json has schema 9; this code reads 1"):
        build(folder)


def test_published_rows_are_marked_and_stay_apart(html, run_folder):
    section = html[html.index('id="published"') :]
    section = section[: section.index("</section>")]
    assert "Not measured here" in section and section.count("published, not measured here") == 12
    assert "63.6" in section and "58.4" in section
    assert not any("LLaVA-OV" in str(cell) for cell in json.loads((run_folder / "results.json").read_text())["cells"])


def test_command_line(make_run_folder, tmp_path):
    run_folder = make_run_folder(methods=("dense", "fastv"), tasks=("forms",), budgets=(0.5,))
    code = "import reports.__main__ as m, sys; s = m.main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(s)"
    run = lambda path: subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=ROOT)
    done = run(run_folder)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["report"] == str(run_folder / "report.html") and last["bytes"] <= MAX_BYTES
    bad = run(tmp_path)
    assert bad.returncode == 2 and "run.json" in bad.stderr and "Traceback" not in bad.stderr


def test_names_become_selectors():
    assert css_name('a.b"]{x}') == "a_b___x_"


def test_no_console_error_in_chromium(built, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: the page is not opened in a browser")
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path}",
        "--enable-logging=stderr",
        "--v=0",
        "--dump-dom",
        built.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert '<html lang="en" class="js">' in done.stdout, "our script ran to its end"
    assert 'id="shown">36<' in done.stdout
    assert "CONSOLE" not in done.stderr
