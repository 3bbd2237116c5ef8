"""Upload what a run trained to the Hugging Face Hub.

example:
  tunesmith push runs/my-run
  tunesmith push runs/my-run-merged --to my-team/faq-bot --public

A run directory is pushed as its final/, or as its newest whole checkpoint without the training state. The repository is
private unless --public is given; pushed again, only what has changed is sent.
"""

import argparse
from pathlib import Path

from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="run directory, checkpoint, final/, adapter or model folder"
    )
    parser.add_argument(
        "--to", metavar="NAME", help="owner/name on the Hub (default: your account, the run's name)"
    )
    parser.add_argument(
        "--public",
        action="store_true",
        help="everybody may see the repository (default: its owner)",
    )
    parser.add_argument(
        "--revision",
        metavar="BRANCH",
        help="branch to push to, made if there is none (default: main)",
    )


def run(args: argparse.Namespace) -> None:
    from tunesmith.inference.load_run import locate_run, undeleted

    location = locate_run(args.run)
    if (folder := location.folder) is None:
        fix = "name a run directory, or a folder of model files"
        raise UsageError(f"{args.run} holds no files to push", where=args.run, fix=fix)
    from tunesmith.checkpoint.manifest import CARD, MANIFEST, check_sums
    from tunesmith.checkpoint.model_card import is_hub_id, model_card
    from tunesmith.hub.push import push_files
    from tunesmith.model.older_readers import CONFIG, TOKENIZER_CONFIG, for_older_readers

    if location.kind == "adapter" and not is_hub_id(location.base.name):
        what, why = (
            "the adapter's base is a folder of this machine",
            f"its files name {location.base.name}",
        )
        fix = f"tunesmith merge {shell_path(args.run)} --output DIR, then tunesmith push DIR; or train with the base's Hub id"
        raise UsageError(what, where=str(folder), why=why, fix=fix)
    name = (folder.parent if location.run else folder).resolve().name
    message = f"Push {name}" + (f"/{folder.name}" if location.run else "")
    with undeleted(location):
        check_sums(folder)
        paths = {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        files: dict[str, Path | bytes] = {}
        kept = (
            n
            for n in paths
            if not n.startswith(("state/", ".")) and "/." not in n and n != MANIFEST
        )
        files |= {n: paths[n] for n in kept}
        for config in {
            CONFIG,
            TOKENIZER_CONFIG,
        } & files.keys():  # of an earlier version, which wrote the new keys alone
            files[config] = for_older_readers(config, paths[config].read_bytes())
        if CARD not in files and location.kind != "base":
            files[CARD] = model_card(location.base, location.run, folder.parent).encode()
        page = push_files(
            files, args.to or name, public=args.public, revision=args.revision, message=message
        )
    print(page)
