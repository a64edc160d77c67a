"""`python -m visor.convert BASE OUT`: a VISOR checkpoint of a base model, ready to be trained.

With every layer SELF the converted model is the base, to the bit; its new blocks have learned nothing yet, and its card
says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

CARD = """# {name}: converted, not trained

trained: false

A VISOR model around `{base}`, made by `python -m visor.convert`. CROSS layers {cross_layers}, SELF slots
{self_layers}. The cross-attention blocks are new: their output projections are zero, so that only configurations with
SELF layers see the image. Train it before use (`visor.training`).
"""


def layer_list(text: str) -> list[int]:
    """ "0,3" to [0, 3]."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"layers are numbers like 0,3,6, got {text!r}") from None


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m visor.convert",
        description="Make a VISOR model of a vision-language model: the same weights, and new cross-attention blocks.",
        epilog="The last line on stdout is a JSON document that says what was made.",
    )
    add = parser.add_argument
    add("base", help="shipped model, folder, or owner/name of the Hub")
    add("out", type=Path, help="folder to write, new or empty")
    add("--cross-layers", type=layer_list, metavar="A,B", help="CROSS layers (default: L/3, evenly spaced)")
    add("--self-layers", type=layer_list, metavar="A,B", help="SELF slots (default: L/3, evenly spaced)")
    add("--cross-kernel", type=int, default=7, help="width of the positional convolution (default: %(default)s)")
    add("--visual-source", default="latest", help="what CROSS layers read: latest or initial (default: %(default)s)")
    add("--router-hidden-size", type=int, metavar="N", help="also add an untrained router with N hidden units")
    add("--seed", type=int, default=0, help="of the new weights (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    options = make_parser().parse_args(argv)
    try:
        print(json.dumps(run(options)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace) -> dict[str, object]:
    """Load, convert, save.

    Raises:
        ValueError: the base cannot be loaded or is of no supported family, a layer does not fit, or `out` is in use.
    """
    out = options.out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; choose another, or remove it first")
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from visor.inference import checkpoint
    from visor.inference.loading import without_bars
    from visor.model.conversion import convert

    folder = checkpoint.resolve(options.base)
    checkpoint.verify_weights(folder)
    with without_bars():
        base = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", local_files_only=True)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    base.config.name_or_path = folder.name  # a path would say more about this machine than about the base
    torch.manual_seed(options.seed)
    hidden = options.router_hidden_size
    model = convert(
        base,
        options.cross_layers,
        options.self_layers,
        cross_kernel=options.cross_kernel,
        visual_source=options.visual_source,
        router=None if hidden is None else {"hidden_size": hidden},
    )
    model.save_pretrained(out)
    processor.save_pretrained(out)
    config = model.config
    layers = {"cross_layers": config.cross_layers, "self_layers": config.self_layers}
    (out / "README.md").write_text(CARD.format(name=out.name, base=options.base, **layers), encoding="utf-8")
    new = sum(
        p.numel() for name, p in model.named_parameters() if "cross_blocks." in name or name.startswith("router.")
    )
    total = sum(p.numel() for p in model.parameters())
    return {"out": str(out), "base": str(folder), **layers, "configurations": config.configurations,
            "parameters": total, "new_parameters": new}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
