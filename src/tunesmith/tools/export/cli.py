"""Export a run to llama.cpp, Ollama, vLLM or Transformers.

example:
  tunesmith export runs/my-run --to gguf --output my-model.gguf
  tunesmith export runs/my-run --to gguf --adapter --output my-adapter.gguf
  tunesmith export runs/my-run --to ollama --quant q8_0 --output my-model
  tunesmith export runs/my-run --to vllm --output my-model
  tunesmith export runs/my-run/checkpoint-200 --output my-model

--to gguf and --to ollama stream base and adapter into one file, so memory use
does not grow with the model. If llama.cpp is installed (pip install xllamacpp),
it must tokenize the run's prompts identically, and the KL divergence from the
tuned model is printed. Without llama.cpp the file is not checked.

With --adapter, --to gguf writes only the LoRA, which llama.cpp applies to a
GGUF file of the base. The pair is not checked.

--to vllm writes a folder with the merged model in bf16. With --adapter it
writes only the LoRA, if vLLM supports it.

--to transformers, the default, assembles a checkpoint that several ranks saved,
with one tensor in memory at a time. final/ and checkpoints of a single process
are already in this format; use `merge` for an adapter.
"""

import argparse

from tunesmith.answers.load_run import locate_run
from tunesmith.cli.options import (
    add_json,
    add_run,
    check_not_given,
    notify_weights,
    whole_number,
)
from tunesmith.errors import UsageError
from tunesmith.tools.export.gguf.converter import find_converter
from tunesmith.tools.export.gguf.types import GGUF_QUANT_TYPES
from tunesmith.tools.export.output import check_gguf_output, check_new_folder

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
        help="for gguf, a new file with the suffix .gguf; otherwise, a new or empty folder",
    )
    parser.add_argument(
        "--quant",
        type=str.lower,
        choices=tuple(GGUF_QUANT_TYPES),
        help="quantization of the weights (default: q4_k_m for gguf and ollama, bf16 for vllm, "
        "which supports no other value)",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="export only the LoRA adapter, which is served together with its base model",
    )
    parser.add_argument(
        "--converter",
        metavar="PATH",
        help="path of llama.cpp's converter: a llama.cpp checkout, or the sdist of "
        "llama-cpp-python 0.3.36; required for model types that tunesmith cannot convert itself "
        "(default: $LLAMA_CPP_DIR, or the sdist of an earlier export)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace an existing export when the new one is complete",
    )
    parser.add_argument(
        "--threads",
        type=whole_number,
        metavar="N",
        help="number of threads for the quantization (default: all cores)",
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="do not compare the GGUF file with the tuned model",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    check_options(args)
    # Check the paths first, because the import of run_export takes seconds.
    location = locate_run(args.run, trust_remote_code=args.trust_remote_code)
    if args.to in ("gguf", "ollama"):
        check_gguf_output(args.output, location, is_folder=args.to == "ollama", force=args.force)
        if args.converter is not None:
            find_converter(args.converter)
    else:
        check_new_folder(args.output, location)
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
    """Raise UsageError if an option does not apply to the output format of --to."""
    if args.to == "vllm" and args.quant not in (None, "bf16"):
        raise UsageError(
            f"--to vllm does not support --quant {args.quant}",
            where="command line: --quant",
            fix="use --quant bf16",
        )
    if args.adapter and args.to == "ollama":
        raise UsageError(
            "--to ollama does not support --adapter",
            where="--to ollama --adapter",
            why="Ollama needs the GGUF file of the entire model",
            fix="remove --adapter, or use --to gguf",
        )
    if args.adapter:
        check_not_given(args, ("quant",), "cannot be used with --adapter, which is not quantized")
    fix = "remove {option}, or use --to gguf"
    if args.to == "transformers":
        options = ("quant", "adapter", "device")
        check_not_given(args, options, "requires --to gguf, ollama or vllm", fix=fix)
    if args.to in ("transformers", "vllm"):
        others = ("converter", "force", "threads", "no_check")
        check_not_given(args, others, "requires --to gguf or ollama", fix=fix)
