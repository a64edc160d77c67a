"""The processes that train together: who takes which example, sums and gathers between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Processes:
    """The processes that train together, through Accelerate.

    Raises:
        ValueError: accelerate is not installed.
    """

    def __init__(self, precision: str = "fp32") -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise ValueError("training needs a package: pip install accelerate") from error
        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.size, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.dtype = torch.bfloat16 if precision == "bf16" else None

    def autocast(self) -> Any:
        """bf16 matrix products, where the precision asks for them."""
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def share(self, items: Sequence) -> list:
        """This process's items: every `size`-th."""
        return list(items[self.rank :: self.size])

    def sum_(self, flat: Tensor) -> Tensor:
        """The sum over the processes, on each."""
        return flat if self.size == 1 else self.accelerator.reduce(flat, "sum")

    def gather(self, items: list) -> list:
        """Items of all processes, process by process."""
        if self.size == 1:
            return items
        from accelerate.utils import gather_object

        return gather_object(items)

    def gather_shared(self, items: list) -> list:
        """What `share` has parted, of all processes, in its undivided order."""
        parts = self.gather([items])
        merged = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            merged[rank :: self.size] = part
        return merged

    def wait(self) -> None:
        """Until all are here."""
        self.accelerator.wait_for_everyone()
