"""`python -m budgets.cost`: what a method costs on a model, without weights, network or torch.

    python -m budgets.cost --model llava-1.5-7b --method fastv --set layer=2 --set drop=0.5 \
        --visual-tokens 576 --text-tokens 36 --json
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from budgets.conventions import CONVENTIONS, check_convention, price_by_formula
from budgets.costs import DECODER_PARTS, PARTS, price
from budgets.geometry import ModelGeometry
from budgets.match import fit, fit_tokens
from budgets.presets import load, names
from budgets.registry import METHODS, UnknownNameError, nearest_first
from budgets.roofline import device, device_names, floors
from budgets.schedule import dense

if TYPE_CHECKING:
    from visor.reduction.method import Method


def build_method(name: str, settings: list[str]) -> Method:
    """A method from its name and `option=value` texts.

    Raises:
        UnknownNameError: no such method or option; the message lists those that exist, nearest first.
        ValueError: not of the form option=value, or a value that the method refuses.
    """
    cls, values = METHODS.get(name), {}
    options = [field.name for field in fields(cls)]
    for setting in settings:
        option, equals, text = setting.partition("=")
        option = option.strip()
        if not equals:
            raise ValueError(
                f"--set takes option=value, got {setting!r}; options of {name}: {', '.join(options) or 'none'}"
            )
        if option not in options:
            known = ", ".join(nearest_first(option, options)) or "none"
            raise UnknownNameError(f"method {name!r} has no option {option!r}; its options, nearest first: {known}")
        values[option] = _value(text.strip())
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"method {name!r} does not take {values}: {error}") from error


def _value(text: str) -> Any:
    """A JSON scalar where it is one, otherwise the text; a JSON list becomes the "2,5" that methods take."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return ",".join(str(item) for item in value) if isinstance(value, list) else value


def report(
    geometry: ModelGeometry, method_name: str, method: Method, num_visual: int, num_text: int, convention: str
) -> dict[str, Any]:
    """The document that the command prints."""
    schedule = method.schedule(geometry, num_visual)
    cost, reference = price(geometry, schedule, num_text), dense(geometry.num_layers, num_visual)
    if convention == "ours":
        decoder_prefill, per_layer, parts = cost.decoder_prefill, cost.per_layer, cost.parts
        full = price(geometry, reference, num_text).decoder_prefill
    else:
        figure = price_by_formula(
            geometry, schedule, num_text, convention, method.nominal_visual_tokens(geometry, num_visual)
        )
        decoder_prefill, per_layer, parts = figure.decoder_prefill, list(figure.per_layer), figure.parts
        full = price_by_formula(geometry, reference, num_text, convention).decoder_prefill
    document = {
        "model": geometry.name, "method": method_name, "options": method.options(), "convention": convention,
        "unit": "FLOPs" if convention == "ours" else "MACs",
        "visual_tokens": num_visual, "text_tokens": num_text,
        "decoder_prefill": decoder_prefill, "flops_relative_to_dense": decoder_prefill / full,
        "per_layer": per_layer, "parts": parts, "kv_bytes": cost.kv_bytes,
        "visual_tokens_mean": cost.visual_tokens_mean, "visual_tokens_per_layer": cost.visual_tokens,
        "modes": [op.mode.value for op in schedule.layers],
    }  # fmt: skip
    if convention == "ours":
        document["decoder_prefill_causal"] = cost.decoder_prefill_causal
        document["decoder_attention_causal"] = cost.attention_causal
        # One pass for one new token right after the prefill.
        document["decode_parts_per_token"] = price(geometry, schedule, num_text, num_new_tokens=2).decode_parts
    return document


