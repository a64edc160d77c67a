"""The command of the main job: `python -m evaluations.run --suite fine-grained` compares methods and writes a report.

Arguments become a checked configuration; `evaluations.job` does the rest. Names and numbers are checked before anything
is loaded.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from evaluations.arguments import key_and_value, method_and_model, names, numbers
from evaluations.command import INTERRUPTED, USAGE, say
from evaluations.job import execute
from evaluations.suite import load_suite, suite_names


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluations.run",
        description="Compare efficiency methods of vision-language models: accuracy, FLOPs, time, memory.",
        epilog="Exit status: 0 all done; 1 a cell or a sample failed, the rest is done; 2 the request cannot be met. "
        "The last line on stdout is a JSON document that says where the results are.",
    )
    add = parser.add_argument
    add("--suite", default="smoke", help=f"{', '.join(suite_names())}, or a .yaml file (default: %(default)s)")
    add("--tasks", type=names, metavar="A,B",
        help="tasks to run: embedded ones, lmms:NAME of lmms-eval, folder:DIR of your own (default: the suite's)")
    add("--data-root", type=Path, metavar="DIR",
        help="where data sets lie as on the Hub, DIR/<org>/<name> (default: the Hub, or its cache)")  # fmt: skip
    add("--methods", type=names, metavar="A,B",
        help="methods to compare, `a+b` for two at once, or all (default: the suite's)")  # fmt: skip
    add("--budgets", type=numbers, metavar="X,Y",
        help="decoder prefill FLOPs relative to dense, in (0, 1] (default: the suite's)")  # fmt: skip
    add("--tokens", type=lambda text: numbers(text, "token budgets"), metavar="N,M",
        help="budgets as papers state them, beside --budgets: visual tokens, mean over the layers")  # fmt: skip
    add("--model", default="dense-tiny", help="shipped model, folder, or owner/name of the Hub (default: %(default)s)")
    add("--checkpoint", dest="checkpoints", type=method_and_model, action="append", metavar="METHOD=MODEL",
        help="what a trained method runs on (default: the shipped one; visor-tiny for dense-tiny)")  # fmt: skip
    add("--visor-model", type=lambda model: ("visor", model), dest="checkpoints", action="append", metavar="MODEL",
        help="the same as --checkpoint visor=MODEL")  # fmt: skip
    add("--policies", type=names, metavar="A,B",
        help="how a method with several configurations chooses: fixed (all of them, always run), per-task, router, "
        "cascade, random, oracle (default: fixed,router,random,oracle)")  # fmt: skip
    add("--cost-weights", type=lambda text: numbers(text, "cost weights"), metavar="X,Y",
        help="lambdas of the cost-aware router: success - lambda * relative cost (default: 0 to 1.6)")  # fmt: skip
    add("--thresholds", type=lambda text: numbers(text, "thresholds"), metavar="X,Y",
        help="of the cascade: it goes on while the first token is less likely (default: 0.5,0.7,0.9,0.97)")  # fmt: skip
    add("--device", default="cpu", help="cpu, cuda, cuda:N or mps (default: %(default)s)")
    add("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    add("--attention", default="sdpa", help="sdpa, eager or flash_attention_2 (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="samples in a batch of the accuracy pass (default: %(default)s)")
    add("--max-pixels", type=int, default=argparse.SUPPRESS,
        help="samples with a larger image fail (default: 89478485, where Pillow warns)")  # fmt: skip
    add("--limit", type=int, help="samples of each task, for a quick look (default: the suite's)")
    add("--out", type=Path, help="run folder, new or to be continued (default: runs/<suite>)")
    add("--generation", type=key_and_value, action="append", metavar="KEY=VALUE",
        help="a setting of transformers' GenerationConfig, such as num_beams=3 (default: greedy, and nothing that the "
        "checkpoint asks for; what that is stands in run.json)")  # fmt: skip
    add("--system", metavar="TEXT", help="a system turn before each question (default: the chat template's own)")
    add("--seed", type=int, default=0, help="for methods that draw at random (default: %(default)s)")
    add("--dry-run", action="store_true", help="print the cells and what they will cost, and run nothing")
    add("--no-timing", dest="timing", action="store_false", help="leave the timing pass out")
    add("--no-report", dest="report", action="store_false", help="leave the report out")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = vars(make_parser().parse_args(argv))
    dry_run, report = options.pop("dry_run"), options.pop("report")
    command = shlex.join(["python", "-m", "evaluations.run", *argv])
    try:
        from evaluations.config import RunConfig

        config = RunConfig.of(load_suite(options.pop("suite")), **options)
        return execute(config, command, dry_run=dry_run, report=report)
    except ValueError as error:
        say(f"error: {error}")
        return USAGE
    except KeyboardInterrupt:
        say("interrupted; the same command continues where this one stopped")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
