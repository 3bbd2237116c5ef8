"""Chat with a trained model or its base.

example:
  tunesmith chat runs/my-run
  tunesmith chat runs/my-run --base
  tunesmith chat runs/my-vision-run --image photo.jpg
  tunesmith chat runs/my-run --tools tools.json
  tunesmith chat demo  # the demo's base model
  echo "What do you know?" | tunesmith chat runs/my-run

ctrl-C stops an answer. Without a terminal, every line of stdin is the next
question of one conversation, a line /reset starts a new conversation, and only
answers go to stdout. To answer each row of a file separately, use
`tunesmith generate`.
"""

import argparse

from tunesmith.answers.load_run import locate_run
from tunesmith.cli.options import add_decoding, add_run

LOADS_TORCH = "here"

EPILOG = """commands in the chat:
/reset                   start a new conversation
/quit                    end the chat, like ctrl-D or ctrl-C twice"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--base", action="store_true", help="chat with the base model instead of the tuned model"
    )
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="system message (default: the system message of the recipe)",
    )
    parser.add_argument(
        "--tools", metavar="FILE", help="JSON list of the tools (functions) that the model may call"
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        action="append",
        default=[],
        help="picture file for the first question; may be repeated",
    )
    add_decoding(parser, max_new_tokens=512)


def run(args: argparse.Namespace) -> None:
    location = locate_run(args.run, base_only=args.base, trust_remote_code=args.trust_remote_code)
    from tunesmith.tools.evaluate.chat import start_chat

    start_chat(args, location)
