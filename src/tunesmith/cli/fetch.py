"""Check license, access and disk, then download a model and a recipe's data.

example:
  tunesmith fetch smollm2-135m-lora  # the model and the data of a recipe
  # license, access and sizes; downloads nothing
  tunesmith fetch Qwen/Qwen3-8B --dry-run
  tunesmith fetch --list
  tunesmith fetch --remove Qwen/Qwen3-8B
  ssh spark-b tunesmith fetch --remove "'meta-llama/*'" --dry-run

An interrupted download resumes where it stopped. HF_HOME names the cache,
HF_TOKEN is your access token.
"""

import argparse
import dataclasses
import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal as size_text

from tunesmith.cli.options import add_json, add_overrides
from tunesmith.config.load import load_recipe
from tunesmith.config.names import nearest
from tunesmith.config.schema import Model, Source
from tunesmith.config.shipped import shipped
from tunesmith.data.source.open_source import is_local, read_rows
from tunesmith.errors import MachineError, UsageError
from tunesmith.host.shell import shell_command, shell_path, shell_word
from tunesmith.host.streams import visible
from tunesmith.units import count_of

if TYPE_CHECKING:
    from tunesmith.hub.download import FetchProgress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        nargs="?",
        metavar="RECIPE|MODEL",
        help="a recipe, or a Hub id, folder or .gguf file",
    )
    add_overrides(parser)
    parser.add_argument("--revision", help="branch, tag or commit of a model, without a recipe")
    parser.add_argument(
        "--update", action="store_true", help="ask the Hub for a newer commit of a cached model"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only check and show; download or remove nothing"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the contents of the caches, largest first"
    )
    what = "delete a model or data set from the cache; patterns work"
    parser.add_argument("--remove", metavar="NAME", help=what)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    if args.list:
        _list(as_json=args.json)
    elif args.remove is not None:
        _remove(args.remove, dry=args.dry_run, as_json=args.json)
    elif args.name is None:
        fix = "tunesmith fetch smollm2-135m-lora, or --list"
        raise UsageError("fetch requires a recipe or a model", where="command line", fix=fix)
    else:
        _fetch(args)


def _fetch(args: argparse.Namespace) -> None:
    model, sources = _model_and_sources(args)
    from tunesmith.hub.download import FetchProgress

    progress = FetchProgress()
    rows = [_model(model, progress, dry=args.dry_run, update=args.update)]
    rows += [_dataset(source, progress, dry=args.dry_run) for source in sources]
    print(json.dumps(rows, indent=2) if args.json else "\n".join(map(_line, rows)))


def _model_and_sources(args: argparse.Namespace) -> "tuple[Model, list[Source]]":
    """The model and the Hub's data sets that the command line asks for."""
    if args.name in shipped() or Path(args.name).suffix in (".yaml", ".yml"):
        if args.revision is not None:
            command = shell_command(
                ["tunesmith", "fetch", args.name, f"model.revision={args.revision}"]
            )
            raise UsageError("a recipe sets its own revision", where="--revision", fix=command)
        recipe = load_recipe(args.name, args.overrides)
        sources = {}
        # A data set may be the source of several splits: it is fetched once.
        for source in (*recipe.data.train, *recipe.data.validation):
            if not is_local(source.source):
                sources[source.source, source.name, source.revision] = source
        return recipe.model, list(sources.values())
    if args.overrides:
        command = f"tunesmith fetch {shell_word(args.name)} --revision REVISION"
        what = f"{args.overrides[0]!r} needs a recipe"
        fix = f"{command}; key=value requires a recipe"
        raise UsageError(what, where="command line", fix=fix)
    return Model(name=args.name, revision=args.revision), []


