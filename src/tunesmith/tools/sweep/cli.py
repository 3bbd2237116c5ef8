"""Train many adapters on one base, stop the worse ones early, find the best.

example:
  # all combinations; random search; no early stopping
  tunesmith sweep my-recipe.yaml train.learning_rate=1e-4,1e-3 adapter.rank=8,32
  tunesmith sweep my-recipe.yaml train.learning_rate=1e-5..1e-3 --candidates 12
  tunesmith sweep my-recipe.yaml adapter.rank=4,16,64 --to-the-end
  # detects the row format and writes a recipe, as `train` does
  tunesmith sweep --model demo --data faq.csv train.learning_rate=3e-4,1e-3

A key with one value applies to all candidates. The worse half by val_loss stops
at a quarter and at half of the steps, and at least two train to the end. Each
candidate has a run directory in output_dir, for `chat`, `eval` and `train`.
After ctrl-C or a kill the same command resumes.
"""

import argparse
import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.cli.options import (
    add_json,
    is_main_process,
    leave_lines_to_rank_0,
    whole_number,
)
from tunesmith.cli.recipe_options import RECIPE_HELP, add_new_recipe, check_no_rows, chosen_recipe
from tunesmith.config.load import load_recipe
from tunesmith.config.shipped import locate_recipe
from tunesmith.distributed.ranks import reported_once_a_node, started_as
from tunesmith.errors import EXIT_OK, EXIT_STOPPED, UsageError
from tunesmith.host.files import from_here
from tunesmith.host.signals import StopRequest
from tunesmith.host.streams import lasting
from tunesmith.launch.node import run_agent
from tunesmith.run_dir import SWEEP
from tunesmith.tools.sweep.search import Search
from tunesmith.tools.sweep.space import Space, check_count, read_space
from tunesmith.tools.sweep.sweep_file import read_sweep

if TYPE_CHECKING:
    from tunesmith.training.make_recipe import NewRecipe

LOADS_TORCH = "here"

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=RECIPE_HELP)
    words = "key=a,b,c lists values, key=LOW..HIGH is a range, key=value applies to all"
    parser.add_argument("words", nargs="*", metavar="key=values", help=words)
    default = "default: 2, after 8 updates and the warmup"
    rungs = f"stop the worse half at N rungs, the last one at half of the steps ({default})"
    parser.add_argument("--rungs", type=whole_number, metavar="N", help=rungs)
    parser.add_argument(
        "--to-the-end", action="store_true", help="train every candidate to the end"
    )
    count = "with a range: how many to sample (default: 16)"
    parser.add_argument("--candidates", type=whole_number, metavar="N", help=count)
    ranks = "number of ranks to start (default: one process)"
    parser.add_argument("--ranks", type=whole_number, metavar="N", help=ranks)
    add_json(parser)
    add_new_recipe(parser)


def run(args: argparse.Namespace) -> int | None:
    with reported_once_a_node():
        space, search = read_search(args)
        if args.recipe is not None:
            # A wrong name is reported before torch is imported.
            locate_recipe(args.recipe, base=Path(), where=str(args.recipe))
        new_file = make_base(args, space)
    if new_file is None:
        return train_candidates(args, space, search)
    is_new = not new_file.path.exists()
    new_file.write_file()
    try:
        return train_candidates(args, space, search)
    finally:
        # A start that is refused leaves none.
        if is_new and not Path(new_file.run.output_dir, SWEEP).exists():
            new_file.path.unlink(missing_ok=True)


def make_base(args: argparse.Namespace, space: Space) -> "NewRecipe | None":
    """The recipe that --model and --data make, with the words that apply to all candidates.

    `args.recipe` then names its file. None where `args.recipe` is a recipe.
    """
    options = {key: vars(args)[key] for key in ("model", "data", "split", "format", "columns")}
    if args.recipe is not None and not any(options.values()):
        check_no_rows(args.recipe, args)
        return None
    words = argparse.Namespace(
        verb=args.verb, recipe=args.recipe, overrides=list(space.fixed), **options
    )
    _, new_file = chosen_recipe(words)
    assert new_file is not None
    new_file.check_file()
    log.info(f"recipe: {new_file.name}")
    args.recipe = str(new_file.path)
    return new_file


def train_candidates(args: argparse.Namespace, space: Space, search: Search) -> int | None:
    """Train the candidates, on the requested ranks, and print the result."""
    if args.ranks is not None and started_as() is None:
        return sweep_on_ranks(args, space)
    leave_lines_to_rank_0()
    with StopRequest() as early:
        early.doing = "the libraries are loaded"
        early.defer_signals()
        from tunesmith.tools.sweep.run import run_sweep
        from tunesmith.tools.sweep.table import sweep_lines, sweep_page

        if early.requested():
            raise early.not_begun()
    result = run_sweep(args.recipe, space, search, argv=sys.argv)
    if not is_main_process():
        return None
    # The sweep has ended well, whether or not someone reads this.
    sys.stdout = lasting(sys.stdout)
    page = sweep_page(result)
    if args.json:
        print(json.dumps(result))
        return None
    for line in sweep_lines(result):
        print(line)
    if page:
        print(f"report: {from_here(page)}")
    return None


def read_search(args: argparse.Namespace) -> tuple[Space, Search]:
    """Read what to try and how to search; UsageError where the words contradict each other."""
    # Beside --model and --data the first word is one of a key.
    if args.recipe is not None and "=" in args.recipe:
        args.words.insert(0, args.recipe)
        args.recipe = None
    space = read_space(args.words)
    search = Search(0 if args.to_the_end else args.rungs)
    if args.candidates is not None:
        search = replace(search, candidates=args.candidates)
    check_count(space, search.candidates)
    if args.candidates is not None and not space.ranges:
        what = "--candidates is for ranges, but there are only lists"
        raise UsageError(what, where="command line", fix="key=LOW..HIGH, or remove it")
    return space, search


def sweep_on_ranks(args: argparse.Namespace, space: Space) -> int:
    """Start the same sweep on several ranks of this machine; its exit code."""
    words = ["--ranks", str(args.ranks), "--", "sweep", args.recipe, *args.words]
    for name in ("candidates", "rungs", "to_the_end", "json"):
        if name in args.typed:
            value = vars(args)[name]
            words += [args.typed[name]] if value is True else [args.typed[name], str(value)]
    code = run_agent(words)
    # Ranks that a stop has ended exit with 0, lest torchrun start them again.
    file = Path(load_recipe(args.recipe, space.fixed).output_dir, SWEEP)
    if code == EXIT_OK and read_sweep(file)["stopped"]:
        return EXIT_STOPPED
    return code
