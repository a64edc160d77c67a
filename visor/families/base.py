"""The adapter: all that the engine and the methods must know about a model family, in one small class.

An adapter is a stateless view on a Hugging Face model. It names the parts (decoder, tower, projector), tells which
inputs feed images, and shapes features the way the family's forward expects them. A new family is one file here that
registers a subclass under its `config.model_type`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from budgets.registry import FAMILIES, nearest_first
from visor.engine.compat import image_output

if TYPE_CHECKING:
    from PIL.Image import Image


class FamilyAdapter:
    """View on a `...ForConditionalGeneration` model, or on its inner model, of one family.

    Class attributes:
        raw_image_inputs: forward arguments that carry pixels.
        image_token_fields: fields of the config that hold the token ids standing for visual tokens.
        image_fields: what the processor makes of images, as the forward takes it: pixels and what describes them.
        sample_fields: of these, what it makes once a prompt, not once an image.
        has_grid_positions: True if position ids have several axes (M-RoPE), so that they are the caller's to give.
        merges_patches: True if a visual token is made of several patches (see families/merging.py).
        packs_tiles: True if an image may be several tiles, packed into one sequence after the projector; False if its
            one tile is a plain grid of tokens.
    """

    raw_image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)
    image_token_fields: ClassVar[tuple[str, ...]] = ("image_token_id",)
    image_fields: ClassVar[tuple[str, ...]] = ("pixel_values",)
    sample_fields: ClassVar[tuple[str, ...]] = ()
    has_grid_positions: ClassVar[bool] = False
    merges_patches: ClassVar[bool] = False
    packs_tiles: ClassVar[bool] = False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def inner(self) -> nn.Module:
        """The model without its language-model head: what merges visual features into the prompt."""
        return self.model.base_model

    @property
    def decoder(self) -> nn.Module:
        """The text decoder, with `layers`, `norm`, `rotary_emb` and `embed_tokens`."""
        return self.inner.get_decoder()

    @property
    def tower(self) -> nn.Module:
        """The vision encoder."""
        return self.inner.vision_tower

    @property
    def projector(self) -> nn.Module:
        """The module from tower features [..., d_tower] to decoder width [..., d]."""
        return self.inner.multi_modal_projector

    @property
    def cuts_first_token(self) -> bool:
        """True if the tower's first token (CLS) never becomes a visual token."""
        return self.model.config.vision_feature_select_strategy == "default"

    @property
    def image_token_ids(self) -> tuple[int, ...]:
        """Token ids that stand for visual tokens in `input_ids`."""
        ids = (getattr(self.model.config, field, None) for field in self.image_token_fields)
        return tuple(i for i in ids if i is not None)

    @classmethod
    def images_are_fed(cls, inputs: Mapping[str, Any]) -> bool:
        """True if these forward arguments carry images.

        Image token ids alone prove nothing: a model may generate one, and a later turn repeats those of the first.
        generate() passes an empty `mm_encoder_outputs` once the images are in the cache.
        """
        if any(inputs.get(name) is not None for name in cls.raw_image_inputs):
            return True
        return any(output is not None for output in (inputs.get("mm_encoder_outputs") or {}).values())

    def tiles(self, pixel_inputs: Mapping[str, Tensor]) -> Tensor:
        """The tiles [T, 3, height, width] that the tower sees of ONE image, from what the processor made of it."""
        return pixel_inputs["pixel_values"]

    def tile_layout(self, pixel_inputs: Mapping[str, Tensor]) -> tuple[int, tuple[int, int]]:
        """Of ONE image: the index of the tile that shows all of it, and the rows and columns of the tiles, in reading
        order, that show its parts."""
        return 0, (0, 0)

    def pack(self, tiles_TNE: Tensor, pixel_inputs: Mapping[str, Tensor], separator: float | None = None) -> Tensor:
        """Values of the tiles of ONE image in the order in which the decoder sees its visual tokens: [N, E].

        Args:
            separator: value at tokens that stand for no patch (a line's end); None means the model's learned ones, for
                projected features.
        """
        if len(tiles_TNE) != 1:
            raise ValueError(f"{type(self).__name__} takes one tile an image, got {len(tiles_TNE)}")
        return tiles_TNE[0]

    def split_images(self, inputs: Mapping[str, Tensor], num_images: int) -> list[dict[str, Tensor]]:
        """What the processor made of all images of a prompt, image by image."""
        split = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(num_images)]
        return [{**image, **{name: inputs[name] for name in self.sample_fields if name in inputs}} for image in split]

    def describe_images(self, processor: Any, images: Sequence[Image]) -> dict[str, Tensor]:
        """What the adapter must know of a prompt's images and the processor does not tell."""
        return {}

    def prompt_arguments(self, input_ids_BP: Tensor) -> dict[str, Any]:
        """What the family's forward must know of a prompt beside its ids and mask."""
        return {}

    def position_ids(self, input_ids: Sequence[int], images: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Position ids [axes, P] of one prompt with all its visual tokens (families that `has_grid_positions`).

        Args:
            images: pixel inputs of the prompt's images, in order.
        """
        raise TypeError(f"{type(self).__name__} numbers its tokens one by one; transformers does that")

    def image_outputs(self, features: Sequence[Tensor], levels: Sequence[Sequence[Tensor]] = ()) -> dict[str, Any]:
        """The value of `mm_encoder_outputs` that feeds ready features instead of pixels.

        Args:
            features: one [N_i, d] tensor an image, projected, in the order of the images in the batch. N_i must equal
                the number of image tokens that the prompt holds for that image.
            levels: for each image what DeepStack adds behind the first layers, [N_i, d] a level.
        """
        return {"image": image_output(list(features))}


def adapter_for(model: nn.Module) -> FamilyAdapter:
    """The adapter of this model's family.

    Raises:
        ValueError: the family has no adapter; the message lists those that have.
    """
    family = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if family == "visor":  # a wrapper: what it wraps is of a family
        return adapter_for(model.base)
    tower = getattr(getattr(getattr(model, "config", None), "vision_config", None), "model_type", None)
    if f"{family}/{tower}" in FAMILIES:  # one class of transformers around towers of different kinds
        return FAMILIES.get(f"{family}/{tower}")(model)
    if family not in FAMILIES:
        known = ", ".join(nearest_first(family, FAMILIES.names()))
        raise ValueError(
            f"{type(model).__name__} is of the family {family!r}, which has no adapter; families that "
            f"have one, nearest first: {known}. To add it, write visor/families/<family>.py with a FamilyAdapter "
            f"registered as {family!r}."
        )
    return FAMILIES.get(family)(model)
