"""Several processes on one batch: each takes a share of the scenes, gradients are averaged.

Started by `torchrun --nproc-per-node 2 -m visor.embedded.train ...`. A second thread in one process did not shorten a
step of the small models on two (busy) cores; a second process draws and computes half the scenes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist


class Group:
    """The processes that train together; a group of one communicates nothing."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun
        self.rank = int(os.environ.get("RANK", "0"))
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("gloo")

    def wait(self) -> None:
        """Go on when all processes have come this far."""
        if self.size > 1:
            dist.barrier()

    def share(self, batch: list) -> list:
        """This process's part of a batch: every `size`-th item."""
        return batch[self.rank :: self.size]

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace gradients by their mean over the group. A parameter without one stays without on every process."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def gather(self, results: list) -> list:
        """Results of all processes in the order of the undivided batch."""
        if self.size == 1:
            return results
        parts: list = [None] * self.size
        dist.all_gather_object(parts, results)
        merged = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            merged[rank :: self.size] = part
        return merged
