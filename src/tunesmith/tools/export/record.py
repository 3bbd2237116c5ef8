"""Export record of a GGUF file: its properties and the result of its check.

The record of `FILE.gguf` is the file `FILE.gguf.json` in the same folder.

`push` reads the model card and the measured values from the record, but does not upload the record.
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

# Files that identify a run directory, an adapter folder and a model folder, in this order. A folder
# that contains one of these files is not a GGUF export.
OTHER_FOLDERS = ("config.yaml", "adapter_config.json", "config.json")
ADAPTER_KIND = "GGUF, LoRA only, f16"


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


def make_record(
    location: RunLocation,
    kind: str,
    size: int,
    unchecked: str,
    check: "FileCheck | None",
    *,
    base: "GgufBase | None" = None,
    converter: "Converter | None" = None,
) -> ExportRecord:
    """Return the record of an exported GGUF file.

    Args:
        location: the exported run.
        kind: description of the weights' type, for the model card.
        size: size of the file in bytes.
        unchecked: why the file was not checked; "" if it was.
        base: the GGUF file that an adapter was trained on; None if the base is not a GGUF file.
        converter: llama.cpp's converter, if the converter wrote the file.
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
        "card": make_card(location, merged=merged, library="gguf"),
    }


def make_card(location: RunLocation, *, merged: str = "", library: str | None = None) -> str:
    """Return the model card for an export of a run. See `model_card` for `merged` and `library`."""
    # Checkpoints and final/ are in the run directory, so the parent folder is the run directory.
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
    """Collect the files to upload for an exported GGUF file, or for a folder of such files.

    Return a dict from the path in the repository to the local file or its contents. If there is no
    model card, build it from the export records. Return None if `path` is not a GGUF export.

    Raise UsageError if a record that the card needs is missing or belongs to another file.
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
    # All files in the folder were exported from the same run, so the card of the first file fits
    # all files.
    return with_files(cards[0], rows)


def card_row(name: str, record: ExportRecord) -> CardFile:
    """Return the row that describes a file in the table of the model card."""
    check = record["check"]
    if check is None:
        return CardFile(name, record["kind"], record["bytes"])
    tuned = check["tuned"]
    return CardFile(name, record["kind"], record["bytes"], tuned["mean_kl"], tuned["agreement"])


def _read_record(file: Path) -> ExportRecord:
    """Read the export record of a GGUF file.

    Raise UsageError if there is no valid record, or if the file's size differs from the record.
    """
    record_file = record_path(file)
    size = file.stat().st_size
    fix = f"export the file again, or add a {CARD} to its folder and push the folder"
    try:
        record: ExportRecord = json.loads(record_file.read_text(encoding="utf-8"))
        missing = [key for key in ("kind", "check", "card") if key not in record]
        if record["bytes"] != size:
            why = f"the record is for a file of {record['bytes']} bytes, but the file has {size}"
        elif missing:
            why = f"{record_file.name} lacks {', '.join(missing)}"
        else:
            return record
    except FileNotFoundError:
        why = f"the file {record_file.name}, which `export` writes, does not exist"
    except (OSError, ValueError, KeyError, TypeError):
        why = f"{record_file.name} cannot be read"
    raise UsageError(
        f"there is no valid export record for {file.name}", where=file, why=why, fix=fix
    )
