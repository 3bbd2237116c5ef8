"""The work of `fetch`: download a model and data sets, list the caches, delete from them."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from huggingface_hub import constants
from rich.filesize import decimal as size_text

from tunesmith.cli.options import print_columns
from tunesmith.config.names import nearest
from tunesmith.config.schema import Model, Source
from tunesmith.data.source.open_source import read_rows
from tunesmith.errors import UsageError
from tunesmith.hub import fetch
from tunesmith.hub.fetch import cached_items, remove_cached
from tunesmith.inference.load_run import select_device
from tunesmith.units import count_of


def fetch_all(
    model: Model, sources: Sequence[Source], *, dry: bool, update: bool, as_json: bool
) -> None:
    """Fetch a model and data sets, or with `dry` only look; print a row for each."""
    rows = [_model(model, dry=dry, update=update)]
    rows += [_dataset(source, dry=dry) for source in sources]
    print(json.dumps(rows, indent=2) if as_json else "\n".join(map(_line, rows)))


def _model(model: Model, *, dry: bool, update: bool) -> dict[str, Any]:
    """Fetch a model, or with `dry` only look; a row of the output, with sizes in bytes."""
    row: dict[str, Any] = {"name": model.name, "kind": "model", "licence": None, "missing_bytes": 0}
    folder = fetch.local_model(model)
    if folder is None and not update:
        folder = fetch.cached_model(model)
    # Neither a folder nor in the cache: what the Hub lists is fetched.
    if folder is None:
        plan = fetch.plan_download(model)
        row["licence"] = fetch.stated_license(plan.info)
        row["gated"] = bool(plan.info.gated)
        row["revision"] = plan.info.sha
        row["bytes"] = plan.total
        row["missing_bytes"] = plan.missing
        fetch.check_cache_room(model.name, plan.missing)
        if not dry:
            folder = fetch.download_model(plan)
    # A GGUF file is read into a folder of its own.
    elif folder.is_file() and not dry:
        from tunesmith.planning.resolve import resolve_dtype_here  # loads torch

        dtype = resolve_dtype_here(model, select_device(None))
        folder = fetch.fetch(dataclasses.replace(model, dtype=dtype))
    # The folder is checked also where nothing was fetched.
    if folder is not None and folder.is_dir():
        spec = fetch.check_folder(folder, model)
        row["type"] = spec.model_type
        row["parameters"] = spec.parameters
        row["bytes"] = sum(f.stat().st_size for f in folder.iterdir() if f.is_file())
    if model.tokenizer is not None and not dry:
        fetch.fetch_without_weights(model.tokenizer)
    row["folder"] = None if folder is None else str(folder)
    return row


def _dataset(source: Source, *, dry: bool) -> dict[str, Any]:
    """Fetch one of the Hub's data sets, or with `dry` only look."""
    row: dict[str, Any] = {"name": source.source, "kind": "dataset", "licence": None, "bytes": None}
    if not constants.HF_HUB_OFFLINE:
        info = fetch.describe_repo(source.source, source.revision, "dataset")
        size = sum(file.size or 0 for file in info.siblings or ())
        row["licence"] = fetch.stated_license(info)
        row["gated"] = bool(info.gated)
        row["revision"] = info.sha
        row["bytes"] = size
        if not fetch.repo_cache(source.source, "dataset").exists():
            # As it is on the Hub, and as an Arrow table.
            fetch.check_cache_room(source.source, 2 * size)
    if not dry:
        row["rows"] = len(read_rows(source))
    return row


def _line(row: dict[str, Any]) -> str:
    """A row as text."""
    missing = 0 if row.get("folder") else row.get("missing_bytes")
    parts = [
        row["name"],
        row["kind"],
        row["licence"] and f"license {row['licence']}",
        row.get("bytes") and size_text(row["bytes"]),
        missing and f"{size_text(missing)} to download",
        row.get("parameters") and f"{row['parameters'] / 1e9:.2f} B parameters",
        "rows" in row and count_of(row["rows"], "row"),
        row.get("folder"),
    ]
    return "  ".join(filter(None, parts))


def list_caches(*, as_json: bool) -> None:
    """Print what the caches hold, largest first."""
    items = cached_items()
    if as_json:
        rows = [dataclasses.asdict(item) for item in items]
        print(json.dumps(rows, indent=2, default=str))
        return
    print_columns([(it.name, it.kind, size_text(it.size), str(it.folder)) for it in items])
    total = size_text(sum(item.size for item in items))
    print(f"{len(items)} in the caches, {total}", file=sys.stderr)


def remove_from_caches(name: str, *, dry: bool, as_json: bool) -> None:
    """Delete what the pattern names from the caches; print what goes."""
    cached = cached_items()
    items = [item for item in cached if fnmatchcase(item.name, name)]
    if not items:
        near = nearest(name, [item.name for item in cached])
        fix = f"did you mean {near}?" if near else "tunesmith fetch --list"
        raise UsageError(f"{name} is not in the caches", where="--remove", fix=fix)
    if not dry:
        for item in items:
            remove_cached(item)
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
