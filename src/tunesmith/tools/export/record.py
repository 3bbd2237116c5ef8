"""Export record of a GGUF file: its properties and the result of its check.

The record of `FILE.gguf` is the file `FILE.gguf.json` in the same folder.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.answers.load_run import RunLocation
from tunesmith.checkpoint.model_card import model_card
from tunesmith.host.files import write_atomically
from tunesmith.tools.export.output import record_path

if TYPE_CHECKING:
    from tunesmith.tools.export.gguf.adapter import GgufBase
    from tunesmith.tools.export.gguf.converter import Converter
    from tunesmith.tools.export.gguf.export import ExportedFile

ADAPTER_KIND = "GGUF, LoRA only, f16"


def write_record(
    file: Path,
    exported: "ExportedFile",
    kind: str,
    base: "GgufBase | None",
    converter: "Converter | None",
) -> None:
    """Write the record of an exported GGUF file.

    Args:
        file: the GGUF file.
        exported: the result of the export.
        kind: description of the weights' type.
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
    }
    if base:
        record["base"] = {"file": base.file.name, "sha256": base.sha256}
    if converter:
        record["converter"] = {"folder": str(converter.folder), "sha256": converter.sha256}
    text = json.dumps(record, indent=2, ensure_ascii=False)
    write_atomically(record_path(file), text + "\n")


def make_card(location: RunLocation, *, merged: str = "") -> str:
    """Return the model card for an export of a run. See `model_card` for `merged`."""
    return model_card(
        location.base, location.run, merged=merged, is_trained=location.holds != "base"
    )
