"""From a training checkpoint to the shipped dense model: bf16 safetensors, tokenizer, processor, model card.

    python -m visor.embedded.export --run runs/tiny --out visor/checkpoints/dense-tiny
    python -m evaluations.run --suite all --methods dense --out runs/card
    python -m visor.embedded.export --out visor/checkpoints/dense-tiny --results runs/card/results.json

    python -m visor.embedded.export --run runs/tiny --unfinished --out packed

The first line writes the model, the third its card with the accuracy that the benchmark measured. The last packs a
training that is to go on elsewhere: copy the folder to runs/tiny there, and run the stage again.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

from visor.embedded.recipes import BASE_STAGES


def export(run: Path, out: Path, history: str = "") -> None:
    """Write the model of the stage `dense` of a run to `out`.

    Args:
        history: for the card, in what this run was other than its recipes (restarts, changed rates, earlier tasks).

    Raises:
        ValueError: a stage of the base model that has not run.
    """
    import torch

    from visor.embedded.architecture import TinyArchitecture
    from visor.embedded.base_model import load_weights
    from visor.embedded.model import TinyModel
    from visor.embedded.vocabulary import build_processor

    architecture = TinyArchitecture()
    model = TinyModel(architecture)
    load_weights(run / "dense", model)
    llava = model.llava.to(torch.bfloat16)
    llava.set_attn_implementation("sdpa")
    llava.save_pretrained(out)
    build_processor(architecture.patch_size).save_pretrained(out)
    facts = {
        "parameters": sum(p.numel() for p in llava.parameters()),
        "history": history,
        "hardware": f"{platform.machine()} CPU, bfloat16 autocast with float32 attention",
        "stages": {name: stage_facts(run / name) for name in BASE_STAGES},
    }
    # Kept beside the weights, but not as .json: facts about training cannot change an answer.
    (out / "training_facts.md").write_text(json.dumps(facts, indent=1) + "\n")


def stage_facts(folder: Path) -> dict[str, Any]:
    """What the card says of a stage of the base model, from its recipe and the last line of its log."""
    options = json.loads((folder / "recipe.json").read_text())["optimisation"]
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    return {
        "steps": last["step"],
        "scenes": last["step"] * options["batch_size"],
        "seconds": last["seconds"],
        "planned": options["steps"],
        "peak_rate": options["peak_rate"],
    }


def card(out: Path, results: Path | None) -> str:
    """The text of the model card."""
    facts = json.loads((out / "training_facts.md").read_text())
    stages = "\n".join(
        f"| {name} | {s['steps']:,} | {s['scenes']:,} | {s['peak_rate']:g} | {s['seconds'] / 60:.0f} min |"
        for name, s in facts["stages"].items()
    )
    hours = sum(s["seconds"] for s in facts["stages"].values()) / 3600
    accuracy = "Not measured yet."
    if results is not None:
        row = "| {task} | {metric} | {score:.1%} | {score_low:.1%} to {score_high:.1%} | {num_samples} |"
        rows = [
            row.format(**c)
            for c in json.loads(results.read_text())["cells"]
            if c["method"] == "dense" and c["score"] is not None
        ]
        head = "| task (test split) | metric | score | 95 % interval | questions |\n|---|---|---|---|---|\n"
        accuracy = head + "\n".join(rows)
    unfinished = [name for name, s in facts["stages"].items() if s["steps"] < s.get("planned", 0)]
    history = f"\n{facts['history']}\n" if facts.get("history") else ""
    status = f"\n**An early checkpoint**: unfinished stages: {', '.join(unfinished)}.\n" if unfinished else ""
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
trained: true
---
# {out.name}
{status}
A small LLaVA of real Hugging Face classes (`LlavaForConditionalGeneration`: SigLIP tower, MLP projector, Qwen2
decoder), {facts["parameters"] / 1e6:.1f} M parameters, for 144 x 144 images in 144 visual tokens. It exists so that
efficiency methods can be compared on a laptop, and knows nothing but the seven small worlds below.

## Data
easy-VQA (its training images), handwritten digits of the UCI set (70 % of the scans), and forms, bar charts, glyph
grids, scenes and connected letters drawn from training seeds (`visor/worlds`). Test splits share no seed, scan or
image with them. The tasks are sized to the model: glyph grids have up to four rows of four characters, as six rows of
five stayed at 60 % when the other tasks had passed 80 %.

## Recipe
`python -m visor.embedded.train --stage dense`; {facts["hardware"]}; {hours:.1f} hours
in all (`decoder` and `tower` side by side).

| stage | steps | scenes | peak rate | time |
|---|---|---|---|---|
{stages}
{history}
## Accuracy
`python -m evaluations.run --suite all --methods dense`

{accuracy}

## Use
```python
from transformers import pipeline

ask = pipeline("image-text-to-text", model="visor/checkpoints/{out.name}")
```
"""


def main(arguments: list[str] | None = None) -> int:
    """Write the model, its card, or both; the last line on stdout is one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m visor.embedded.export", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of a run; without it only the card is written")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--results", type=Path, help="results.json of an evaluation of this model, for the card")
    parser.add_argument("--history", type=Path, help="text file for the card: in what this run was not its recipe")
    parser.add_argument("--unfinished", action="store_true", help="only pack the stages of --run, small, into --out")
    options = parser.parse_args(arguments)
    try:
        if options.unfinished:
            if options.run is None:
                raise ValueError("--unfinished needs --run: the folder of the run to pack")
            from visor.embedded.base_model import pack

            print(json.dumps({"packed": str(options.out), "stages": pack(options.run, options.out)}))
            return 0
        if options.run is not None:
            export(options.run, options.out, options.history.read_text().strip() if options.history else "")
        (options.out / "README.md").write_text(card(options.out, options.results))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"model": str(options.out)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
