"""Export record of a GGUF file: its properties and the result of its check.

The record of `FILE.gguf` is the file `FILE.gguf.json` in the same folder.

`push` reads the model card and the measured values from the record, but does not upload the record.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.answers.load_run import RunLocation
from tunesmith.checkpoint.manifest import CARD
from tunesmith.checkpoint.model_card import CardFile, model_card, with_files
from tunesmith.errors import UsageError
from tunesmith.host.files import write_atomically
from tunesmith.run_dir import weights_step
from tunesmith.tools.export.output import record_path

if TYPE_CHECKING:
    from tunesmith.tools.export.gguf.adapter import GgufBase
    from tunesmith.tools.export.gguf.converter import Converter
    from tunesmith.tools.export.gguf.export import ExportedFile

# Files that identify a run directory, an adapter folder and a model folder, in this order. A folder
# that contains one of these files is not a GGUF export.
OTHER_FOLDERS = ("config.yaml", "adapter_config.json", "config.json")
ADAPTER_KIND = "GGUF, LoRA only, f16"


def write_record(
    file: Path,
    location: RunLocation,
    exported: "ExportedFile",
    kind: str,
    base: "GgufBase | None",
    converter: "Converter | None",
) -> None:
    """Write the record of an exported GGUF file.

    Args:
        file: the GGUF file.
        location: the exported run.
        exported: the result of the export.
        kind: description of the weights' type, for the model card.
        base: the GGUF file that an adapter was trained on; None if the base is not a GGUF file.
        converter: llama.cpp's converter, if the converter wrote the file.
    """
    record = {
        "tunesmith": "export",
        "kind": kind,
        "bytes": exported.bytes,
        "check": asdict(exported.check) if exported.check else None,
        "unchecked": exported.unchecked,
        "base": None,
        "converter": None,
        "card": make_card(location, merged="" if kind == ADAPTER_KIND else "GGUF", library="gguf"),
    }
    if base:
        record["base"] = {"file": base.file.name, "sha256": base.sha256}
    if converter:
        record["converter"] = {"folder": str(converter.folder), "sha256": converter.sha256}
    text = json.dumps(record, indent=2, ensure_ascii=False)
    write_atomically(record_path(file), text + "\n")


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
    records = [record_path(file) for file in ggufs]
    sent: dict[str, Path | bytes] = {
        file.name: file for file in files if file not in records and not file.name.startswith(".")
    }
    if CARD not in sent:
        sent[CARD] = _card(ggufs).encode()
    return sent


def _card(ggufs: list[Path]) -> str:
    cards = []
    rows = []
    for file in ggufs:
        record = _read_record(file)
        cards.append(record["card"])
        measured = record["check"]["tuned"] if record["check"] else {}
        mean_kl, agreement = measured.get("mean_kl"), measured.get("agreement")
        rows.append(CardFile(file.name, record["kind"], record["bytes"], mean_kl, agreement))
    # All files in the folder were exported from the same run, so the card of the first file fits
    # all files.
    return with_files(cards[0], rows)


def _read_record(file: Path) -> dict[str, Any]:
    """Read the export record of a GGUF file.

    Raise UsageError if there is no valid record, or if the file's size differs from the record.
    """
    record_file = record_path(file)
    size = file.stat().st_size
    fix = f"export the file again, or add a {CARD} to its folder and push the folder"
    try:
        record: dict[str, Any] = json.loads(record_file.read_text(encoding="utf-8"))
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
