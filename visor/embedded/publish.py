"""From the last stage's model to a shipped one: bf16 safetensors, processor, facts about the training, model card.

    python -m visor.embedded.publish --run runs/tiny --model runs/tiny/router/model --out visor/checkpoints/visor-tiny
    python -m evaluations.run --suite all --methods visor --policies router --out runs/card
    python -m visor.embedded.publish --out visor/checkpoints/visor-tiny --results runs/card/results.json

The first command writes the model with a card that has no accuracy yet, the last one rewrites the card.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visor.embedded.recipes import M3_STAGES, VISOR_STAGES

FACTS = "training_facts.md"  # not .json: facts about training cannot change an answer, and are no part of the hash


def publish(run: Path, model: Path, out: Path, base: str, history: str = "") -> Path:
    """Write the shipped folder.

    Args:
        run: folder with one folder a stage, in each `done.json`.
        model: the model folder to ship.
        base: name of the model that the training began with.
        history: for the card, in what this run was other than its recipes, or what is still to do.

    Raises:
        ValueError: no finished stage.
    """
    import torch

    from visor.training.models import load_model

    loaded, processor = load_model(model)
    kind = "visor" if loaded.config.model_type == "visor" else "m3"
    stages = stage_facts(run, VISOR_STAGES if kind == "visor" else M3_STAGES)
    if not stages:
        raise ValueError(f"no finished stage of {kind} in {run}: no folder of it holds a done.json")
    loaded = loaded.to(torch.bfloat16)
    loaded.save_pretrained(out)
    processor.save_pretrained(out)
    facts = {
        "parameters": sum(p.numel() for p in loaded.parameters()),
        "base": base,
        "base_steps": steps_of(stages[0]["base"]),
        "kind": kind,
        "hardware": platform.machine(),
        "history": history,
        "stages": stages,
    }
    if facts["kind"] == "visor":
        names = ("cross_layers", "self_layers", "configurations", "router", "visual_source", "cross_kernel")
        facts["config"] = {name: getattr(loaded.config, name) for name in names}
    else:
        facts["config"] = {"m3_sides": list(loaded.config.m3_sides)}
    (out / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    (out / "README.md").write_text(card(out, None))
    return out


def steps_of(base: str | Path) -> int | None:
    """Steps that a model had seen, its own base's included; None where it does not say."""
    from visor.inference import checkpoint
    from visor.inference.training_facts import read_training

    try:
        folder = Path(checkpoint.resolve(base))
    except ValueError:
        return None
    found = read_training(folder, None)
    if not found or not found["stages"]:
        return None
    return (found["base_steps"] or 0) + sum(one["steps"] for one in found["stages"])


def stage_facts(run: Path, stages: Sequence[str]) -> list[dict[str, Any]]:
    """What those stages of a run that are finished say of themselves."""
    facts = []
    for name in stages:
        path = run / name / "done.json"
        if not path.exists():
            continue
        done = {**json.loads(path.read_text()), "name": name}
        log = path.with_name("log.jsonl")
        if log.exists():
            last = json.loads(log.read_text().splitlines()[-1])
            done["last"] = {key: last[key] for key in ("loss", "accuracy", "passes")}
        facts.append(done)
    return facts


def card(folder: Path, results: Path | None) -> str:
    """The text of the model card."""
    facts = json.loads((folder / FACTS).read_text())
    config, is_visor = facts["config"], facts["kind"] == "visor"
    trained = [one for one in facts["stages"] if "steps" in one]
    rows = [
        f"| {one['name']} | {', '.join(one['trained'])} | {one['steps']:,} | {one['examples']:,} | "
        f"{one['peak_rate']:g} | {one['seconds'] / 60:.0f} min | {one['last']['loss']:.3f} |"
        for one in trained
    ]
    recipe = "| stage | trained | steps | images | peak rate | time | last loss |\n|---|---|---|---|---|---|---|\n"
    if is_visor:
        listed = "\n".join(f"{i}. SELF layers {subset or 'none'}" for i, subset in enumerate(config["configurations"]))
        what = (
            f"VISOR (arXiv 2603.23495) on `{facts['base']}`: text reads the image in the CROSS layers "
            f"{config['cross_layers']}; the visual tokens are reworked in a choice of the SELF slots "
            f"{config['self_layers']}. Universal: one set of weights serves every configuration (counted from 0):\n\n"
            f"{listed.replace('0. ', '0. ', 1)}"
        )
        use = '`model.generate(**inputs, configuration=0)`, `budget=0.2`, or `policy="router"`.'
        title, command = "visor", "--methods visor --policies router"
        data = (
            "The training splits of its base's worlds, from other seeds; search on validation splits, labels of the "
            "router on scenes\nthat no stage has trained on (of the finite sets: validation splits). Test splits share "
            "no seed, scan or image with any\nof them."
        )
    else:
        what = (
            f"The trained rival of VISOR: `{facts['base']}` fine-tuned with nested average pooling (M3, Matryoshka "
            f"Multimodal Models, arXiv 2405.17430) over token grids of the sides {config['m3_sides']}."
        )
        use = "As any LLaVA; `--methods m3` of `evaluations.run` pools its visual tokens."
        title, command = "m3", "--methods m3 --budgets 1,0.3,0.16,0.12,0.09"
        data = (
            "The training splits of its base's worlds, from other seeds. Test splits share no seed, scan or image with "
            "them."
        )
    others = "".join(f"* {text}\n" for one in facts["stages"] if (text := _remark(one)))
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
trained: true
---
# {folder.name}

