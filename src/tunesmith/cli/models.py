"""List the model types, and what works with each.

example:
  tunesmith models  # all types that Transformers has
  tunesmith models qwen3_5_text  # one type, with measurements
  tunesmith models ./my-model  # a folder with config.json, measured now
  tunesmith models --json  # for scripts

tuned: packed rows, with tunesmith's optimized forwards.
packed: packed rows, with Transformers' forwards.
padded: one document per row, which is slower.
refused: not supported, with the reason.

pictures: packed if rows with pictures were measured; untried if a run
with model.vision measures them on the model's own files.
GGUF: own if `export` writes the model, converter if it uses llama.cpp's
converter, untried if no file of that converter was compared with the model.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tunesmith.cli.options import add_json, print_columns
from tunesmith.host import demo_model
from tunesmith.host.streams import show, visible
from tunesmith.model.gguf_writers import describe_gguf_export
from tunesmith.model.model_types import (
    ModelType,
    find_model_type,
    measured_with,
    read_model_types,
)

# Kernels of recurrent layers; without them they are computed by plain PyTorch.
KERNEL_PACKAGE = "flash-linear-attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", help="a model type, or a folder with config.json (default: all types)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    if args.name is None:
        types = list(read_model_types().values())
        if args.json:
            print(json.dumps([as_row(entry) for entry in types], indent=1))
        else:
            print_table(types)
        return
    is_demo = args.name == demo_model.DEMO_NAME and not Path(args.name, "config.json").is_file()
    if is_demo:
        print(f"{demo_model.DEMO_NAME} is {demo_model.DEMO_DESCRIPTION}", file=sys.stderr)
        args.name = demo_model.MODEL_TYPE
    if is_folder(args.name):
        from tunesmith.model.measure_folder import measure_folder

        entry = measure_folder(Path(args.name))
    else:
        entry = find_model_type(args.name)
    if args.json:
        print(json.dumps(as_row(entry), indent=1))
    else:
        print_one(entry)


def is_folder(name: str) -> bool:
    """Tell whether a word names a place, and no model type."""
    return "/" in name or Path(name).is_dir()


def missing_here(entry: ModelType) -> str:
    """Say what this machine lacks that would make the type faster; "" where nothing."""
    if entry.support.recurrent and find_spec("fla") is None:
        return KERNEL_PACKAGE
    return ""


def as_row(entry: ModelType) -> dict[str, Any]:
    """A type as JSON has it."""
    row = entry.row()
    row["gguf"] = entry.gguf
    row["missing"] = missing_here(entry)
    return row


def print_table(types: Iterable[ModelType]) -> None:
    """All types, those that train best first."""
    order = ("tuned", "packed", "padded", "refused")
    rows = sorted(types, key=lambda entry: (order.index(entry.support.state), entry.model_type))
    columns = [
        (row.model_type, row.support.state, row.pictures or "-", row.gguf or "-", row.support.why)
        for row in rows
    ]
    print_columns([("type", "text", "pictures", "GGUF", ""), *columns])
    versions = ", ".join(f"{name} {version}" for name, version in measured_with().items())
    print(f"\n{len(rows)} types, measured with {versions}", file=sys.stderr)


def print_one(entry: ModelType) -> None:
    """Print what was measured of one type, by the names of the JSON row."""
    row = as_row(entry)
    # A type that is refused is not exported.
    if entry.support.state != "refused":
        row["gguf"] = describe_gguf_export(entry.model_type, entry.text)
    print(visible(row.pop("model_type")))
    for name, value in row.items():
        if value or isinstance(value, float):
            text = ", ".join(value) if isinstance(value, tuple) else value
            show(f"  {name}: {text}", sys.stdout)
