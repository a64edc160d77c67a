"""The main table for a paper (booktabs), and BibTeX for what the run used."""

from __future__ import annotations

from reports.comparisons import AVERAGE, Analysis
from reports.data import Setting
from reports.style import percent

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}

_VISOR = """@inproceedings{bulat2026visor,
  title     = {{VISion On Request}: Enhanced {VLLM} efficiency with sparse, dynamically selected,
               vision-language interactions},
  author    = {Bulat, Adrian and Baldrati, Alberto and Metaxas, Ioannis Maniadis and Ouali, Yassine and
               Tzimiropoulos, Georgios},
  booktitle = {CVPR},
  year      = {2026},
  note      = {arXiv:2603.23495},
}
"""
_PAPERS = {  # method: (key, title, arXiv id, year)
    "fastv": ("fastv", "An Image is Worth 1/2 Tokens After Layer 2", "2403.06764", 2024),
    "visionzip": (
        "visionzip",
        "{VisionZip}: Longer is Better but Not Necessary in Vision Language Models",
        "2412.04467",
        2024,
    ),
    "pyramiddrop": ("pyramiddrop", "{PyramidDrop}: Accelerating Your Large Vision-Language Models", "2410.17247", 2024),
    "m3": ("m3", "Matryoshka Multimodal Models", "2405.17430", 2024),
}


def escape(text: str) -> str:
    """Text safe in LaTeX."""
    return "".join(_SPECIAL.get(letter, letter) for letter in text)


def _cell(analysis: Analysis, setting: Setting, task: str) -> str:
    interval = analysis.intervals.get((setting.id, task))
    if interval is None:
        return "--"
    half = (interval.high - interval.low) / 2
    number = {"best": r"\textbf{%s}", "tied": r"\underline{%s}"}.get(analysis.marks.get((setting.id, task), ""), "%s")
    return number % percent(interval.estimate) + rf" {{\scriptsize$\pm${percent(half)}}}"


def latex_table(analysis: Analysis) -> str:
    """A booktabs table: bold is best at its budget, underlined is not significantly different from it."""
    run = analysis.run
    heads = [escape(task.title) for task in run.tasks]
    lines = [
        r"% Needs \usepackage{booktabs}.",
        r"\begin{table}[t]",
        r"\centering",
        r"\small",
        r"\begin{tabular}{l" + "r" * (len(heads) + 2) + "}",
        r"\toprule",
        " & ".join(["Method", r"FLOPs (\%)", *heads, "Average"]) + r" \\",
    ]
    groups = [("Reference", [run.dense])] if run.dense else []
    groups += [(group.title, list(group.settings)) for group in analysis.groups]
    for title, settings in groups:
        lines += [r"\midrule", rf"\multicolumn{{{len(heads) + 3}}}{{l}}{{\textit{{{escape(title)}}}}} \\"]
        for setting in settings:
            if setting.is_swept:
                continue
            share = analysis.costs[setting.id].flops_relative
            name = escape(setting.label if setting.policy else setting.title)
            name += r"$^\dagger$" if setting.trained else ""
            cells = [name, "--" if share is None else f"{100 * share:.3g}"]
            cells += [_cell(analysis, setting, task) for task in (*(t.name for t in run.tasks), AVERAGE)]
            lines.append(" & ".join(cells) + r" \\")
    caption = (
        f"Accuracy in \\% on suite {escape(str(run.run.get('suite', {}).get('name', '')))}, with half the width of the "
        r"95\% confidence interval. FLOPs: decoder prefill relative to dense. Bold: best at its budget; underlined: "
        r"not significantly different from it (paired test, Holm, $\alpha=0.05$). $^\dagger$ trained for it."
    )
    if run.limit is not None:
        caption += rf" \textbf{{Subset: --limit {run.limit}; not for comparison.}}"
    if run.untrained:
        caption += r" \textbf{Untrained weights: the accuracies mean nothing.}"
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{caption}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def bibtex(analysis: Analysis) -> str:
    """Entries for VISOR and for the measured methods that have a paper we know."""
    entries = [_VISOR]
    for method in dict.fromkeys(setting.method for setting in analysis.run.settings):
        if method in _PAPERS:
            key, title, arxiv, year = _PAPERS[method]
            entries.append(
                f"@misc{{{key}{year},\n  title  = {{{title}}},\n  year   = {{{year}}},\n  eprint = {{{arxiv}}},\n"
                "  archivePrefix = {arXiv},\n}\n"
            )
    return "\n".join(entries)
