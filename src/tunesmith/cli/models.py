"""List the model types and what each of them supports.

example:
  tunesmith models  # all types that Transformers has
  tunesmith models qwen3_5_text  # one type, with measurements
  tunesmith models ./my-model  # a folder with config.json, measured now
  tunesmith models --json  # for scripts

tuned: packed rows, with tunesmith's optimized forwards.
packed: packed rows, with Transformers' forwards.
padded: one document per row, which is slower.
refused: not supported, with the reason.

pictures: packed if rows with images were tested; untried if a run with
model.vision tests them with the files of the model.
GGUF: own if `export` writes the file itself; converter if it uses llama.cpp's
converter; untried if no file of the converter was compared with the model.
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
from tunesmith.model.known.gguf_writers import describe_gguf_export
from tunesmith.model.known.model_types import (
    ModelType,
    find_model_type,
    measured_with,
    read_model_types,
)

# Package with kernels for recurrent layers. If the package is not installed, PyTorch code is used
# instead.
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
    if "/" in args.name or Path(args.name).is_dir():
        from tunesmith.model.measuring.measure_folder import measure_folder

        entry = measure_folder(Path(args.name))
    else:
        entry = find_model_type(args.name)
    if args.json:
        print(json.dumps(as_row(entry), indent=1))
    else:
        print_one(entry)


def as_row(entry: ModelType) -> dict[str, Any]:
    """Return the values of a model type for JSON."""
    row = entry.row()
    row["gguf"] = entry.gguf
    row["missing"] = KERNEL_PACKAGE if entry.support.recurrent and find_spec("fla") is None else ""
    return row


def print_table(types: Iterable[ModelType]) -> None:
    """Print a table of all model types, the best supported types first."""
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
    """Print the values of one model type. The names are the same as the keys of --json."""
    row = as_row(entry)
    # Refused model types cannot be exported.
    if entry.support.state != "refused":
        row["gguf"] = describe_gguf_export(entry.model_type, entry.text)
    print(visible(row.pop("model_type")))
    for name, value in row.items():
        if value or isinstance(value, float):
            text = ", ".join(value) if isinstance(value, tuple) else value
            show(f"  {name}: {text}", sys.stdout)
