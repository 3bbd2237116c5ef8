"""Chat with a trained model, its base, or both.

example:
  tunesmith chat runs/my-run
  tunesmith chat runs/my-run --side-by-side
  tunesmith chat runs/my-vision-run --image photo.jpg
  tunesmith chat runs/my-run --tools tools.json
  tunesmith chat demo  # the demo's model, as it is
  echo "What do you know?" | tunesmith chat runs/my-run

ctrl-C stops an answer. Without a terminal, every line of stdin is the next
question of one conversation, a line /reset starts a new one, and only answers
go to stdout. `tunesmith generate` answers rows of a file, each alone.
"""

import argparse

from tunesmith.cli.options import add_decoding, add_run
from tunesmith.errors import UsageError
from tunesmith.inference.load_run import locate_run

LOADS_TORCH = "here"

EPILOG = """commands in the chat:
/reset                   start a new conversation
/quit                    leave (so does ctrl-D, or ctrl-C twice)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    sides = parser.add_mutually_exclusive_group()
    sides.add_argument("--base", action="store_true", help="chat with the base model")
    both = "show the answers of both base and tuned model"
    sides.add_argument("--side-by-side", action="store_true", help=both)
    system = "system message (default: the recipe's)"
    parser.add_argument("--system", metavar="TEXT", help=system)
    tools = "JSON list of the tools (functions) that the model may call"
    parser.add_argument("--tools", metavar="FILE", help=tools)
    image = "picture that the first question shows; may be repeated"
    parser.add_argument("--image", metavar="FILE", action="append", default=[], help=image)
    add_decoding(parser, max_new_tokens=512)


def run(args: argparse.Namespace) -> None:
    location = locate_run(args.run, trust_remote_code=args.trust_remote_code)
    if location.holds == "base" and args.side_by_side:
        what = f"{args.run} is a base model, so there is nothing to compare"
        fix = "use a run, a checkpoint or an adapter, or remove --side-by-side"
        raise UsageError(what, where="--side-by-side", fix=fix)
    from tunesmith.tools.evaluate.chat import start_chat

    start_chat(args, location)
