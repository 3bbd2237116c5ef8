"""Fine-tune what a recipe describes, or go on with it.

example:
  tunesmith train smollm2-135m-lora data.train.source=rows.jsonl data.train.format=alpaca
  tunesmith train my-recipe.yaml train.duration='2 epochs'      # goes on where it stopped
  tunesmith train my-recipe.yaml --fresh                        # puts the old run aside and starts over

ctrl-C (and SIGTERM, SIGHUP, SIGUSR1) saves after the present step and exits with 75: the same command goes on. ctrl-C
again stops at once: the same command goes on from the newest checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial

from tunesmith.errors import EXIT_OK
from tunesmith.host_files import refuse_many_ranks
from tunesmith.signals import StopRequest
from tunesmith.streams import lasting


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a recipe file, or the name of one that ships (see `tunesmith recipes`)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys that win over the file's")
    parser.add_argument("--fresh", action="store_true", help="put an earlier run in output_dir aside and start over")
    parser.add_argument("--why", action="store_true", help="say why each choice was made for this machine")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    refuse_many_ranks("train")
    with StopRequest():  # importing torch takes seconds
        from tunesmith.config.load import load_recipe

        recipe = load_recipe(args.recipe, args.overrides, say=partial(print, file=sys.stderr))
        from tunesmith.metrics.summary import closing_summary
        from tunesmith.training.run import train

    result = train(recipe, fresh=args.fresh, why=args.why, argv=sys.argv)
    sys.stdout = lasting(sys.stdout)  # the run has ended well, whether or not someone reads this
    with StopRequest() as late:
        late.hold()
        if args.json:
            print(json.dumps(result.values()))
        else:
            before = result.finished_before
            print(closing_summary(recipe, steps=result.steps, seconds=result.seconds, finished_before=before))
    return EXIT_OK
