"""One stage of VISOR's training: `python -m visor.training.run --recipe universal --model BASE --out DIR`.

BASE is a model folder, the name of a shipped model, or a Hub id; the first stage makes a VISOR model of a base. The
same command continues what was interrupted, and does nothing if it is done. Several processes:
`torchrun --nproc-per-node 2 -m visor.training.run ...`, or `accelerate launch`. DIR holds `model/` (or the labels),
`log.jsonl`, `skipped.jsonl` and `recipe.json`. The last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visor.training.recipe import TRAINED, Recipe, load

if TYPE_CHECKING:
    from torch import nn

MAY_CHANGE = ("steps", "log_every", "save_every", "workers", "micro_batch", "max_skipped")
"""Options of the optimisation that a run may continue with other values of. Another `steps` is another learning rate
schedule from there on; the rest changes no weight."""
NOT_READ = {
    **{stage: ("exploration", "router", "router_fit") for stage in TRAINED},
    "search": ("optimisation", "pooling", "configuration_weights", "router", "router_fit"),
    "labels": ("optimisation", "pooling", "configuration_weights", "router_fit"),
    "router": ("optimisation", "pooling", "configuration_weights"),
}
"""Parts of a recipe that a stage has no use for: they may be anything when it is continued."""


def load_model(name_or_path: str | Path) -> tuple[nn.Module, Any]:
    """A model with float32 weights, on the CPU, and its processor.

    Raises:
        ValueError: there is no such model.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import visor.model.configuration  # noqa: F401  registers VISOR models with the Auto classes
    from visor.inference import checkpoint
    from visor.inference.loading import without_bars

    folder = checkpoint.resolve(name_or_path)
    with without_bars():
        model = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
        )
    return model, AutoProcessor.from_pretrained(folder, local_files_only=True)


def save_model(model: nn.Module, processor: Any, folder: Path) -> None:
    """Write a model folder whole or not at all."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def as_visor(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model itself if it is a VISOR model, else one made of it as the recipe says."""
    import torch

    from visor.model.conversion import convert

    if model.config.model_type == "visor":
        return model
    if recipe.stage not in ("blocks", "everything"):
        raise ValueError(f"the stage {recipe.stage!r} needs a VISOR model; run the stage 'blocks' on this base first")
    how = recipe.conversion
    torch.manual_seed(recipe.seed)
    layers = {name: getattr(how, name) and list(getattr(how, name)) for name in ("cross_layers", "self_layers")}
    model = convert(model, **layers, cross_kernel=how.cross_kernel, visual_source=how.visual_source)
    start_blocks(model, how.blocks)
    return model


def note_base(model: nn.Module, recipe: Recipe) -> None:
    """Write into the config of a VISOR model that the base's own weights are trained on, and whose they were."""
    config = model.config
    if config.model_type == "visor" and config.trained_from is None and set(recipe.train) - {"cross"}:
        config.trained_from = Path(config.base_config._name_or_path).name or "an unnamed base"


def start_blocks(model: nn.Module, how: str) -> None:
    """Give the new cross-attention blocks weights to start from; see `Conversion.blocks`."""
    import torch

    decoder = model.get_decoder()
    with torch.no_grad():
        for layer, block in decoder.cross_blocks.items():
            if how == "copy":
                own = decoder.layers[int(layer)]
                for name in ("q_proj", "k_proj", "v_proj"):
                    getattr(block, name).weight.copy_(getattr(own.self_attn, name).weight)
                for norm in (block.text_norm, block.visual_norm):
                    norm.weight.copy_(own.input_layernorm.weight)
                block.position_conv.weight.normal_(0, 0.1 * block.position_conv.weight[0].numel() ** -0.5)
            elif how == "fan_in":
                for module in (block.q_proj, block.k_proj, block.v_proj, block.position_conv):
                    module.weight.normal_(0, module.weight[0].numel() ** -0.5)


def remember(recipe: Recipe, folder: Path, is_main: bool) -> None:
    """Refuse to continue a run with another recipe; note the recipe of a new one."""
    from visor.training.explore import write_json

    path, own = folder / "recipe.json", json.loads(json.dumps(recipe.to_dict()))
    if path.exists():
        before = json.loads(json.dumps(Recipe.from_dict(json.loads(path.read_text())).to_dict()))
        strip = lambda d: {
            **d,
            "tensorboard": None,
            "optimisation": {k: v for k, v in d["optimisation"].items() if k not in MAY_CHANGE},
            **dict.fromkeys(NOT_READ[recipe.stage]),
        }
        old, new = strip(before), strip(own)
        if old != new:
            changed = [name for name in new if old.get(name) != new[name]]
            raise ValueError(
                f"{folder} was begun with another recipe (different: {', '.join(changed)}); give another --out, or "
                "delete the folder to start anew"
            )
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, own)


