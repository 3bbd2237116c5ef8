#!/usr/bin/env bash
# Makes what first_gpu.sh needs beside a checkout, for a GPU machine with Python and torch but without a network:
#   bash benchmarks/first_gpu_prep.sh ROWS TOKENIZER [FOLDER=.gpu]
# ROWS: a JSON array of alpaca rows. TOKENIZER: a folder, a Hub id, or a .gguf file. Copy FOLDER (about 50 MB) along with the
# checkout. PYTHON_VERSION and ARCH are those of the GPU machine; WHEELS names what its Python lacks.
set -euo pipefail
rows=${1:?rows: a JSON array of alpaca rows} tokenizer=${2:?tokenizer: a folder, a Hub id or a .gguf file} folder=${3:-.gpu}
arch=${ARCH:-x86_64} python=${PYTHON:-python3}
wheels=${WHEELS:-ruamel.yaml bitsandbytes pydantic pydantic-core annotated-types typing-inspection typing-extensions
  pytest-xdist execnet}
mkdir -p "$folder/wheels"
for wheel in $wheels; do
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" --implementation cp \
    --platform "manylinux_2_28_$arch" --platform "manylinux_2_24_$arch" --platform "manylinux_2_17_$arch" \
    --platform "manylinux2014_$arch" --platform any -d "$folder/wheels" "$wheel" || echo "not found: $wheel" >&2
done
"$python" - "$rows" "$tokenizer" "$folder" <<'P'
import json, sys
from pathlib import Path
from transformers import AutoTokenizer

rows, tokenizer, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
# Repeated: a small file fills few bins, so that a step at the end of an epoch would be short.
once = json.loads(Path(rows).read_text())
(folder / "rows.json").write_text(json.dumps(once * max(1, 8_000 // len(once))))
file = Path(tokenizer)
given = (str(file.parent), {"gguf_file": file.name}) if file.suffix == ".gguf" else (tokenizer, {})
AutoTokenizer.from_pretrained(given[0], **given[1]).save_pretrained(folder / "tokenizer")
P
du -sh "$folder"
