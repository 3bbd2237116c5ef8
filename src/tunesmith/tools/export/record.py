"""The record of what an export measured of a GGUF file, stored beside it: `FILE.gguf.json`.

`push` reads the model card and the figures from it, and does not send it.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from tunesmith.checkpoint.manifest import CARD
from tunesmith.checkpoint.model_card import CardFile, model_card, with_files
from tunesmith.errors import UsageError
from tunesmith.host.files import write_atomically
from tunesmith.inference.load_run import RunLocation
from tunesmith.run_dir import weights_step
from tunesmith.tools.export.output import record_path

if TYPE_CHECKING:
    from tunesmith.tools.export.gguf.adapter import GgufBase
    from tunesmith.tools.export.gguf.check import FileCheck
    from tunesmith.tools.export.gguf.converter import Converter

# What is in a run, an adapter's folder and a model's.
OTHER_FOLDERS = ("config.yaml", "adapter_config.json", "config.json")
ADAPTER_KIND = "GGUF, the LoRA alone in f16"


class ExportRecord(TypedDict):
    """The content of FILE.gguf.json."""

    tunesmith: str
    kind: str
    bytes: int
    check: dict[str, dict[str, float]] | None
    unchecked: str
    base: dict[str, str] | None
    converter: dict[str, str] | None
    card: str


def record_of(
    location: RunLocation,
    kind: str,
    size: int,
    unchecked: str,
    check: "FileCheck | None",
    *,
    base: "GgufBase | None" = None,
    converter: "Converter | None" = None,
) -> ExportRecord:
    """The record of an exported GGUF file.

    Args:
        location: of the run that was exported.
        kind: the type of the file's weights, in words.
        size: bytes of the file.
        unchecked: why there is no check.
        base: the one GGUF file that an adapter is for.
        converter: llama.cpp's converter that wrote the file.
    """
    merged = "" if kind == ADAPTER_KIND else "GGUF"
    return {
        "tunesmith": "export",
        "kind": kind,
        "bytes": size,
        "check": asdict(check) if check else None,
        "unchecked": unchecked,
        "base": {"file": base.file.name, "sha256": base.sha256} if base else None,
        "converter": {"folder": str(converter.folder), "sha256": converter.sha256}
        if converter
        else None,
        "card": card_of(location, merged=merged, library="gguf"),
    }


def card_of(location: RunLocation, *, merged: str = "", library: str | None = None) -> str:
    """The model card of what is made of a run; `merged` and `library` as of `model_card`."""
    # A run's checkpoints and final/ lie in its directory.
    run_dir = location.folder.parent if location.folder else Path()
    return model_card(
        location.base,
        location.run,
        run_dir,
        merged=merged,
        library=library,
        is_trained=location.holds != "base",
        step=weights_step(location.folder),
    )


def write_record(file: Path, record: ExportRecord) -> None:
    write_atomically(record_path(file), json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def gguf_to_push(path: Path) -> dict[str, Path | bytes] | None:
    """Collect what an exported GGUF file or a folder of such files sends: path in the repository ->
    file or contents, with a card from their records. None where `path` is something else.

    UsageError where a file is not the one that its record is about.
    """
    if path.suffix == ".gguf" and path.is_file():
        files = [path]
    elif path.is_dir() and not any((path / name).exists() for name in OTHER_FOLDERS):
        files = sorted(file for file in path.iterdir() if file.is_file())
    else:
        return None
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if not ggufs:
        return None
    records = {record_path(file): file for file in ggufs}
    sent: dict[str, Path | bytes] = {}
    for file in files:
        if file not in records and not file.name.startswith("."):
            sent[file.name] = file
    if CARD not in sent:
        sent[CARD] = _card(ggufs).encode()
    return sent


def _card(ggufs: list[Path]) -> str:
    cards = []
    rows = []
    for file in ggufs:
        record = _read_record(file)
        cards.append(record["card"])
        rows.append(card_row(file.name, record))
    # Files of one folder are of one run; the first tells of it.
    return with_files(cards[0], rows)


def card_row(name: str, record: ExportRecord) -> CardFile:
    """The row of a file in the card's table."""
    check = record["check"]
    if check is None:
        return CardFile(name, record["kind"], record["bytes"])
    tuned = check["tuned"]
    return CardFile(name, record["kind"], record["bytes"], tuned["mean_kl"], tuned["agreement"])


def _read_record(file: Path) -> ExportRecord:
    """UsageError where there is none, or one of another file."""
    place = record_path(file)
    size = file.stat().st_size
    fix = f"export it again, or push its folder with a {CARD} in it"
    try:
        record: ExportRecord = json.loads(place.read_text(encoding="utf-8"))
        missing = [key for key in ("kind", "check", "card") if key not in record]
        if record["bytes"] != size:
            why = f"its record is of one with {record['bytes']} bytes, and it has {size}"
        elif missing:
            why = f"{place.name} lacks {', '.join(missing)}"
        else:
            return record
    except FileNotFoundError:
        why = f"there is no {place.name}, which `export` writes"
    except (OSError, ValueError, KeyError, TypeError):
        why = f"{place.name} cannot be read"
    raise UsageError(
        f"there is no export record for {file.name}", where=str(file), why=why, fix=fix
    )
