#!/usr/bin/env bash
# Makes what gpu_session.py needs beside a checkout, for a GPU machine with Python and torch but without a network:
#   bash benchmarks/first_gpu_prep.sh ROWS TOKENIZER [FOLDER=.gpu]
# ROWS: a JSON array of alpaca rows. TOKENIZER: a folder, a Hub id, or a .gguf file. Copy FOLDER (about 20 MB) along with the
# checkout. PYTHON_VERSION, ARCH and CUDA (130 for 13.0) are those of the GPU machine; PACKAGES names what its Python lacks.
# Transformers comes as a wheel, which gpu_session.py unpacks: images of NVIDIA have 5.17, without pictures.
set -euo pipefail

rows=${1:?rows: a JSON array of alpaca rows}
tokenizer=${2:?tokenizer: a folder, a Hub id or a .gguf file}
folder=${3:-.gpu}
arch=${ARCH:-x86_64}
cuda=${CUDA:-130}
python=${PYTHON:-python3}
version=${PYTHON_VERSION:-3.12}
site=$folder/site-$version
packages=${PACKAGES:-ruamel.yaml bitsandbytes pydantic pydantic-core annotated-types typing-inspection typing-extensions
  datasketch pytest-xdist execnet}

platforms=()
for tag in manylinux_2_28 manylinux_2_24 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${tag}_$arch")
done
rm -rf "$site"
# Unpacked here: the GPU machine then spends no second on an installer, and parts that it cannot use stay behind.
for package in $packages; do
  "$python" -m pip install -q --no-deps --no-compile --only-binary=:all: --python-version "$version" \
    --implementation cp "${platforms[@]}" --target "$site" "$package" || echo "not found: $package" >&2
done
# bitsandbytes brings a library for each CUDA and ROCm release, 125 MB together.
find "$site/bitsandbytes" -name 'libbitsandbytes_*' ! -name "libbitsandbytes_cuda$cuda*" ! -name '*_cpu*' -delete
rm -f "$folder"/transformers-*.whl
"$python" -m pip download -q --no-deps --only-binary=:all: --dest "$folder" 'transformers>=5.18,<6'
git describe --always --abbrev=40 --exclude='*' --dirty=+ >"$folder/commit" || rm -f "$folder/commit"

"$python" - "$rows" "$tokenizer" "$folder" <<'P'
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

rows, tokenizer, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
# Repeated: a small file fills few bins, so that a step at the end of an epoch would be short.
once = json.loads(Path(rows).read_text())
(folder / "rows.json").write_text(json.dumps(once * max(1, 8_000 // len(once))))
options = {}
if tokenizer.endswith(".gguf"):
    options["gguf_file"] = Path(tokenizer).name
    tokenizer = str(Path(tokenizer).parent)
AutoTokenizer.from_pretrained(tokenizer, **options).save_pretrained(folder / "tokenizer")
P
du -sh "$folder"
