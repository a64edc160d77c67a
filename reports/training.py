"""What each model of a run was trained on and for how long, beside the verdict: a reader must know what is compared.

A method that needs weights of its own was trained further than the model that it is compared with, if only by its own
stages. Then a part of the difference may be training and not the method, and the report says so. Everything is as the
run recorded it (`visor.inference.training_facts`); what is not stated there is said not to be.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from reports.data import Run


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint of the run.

    Args:
        name: of the checkpoint.
        methods: titles of the methods that run on it; empty for the reference, on which all the others run.
        trained: False where the checkpoint says that it is not.
        facts: what it states of its training; None where it states nothing.
    """

    name: str
    methods: tuple[str, ...]
    trained: bool | None
    facts: dict[str, Any] | None = field(hash=False, default=None)

    @property
    def own_steps(self) -> int | None:
        """Steps of its own stages, without those of its base; None where they are not stated."""
        stages = (self.facts or {}).get("stages")
        return sum(stage["steps"] for stage in stages) if stages else None

    @property
    def label(self) -> str:
        """Name, and what runs on it."""
        return f"{self.name} ({', '.join(self.methods)})" if self.methods else self.name


def models(run: Run) -> list[TrainedModel]:
    """The reference first, then the checkpoints of methods in the order of the settings."""
    provenance = run.run.get("provenance") or {}
    reference = provenance.get("checkpoint") or {}
    found = [_model(reference, ())] if reference else []
    titles: dict[tuple[str, str], list[str]] = {}
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for setting in run.settings:
        entry = (provenance.get("checkpoints") or {}).get(setting.method)
        if entry and entry.get("sha256") != reference.get("sha256"):
            key = (str(entry.get("name")), str(entry.get("sha256")))
            entries[key] = entry
            if setting.title not in titles.setdefault(key, []):
                titles[key].append(setting.title)
    return found + [_model(entry, tuple(titles[key])) for key, entry in entries.items()]


def _model(entry: dict[str, Any], methods: tuple[str, ...]) -> TrainedModel:
    return TrainedModel(str(entry.get("name")), methods, entry.get("trained"), entry.get("training"))


def sentence(model: TrainedModel) -> str:
    """One model, in one line of plain text."""
    if model.trained is False:
        return f"{model.label}: not trained."
    facts = model.facts
    if not facts:
        return f"{model.label}: training not stated."
    parts = []
    if facts.get("stated"):
        parts.append(facts["stated"])
    if model.own_steps is not None:
        stages = facts["stages"]
        each = ", ".join(f"{stage['name']} {stage['steps']:,}" for stage in stages)
        steps = f"{model.own_steps:,} steps"
        if facts.get("base"):
            at = f" at {facts['base_steps']:,} steps" if facts.get("base_steps") else ""
            steps = f"{facts['base']}{at}, and {steps} more"
        parts.append(f"{steps} ({each})" if len(stages) > 1 else steps)
        parts += [text for text in (_total(stages, "examples"), _total(stages, "seconds")) if text]
    elif not facts.get("stated"):
        parts.append("steps not stated")
    text = f"{model.label}: {'; '.join(parts)}."
    return f"{text} Data: {facts['data']}" if facts.get("data") else text


def _total(stages: list[dict[str, Any]], what: str) -> str:
    """Of all stages; nothing if one does not state it."""
    values = [stage.get(what) for stage in stages]
    if None in values:
        return ""
    total = sum(values)
    if what == "examples":
        return f"{total:,} examples"
    return f"{total / 3600:.1f} hours" if total >= 3600 else f"{total / 60:.0f} minutes"


def _all_steps(model: TrainedModel) -> int | None:
    """All steps that its weights have seen, its base's included; None where a part is not stated."""
    facts = model.facts or {}
    if model.own_steps is None or not facts.get("base"):
        return model.own_steps
    return None if facts.get("base_steps") is None else facts["base_steps"] + model.own_steps


def _further(model: TrainedModel, reference: TrainedModel) -> int | None:
    """How many steps more than the reference it has seen; None where that is not stated."""
    facts = model.facts or {}
    if facts.get("base") == reference.name and facts.get("base_steps") is None:
        return model.own_steps
    mine, its = _all_steps(model), _all_steps(reference)
    return None if mine is None or its is None else mine - its


def caveat(run: Run) -> tuple[str, str] | None:
    """Head and text of a warning: which methods were trained further than the reference, or may have been."""
    found = models(run)
    if len(found) < 2 or run.untrained:
        return None
    reference, others = found[0], found[1:]
    steps = {model: _further(model, reference) for model in others}
    further = [f"{model.label} by {more:,} steps" for model, more in steps.items() if more is not None and more > 0]
    unknown = [model.label for model, more in steps.items() if more is None]
    texts = []
    if further:
        texts.append(f"{'; '.join(further)}: a part of the difference from dense may be training and not the method.")
    if unknown:
        texts.append(f"Whether {', '.join(unknown)} saw more steps than {reference.name} is not stated.")
    if not texts:
        return None
    head = f"Trained further than {reference.name}, the reference." if further else "Training not stated."
    return head, " ".join(texts)
