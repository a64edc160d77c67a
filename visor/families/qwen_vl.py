"""Qwen2-VL to Qwen3-VL: a tower of dynamic resolution, a merger of 2 x 2 patches, M-RoPE; in Qwen3-VL DeepStack.

An image of h x w patches gives (h/2)(w/2) visual tokens. Position ids have three axes (time, height, width): a visual
token's are the place of its cell, the text behind an image starts after the longer side. So a token that stays keeps
its place in the image whatever is dropped around it, also when the encoder side has reduced. Qwen2.5-VL's blocks see
windows, except a few that see everything: attention is read from those only.

Shapes: S patches of an image, N visual tokens, D decoder width, H heads, d head width, P prompt length.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from budgets.registry import FAMILIES
from visor.engine.compat import deepstack_output, vision_rotated, vision_window_index
from visor.engine.stopwatch import scoring
from visor.families.merging import EncodedImage, MergingAdapter, noting_angles, patch_tap, recorded_outputs


class QwenVLAdapter(MergingAdapter):
    """What all share."""

    raw_image_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "pixel_values_videos")
    image_token_fields: ClassVar[tuple[str, ...]] = ("image_token_id", "video_token_id")
    image_fields: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")
    has_grid_positions: ClassVar[bool] = True

    @property
    def tower(self) -> nn.Module:
        return self.inner.visual

    @property
    def projector(self) -> nn.Module:
        """The merger: [S, d_tower] to [S / 4, D]."""
        return self.inner.visual.merger

    @property
    def merge(self) -> int:
        return self.model.config.vision_config.spatial_merge_size

    @property
    def full_blocks(self) -> list[int]:
        """Blocks that see the whole image."""
        return list(range(len(self.tower.blocks)))

    def cell_order(self, grid_thw: Tensor) -> Tensor | None:
        """Where in the tower's own order each visual token's patches stand; None if in order."""
        return None

    def grid(self, pixel_inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        """Rows and columns of the visual tokens of an image.

        Raises:
            ValueError: a video.
        """
        times, height, width = pixel_inputs["image_grid_thw"][0].tolist()
        if times != 1:
            raise ValueError(f"{times} frames: only still images are encoded here")
        return height // self.merge, width // self.merge

    def split_images(self, inputs: Mapping[str, Tensor], num_images: int) -> list[dict[str, Tensor]]:
        """Patches of all images stand in one row; the grids tell whose they are."""
        grids = inputs["image_grid_thw"]
        patches = inputs["pixel_values"].split(grids.prod(-1).tolist())
        return [
            {"pixel_values": pixels, "image_grid_thw": grid[None]} for pixels, grid in zip(patches, grids, strict=True)
        ]

    def position_ids(self, input_ids: Sequence[int], images: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Three position ids a token of one prompt with all its visual tokens: [3, P], on the CPU."""
        ids_1P = torch.tensor([list(input_ids)])
        if not images:
            return torch.arange(ids_1P.shape[1]).expand(3, -1)
        grids = torch.cat([image["image_grid_thw"] for image in images]).cpu()
        is_image_1P = (ids_1P == self.model.config.image_token_id).int()
        positions_31P, _ = self.inner.get_rope_index(ids_1P, mm_token_type_ids=is_image_1P, image_grid_thw=grids)
        return positions_31P[:, 0]

    def encode_image(self, pixel_inputs: Mapping[str, Tensor], taps: Collection[str]) -> EncodedImage:
        from visor.vision.taps import BLOCK_OF_TAP, whole_image_places

        rows, columns = self.grid(pixel_inputs)
        block_of = {tap: self._block(BLOCK_OF_TAP[tap]) for tap in taps if tap in BLOCK_OF_TAP}
        attention = {index: self.tower.blocks[index].attn for index in sorted(set(block_of.values()))}
        with (
            noting_angles(attention) as angles,
            recorded_outputs({index: {"qkv": each.qkv} for index, each in attention.items()}) as seen,
        ):
            output = self.inner.get_image_features(
                pixel_inputs["pixel_values"], pixel_inputs["image_grid_thw"], return_dict=True
            )
        features_ND = output.pooler_output[0]
        levels = tuple(level[0] for level in getattr(output, "deepstack_features", None) or ())
        order = self.cell_order(pixel_inputs["image_grid_thw"])
        values: dict[str, Tensor] = {}
        with scoring("tower"):
            for tap, index in block_of.items():
                q_SHd, k_SHd, _ = seen[index]["qkv"].unflatten(-1, (3, self.tower.config.num_heads, -1)).unbind(1)
                rotate = lambda q, k, i=index: vision_rotated(attention[i], q, k, angles[i])
                value_SE = patch_tap(tap, q_SHd, k_SHd, rotate)
                value_NE = value_SE.unflatten(0, (-1, self.merge**2)).mean(1)
                values[tap] = value_NE if order is None else value_NE[order.to(value_NE.device)]
        if "places" in taps:
            values["places"] = whole_image_places(features_ND[None], (rows, columns))[0]
        return EncodedImage(features_ND, levels, values, (rows, columns))

    def _block(self, wanted: int) -> int:
        """The block to read for one counted from an end: the nearest to that end which sees the whole image."""
        full, depth = self.full_blocks, len(self.tower.blocks)
        if wanted % depth in full:
            return wanted % depth
        return full[0] if wanted >= 0 else full[-1]


@FAMILIES.register("qwen2_vl")
class Qwen2VLAdapter(QwenVLAdapter):
    """`Qwen2VLForConditionalGeneration`: all of its tower's blocks see the whole image."""


@FAMILIES.register("qwen2_5_vl")
class Qwen2_5VLAdapter(QwenVLAdapter):
    """`Qwen2_5_VLForConditionalGeneration`."""

    @property
    def full_blocks(self) -> list[int]:
        full = [i for i in self.tower.fullatt_block_indexes if i < len(self.tower.blocks)]
        if not full:
            raise ValueError("no block of this tower sees the whole image, so no attention of it ranks all patches")
        return full

    def cell_order(self, grid_thw: Tensor) -> Tensor:
        """The tower sorts cells by window."""
        return vision_window_index(grid_thw, self.tower).argsort()


@FAMILIES.register("qwen3_vl")
class Qwen3VLAdapter(QwenVLAdapter):
    """`Qwen3VLForConditionalGeneration`; features for images carry their DeepStack levels."""

    def image_outputs(self, features: Sequence[Tensor], levels: Sequence[Sequence[Tensor]] = ()) -> dict[str, Any]:
        """With the levels [N_i, D] of each image, as many as the tower has."""
        num_levels = len(self.tower.deepstack_visual_indexes)
        if len(levels) != len(features) or any(len(each) != num_levels for each in levels):
            raise ValueError(f"{type(self.model).__name__} needs {num_levels} DeepStack levels beside every feature")
        return {"image": deepstack_output(list(features), [list(level) for level in zip(*levels, strict=True)])}


@FAMILIES.register("qwen3_vl_moe")
class Qwen3VLMoeAdapter(Qwen3VLAdapter):
    """`Qwen3VLMoeForConditionalGeneration`: a mixture of experts behind the attention; the engine never looks there."""