def roofline(
    geometry: ModelGeometry, method: Method, num_visual: int, num_text: int, name: str, dtype: str | None, batch: int
) -> dict[str, Any]:
    """The floors of the method and of dense on a device, as a part of the document."""
    on = device(name)
    dtype = dtype or ("bfloat16" if "bfloat16" in on.flops_per_s else "float32")
    at = lambda schedule: floors(geometry, schedule, num_text, on, dtype, batch)
    ours, reference = at(method.schedule(geometry, num_visual)), at(dense(geometry.num_layers, num_visual))
    return {
        "device": on.title, "dtype": dtype, "batch_size": batch, "source": on.source,
        "flops_per_s": on.flops_per_s[dtype], "bytes_per_s": on.bytes_per_s,
        "floors": {stage: floor.to_dict() for stage, floor in ours.items()},
        "speed_up_at_the_floor": {s: reference[s].ms / ours[s].ms if ours[s].ms else None for s in ours},
    }  # fmt: skip


def _roofline_lines(roof: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"  roofline: {roof['device']}, {roof['dtype']}, batch {roof['batch_size']}: "
        f"{roof['flops_per_s'] / 1e12:.4g} TFLOP/s, {roof['bytes_per_s'] / 1e9:.4g} GB/s ({roof['source']})",
        f"  {'no faster than':<22}{'by FLOPs':>12}{'by bytes':>12}   binds    speed-up over dense at the floor",
    ]
    for stage, floor in roof["floors"].items():
        speed_up = roof["speed_up_at_the_floor"][stage]
        label = f"{stage}, one token" if stage == "decode" else stage
        lines.append(
            f"  {label:<22}{floor['flops_ms']:>9.4g} ms{floor['bytes_ms']:>9.4g} ms   {floor['binds']:<9}"
            + ("-" if speed_up is None else f"x{speed_up:.2f}")
        )
    return lines


def table(document: dict[str, Any]) -> str:
    """The document for people."""
    unit = document["unit"]
    options = " ".join(f"{name}={value}" for name, value in document["options"].items())
    lines = [
        f"{document['model']}  {document['method']} {options}".rstrip(),
        f"{document['visual_tokens']} visual + {document['text_tokens']} text tokens, "
        f"convention {document['convention']} ({unit}; attention as the full square)",
        "",
    ]
    rows = [(part, document["parts"][part]) for part in PARTS if part in document["parts"]]
    for part, amount in rows:
        note = "" if part in DECODER_PARTS else "   (not in the decoder prefill)"
        lines.append(f"  {part:<22}{_amount(amount, unit):>18}{note}")
    lines.append(f"  {'decoder prefill':<22}{_amount(document['decoder_prefill'], unit):>18}"
                 f"   = {document['flops_relative_to_dense']:.2%} of dense")  # fmt: skip
    if "decoder_prefill_causal" in document:
        causal = _amount(document["decoder_prefill_causal"], unit)
        lines.append(f"  {'  attention causal':<22}{causal:>18}")
        decode = sum(document["decode_parts_per_token"].values())
        lines.append(f"  {'decode, first token':<22}{_amount(decode, unit):>18}")
    lines += [
        f"  {'KV cache':<22}{document['kv_bytes'] / 2**20:>14.2f} MiB",
        f"  {'visual tokens, mean':<22}{document['visual_tokens_mean']:>14.1f}     over the layers; text-only ones: 0",
        "",
        "  layers  mode   visual tokens   " + unit + " per layer",
    ]
    lines += [f"  {text}" for text in _layer_rows(document)]
    if "roofline" in document:
        lines += _roofline_lines(document["roofline"])
    return "\n".join(lines)


def _layer_rows(document: dict[str, Any]) -> list[str]:
    """Runs of equal layers, one line each."""
    rows = list(zip(document["modes"], document["visual_tokens_per_layer"], document["per_layer"], strict=True))
    texts, start = [], 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[start]:
            place = f"{start}" if i == start + 1 else f"{start}-{i - 1}"
            mode, visual, amount = rows[start]
            texts.append(f"{place:<8}{mode:<7}{visual:>13}   {_amount(amount, document['unit']):>18}")
            start = i
    return texts