def run_stage(
    recipe: Recipe,
    model: str | Path,
    out: Path,
    labels: Path | None = None,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Run or continue a stage. Returns what the command prints.

    Args:
        labels: folder of the stage `labels`, for the stage `router`.
        stop_after: stop at this step as if interrupted there.

    Raises:
        ValueError: a recipe, data or a model that do not fit.
    """
    import torch

    from visor.training.attention import use_float32_attention
    from visor.training.explore import write_json
    from visor.training.forward import PackedModel
    from visor.training.processes import Processes

    done = out / "done.json"
    precision = recipe.optimisation.precision if recipe.stage in TRAINED else recipe.exploration.precision
    processes = Processes(precision)
    remember(recipe, out, processes.is_main)
    if done.exists():
        document = json.loads(done.read_text())
        if recipe.stage not in TRAINED or document["steps"] >= recipe.optimisation.steps:
            return document
    processes.wait()
    loaded, processor = load_model(model)
    if recipe.stage != "m3":
        loaded = as_visor(loaded, recipe)
    elif loaded.config.model_type == "visor":
        raise ValueError("the stage 'm3' trains a base model, not a VISOR model; it is VISOR's rival")
    if processes.device.type == "cpu" and precision == "bf16":
        use_float32_attention(loaded)
    packed = PackedModel(loaded)
    runner = (
        _train if recipe.stage in TRAINED else {"search": _search, "labels": _label, "router": _route}[recipe.stage]
    )
    document = runner(recipe, packed, processor, out, processes, labels=labels, stop_after=stop_after)
    if document is None:  # stopped on the way
        return {"stage": recipe.stage, "stopped": stop_after, "out": str(out)}
    document = {"stage": recipe.stage, "model": str(out / "model"), "base": str(model), **document}
    if processes.is_main:
        loaded = packed.model
        if recipe.stage != "labels":
            if recipe.stage in TRAINED:
                note_base(loaded, recipe)
            loaded.set_attn_implementation("sdpa")
            save_model(loaded.to("cpu", torch.float32), processor, out / "model")
        else:
            document["labels"] = str(out)
            document["model"] = str(model)
        write_json(done, document)
    processes.wait()
    return document


def _encoder(recipe: Recipe, packed: Any, processor: Any) -> Any:
    from visor.training.encoding import Encoder
    from visor.training.parts import readers_of

    adapter, options = packed.adapter, recipe.encoding
    return Encoder(
        processor,
        adapter.image_token_ids,
        adapter.image_fields,
        options.max_text_tokens,
        options.hint_tokens,
        with_facts=bool(readers_of(packed)) or packed.looks is not None,
    )


def _train(recipe: Recipe, packed: Any, processor: Any, out: Path, processes: Any, stop_after: int | None, **_: Any):
    import torch

    from visor.training.data import Stream
    from visor.training.objectives import NestedPooling, VisorObjective
    from visor.training.optimise import Training

    options = replace(recipe.optimisation, seed=recipe.seed)
    common = {
        "seed": recipe.seed,
        "pad_id": processor.tokenizer.pad_token_id or 0,
        "hint_weight": options.hint_weight,
        "facts_weight": options.facts_weight,
        "written_share": recipe.pooling.written_share if options.facts_weight else 0.0,
    }
    if recipe.stage == "m3":
        objective = NestedPooling(recipe.pooling.sides, recipe.pooling.at_once, **common)
    else:
        config = packed.visor.config
        subsets = config.configurations if recipe.stage == "universal" else [config.self_layers]
        objective = VisorObjective(
            configurations=tuple(tuple(subset) for subset in subsets),
            weights=recipe.configuration_weights,
            factors=recipe.pooling.factors,
            pooled_share=recipe.pooling.share,
            factor_weights=recipe.pooling.weights,
            looks_weight=options.looks_weight,
            **common,
        )
        if options.looks_weight:
            packed.watch_looks()
    if options.facts_weight:
        torch.manual_seed(recipe.seed)
        packed.read_facts(len(processor.tokenizer))
        if recipe.pooling.factors or recipe.pooling.sides:
            packed.read_written(len(processor.tokenizer))
    training = Training(
        packed,
        recipe.train,
        objective,
        Stream.of(recipe.data, recipe.seed),
        _encoder(recipe, packed, processor),
        options,
        out,
        processes,
        recipe.tensorboard,
    )
    training.run(stop_after)
    if training.step < options.steps:
        return None
    training.adopt_average()
    if recipe.stage == "m3":
        packed.model.config.m3_sides = list(recipe.pooling.sides)
    return {
        "steps": training.step,
        "examples": training.step * options.batch_size,
        "seconds": round(training.seconds),
        "peak_rate": options.peak_rate,
        "trained": list(recipe.train),
        "skipped": len(training.log.skipped.reasons),
    }


def _search(recipe: Recipe, packed: Any, processor: Any, out: Path, processes: Any, **_: Any) -> dict[str, Any]:
    from budgets.search import table
    from visor.training.data import Stream
    from visor.training.explore import run_search

    options = recipe.exploration
    result = run_search(
        packed,
        Stream.of(recipe.data, recipe.seed),
        _encoder(recipe, packed, processor),
        out,
        processes,
        options.num_examples,
        options.batch_size,
        options.score,
        options.longest,
        options.margin,
    )
    if processes.is_main:
        print(table(result.candidates), flush=True)
    packed.visor.set_configurations(result.configurations)
    return {"configurations": result.configurations, "search": str(out / "search.json")}


def _label(recipe: Recipe, packed: Any, processor: Any, out: Path, processes: Any, **_: Any) -> dict[str, Any]:
    from visor.training.data import Stream
    from visor.training.labels import run_labels

    options = recipe.exploration
    document = run_labels(
        packed,
        Stream.of(recipe.data, recipe.seed),
        _encoder(recipe, packed, processor),
        out,
        processes,
        recipe.router.inputs,
        options.num_examples,
        options.batch_size,
        options.score,
        options.reach,
        options.first_position,
    )
    names = ("num_questions", "mean_score", "label_share", "costs", "skipped")
    return {"inputs": list(recipe.router.inputs), **{name: document[name] for name in names if name in document}}


def _route(recipe: Recipe, packed: Any, processor: Any, out: Path, processes: Any, labels: Path | None, **_: Any):
    import torch

    from visor.training.fit_router import fit
    from visor.training.labels import Labels

    if labels is None:
        raise ValueError("the stage 'router' needs --labels: the folder of the stage 'labels'")
    known = Labels.load(labels)
    visor, shape = packed.visor, recipe.router
    num, width = len(visor.config.configurations), packed.decoder.config.hidden_size
    expected = (num, width * len(shape.inputs))
    if (known.scores_NC.shape[1], known.vectors_NR.shape[1]) != expected:
        raise ValueError(
            f"the labels in {labels} have {known.scores_NC.shape[1]} configurations and routing vectors of "
            f"{known.vectors_NR.shape[1]}, the model needs {num} and {expected[1]}; label with this model and recipe"
        )
    torch.manual_seed(recipe.seed)
    visor.add_router(shape.hidden_size, shape.inputs)
    if not processes.is_main:
        return {}
    document = fit(visor.router, known, replace(recipe.router_fit, seed=recipe.seed), out)
    return {name: document[name] for name in ("num_questions", "label_accuracy", "router", "fixed", "oracle")}


def main(arguments: list[str] | None = None) -> int:
    """The command; the last line on stdout is one JSON document."""
    parser = argparse.ArgumentParser(
        prog="python -m visor.training.run", description=__doc__.splitlines()[0], epilog=__doc__.partition("\n")[2]
    )
    parser.add_argument("--recipe", required=True, help="YAML file, or the name of one in visor/training/recipes")
    parser.add_argument("--model", required=True, help="model to train: folder, shipped name, or Hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder of model, checkpoint and logs")
    parser.add_argument("--labels", type=Path, help="stage router: folder of the stage labels")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
                        help="change an entry of the recipe, such as optimisation.steps=100")  # fmt: skip
    parser.add_argument("--threads", type=int, help="of each process")
    parser.add_argument("--stop-after", type=int, help="stop at this step, as if interrupted there")
    options = parser.parse_args(arguments)
    try:
        recipe = load(options.recipe, options.changes)
        if options.threads:
            import torch

            torch.set_num_threads(options.threads)
        document = run_stage(recipe, options.model, options.out, options.labels, options.stop_after)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
