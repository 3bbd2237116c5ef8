"""Export a run to llama.cpp, Ollama, vLLM or Transformers.

example:
  tunesmith export runs/my-run --to gguf --output my-model.gguf
  tunesmith export runs/my-run --to gguf --adapter --output my-adapter.gguf
  tunesmith export runs/my-run --to ollama --adapter --output my-adapter
  tunesmith export runs/my-run --to ollama --quant q8_0 --output my-model
  tunesmith export runs/my-run --to vllm --output my-model
  tunesmith export runs/my-run/checkpoint-200 --output my-model

--to gguf and ollama stream base and adapter into one file, so memory does not
grow with the model. If llama.cpp is installed (pip install xllamacpp), it must
tokenize the run's prompts identically, and the KL divergence from the tuned
model is printed. Without it nothing is checked.

With --adapter they write the LoRA alone. Of a run on a .gguf file it is for
that very file: both are checked together, and the command that serves them is
printed.

--to vllm writes a folder: the merged model in bf16. With --adapter it writes
the LoRA, if vLLM supports it.

--to transformers, the default, assembles a checkpoint that several ranks saved,
one tensor in memory at a time. final/ and checkpoints of a single process are
already in this format; use `merge` for an adapter.
"""

import argparse

from tunesmith.cli.options import (
    add_json,
    add_run,
    check_not_given,
    notify_weights,
    whole_number,
)
from tunesmith.errors import UsageError
from tunesmith.inference.load_run import locate_run
from tunesmith.tools.export.gguf.converter import find_converter
from tunesmith.tools.export.gguf.types import GGUF_QUANT_TYPES
from tunesmith.tools.export.output import gguf_place, new_folder_place

LOADS_TORCH = "here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--to",
        choices=("transformers", "gguf", "ollama", "vllm"),
        default="transformers",
        help="output format (default: transformers)",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="PATH",
        help="a new file.gguf; otherwise a new or empty folder",
    )
    parser.add_argument(
        "--quant",
        type=str.lower,
        choices=tuple(GGUF_QUANT_TYPES),
        help="of the weights (default: q4_k_m; for vllm, which takes bf16 alone, bf16)",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="only the LoRA, to be served beside the GGUF file of its base, or by vLLM",
    )
    parser.add_argument(
        "--converter",
        metavar="PATH",
        help="llama.cpp's own converter, for model types that tunesmith does not write itself, and "
        "their adapters: a llama.cpp checkout, or the sdist of llama-cpp-python 0.3.36, which is "
        "unpacked once (default: $LLAMA_CPP_DIR, then what was unpacked)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an existing export when the new one is complete",
    )
    parser.add_argument(
        "--threads", type=whole_number, metavar="N", help="that quantize (default: all cores)"
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not compare the GGUF file with the tuned model",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    check_options(args)
    # The import below takes seconds, so wrong paths are reported before it.
    location = locate_run(args.run, trust_remote_code=args.trust_remote_code)
    if args.to in ("gguf", "ollama"):
        gguf_place(args.output, location, is_folder=args.to == "ollama", force=args.force)
        if args.converter is not None:
            find_converter(args.converter)
    else:
        new_folder_place(args.output, location)
    if args.to != "transformers":
        notify_weights(location)
    from tunesmith.tools.export.run_export import export_for_gguf, export_for_vllm, join_sharded

    if args.to == "transformers":
        join_sharded(args, location)
    elif args.to == "vllm":
        export_for_vllm(args, location)
    else:
        export_for_gguf(args)


def check_options(args: argparse.Namespace) -> None:
    """UsageError for options of another target than --to."""
    if args.to == "vllm" and args.quant not in (None, "bf16"):
        raise UsageError(
            f"--quant {args.quant} is not one of --to vllm",
            where="command line: --quant",
            fix="--quant bf16",
        )
    if args.adapter:
        check_not_given(args, ("quant",), "is for a whole model")
    if args.to == "transformers":
        options = ("quant", "adapter", "converter", "force", "threads", "no_check", "device")
        check_not_given(args, options, "is for --to gguf, ollama or vllm")
    elif args.to == "vllm":
        others = ("converter", "force", "threads", "no_check")
        check_not_given(args, others, "is for --to gguf or ollama")