def _model(model: "Model", progress: "FetchProgress", *, dry: bool, update: bool) -> dict[str, Any]:
    """Fetch a model, or with `dry` only look; a row of the output, with sizes in bytes."""
    from tunesmith.hub import fetch

    row: dict[str, Any] = {
        "name": model.name,
        "kind": "model",
        "licence": None,
        "bytes": None,
        "missing_bytes": 0,
    }
    folder = fetch.local_model(model)
    if folder is None and not update:
        folder = fetch.cached_model(model)
    # Neither a folder nor in the cache: what the Hub lists is fetched.
    if folder is None:
        plan = fetch.plan_download(model, progress)
        row["licence"] = plan.listing.license
        row["gated"] = plan.listing.gated
        row["revision"] = plan.listing.commit
        row["bytes"] = plan.total
        row["missing_bytes"] = plan.missing
        row["left_out"] = list(plan.left_out)
        fetch.check_cache_room(model.name, plan.missing)
        if not dry:
            folder = fetch.download_model(plan, progress)
    # A GGUF file is read into a folder of its own.
    elif folder.is_file() and not dry:
        from tunesmith.inference.load_run import select_device
        from tunesmith.planning.resolve import resolve_dtype_here

        dtype = resolve_dtype_here(model, select_device(None))
        folder = fetch.fetch(dataclasses.replace(model, dtype=dtype), progress=progress)
    # The folder is checked also where nothing was fetched.
    if folder is not None and folder.is_dir():
        spec = fetch.check_folder(folder, model)
        row["type"] = spec.model_type
        row["parameters"] = spec.parameters
        if not row["bytes"]:
            row["bytes"] = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    if model.tokenizer is not None and not dry:
        fetch.fetch_without_weights(model.tokenizer)
    row["folder"] = None if folder is None else str(folder)
    return row


def _dataset(source: "Source", progress: "FetchProgress", *, dry: bool) -> dict[str, Any]:
    """Fetch one of the Hub's data sets, or with `dry` only look."""
    from huggingface_hub import constants

    from tunesmith.hub import fetch

    row: dict[str, Any] = {"name": source.source, "kind": "dataset", "licence": None, "bytes": None}
    if not constants.HF_HUB_OFFLINE:
        listing = fetch.list_repo(source.source, source.revision, "dataset", progress)
        size = sum(file.size for file in listing.files.values())
        row["licence"] = listing.license
        row["gated"] = listing.gated
        row["revision"] = listing.commit
        row["bytes"] = size
        if not fetch.repo_cache(source.source, "dataset").exists():
            # As it is on the Hub, and as an Arrow table.
            fetch.check_cache_room(source.source, 2 * size)
    if not dry:
        row["rows"] = len(read_rows(source))
    return row


def _line(row: dict[str, Any]) -> str:
    """A row as text."""
    parts = [row["name"], row["kind"]]
    if row["licence"]:
        parts.append(f"license {row['licence']}")
    if row["bytes"]:
        parts.append(size_text(row["bytes"]))
    if row.get("missing_bytes") and row["folder"] is None:
        parts.append(f"{size_text(row['missing_bytes'])} to download")
    if row.get("parameters"):
        parts.append(f"{row['parameters'] / 1e9:.2f} B parameters")
    if "rows" in row:
        parts.append(count_of(row["rows"], "row"))
    if row.get("folder"):
        parts.append(row["folder"])
    return "  ".join(parts)


def _list(*, as_json: bool) -> None:
    from tunesmith.hub.fetch import cached_items

    items = cached_items()
    if as_json:
        rows = [dataclasses.asdict(item) for item in items]
        print(json.dumps(rows, indent=2, default=str))
        return
    width = max((len(item.name) for item in items), default=0)
    for item in items:
        line = f"{item.name:<{width}}  {item.kind:<9}  {size_text(item.size):>10}  {item.folder}"
        print(visible(line))
    total = size_text(sum(item.size for item in items))
    print(f"{len(items)} in the caches, {total}", file=sys.stderr)


def _remove(name: str, *, dry: bool, as_json: bool) -> None:
    """Delete what the pattern names from the caches; print what goes."""
    from tunesmith.hub.fetch import cached_items, remove_cached

    cached = cached_items()
    items = [item for item in cached if fnmatchcase(item.name, name)]
    if not items:
        near = nearest(name, [item.name for item in cached])
        fix = f"did you mean {near}?" if near else "tunesmith fetch --list"
        raise UsageError(f"{name} is not in the caches", where="--remove", fix=fix)
    if not dry:
        for item in items:
            try:
                remove_cached(item)
            except OSError as error:
                what = f"cannot delete {name}: {error.strerror}"
                fix = f"ls -ld {shell_path(item.folder)}"
                raise MachineError(what, where=str(item.folder), fix=fix) from error
    if as_json:
        rows = []
        for item in items:
            size = item.size
            rows.append({"name": item.name, "kind": item.kind, "bytes": size, "removed": not dry})
        print(json.dumps(rows, indent=2))
        return
    verb = "would remove" if dry else "removed"
    for item in items:
        print(f"{verb} {item.kind} {item.name}  {size_text(item.size)}")
