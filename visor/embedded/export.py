"""From a training checkpoint to a shipped model: bf16 safetensors, tokenizer, processor, model card.

    python -m visor.embedded.export --run runs/tiny --out visor/checkpoints/dense-tiny
    python -m evaluations.run --suite all --methods dense --out runs/card
    python -m visor.embedded.export --out visor/checkpoints/dense-tiny --results runs/card/results.json

    python -m visor.embedded.export --run runs/tiny --unfinished --out packed

The first line writes the model, the third its card with the accuracy that the benchmark measured. The last
packs a training that is to go on elsewhere: copy the folder to runs/tiny there, and run the stage again.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
from pathlib import Path


def export(run: Path, out: Path, history: str = "") -> None:
    """Write the model of `run/dense.pt` to `out`.

    Args:
        history: for the card, in what this run was other than its recipe (restarts, changed rates, earlier tasks).
    """
    import torch

    from visor.embedded import stages
    from visor.embedded.architecture import TinyArchitecture
    from visor.embedded.recipes import RECIPES
    from visor.embedded.train import STAGES
    from visor.embedded.trainer import load_weights
    from visor.embedded.vocabulary import build_processor

    architecture = TinyArchitecture()
    model = stages.TinyModel(architecture)
    load_weights(run / "dense.pt", model)
    llava = model.llava.to(torch.bfloat16)
    llava.set_attn_implementation("sdpa")
    llava.save_pretrained(out)
    build_processor(architecture.patch_size).save_pretrained(out)
    logs = {name: [json.loads(line) for line in (run / f"{name}.jsonl").open()] for name in STAGES}
    facts = {
        "parameters": sum(p.numel() for p in llava.parameters()),
        "history": history,
        "hardware": f"{platform.machine()} CPU, bfloat16 autocast with float32 attention",
        "stages": {
            name: {
                "steps": log[-1]["step"],
                "scenes": log[-1]["step"] * RECIPES[name].batch_size,
                "seconds": log[-1]["seconds"],
                "planned": RECIPES[name].steps,
                "peak_rate": RECIPES[name].peak_rate,
            }
            for name, log in logs.items()
        },
    }
    # Kept beside the weights, but not as .json: facts about training cannot change an answer.
    (out / "training_facts.md").write_text(json.dumps(facts, indent=1) + "\n")


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


def main(arguments: list[str] | None = None) -> None:
    """Write the model, its card, or both."""
    parser = argparse.ArgumentParser(prog="python -m visor.embedded.export", description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of training checkpoints; without it only the card is written")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--results", type=Path, help="results.json of an evaluation of this model, for the card")
    parser.add_argument("--history", type=Path, help="text file for the card: in what this run was not its recipe")
    parser.add_argument("--unfinished", action="store_true", help="only pack the stages of --run, small, into --out")
    options = parser.parse_args(arguments)
    if options.unfinished:
        from visor.embedded.trainer import without_optimizer

        for path in sorted(options.run.glob("*.pt")):
            without_optimizer(path, options.out / path.name)
            shutil.copy(path.with_suffix(".jsonl"), options.out)
        print(json.dumps({"packed": str(options.out)}))
        return
    if options.run is not None:
        export(options.run, options.out, options.history.read_text().strip() if options.history else "")
    (options.out / "README.md").write_text(card(options.out, options.results))
    print(json.dumps({"model": str(options.out)}))


if __name__ == "__main__":
    main()
