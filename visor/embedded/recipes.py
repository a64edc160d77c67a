"""The stages of the small models, in their order, and their recipes; nothing here needs torch.

    decoder, tower -> align -> dense                                        = dense-tiny
    dense -> blocks -> everything -> search -> universal -> labels -> router = visor-tiny
    dense -> m3                                                              = m3-tiny

`decoder` (symbolic scenes) and `tower` (patch labels) know nothing of each other; `align` fits the projector between
them; `dense` trains everything on pixels. The others are stages of `visor.training`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from budgets.registry import nearest_first
from visor.embedded.curriculum import CurriculumOptions
from visor.training.optimisation import Optimisation
from visor.training.recipe import TRAINED, Recipe, load
from visor.training.recipe_file import build_known, load_options

RECIPES = Path(__file__).resolve().parent / "recipes"
BASE_STAGES = ("decoder", "tower", "align", "dense")
VISOR_STAGES = ("blocks", "everything", "search", "universal", "labels", "router")
M3_STAGES = ("m3",)
STAGES = (*BASE_STAGES, *VISOR_STAGES, *M3_STAGES)
TARGETS = {"visor": ("router",), "all": ("router", "m3")}
"""Names for what is trained up to some stages."""


@dataclass(frozen=True)
class BaseRecipe:
    """A stage of the dense base model.

    Args:
        stage: one of `BASE_STAGES`.
        seed: of data order and of all random choices.
        tensorboard: write a TensorBoard log too.
        curriculum: which worlds it draws its scenes from.
        label_weight: of the patch labels, where they are not all of the loss.
        optimisation: how; `hint_weight` and `fact_supervision_weight` weigh means over the step.
    """

    stage: str
    curriculum: CurriculumOptions
    seed: int = 0
    tensorboard: bool = False
    label_weight: float = 1.0
    optimisation: Optimisation = field(default_factory=lambda: Optimisation(steps=1000))

    def __post_init__(self) -> None:
        if self.stage not in BASE_STAGES:
            raise ValueError(
                f"unknown stage {self.stage!r} of the base model; expected one of {', '.join(BASE_STAGES)}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BaseRecipe:
        """From what `to_dict` gave, here or in an earlier version."""
        return build_known(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def recipe_of(stage: str, changes: Sequence[str] = ()) -> BaseRecipe | Recipe:
    """The recipe of a stage, with `key=value` changes.

    Raises:
        ValueError: no such stage, or options that do not exist or do not fit.
    """
    check_stage(stage, STAGES)
    if stage in BASE_STAGES:
        return load_options(BaseRecipe, stage, RECIPES, changes)
    return load(stage, changes, RECIPES)


def check_stage(name: str, known: Sequence[str]) -> None:
    """Refuse an unknown name.

    Raises:
        ValueError: it is none of `known`; the message lists them, nearest first.
    """
    if name not in known:
        raise ValueError(f"unknown stage {name!r}; nearest first: {', '.join(nearest_first(name, list(known)))}")


def stages_before(stage: str, has_base: bool) -> tuple[str, ...]:
    """The stages that a stage builds on, in the order in which they run.

    Args:
        has_base: a dense model is given, so that none has to be trained.
    """
    if stage in BASE_STAGES:
        return {"decoder": (), "tower": (), "align": BASE_STAGES[:2], "dense": BASE_STAGES[:3]}[stage]
    first = () if has_base else BASE_STAGES
    return first if stage in M3_STAGES else (*first, *VISOR_STAGES[: VISOR_STAGES.index(stage)])


def changes_by_stage(changes: Sequence[str]) -> dict[str, list[str]]:
    """`STAGE.KEY=VALUE` changes as `KEY=VALUE` changes by stage.

    Raises:
        ValueError: of another form, or no such stage.
    """
    found: dict[str, list[str]] = {}
    for change in changes:
        stage, dot, rest = change.partition(".")
        if not dot or "=" in stage:
            raise ValueError(f"--set takes STAGE.KEY=VALUE, such as m3.optimisation.steps=100; got {change!r}")
        check_stage(stage, STAGES)
        found.setdefault(stage, []).append(rest)
    return found


def scaled(recipe: BaseRecipe | Recipe, share: float) -> BaseRecipe | Recipe:
    """The recipe with `share` of its steps, or of its examples; never none."""
    if share == 1.0:
        return recipe
    if recipe.stage in (*BASE_STAGES, *TRAINED):
        steps = max(1, round(recipe.optimisation.steps * share))
        warmup = max(1, round(recipe.optimisation.warmup * min(1.0, share)))
        return replace(recipe, optimisation=replace(recipe.optimisation, steps=steps, warmup=warmup))
    examples = max(recipe.exploration.batch_size, round(recipe.exploration.num_examples * share))
    return replace(recipe, exploration=replace(recipe.exploration, num_examples=examples))