def _amount(amount: int, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(amount) >= factor:
            return f"{amount / factor:.4f} {prefix}{unit}"
    return f"{amount} {unit}"


def listing() -> dict[str, Any]:
    """All models and methods, with the methods' options and their defaults."""
    methods = {}
    for name in METHODS:
        options = {field.name: field.default for field in fields(METHODS.get(name)) if field.default is not MISSING}
        methods[name] = {"title": METHODS.get(name).title, "options": options}
    return {"models": names(), "methods": methods, "conventions": list(CONVENTIONS)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m budgets.cost",
        description="FLOPs by part, per layer, and KV bytes of an efficiency method on a model. Needs no weights.",
    )
    arguments.add_argument("--model", help="a name (see --list), a config.json, or a folder that holds one")
    arguments.add_argument("--method", default="dense", help="a name (see --list); default: dense")
    arguments.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE", dest="settings",
                           help="an option of the method; repeat for more")  # fmt: skip
    arguments.add_argument(
        "--budget", type=float, help="choose the setting that meets this share of dense FLOPs, in (0, 1]"
    )
    arguments.add_argument(
        "--tokens", type=float, help="choose it by this number of visual tokens, mean over the decoder's layers"
    )
    arguments.add_argument("--visual-tokens", type=int, help="default: one tile of the model")
    arguments.add_argument("--text-tokens", type=int, default=64, help="prompt tokens beside the image; default: 64")
    arguments.add_argument("--convention", default="ours",
                           help="ours (FLOPs, all parts), or MACs by a paper's formula: f2, f3, gqa")  # fmt: skip
    arguments.add_argument("--device", help="also print the least time by FLOPs and by bytes on a device: "
                           f"{', '.join(device_names())} (this machine's, measured)")  # fmt: skip
    arguments.add_argument("--dtype", help="number format of the roofline; default: bfloat16, on the CPU float32")
    arguments.add_argument("--batch-size", type=int, default=1, help="samples a pass of the roofline; default: 1")
    arguments.add_argument("--json", action="store_true", help="print the JSON document only")
    arguments.add_argument("--list", action="store_true", help="list models and methods")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command; the last line on stdout is one JSON document."""
    arguments = parser().parse_args(argv)
    try:
        if arguments.list:
            document = listing()
            text = _listing_text(document)
        else:
            document = _answer(arguments)
            text = table(document)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not arguments.json:
        print(text + "\n")
    print(json.dumps(document))
    return 0


def _answer(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.model is None:
        raise ValueError(f"--model is missing; the models that exist: {', '.join(names())}")
    check_convention(arguments.convention)
    geometry = load(arguments.model)
    method = build_method(arguments.method, arguments.settings)
    num_visual, num_text = arguments.visual_tokens, arguments.text_tokens
    if num_visual is None:
        if geometry.vision is None or geometry.vision.image_size is None:
            raise ValueError(f"{geometry.name} has no fixed number of tokens a tile; give --visual-tokens")
        num_visual = geometry.vision.visual_tokens_per_tile
    if num_visual < 1 or num_text < 0:
        raise ValueError(
            f"--visual-tokens must be at least 1 and --text-tokens at least 0, got {num_visual}, {num_text}"
        )
    if arguments.budget is not None and arguments.tokens is not None:
        raise ValueError("--budget and --tokens both choose the setting; give one of them")
    if arguments.budget is not None:
        method = fit(method, geometry, num_visual, num_text, arguments.budget)
    if arguments.tokens is not None:
        method = fit_tokens(method, geometry, num_visual, num_text, arguments.tokens)
    document = report(geometry, arguments.method, method, num_visual, num_text, arguments.convention)
    if arguments.device is not None:
        document["roofline"] = roofline(
            geometry, method, num_visual, num_text, arguments.device, arguments.dtype, arguments.batch_size
        )
    return document


def _listing_text(document: dict[str, Any]) -> str:
    lines = ["models", *(f"  {name}" for name in document["models"]), "", "methods"]
    for name, method in document["methods"].items():
        options = ", ".join(f"{option}={default!r}" for option, default in method["options"].items())
        lines.append(f"  {name:<14}{method['title']}" + (f"  ({options})" if options else ""))
    return "\n".join([*lines, "", "conventions", f"  {', '.join(document['conventions'])}"])


if __name__ == "__main__":
    sys.exit(main())
