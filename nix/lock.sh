#!/bin/sh
# Write nix/requirements.txt again, after a change of pyproject.toml or constraints.txt. Needs uv and the network.
set -eu
cd "$(dirname "$0")/.."
rm -f nix/requirements.txt # uv would keep its versions
uv pip compile --quiet pyproject.toml nix/requirements.in --extra nf4 --extra gguf --extra tensorboard --constraints constraints.txt \
  --python-version 3.13 --universal --generate-hashes --no-annotate --output-file nix/requirements.txt \
  --custom-compile-command nix/lock.sh
