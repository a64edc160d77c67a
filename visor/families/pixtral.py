"""Pixtral towers: every image at its own size, RoPE over rows and columns; LLaVA around one, and Mistral 3.

In the prompt each row of an image is a block of image tokens of its own, closed by a text token that breaks the line.
These breaks stay whatever happens to a row's tokens: they are text. Mistral 3 merges 2 x 2 patches into one visual
token; the LLaVA form makes a token of every patch.

Shapes: S patches of an image, N visual tokens, H heads, d head width, D decoder width.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar

from torch import Tensor

from budgets.registry import FAMILIES
from visor.engine.compat import pixtral_rotated
from visor.engine.stopwatch import scoring
from visor.families.merging import EncodedImage, MergingAdapter, noting_angles, patch_tap, recorded_outputs


@FAMILIES.register("llava/pixtral")
class PixtralAdapter(MergingAdapter):
    """`LlavaForConditionalGeneration` around a Pixtral tower."""

    image_fields: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")

    @property
    def merge(self) -> int:
        return 1

    def grid(self, pixel_inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        """Rows and columns of the visual tokens of an image."""
        side = self.tower.patch_size * self.merge
        height, width = pixel_inputs["image_sizes"][0].tolist()
        return height // side, width // side

    def encode_image(self, pixel_inputs: Mapping[str, Tensor], taps: Collection[str]) -> EncodedImage:
        from visor.vision.taps import BLOCK_OF_TAP, whole_image_places

        rows, columns = self.grid(pixel_inputs)
        layers, config = self.tower.transformer.layers, self.tower.config
        block_of = {tap: BLOCK_OF_TAP[tap] % len(layers) for tap in taps if tap in BLOCK_OF_TAP}
        attention = {index: layers[index].attention for index in sorted(set(block_of.values()))}
        with (
            noting_angles(attention) as angles,
            recorded_outputs({i: {"q": each.q_proj, "k": each.k_proj} for i, each in attention.items()}) as seen,
        ):
            output = self.inner.get_image_features(
                pixel_inputs["pixel_values"], image_sizes=pixel_inputs["image_sizes"], return_dict=True
            )
        features_ND = output.pooler_output[0]
        values: dict[str, Tensor] = {}
        with scoring("tower"):
            for tap, index in block_of.items():
                q_SHd, k_SHd = (seen[index][name][0].unflatten(-1, (config.num_attention_heads, -1)) for name in "qk")
                rotate = lambda q, k, i=index: pixtral_rotated(attention[i], q, k, angles[i])
                value_SE = patch_tap(tap, q_SHd, k_SHd, rotate)
                cells = value_SE.unflatten(0, (rows, self.merge, columns, self.merge))
                values[tap] = cells.mean((1, 3)).flatten(0, 1)
        if "places" in taps:
            values["places"] = whole_image_places(features_ND[None], (rows, columns))[0]
        return EncodedImage(features_ND, (), values, (rows, columns))


@FAMILIES.register("mistral3")
class Mistral3Adapter(PixtralAdapter):
    """`Mistral3ForConditionalGeneration`."""

    @property
    def merge(self) -> int:
        return self.model.config.spatial_merge_size
