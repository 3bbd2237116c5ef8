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
from pathlib import Path

from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        metavar="RUN",
        help="run directory, checkpoint, final/, adapter or model folder, exported file or folder",
    )
    parser.add_argument(
        "--to", metavar="NAME", help="owner/name on the Hub (default: your account, the run's name)"
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
    from tunesmith.inference.load_run import locate_run, undeleted
    from tunesmith.tools.export.push import push_files
    from tunesmith.tools.export.record import gguf_to_push

    path = Path(args.run)
    exported = gguf_to_push(path)
    if exported is not None:
        name = path.resolve().name.removesuffix(".gguf")
        options = {"public": args.public, "revision": args.revision}
        print(push_files(exported, args.to or name, message=f"Push {name}", **options))
        return
    location = locate_run(args.run)
    folder = location.folder
    if folder is None:
        fix = "use a run directory, or a folder with model files"
        raise UsageError(f"{args.run} has no files to push", where=args.run, fix=fix)
    from tunesmith.checkpoint.manifest import CARD, MANIFEST, check_sums
    from tunesmith.checkpoint.model_card import is_hub_id, model_card
    from tunesmith.run_dir import weights_step

    # Others load an adapter by the name of its base, which must then be one that they can fetch.
    if location.holds == "adapter" and not is_hub_id(location.base.name):
        what = "the adapter's base is a local folder"
        why = f"its files name {location.base.name}"
        merge = f"tunesmith merge {shell_path(args.run)} --output DIR, then tunesmith push DIR"
        fix = f"{merge}; or train with the base's Hub id"
        raise UsageError(what, where=str(folder), why=why, fix=fix)
    if location.run:
        # A checkpoint or final/ is named after its run.
        name = folder.parent.resolve().name
        message = f"Push {name}/{folder.name}"
    else:
        name = folder.resolve().name
        message = f"Push {name}"
    with undeleted(location):
        # A damaged file would spread: sums are compared before the first byte goes.
        check_sums(folder)
        files: dict[str, Path | bytes] = {}
        for path in sorted(folder.rglob("*")):
            file = path.relative_to(folder).as_posix()
            # Hidden files are the system's or an editor's; state/ holds the optimizer, which only a
            # resumed run reads.
            is_hidden = file.startswith(".") or "/." in file
            if path.is_file() and not (is_hidden or file.startswith("state/") or file == MANIFEST):
                files[file] = path
        # A plain model has the card of its makers, or none.
        if CARD not in files and location.holds != "base":
            step = weights_step(folder)
            card = model_card(location.base, location.run, folder.parent, step=step)
            files[CARD] = card.encode()
        page = push_files(
            files, args.to or name, public=args.public, revision=args.revision, message=message
        )
    print(page)
