"""Train many adapters over one loaded base, stop the worse ones early, and name the best.

examples:
  tunesmith sweep my-recipe.yaml train.learning_rate=1e-4,3e-4,1e-3 adapter.rank=8,32      # every combination
  tunesmith sweep my-recipe.yaml train.learning_rate=1e-5..1e-3 --candidates 12            # drawn at random
  tunesmith sweep my-recipe.yaml adapter.rank=4,16,64 output_dir=runs/ranks --to-the-end   # none stops early

A key with one value sets the recipe of all candidates. The worse half by val_loss stops at a quarter and at half of the
steps, and two train to the end. Each candidate is a run directory below output_dir, as `tunesmith train` alone writes it: `chat`, `eval` and `train` go on with any of them. After
ctrl-C, or a kill, the same command goes on.
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from tunesmith.cli.options import whole_number
from tunesmith.config.load import load_recipe
from tunesmith.distributed.ranks import started_as, told_once_a_node
from tunesmith.errors import EXIT_OK, EXIT_STOPPED, UsageError
from tunesmith.host.files import from_here
from tunesmith.host.signals import StopRequest
from tunesmith.host.streams import lasting
from tunesmith.run_dir import SWEEP, read_sweep
from tunesmith.sweep.search import Search
from tunesmith.sweep.space import check_count, read_space


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipe = "a recipe file, or the name of one that ships (see `tunesmith recipes`)"
    parser.add_argument("recipe", metavar="RECIPE", help=recipe)
    words = "key=a,b,c lists values, key=LOW..HIGH is a range, key=value sets the recipe"
    parser.add_argument("words", nargs="+", metavar="key=values", help=words)
    few = "stop the worse half at N rungs, the last one at half of the steps (default: 2, after 8 updates and the warmup)"
    parser.add_argument("--rungs", type=whole_number, metavar="N", help=few)
    parser.add_argument(
        "--to-the-end", action="store_true", help="train every candidate to its end"
    )
    count = "with a range: how many to draw (default: 16)"
    parser.add_argument("--candidates", type=whole_number, metavar="N", help=count)
    ranks = "start so many ranks here (default: one process)"
    parser.add_argument("--ranks", type=whole_number, metavar="N", help=ranks)
    parser.add_argument("--json", action="store_true", help="print what sweep.json holds on stdout")
    for removed in ("--sampler", "--pruner"):  # `_check_removed` says what to use
        parser.add_argument(removed, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int | None:
    leads = (started_as() or {"RANK": 0})["RANK"] == 0  # of several ranks one speaks
    with told_once_a_node():
        _check_removed(args)
        space, search = read_space(args.words), Search(0 if args.to_the_end else args.rungs)
        if args.candidates is not None:
            search = replace(search, candidates=args.candidates)
        check_count(space, search.candidates)
        if args.candidates is not None and not space.ranges:
            what = "--candidates is for ranges, and only lists are given"
            raise UsageError(what, where="command line", fix="key=LOW..HIGH, or leave it out")
    if args.ranks is not None and started_as() is None:
        from tunesmith.launch.node import run_agent

        options = ["--candidates", str(args.candidates)] if args.candidates is not None else []
        options += ["--rungs", str(args.rungs)] if args.rungs else []
        options += ["--to-the-end"] * args.to_the_end + ["--json"] * args.json
        code = run_agent(
            ["--ranks", str(args.ranks), "--", "sweep", args.recipe, *args.words, *options]
        )
        file = Path(load_recipe(args.recipe, space.fixed).output_dir, SWEEP)
        return EXIT_STOPPED if code == EXIT_OK and read_sweep(file).get("stopped") else code
    say = partial(print, file=sys.stderr, flush=True) if leads else lambda text: None
    with StopRequest() as early:
        early.doing = "the libraries are loaded"
        early.hold(say)
        from tunesmith.sweep.run import run_sweep
        from tunesmith.sweep.table import sweep_lines, sweep_page

        if early.requested():
            raise early.not_begun()
    found = run_sweep(args.recipe, space, search, announce=say, argv=sys.argv)
    if leads:
        sys.stdout = lasting(sys.stdout)
        page = sweep_page(found)
        lines = [*sweep_lines(found), *([f"report: {from_here(page)}"] if page else [])]
        print(json.dumps(found) if args.json else "\n".join(lines))
    return None


def _check_removed(args: argparse.Namespace) -> None:
    """UsageError for the flags that chose among Optuna's samplers and pruners."""
    for name in ("sampler", "pruner"):
        if vars(args)[name] is not None:
            raise UsageError(
                f"--{name} was removed",
                where=f"command line: --{name}",
                why="candidates of a range are drawn at random, and the worse half of them stops at each rung",
                fix="leave it out; --candidates N draws more or fewer, --rungs N and --to-the-end say where they stop",
            )