{what}

{facts["parameters"] / 1e6:.1f} M parameters, for 144 x 144 images. It exists so that efficiency methods can be compared
on a laptop, and knows nothing but the seven small worlds of its base (see that card for what they are).

## Data
{data}

## Recipe
`python -m visor.embedded.train --stage {title} --base {facts["base"]}`; {facts["hardware"]} CPU, bfloat16 autocast with
float32 attention.

{recipe}{chr(10).join(rows)}

{others}{facts.get("history", "")}
## Accuracy
{_accuracy(results, command)}

## Use
{use}
"""


def _remark(done: dict[str, Any]) -> str:
    if done["stage"] == "search":
        return f"search: viable SELF subsets {done['configurations']}"
    if done["stage"] == "labels":
        shares = ", ".join(f"{share:.0%}" for share in done["label_share"])
        return (
            f"labels: {done['num_questions']:,} questions; each configuration the cheapest that suffices for {shares}"
        )
    if done["stage"] == "router":
        return (
            f"router, on {done['num_questions']:,} held-out questions: score {done['router']['score']:.3f} at "
            f"{done['router']['cost']:.1%} of the dense decoder FLOPs; the largest configuration "
            f"{done['fixed'][-1]['score']:.3f} at {done['fixed'][-1]['cost']:.1%}, the smallest "
            f"{done['fixed'][0]['score']:.3f} at {done['fixed'][0]['cost']:.1%}"
        )
    return ""


def _accuracy(results: Path | None, command: str) -> str:
    if results is None:
        return "Not measured yet."
    cells = [cell for cell in json.loads(results.read_text())["cells"] if cell.get("score") is not None]
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    by_setting: dict[str, dict[str, Any]] = {}
    for cell in cells:
        by_setting.setdefault(cell.get("setting_id") or cell["method"], {})[cell["task"]] = cell
    lines = [f"| setting | {' | '.join(tasks)} | decoder FLOPs of dense |", "|---" * (len(tasks) + 2) + "|"]
    for name, own in by_setting.items():
        scores = [f"{own[task]['score']:.1%}" if task in own else "" for task in tasks]
        cost = own[tasks[-1]]["flops_relative_to_dense"] if tasks[-1] in own else None
        lines.append(f"| {name} | {' | '.join(scores)} | {'' if cost is None else f'{cost:.1%}'} |")
    sizes = sorted({cell["num_samples"] for cell in cells if cell["task"] != "average"})
    return (
        f"`python -m evaluations.run --suite all {command}`, test split, {' or '.join(map(str, sizes))} questions a "
        "task.\n\n" + "\n".join(lines)
    )


def main(arguments: list[str] | None = None) -> int:
    """Write the model, its card, or both; the last line on stdout is one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m visor.embedded.publish", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of the stages; without it only the card is written")
    parser.add_argument("--model", type=Path, help="model folder to ship; default: the last of VISOR, else M3")
    parser.add_argument("--base", default="dense-tiny", help="name of the model that the training began with")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--history", type=Path, help="text file for the card: in what this run was not its recipes")
    parser.add_argument("--results", type=Path, help="results.json of an evaluation of this model, for the card")
    options = parser.parse_args(arguments)
    try:
        if options.run is not None:
            done = stage_facts(options.run, (*M3_STAGES, *VISOR_STAGES))
            models = [one["model"] for one in done if one["stage"] != "labels"]
            if not (options.model or models):
                raise ValueError(f"no finished stage with a model in {options.run}")
            history = f"\n{options.history.read_text().strip()}\n" if options.history else ""
            publish(options.run, options.model or Path(models[-1]), options.out, options.base, history)
        if not (options.out / FACTS).is_file():
            raise ValueError(f"{options.out} was not written by this command (no {FACTS}); give --run")
        (options.out / "README.md").write_text(card(options.out, options.results))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"model": str(options.out)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
