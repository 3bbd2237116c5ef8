"""Export a run to llama.cpp, Ollama, vLLM or Transformers.

example:
  tunesmith export runs/my-run --to gguf --output my-model.gguf
  tunesmith export runs/my-run --to gguf --adapter --output my-adapter.gguf
  tunesmith export runs/my-run --to ollama --quant q8_0 --output my-model
  tunesmith export runs/my-run --to vllm --quant fp8 --output my-model
  tunesmith export runs/my-run/checkpoint-200 --output my-model

--to gguf and ollama stream base and adapter into one file, so memory does not
grow with the model. If llama.cpp is installed (pip install xllamacpp), it must
tokenize the run's prompts identically, and the KL divergence from the tuned
model is printed. Without it nothing is checked.

With --adapter gguf writes the LoRA alone. Of a run on a .gguf file it is for
that very file: both are checked together, and the command that serves them is
printed.

--to vllm writes a folder: the merged model in bf16, or with linear layers in
fp8, and prints the KL divergence that this causes. With --adapter it writes the
LoRA, if vLLM supports it.

--to transformers, the default, assembles a checkpoint that several ranks saved,
one tensor in memory at a time. final/ and checkpoints of a single process are
already in this format; use `merge` for an adapter.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from tunesmith.cli.options import (
    ProgressCounter,
    add_json,
    add_run,
    check_not_given,
    notify,
    notify_weights,
    whole_number,
)
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_path, shell_word

if TYPE_CHECKING:
    from tunesmith.tools.export.gguf.check import FileCheck
    from tunesmith.tools.export.gguf.export import ExportedFile

LOADS_TORCH = "here"

MOST_TIMES = 1000  # larger factors are printed as this one
SAME_CHANGE_FACTOR = 1.5  # changes within this factor count as equal
# As in `export.gguf.types`, which a test compares; that module is not loaded to parse.
GGUF_QUANTS = ("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
VLLM_QUANTS = ("bf16", "fp8")


class ExportOptions(TypedDict):
    """The arguments that `export_gguf` and `export_adapter` share."""

    force: bool
    threads: int | None
    check: bool
    device: str | None
    checking: Callable[[int, int], None]


QUANTS_OF_TARGET = {"gguf": GGUF_QUANTS, "ollama": GGUF_QUANTS, "vllm": VLLM_QUANTS}


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
        choices=(*GGUF_QUANTS, "fp8"),
        help="of the weights (default: q4_k_m; for vllm, which takes bf16 and fp8, bf16)",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="only the LoRA, to be served beside the GGUF file of its base, or by vLLM",
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
        help="do not compare the result with the tuned model; not for bf16 or an adapter for vLLM",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    # A --to without a row in QUANTS_OF_TARGET takes no --quant.
    if args.quant and args.quant not in QUANTS_OF_TARGET.get(args.to, (args.quant,)):
        raise UsageError(
            f"--quant {args.quant} is not one of --to {args.to}",
            where="command line: --quant",
            fix=f"one of {', '.join(QUANTS_OF_TARGET[args.to])}",
        )
    if args.adapter:
        check_not_given(args, ("quant",), "is for a whole model")
        if args.to == "ollama":
            fix = "--to gguf --adapter, or --to ollama without --adapter"
            check_not_given(args, ("adapter",), "is for --to gguf or vllm", fix=fix)
    if args.to == "transformers":
        options = ("quant", "adapter", "force", "threads", "no_check", "device")
        check_not_given(args, options, "is for --to gguf, ollama or vllm")
        _export_sharded(args)
    elif args.to == "vllm":
        check_not_given(args, ("force", "threads"), "is for --to gguf or ollama")
        if args.quant != "fp8":
            place = "is for --to gguf or ollama, or --quant fp8"
            check_not_given(args, ("no_check",), place)
        _export_vllm(args)
    else:
        _export_gguf(args)


def _export_gguf(args: argparse.Namespace) -> None:
    from tunesmith.inference.load_run import locate_run
    from tunesmith.tools.export.output import gguf_place

    # The next import takes seconds, so it comes after the checks.
    location = locate_run(args.run)
    gguf_place(args.output, location, is_folder=args.to == "ollama", force=args.force)
    notify_weights(location)
    from tunesmith.tools.export.gguf.export import DEFAULT_QUANT, export_adapter, export_gguf

    with ProgressCounter() as progress:
        options: ExportOptions = {
            "force": args.force,
            "threads": args.threads,
            "check": not args.no_check,
            "device": args.device,
            "checking": lambda done, total: progress("parts checked in llama.cpp", done, total),
        }
        if args.adapter:
            exported = export_adapter(args.run, args.output, **options)
        else:
            exported = export_gguf(
                args.run,
                args.output,
                quant=args.quant or DEFAULT_QUANT,
                for_ollama=args.to == "ollama",
                progress=lambda size, total: progress("MB written", size // 10**6, total // 10**6),
                **options,
            )
    if args.json:
        print(json.dumps(asdict(exported), indent=2))
        return
    for note in exported.notes:
        notify(f"note: {note}")
    print(f"{exported.file}: {exported.bytes / 1e6:,.1f} MB in {exported.quant}")
    print_check(args, exported)
    print(f"next: {_next_command(args, exported)}")
    for line in _share_lines(args, exported):
        print(line)


def _export_vllm(args: argparse.Namespace) -> None:
    from tunesmith.inference.load_run import locate_run
    from tunesmith.tools.export.output import new_folder_place

    # Wrong paths are reported before torch is imported.
    location = locate_run(args.run)
    new_folder_place(args.output, location)
    notify_weights(location)
    output = shell_path(Path(args.output))
    if args.adapter:
        from tunesmith.tools.export.vllm_adapter import export_peft

        rank = export_peft(args.run, args.output)
        base = location.base.name
        module = shell_word(f"{Path(args.output).name}={args.output}")
        serve = f"vllm serve {shell_word(base)} --enable-lora --max-lora-rank {rank}"
        # vLLM reads the base's tokenizer, whose template has neither the arguments nor the date of
        # training, if it has one at all, and the base's end tokens.
        template = Path(location.folder or args.run, "chat_template.jinja")
        options = f" --chat-template {shell_path(template)}" if template.is_file() else ""
        options += f" --generation-config {output}"
        report: dict[str, object] = {"output": args.output, "max_lora_rank": rank}
        needed = [output, *([shell_path(template)] if template.is_file() else [])]
        lines = [
            f"next: {serve} --lora-modules {module}{options}",
            f"to share: {', '.join(needed)}; the command above also loads the base, {base}",
        ]
    elif args.quant in (None, "bf16"):
        from tunesmith.tools.export.merge import merge

        merged = merge(args.run, args.output, dtype="bf16", device=args.device)
        report = asdict(merged)
        difference = merged.merge_check.merged.mean_kl
        lines = [
            f"{args.output}: {merged.bytes / 1e6:,.1f} MB in bf16; "
            f"mean KL {difference:.2g} nats against the tuned model",
            f"next: vllm serve {output}",
            f"to share: the folder {output}; the command above starts it",
        ]
    else:
        from tunesmith.tools.export.vllm import export_rounded

        with ProgressCounter() as progress:
            rounded = export_rounded(
                args.run,
                args.output,
                device=args.device,
                check=not args.no_check,
                checking=lambda done, total: progress("layers checked", done, total),
            )
        report = asdict(rounded)
        kl = rounded.rounded
        base_kl = f" (base: {rounded.base.mean_kl:.2g})" if rounded.base else ""
        compared = "not compared with the tuned model (--no-check)"
        if kl is not None:
            compared = (
                f"rounding: mean KL {kl.mean_kl:.2g} nats against the tuned model{base_kl}, "
                f"the same most likely token at {kl.agreement:.0%} of {rounded.positions} positions"
            )
        lines = [
            f"{args.output}: {rounded.bytes / 1e6:,.1f} MB, "
            f"{rounded.layers} linear layers in {args.quant}",
            compared,
            f"next: vllm serve {output}",
            f"to share: the folder {output}; the command above starts it",
        ]
    if args.json:
        print(json.dumps(report, indent=2))
        return
    for line in lines:
        print(line)


def print_check(args: argparse.Namespace, exported: "ExportedFile") -> None:
    """Tell how near a file is to the tuned model, and what to do where it is not."""
    check = exported.check
    if check is None:
        print(f"not compared with the tuned model in llama.cpp ({exported.unchecked})")
        return
    print(f"prompts: {check.prompts} of {check.prompts} have identical token ids in llama.cpp")
    what = f"{Path(exported.base).name} with the adapter" if exported.base else "the file"
    verdict = f"good: {what} is near the tuned model"
    if not check.is_near:
        verdict = f"not good: {what} differs from the tuned model"
    print(f"next tokens: {verdict}")
    same = round(check.tuned.agreement * check.positions)
    print(f"  its most likely next token is the same at {same} of {check.positions} positions")
    print(f"  {_rounding(check)}")
    if not check.is_near and exported.base:
        notify(
            "warning: llama.cpp rounds activations for a quantized file, and the answers change; "
            "without --adapter --quant q8_0 or f16 is nearer"
        )
    elif not check.is_near:
        notify(
            "warning: rounding to so few bits changes what the model answers; "
            "use more: --quant q8_0, or f16"
        )


def _rounding(check: "FileCheck") -> str:
    """Describe how far rounding changed next-token probabilities, beside what training did."""
    rounding = check.tuned.mean_kl
    if check.base is None:
        return f"rounding changed probabilities by {rounding:.2g} nats (mean KL)"
    training = check.base.mean_kl
    figures = f"(KL {rounding:.2g}, {training:.2g} nats)"
    if rounding > SAME_CHANGE_FACTOR * training:
        times = rounding / max(training, rounding / MOST_TIMES)
        compared = f"{times:,.0f} times as much as training"
    elif training > SAME_CHANGE_FACTOR * rounding:
        times = training / max(rounding, training / MOST_TIMES)
        compared = f"{times:,.0f} times less than training"
    else:
        compared = "as much as training"
    return f"rounding changed probabilities {compared} {figures}"


def _next_command(args: argparse.Namespace, exported: "ExportedFile") -> str:
    file = shell_path(Path(exported.file))
    if args.adapter and args.to == "gguf":
        base = shell_path(Path(exported.base)) if exported.base else "BASE.gguf"
        command = f"llama-server -m {base} --lora {file}"
        if exported.chat_template:
            command += f" --chat-template-file {shell_path(Path(exported.chat_template))}"
        return command
    if args.to == "ollama":
        folder = shell_path(Path(exported.output))
        name = shell_word(Path(exported.output).name)
        return f"cd {folder} && ollama create {name} -f Modelfile && ollama run {name}"
    return f"llama-server -m {file} -c 8192"


def _share_lines(args: argparse.Namespace, exported: "ExportedFile") -> list[str]:
    """List what a colleague needs of an exported file."""
    from tunesmith.inference.load_run import locate_run

    needed = shell_path(Path(exported.file))
    if args.to == "ollama":
        needed = f"the folder {shell_path(Path(exported.output))}"
    elif exported.base:
        needed += f" and {shell_path(Path(exported.base))}, the only base that it is for"
        if exported.chat_template:
            needed += f", with {shell_path(Path(exported.chat_template))}"
    elif args.adapter:
        needed += f" and BASE.gguf, its base {locate_run(args.run).base.name}"
    return [f"to share: {needed}; the command above starts it"]


def _export_sharded(args: argparse.Namespace) -> None:
    from tunesmith.inference.load_run import locate_run

    location = locate_run(args.run)
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError("--output is not an empty folder", where=str(output), fix="use a new name")
    from tunesmith.checkpoint.manifest import check_sums
    from tunesmith.checkpoint.sharded import export_sharded, is_sharded

    folder = location.folder
    if folder is None or location.run is None or not is_sharded(folder):
        fix = "use the folder directly"
        if location.holds == "adapter":
            fix = "use `tunesmith merge` for an adapter"
        raise UsageError(
            f"{args.run} needs no export",
            where=str(folder or args.run),
            why="only checkpoints of full fine-tuning on several ranks need it",
            fix=f"{fix}; --to gguf writes a file for llama.cpp",
        )
    # All files: the weights are joined from every part.
    check_sums(folder, reads=lambda name: True)
    export_sharded(folder, output, location.run)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    if args.json:
        report = {"checkpoint": str(folder), "output": str(output), "bytes": size}
        print(json.dumps(report, indent=2))
    else:
        weights = f"{size / 2**20:.0f} MiB in {location.run.model.dtype}"
        print(f"{output}: {weights}; load it with Transformers")
        print(f"next: tunesmith chat {shell_path(output)}")
        print(f"to share: the folder {shell_path(output)}")
