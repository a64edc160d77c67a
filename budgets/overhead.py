"""`python -m budgets.overhead`: what choosing tokens costs, by FLOPs, beside the prefill that it saves.

One row a method: its own scoring, at its authors' default setting or at a budget, relative to the dense decoder
prefill; what is left of the prefill, scoring included; and what it does to the tower, which is no part of the budget.
Times are measured, not computed: `python -m evaluations.overhead` shows them beside these figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from budgets.costs import price
from budgets.geometry import ModelGeometry
from budgets.match import fit
from budgets.presets import load
from budgets.registry import METHODS
from budgets.schedule import dense

LARGE = 0.05
"""Share of the dense prefill above which choosing tokens is called out."""


def setting(name: str, geometry: ModelGeometry, num_visual: int, num_text: int, budget: float | None = None) -> Any:
    """The method as it is priced: at its authors' setting, or at a budget.

    Raises:
        ValueError: there is no such method, or it cannot meet the budget on this model.
    """
    method = METHODS.get(name)()
    if getattr(method, "keep", 1) is None:  # as many as stand out: here as many as its own paper counts
        method = type(method)(keep=max(1, num_visual // method.usually_one_in))
    return method if budget is None or name == "dense" else fit(method, geometry, num_visual, num_text, budget)


def rows(
    geometry: ModelGeometry, num_visual: int, num_text: int, budget: float | None, names: list[str] | None = None
) -> list[dict[str, Any]]:
    """One row a method; a method that cannot be had has a reason instead of figures."""
    full = price(geometry, dense(geometry.num_layers, num_visual), num_text)
    table = []
    for name in names or METHODS.names():
        row: dict[str, Any] = {"method": name, "title": METHODS.get(name).title}
        try:
            method = setting(name, geometry, num_visual, num_text, budget)
            cost = price(geometry, method.schedule(geometry, num_visual), num_text)
        except ValueError as error:
            table.append({**row, "reason": str(error)})
            continue
        share = cost.parts["scoring"] / full.decoder_prefill
        table.append(
            {
                **row,
                "options": method.options(),
                "visual_tokens_mean": cost.visual_tokens_mean,
                "scoring_flops": cost.parts["scoring"],
                "scoring_relative_to_dense": share,
                "decoder_prefill_relative_to_dense": cost.decoder_prefill / full.decoder_prefill,
                "tower_relative_to_dense": cost.parts["tower"] / full.parts["tower"] if full.parts["tower"] else None,
                "is_large": share > LARGE,
            }
        )
    return table


def text_of(table: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [f"{'method':<14}{'tokens, mean':>13}{'scoring':>14}{'of dense':>10}{'prefill':>9}{'tower':>8}"]
    for row in table:
        if "reason" in row:
            lines.append(f"{row['method']:<14}  {row['reason']}")
            continue
        tower = row["tower_relative_to_dense"]
        lines.append(
            f"{row['method']:<14}{row['visual_tokens_mean']:>13.1f}{row['scoring_flops'] / 1e9:>12.3f} G"
            f"{row['scoring_relative_to_dense']:>10.3%}{row['decoder_prefill_relative_to_dense']:>9.1%}"
            f"{'-' if tower is None else f'{tower:.1%}':>8}" + (f"  more than {LARGE:.0%}" if row["is_large"] else "")
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m budgets.overhead", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--model", default="llava-1.5-7b", help="preset, config.json or folder (default: %(default)s)")
    add("--visual-tokens", type=int, default=576, help="default: %(default)s")
    add("--text-tokens", type=int, default=64, help="default: %(default)s")
    add("--budget", type=float, help="decoder prefill FLOPs relative to dense (default: the methods' own settings)")
    add("--methods", type=lambda text: text.split(","), metavar="A,B", help="default: all")
    options = parser.parse_args(arguments)
    try:
        geometry = load(options.model)
        table = rows(geometry, options.visual_tokens, options.text_tokens, options.budget, options.methods)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{geometry.name}, {options.visual_tokens} visual + {options.text_tokens} text tokens, batch 1; FLOPs of "
        "choosing tokens, relative to the dense decoder prefill\n"
    )
    print(text_of(table))
    print(json.dumps({"model": geometry.name, "visual_tokens": options.visual_tokens,
                      "text_tokens": options.text_tokens, "budget": options.budget, "methods": table}))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
