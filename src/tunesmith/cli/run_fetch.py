"""Implementation of the command `fetch`, which downloads models and data sets."""

import json
from collections.abc import Sequence
from typing import Any

from huggingface_hub import constants
from rich.filesize import decimal as size_text

from tunesmith.config.schema import Model, Source
from tunesmith.hub import fetch
from tunesmith.rows.source.open_source import read_rows
from tunesmith.units import count_of


def fetch_all(
    model: Model, sources: Sequence[Source], *, dry: bool, update: bool, as_json: bool
) -> None:
    """Download a model and data sets, and print a row for each. `dry` only checks them."""
    rows = [_model(model, dry=dry, update=update)]
    rows += [_dataset(source, dry=dry) for source in sources]
    print(json.dumps(rows, indent=2) if as_json else "\n".join(map(_line, rows)))


def _model(model: Model, *, dry: bool, update: bool) -> dict[str, Any]:
    """Download a model, or only check it if `dry`. Return its output row, with sizes in bytes."""
    row: dict[str, Any] = {"name": model.name, "kind": "model", "licence": None, "missing_bytes": 0}
    folder = fetch.local_model(model)
    if folder is None and not update:
        folder = fetch.cached_model(model)
    # If the model is neither a local folder nor in the cache, download it from the Hub.
    if folder is None:
        plan = fetch.plan_download(model)
        row |= {
            "licence": fetch.stated_license(plan.info),
            "gated": bool(plan.info.gated),
            "revision": plan.info.sha,
            "bytes": plan.total,
            "missing_bytes": plan.missing,
        }
        fetch.check_cache_space(model.name, plan.missing)
        if not dry:
            folder = fetch.download_model(plan)
    # Check the folder even if nothing was downloaded.
    if folder is not None:
        spec = fetch.check_folder(folder, model)
        row |= {
            "type": spec.model_type,
            "parameters": spec.parameters,
            "bytes": sum(f.stat().st_size for f in folder.iterdir() if f.is_file()),
        }
    if model.tokenizer is not None and not dry:
        fetch.fetch_tokenizer(model.tokenizer)
    row["folder"] = None if folder is None else str(folder)
    return row


def _dataset(source: Source, *, dry: bool) -> dict[str, Any]:
    """Download a data set from the Hub, or only check it if `dry`. Return its output row."""
    row: dict[str, Any] = {"name": source.source, "kind": "dataset", "licence": None, "bytes": None}
    if not constants.HF_HUB_OFFLINE:
        info = fetch.describe_repo(source.source, source.revision, "dataset")
        size = sum(file.size or 0 for file in info.siblings or ())
        row |= {
            "licence": fetch.stated_license(info),
            "gated": bool(info.gated),
            "revision": info.sha,
            "bytes": size,
        }
        if not fetch.repo_cache(source.source, "dataset").exists():
            fetch.check_cache_space(source.source, size)
    if not dry:
        row["rows"] = len(read_rows(source))
    return row


def _line(row: dict[str, Any]) -> str:
    """Format an output row as text."""
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
