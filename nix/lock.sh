#!/bin/sh
# Regenerate nix/requirements.txt after a change of pyproject.toml or constraints.txt. Requires uv and a network.
set -eu
cd "$(dirname "$0")/.."
rm -f nix/requirements.txt # otherwise uv keeps the versions in this file
uv pip compile --quiet pyproject.toml nix/requirements.in --extra nf4 --extra gguf --extra tensorboard --constraints constraints.txt \
  --python-version 3.13 --universal --generate-hashes --no-annotate --output-file nix/requirements.txt \
  --custom-compile-command nix/lock.sh
