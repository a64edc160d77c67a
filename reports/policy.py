"""What a policy chose: shares of configurations per task and difficulty, and confusion with the oracle."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from reports.data import Run


@dataclass(frozen=True)
class Row:
    """Shares of the configurations over some samples."""

    title: str
    num_samples: int
    shares: dict[str, float]


@dataclass(frozen=True)
class Choice:
    """What one setting chose.

    Args:
        configurations: all that any policy of the run chose, cheapest first.
        rows: all samples, then by task, then by difficulty.
        confusion: (oracle's choice, this choice) -> share of the samples that have both; empty for the oracle itself.
        num_confusion: how many samples those are.
    """

    setting_id: str
    title: str
    configurations: list[str]
    rows: list[Row]
    confusion: dict[tuple[str, str], float]
    num_confusion: int


def choices(run: Run) -> list[Choice]:
    """One entry a policy setting whose records name a configuration; empty where there is none."""
    rows = run.samples[run.samples.configuration.notna()]
    if rows.empty:
        return []
    rows = rows.assign(configuration=rows.configuration.map(str))
    cheapest_first = rows.groupby("configuration").decoder_flops.mean().sort_values(kind="stable")
    configurations = list(cheapest_first.index)
    titles = {task.name: task.title for task in run.tasks}
    keyed = {sid: part.set_index(["task", "sample_id"]) for sid, part in rows.groupby("setting_id", sort=False)}
    oracles = [s for s in run.settings if s.policy == "oracle" and s.id in keyed]
    result = []
    for setting in run.settings:
        part = rows[rows.setting_id == setting.id]
        if setting.policy is None or part.empty:
            continue
        groups = [_row("all samples", part)]
        groups += [_row(titles[name], part[part.task == name]) for name in titles if (part.task == name).any()]
        if part.difficulty.nunique() > 1:
            groups += [_row(f"difficulty {level}", each) for level, each in part.groupby("difficulty")]
        confusion, count = {}, 0
        oracle = next((o for o in oracles if o.method == setting.method and o.id != setting.id), None)
        if oracle is not None:
            both = (
                keyed[oracle.id]
                .configuration.rename("label")
                .to_frame()
                .join(keyed[setting.id].configuration, how="inner")
            )
            count = len(both)
            pairs = both.value_counts(["label", "configuration"], sort=False)
            confusion = {pair: number / count for pair, number in pairs.items()}
        result.append(Choice(setting.id, setting.label, configurations, groups, confusion, count))
    return result


def _row(title: str, part: pd.DataFrame) -> Row:
    shares = part.configuration.value_counts(normalize=True, sort=False)
    return Row(title, len(part), {str(name): float(share) for name, share in shares.items()})
