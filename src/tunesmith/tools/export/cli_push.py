"""Upload a trained model to the Hugging Face Hub.

example:
  tunesmith push runs/my-run
  tunesmith push runs/my-run-merged --to my-team/faq-bot --public
  tunesmith push my-model-for-ollama
  tunesmith push my-model.gguf

For a run directory it uploads final/, or the newest complete checkpoint without
the training state. The repository is private unless you pass --public; a second
push uploads only changes. For exported files, the model card lists each file's
kind, size and mean KL, as measured by `export`.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        metavar="RUN",
        help="what to upload: a run directory, a checkpoint, final/, an adapter or model folder, "
        "or an exported file or folder",
    )
    parser.add_argument(
        "--to",
        metavar="NAME",
        help="repository on the Hub as owner/name (default: the run's name, in your account)",
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="make the repository public (default: private)",
    )
    parser.add_argument(
        "--revision",
        metavar="BRANCH",
        help="branch to push to, created if missing (default: main)",
    )


def run(args: argparse.Namespace) -> None:
    from tunesmith.tools.export.push import push

    print(push(args.run, to=args.to, public=args.public, revision=args.revision))
