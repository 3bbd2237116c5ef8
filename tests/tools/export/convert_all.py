"""Convert several models in one process, as `convert_with_llama_cpp` does one: imports take longer.

    python convert_all.py FOLDER CONVERTER QUANT ...    # FOLDER/NAME -> FOLDER/NAME-QUANT.gguf

An error is written to FOLDER/NAME-QUANT.txt.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from tunesmith.inference.load_run import locate_run
from tunesmith.tools.export.gguf.convert_with_llama_cpp import Conversion, _convert
from tunesmith.tools.export.gguf.converter import find_converter


def main() -> None:
    root, converter, *quants = sys.argv[1:]
    found = find_converter(converter)
    assert found is not None
    for folder in sorted(path for path in Path(root).iterdir() if path.is_dir()):
        for quant in quants:
            file = Path(root) / f"{folder.name}-{quant}.gguf"
            job = Conversion(locate_run(folder), quant, "tiny", 1, for_ollama=False)
            try:
                _convert(job, found, file, lambda done, total: None)
            except Exception:
                file.with_suffix(".txt").write_text(traceback.format_exc())


main()
