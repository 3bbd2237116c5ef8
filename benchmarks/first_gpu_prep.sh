#!/usr/bin/env bash
# Download the files that gpu_session.py needs on a GPU machine with Python and torch but without a network.
#
#   bash benchmarks/first_gpu_prep.sh ROWS TOKENIZER [FOLDER=.gpu]
#
# ROWS is a JSON array of alpaca rows. TOKENIZER is a folder, a Hub id or a .gguf file. After the run, copy FOLDER (about
# 20 MB) to the GPU machine together with the checkout.
#
# Environment variables that describe the GPU machine:
#   PYTHON_VERSION, ARCH, CUDA  versions of Python and CUDA (130 for 13.0), and the architecture
#   PACKAGES                    packages that its Python does not have
#
# gpu_session.py unpacks the wheel of Transformers, because NVIDIA's images have version 5.17, which cannot train on
# pictures. All packages have the versions in constraints.txt, with which the tests have passed.
set -euo pipefail

rows=${1:?ROWS is missing: a JSON array of alpaca rows}
tokenizer=${2:?TOKENIZER is missing: a folder, a Hub id or a .gguf file}
folder=${3:-.gpu}
arch=${ARCH:-x86_64}
cuda=${CUDA:-130}
python=${PYTHON:-python3}
version=${PYTHON_VERSION:-3.12}
site=$folder/site-$version
constraints=$(dirname "$0")/../constraints.txt
packages=${PACKAGES:-ruamel.yaml bitsandbytes pydantic pydantic-core annotated-types typing-inspection typing-extensions
  datasketch pytest-xdist execnet}

platforms=()
for tag in manylinux_2_28 manylinux_2_24 manylinux_2_17 manylinux2014; do
  platforms+=(--platform "${tag}_$arch")
done
rm -rf "$site"
# Unpack the packages here, so that the GPU machine needs no time to install them, and unused files are not copied.
for package in $packages; do
  "$python" -m pip install -q -c "$constraints" --no-deps --no-compile --only-binary=:all: --python-version "$version" \
    --implementation cp "${platforms[@]}" --target "$site" "$package" || echo "pip could not install $package" >&2
done
# Delete unused libraries of bitsandbytes. It has one for each CUDA and ROCm release, 125 MB in total.
find "$site/bitsandbytes" -name 'libbitsandbytes_*' ! -name "libbitsandbytes_cuda$cuda*" ! -name '*_cpu*' -delete
rm -f "$folder"/transformers-*.whl
"$python" -m pip download -q -c "$constraints" --no-deps --only-binary=:all: --dest "$folder" transformers
git describe --always --abbrev=40 --exclude='*' --dirty=+ >"$folder/commit" || rm -f "$folder/commit"

"$python" - "$rows" "$tokenizer" "$folder" <<'P'
import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

rows, tokenizer, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
# Repeat the rows. A small file fills few packed rows, and the last step of an epoch would be too small.
once = json.loads(Path(rows).read_text())
(folder / "rows.json").write_text(json.dumps(once * max(1, 8_000 // len(once))))
options = {}
if tokenizer.endswith(".gguf"):
    options["gguf_file"] = Path(tokenizer).name
    tokenizer = str(Path(tokenizer).parent)
AutoTokenizer.from_pretrained(tokenizer, **options).save_pretrained(folder / "tokenizer")
P
du -sh "$folder"
