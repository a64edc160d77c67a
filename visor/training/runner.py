"""One stage from a recipe and a model to a finished folder: train, search, label, or fit the router.

The folder holds `model/` (or the labels), `log.jsonl`, `skipped.jsonl`, `recipe.json`, and `done.json` once it is
finished. What was interrupted continues; what is done is not repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visor.training.recipe import TRAINED, Recipe
from visor.training.run_folder import finished, remember, write_json

if TYPE_CHECKING:
    from visor.training.auxiliary.scene_targets import TargetsOf
    from visor.training.encoding import Encoder
    from visor.training.forward import PackedModel
    from visor.training.objectives import Objective
    from visor.training.processes import Processes

NOT_READ = {
    **{stage: ("exploration", "router", "router_fit") for stage in TRAINED},
    "search": ("optimisation", "pooling", "configuration_weights", "router", "router_fit"),
    "labels": ("optimisation", "pooling", "configuration_weights", "router_fit"),
    "router": ("optimisation", "pooling", "configuration_weights"),
}
"""Parts of a recipe that a stage has no use for: they may be anything when it is continued."""


@dataclass(frozen=True)
class StageRun:
    """What the kinds of stages work with; the arguments of `run_stage`, loaded."""

    recipe: Recipe
    packed: PackedModel
    processor: Any
    out: Path
    processes: Processes
    labels: Path | None
    stop_after: int | None
    targets_of: TargetsOf | None

    def encoder(self) -> Encoder:
        """Examples to rows, as the recipe says; with targets where an auxiliary loss asks for them."""
        from visor.training.encoding import Encoder

        adapter, options = self.packed.adapter, self.recipe.encoding
        return Encoder(
            self.processor,
            adapter.image_token_ids,
            adapter.image_fields,
            options.max_text_tokens,
            options.hint_tokens,
            self.targets_of if self.recipe.needs_targets else None,
        )


def run_stage(
    recipe: Recipe,
    model: str | Path,
    out: Path,
    labels: Path | None = None,
    stop_after: int | None = None,
    targets_for: Callable[[Any], TargetsOf] | None = None,
) -> dict[str, Any]:
    """Run or continue a stage. Returns what the command prints.

    Args:
        model: a model folder, the name of a shipped model, or a Hub id.
        labels: folder of the stage `labels`, for the stage `router`.
        stop_after: stop at this step as if interrupted there.
        targets_for: from a tokenizer, who knows what scenes say in its tokens. Auxiliary losses of facts and attention
            need it.

    Raises:
        ValueError: a recipe, data or a model that do not fit.
    """
    if recipe.needs_targets and targets_for is None:
        raise ValueError(
            "fact_supervision_weight and attention_supervision_weight need scenes with ground truth and who puts it "
            "into token ids: for the built-in worlds and the tokenizer of the small models run `python -m "
            "visor.embedded.train`, for others call visor.training.runner.run_stage with targets_for=; or set both to 0"
        )
    import torch

    from visor.training.attention import use_float32_attention
    from visor.training.forward import PackedModel
    from visor.training.models import as_visor, load_model, note_base, save_model
    from visor.training.processes import Processes

    is_trained = recipe.stage in TRAINED
    processes = Processes(recipe.precision)
    remember(recipe, out, processes.is_main, NOT_READ[recipe.stage])
    if (document := finished(out, recipe.optimisation.steps if is_trained else None)) is not None:
        return document
    processes.wait()
    loaded, processor = load_model(model)
    if recipe.stage != "m3":
        loaded = as_visor(loaded, recipe)
    elif loaded.config.model_type == "visor":
        raise ValueError("the stage 'm3' trains a base model, not a VISOR model; it is VISOR's rival")
    if processes.device.type == "cpu" and recipe.precision == "bf16":
        use_float32_attention(loaded)
    packed = PackedModel(loaded)
    targets_of = targets_for(processor.tokenizer) if targets_for is not None else None
    kind = _train if is_trained else {"search": _search, "labels": _label, "router": _route}[recipe.stage]
    found = kind(StageRun(recipe, packed, processor, out, processes, labels, stop_after, targets_of))
    if found is None:  # stopped on the way
        return {"stage": recipe.stage, "stopped": stop_after, "out": str(out)}
    document = {"stage": recipe.stage, "model": str(out / "model"), "base": str(model), **found}
    if processes.is_main:
        loaded = packed.model
        if recipe.stage != "labels":
            if is_trained:
                note_base(loaded, recipe)
            # Saved and shipped with the kernel that inference uses, whatever training ran on.
            loaded.set_attn_implementation("sdpa")
            save_model(loaded.to("cpu", torch.float32), processor, out / "model")
        else:
            document["labels"] = str(out)
            document["model"] = str(model)
        write_json(out / "done.json", document)
    processes.wait()
    return document


def objective_of(run: StageRun) -> Objective:
    """What a stage minimises, as its recipe says."""
    from visor.training.objectives import NestedPooling, VisorObjective

    recipe, options, pooling = run.recipe, run.recipe.optimisation, run.recipe.pooling
    common = {
        "seed": recipe.seed,
        "pad_id": run.processor.tokenizer.pad_token_id or 0,
        "hint_weight": options.hint_weight,
        "fact_supervision_weight": options.fact_supervision_weight,
        "window_words_share": pooling.window_words_share if options.fact_supervision_weight else 0.0,
    }
    if recipe.stage == "m3":
        return NestedPooling(pooling.sides, pooling.at_once, **common)
    config = run.packed.visor.config
    subsets = config.configurations if recipe.stage == "universal" else [config.self_layers]
    return VisorObjective(
        configurations=tuple(tuple(subset) for subset in subsets),
        weights=recipe.configuration_weights,
        factors=pooling.factors,
        pooled_share=pooling.share,
        factor_weights=pooling.weights,
        attention_supervision_weight=options.attention_supervision_weight,
        **common,
    )


def _add_auxiliary(run: StageRun) -> None:
    """Give the model the auxiliary losses that the recipe weighs."""
    import torch

    recipe, options, num_words = run.recipe, run.recipe.optimisation, len(run.processor.tokenizer)
    if options.attention_supervision_weight and recipe.stage != "m3":  # which has no CROSS layers
        run.packed.supervise_attention()
    if options.fact_supervision_weight:
        torch.manual_seed(recipe.seed)  # of the heads' first weights
        run.packed.add_fact_heads(num_words)
        if recipe.pooling.factors or recipe.pooling.sides:
            run.packed.add_window_word_head(num_words)


def _train(run: StageRun) -> dict[str, Any] | None:
    from visor.training.data import Stream
    from visor.training.optimise import Training
    from visor.training.packed_stage import PackedStage

    recipe = run.recipe
    options = replace(recipe.optimisation, seed=recipe.seed)
    objective = objective_of(run)
    _add_auxiliary(run)
    stream = Stream.of(recipe.data, recipe.seed)
    stage = PackedStage(run.packed, recipe.train, objective, stream, run.encoder(), options, run.processes)
    training = Training(stage, options, run.out, run.processes, recipe.tensorboard)
    training.run(run.stop_after)
    if training.step < options.steps:
        return None
    training.adopt_average()
    if recipe.stage == "m3":
        run.packed.model.config.m3_sides = list(recipe.pooling.sides)
    return {**training.summary(), "trained": list(recipe.train), "skipped": len(training.log.skipped.reasons)}


def _search(run: StageRun) -> dict[str, Any]:
    from budgets.search import table
    from visor.training.data import Stream
    from visor.training.explore import run_search

    options = run.recipe.exploration
    result = run_search(
        run.packed,
        Stream.of(run.recipe.data, run.recipe.seed),
        run.encoder(),
        run.out,
        run.processes,
        options.num_examples,
        options.batch_size,
        options.score,
        options.longest,
        options.margin,
    )
    if run.processes.is_main:
        print(table(result.candidates), flush=True)
    run.packed.visor.set_configurations(result.configurations)
    return {"configurations": result.configurations, "search": str(run.out / "search.json")}


def _label(run: StageRun) -> dict[str, Any]:
    from visor.training.data import Stream
    from visor.training.labels import run_labels

    options, inputs = run.recipe.exploration, run.recipe.router.inputs
    document = run_labels(
        run.packed,
        Stream.of(run.recipe.data, run.recipe.seed),
        run.encoder(),
        run.out,
        run.processes,
        inputs,
        options.num_examples,
        options.batch_size,
        options.score,
        options.reach,
        options.first_position,
    )
    names = ("num_questions", "mean_score", "label_share", "costs", "skipped")
    return {"inputs": list(inputs), **{name: document[name] for name in names if name in document}}


def _route(run: StageRun) -> dict[str, Any]:
    import torch

    from visor.training.fit_router import fit
    from visor.training.labels import Labels

    if run.labels is None:
        raise ValueError("the stage 'router' needs --labels: the folder of the stage 'labels'")
    known = Labels.load(run.labels)
    visor, shape = run.packed.visor, run.recipe.router
    num, width = len(visor.config.configurations), run.packed.decoder.config.hidden_size
    expected = (num, width * len(shape.inputs))
    if (known.scores_NC.shape[1], known.vectors_NR.shape[1]) != expected:
        raise ValueError(
            f"the labels in {run.labels} have {known.scores_NC.shape[1]} configurations and routing vectors of "
            f"{known.vectors_NR.shape[1]}, the model needs {num} and {expected[1]}; label with this model and recipe"
        )
    torch.manual_seed(run.recipe.seed)
    visor.add_router(shape.hidden_size, shape.inputs)
    if not run.processes.is_main:
        return {}
    document = fit(visor.router, known, replace(run.recipe.router_fit, seed=run.recipe.seed), run.out)
    return {name: document[name] for name in ("num_questions", "label_accuracy", "router", "fixed", "oracle")}
