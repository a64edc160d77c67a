"""Schedules for the engine's tests."""

from __future__ import annotations

from budgets.schedule import LayerMode, LayerOp, Reduction, Schedule

MODES = {"t": LayerMode.TEXT, "c": LayerMode.CROSS, "s": LayerMode.SELF}


def schedule(
    modes: str, num_visual: int, keep: dict[int, float] | None = None, method: str = "fastv", positions: str = "kept"
) -> Schedule:
    """`modes` is a letter a layer; `keep` the share of the original tokens that stays before a layer."""
    keep = {layer: max(1, round(share * num_visual)) for layer, share in (keep or {}).items()}
    reduce = {layer: Reduction(method, count) for layer, count in keep.items()}
    return Schedule(
        tuple(LayerOp(MODES[mode], reduce.get(i)) for i, mode in enumerate(modes)), num_visual, positions=positions
    )


def schedules(modes: str, counts: list[int], shares: tuple[float, ...] = (0.5,), **options) -> list[Schedule]:
    """One a sample. `shares` cycles over the samples and scales `keep`, so that a batch keeps uneven numbers."""
    keep = options.pop("keep", None) or {}
    return [
        schedule(modes, n, {layer: share * shares[i % len(shares)] for layer, share in keep.items()}, **options)
        for i, n in enumerate(counts)
    ]
