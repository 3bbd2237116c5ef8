"""Result of an export to GGUF, and its record: the properties of the file and its check.

The record of `FILE.gguf` is the file `FILE.gguf.json` in the same folder.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.answers.load_run import RunLocation
from tunesmith.checkpoint.model_card import model_card
from tunesmith.host.files import write_atomically
from tunesmith.metrics.result_table import ResultTable, Tabular
from tunesmith.tools.export.output import record_path

if TYPE_CHECKING:
    from tunesmith.tools.export.gguf.check import FileCheck
    from tunesmith.tools.export.gguf.converter import Converter

ADAPTER_KIND = "GGUF, LoRA only, f16"


@dataclass(frozen=True)
class ExportedFile(Tabular):
    """Result of an export to GGUF: the written file, and its comparison with the tuned model.

    Attributes:
        output: the path that the caller gave.
        file: the GGUF file; for Ollama it is in the folder `output`.
        quant: the quantization of the weights.
        bytes: size of the file.
        notes: differences between llama.cpp and Transformers, for the user.
        check: the comparison with the tuned model; None if the file was not checked.
        unchecked: the reason if the file was not checked; "" if it was checked.
    """

    output: str
    file: str
    quant: str
    bytes: int
    notes: tuple[str, ...]
    check: "FileCheck | None"
    unchecked: str = ""

    def table(self) -> ResultTable:
        """Return a table with the file and its difference to the tuned model."""
        rows = [("file", self.file), ("size", f"{self.bytes / 1e6:,.1f} MB in {self.quant}")]
        notes = [f"note: {note}" for note in self.notes]
        check = self.check
        if check is None:
            rows.append(("check", f"not compared with the tuned model ({self.unchecked})"))
            return ResultTable(rows, notes=notes)
        answers = f"mean KL {check.tuned.mean_kl:.2g} nats against the tuned model"
        if check.base:
            answers += f" (base: {check.base.mean_kl:.2g})"
        verdict = "not good: differs from the tuned model"
        if check.is_near:
            verdict = "good: near the tuned model"
        same = round(check.tuned.agreement * check.positions)
        rows += [
            ("prompts", f"{check.prompts} have identical token ids in llama.cpp"),
            ("answers", answers),
            ("next tokens", f"the same at {same} of {check.positions} positions"),
            ("verdict", verdict),
        ]
        return ResultTable(rows, notes=notes)


def write_record(
    file: Path,
    exported: ExportedFile,
    kind: str,
    converter: "Converter | None",
) -> None:
    """Write the record of an exported GGUF file.

    Args:
        file: the GGUF file.
        exported: the result of the export.
        kind: description of the weights' type.
        converter: llama.cpp's converter, if the converter wrote the file.
    """
    record = {
        "tunesmith": "export",
        "kind": kind,
        "bytes": exported.bytes,
        "check": asdict(exported.check) if exported.check else None,
        "unchecked": exported.unchecked,
        "converter": None,
    }
    if converter:
        record["converter"] = {"folder": str(converter.folder), "sha256": converter.sha256}
    text = json.dumps(record, indent=2, ensure_ascii=False)
    write_atomically(record_path(file), text + "\n")


def make_card(location: RunLocation, *, merged: str = "") -> str:
    """Return the model card for an export of a run. See `model_card` for `merged`."""
    return model_card(
        location.base, location.run, merged=merged, is_trained=location.holds != "base"
    )
