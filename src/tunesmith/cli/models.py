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
from collections import Counter
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
    Pictures,
    Support,
    find_model_type,
    measured_with,
    read_model_types,
)

PICTURES: dict[Pictures, str] = {
    "": "",
    "packed": "packed rows, with model.vision: true",
    "refused": "not supported",
    "untried": "a run with model.vision: true measures it before it starts",
}
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
    counts: Counter[str] = Counter(entry.support.state for entry in rows)
    counted = ", ".join(f"{counts[state]} {state}" for state in order)
    versions = ", ".join(f"{name} {version}" for name, version in measured_with().items())
    print(f"\n{len(rows)} types: {counted}; measured with {versions}", file=sys.stderr)


def _packs_eager_too(support: Support) -> bool:
    return support.packs_eager or support.state not in ("tuned", "packed")


def print_one(entry: ModelType) -> None:
    """Print what was measured of one type."""
    support = entry.support
    can_train = support.state != "refused"
    lines = {
        "state": support.state,
        "why": support.why,
        "text model": entry.text + (", in the class of the entire model" if entry.entire else ""),
        "pictures": PICTURES[entry.pictures],
        "Transformers": f"{entry.since} or newer" if entry.since else "",
        "run one row a document": ", ".join(support.recurrent),
        "GGUF": describe_gguf_export(entry.model_type, entry.text) if can_train else "",
        "no adapter on": ", ".join(support.dead_targets),
        "not with packed rows": "" if _packs_eager_too(support) else "model.attention: eager",
        "missing here": missing_here(entry),
    }
    errors = support.errors
    if errors is not None:
        lines["largest difference"] = (
            f"logits {errors.logits:.1e}, gradients {errors.gradients:.1e}"
        )
    if entry.uncut:
        lines["parallel.tensor"] = f"1 alone: {entry.uncut}"
    if entry.tensor is not None:
        lines["parallel.tensor"] = f"{entry.tensor:.1e} from one rank, in losses and gradients"
    print(visible(entry.model_type))
    for name, value in lines.items():
        if value:
            show(f"  {name}: {value}", sys.stdout)
