"""Fine-tune a model on rows of your own, or what a recipe describes; or go on with it.

example:
  tunesmith train --model HuggingFaceTB/SmolLM2-135M-Instruct --data faq.csv     # looks at the rows, makes a recipe
  tunesmith train smollm2-135m-lora data.train.source=rows.jsonl data.train.format=alpaca
  tunesmith train my-recipe.yaml train.duration='2 epochs'      # goes on where it stopped
  tunesmith train my-recipe.yaml --fresh                        # puts the old run aside and starts over

ctrl-C (and SIGTERM, SIGHUP, SIGUSR1) saves after the present step and exits with 75: the same command goes on. ctrl-C
again stops at once: the same command goes on from the newest checkpoint.
"""

import argparse
import json
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from tunesmith.cli.options import add_recipe, chosen_recipe
from tunesmith.distributed.ranks import started_as, told_once_a_node
from tunesmith.host.signals import StopRequest
from tunesmith.host.streams import lasting
from tunesmith.metrics.log_file import LogFile
from tunesmith.run_dir import LOG


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--fresh", action="store_true", help="put an earlier run in output_dir aside and start over"
    )
    parser.add_argument(
        "--why", action="store_true", help="say why each choice was made for this machine"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def run(args: argparse.Namespace) -> None:
    leads = (started_as() or {"RANK": 0})["RANK"] == 0  # of several ranks one speaks
    log = LogFile()
    say = log.with_log(partial(print, file=sys.stderr, flush=True) if leads else lambda text: None)
    with StopRequest() as early:
        early.doing = "the libraries are loaded"  # for seconds; an exception inside torch's C++ code would abort
        early.hold(say)
        with told_once_a_node():
            recipe, made = chosen_recipe(args, say)
            if made is not None:
                made.check_file()
        if made is not None:
            say(f"recipe: {made.name} (to change it, edit it, then: tunesmith train {made.name})")
        from tunesmith.metrics.summary import closing_summary
        from tunesmith.training.run import train

        if early.requested():
            raise early.not_begun()

    log.path = Path(recipe.output_dir, LOG)

    def keep(record: object) -> None:
        """Write the recipe's file, and what was told before: the run has begun. A start that is refused leaves none."""
        with suppress(OSError):
            log.open()
        if made is not None:
            made.write_file()

    result = train(recipe, fresh=args.fresh, why=args.why, argv=sys.argv, on_record=keep)
    if not leads:
        return
    sys.stdout = lasting(sys.stdout)  # the run has ended well, whether or not someone reads this
    with StopRequest() as late:
        late.hold()
        if args.json:
            print(json.dumps(result.values()))
        else:
            before = result.finished_before
            text = closing_summary(
                recipe, steps=result.steps, seconds=result.seconds, finished_before=before
            )
            print(text)
            if not before:
                keep(None)
                with suppress(OSError):
                    log.write(text)
    log.close()
