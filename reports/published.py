"""Numbers that others have published. Shown as published, never beside or among what was measured here.

From the paper's tables: LLaVA-OneVision-0.5B, thirteen public benchmarks, means over its
easy and its hard ones in %, and the saving in decoder FLOPs. Other weights, other tasks, other token counts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One row: means over easy and hard benchmarks in %, and the saving; a missing one was not published."""

    method: str
    title: str
    easy: str
    hard: str
    saving: str


@dataclass(frozen=True)
class PublishedTable:
    """Rows of one source."""

    title: str
    source: str
    note: str
    rows: tuple[Published, ...]


_SOURCE = "Bulat et al., VISion On Request, CVPR 2026, arXiv 2603.23495"
PUBLISHED = (
    PublishedTable(
        "Methods on LLaVA-OneVision-0.5B",
        _SOURCE,
        "Means over the paper's easy and hard benchmarks; the saving is of decoder FLOPs at the paper's token counts.",
        (
            Published("dense", "LLaVA-OV-0.5B", "61.5", "57.1", "1\u00d7"),
            Published("visionzip", "VisionZip, fine-tuned", "59.3", "43.1", "5.7\u00d7"),
            Published("hired", "HiRED", "59.3", "39.0", "5.0\u00d7"),
            Published("m3", "M3", "64.0", "56.6", "8.0\u00d7"),
            Published("visor", "VISOR", "63.6", "58.4", "8.6\u00d7 (8.9\u00d7 elsewhere)"),
            Published("visor_tr2", "VISOR-TR 2x", "63.3", "57.8", "17.8\u201318\u00d7"),
            Published("visor_tr4", "VISOR-TR 4x", "63.1", "56.2", "35\u00d7"),
            Published("visor+visionzip", "VISOR + VisionZip", "63.3", "55.3", "37\u00d7"),
            Published("visor+vispruner", "VISOR + VisPruner", "63.5", "55.9", "39\u00d7"),
        ),
    ),
    PublishedTable(
        "VISOR by its number of SELF and CROSS layers",
        _SOURCE,
        "The paper's ablation on the same model of 24 decoder layers.",
        (
            Published("visor", "0 SELF, 6 CROSS", "63.3", "51.8", ""),
            Published("visor", "2 SELF, 8 CROSS", "63.5", "56.2", ""),
            Published("visor", "8 SELF, 8 CROSS", "63.6", "58.4", ""),
        ),
    ),
)
