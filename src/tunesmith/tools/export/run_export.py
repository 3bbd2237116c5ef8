"""The work of `export`, and what it prints of the result."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tunesmith.checkpoint.manifest import check_sums
from tunesmith.checkpoint.sharded import export_sharded, is_sharded
from tunesmith.cli.options import ProgressCounter, notify
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.host.streams import width_of
from tunesmith.inference.load_run import RunLocation
from tunesmith.tools.export.gguf.export import (
    DEFAULT_QUANT,
    ExportedFile,
    export_adapter,
    export_gguf,
)
from tunesmith.tools.export.gguf.ollama import ollama_name
from tunesmith.tools.export.merge import merge
from tunesmith.tools.export.vllm_adapter import export_peft


def export_for_gguf(args: argparse.Namespace) -> None:
    """Write a .gguf file or Ollama's folder, and print how near it is to the tuned model."""
    with ProgressCounter() as progress:
        export: Callable[..., ExportedFile] = export_adapter
        if not args.adapter:
            export = partial(
                export_gguf,
                quant=args.quant or DEFAULT_QUANT,
                progress=lambda size, total: progress("MB written", size // 10**6, total // 10**6),
            )
        exported = export(
            args.run,
            args.output,
            for_ollama=args.to == "ollama",
            converter=args.converter,
            force=args.force,
            threads=args.threads,
            check=not args.no_check,
            device=args.device,
            trust_remote_code=args.trust_remote_code,
            checking=lambda done, total: progress("parts checked in llama.cpp", done, total),
        )
    if args.json:
        print(json.dumps(asdict(exported), indent=2))
        return
    for note in exported.notes:
        notify(f"note: {note}")
    print(replace(exported, notes=()).table().text(width_of(sys.stdout)))
    warn_of_distance(exported)
    print(f"next: {_next_command(args, exported)}")


def export_for_vllm(args: argparse.Namespace, location: RunLocation) -> None:
    """Write a folder for vLLM, and print the command that serves it."""
    output = shell_path(Path(args.output))
    if args.adapter:
        rank = export_peft(args.run, args.output, trust_remote_code=args.trust_remote_code)
        base = location.base.name
        module = shell_word(f"{Path(args.output).name}={args.output}")
        serve = f"vllm serve {shell_word(base)} --enable-lora --max-lora-rank {rank}"
        # vLLM reads the base's tokenizer, whose template has neither the arguments nor the date of
        # training, if it has one at all, and the base's end tokens.
        template = Path(location.folder or args.run, "chat_template.jinja")
        options = f" --chat-template {shell_path(template)}" if template.is_file() else ""
        options += f" --generation-config {output}"
        report: dict[str, object] = {"output": args.output, "max_lora_rank": rank}
        lines = [f"next: {serve} --lora-modules {module}{options}"]
    else:
        merged = merge(
            args.run,
            args.output,
            dtype="bf16",
            device=args.device,
            trust_remote_code=args.trust_remote_code,
        )
        report = asdict(merged)
        difference = merged.merge_check.merged.mean_kl
        lines = [
            f"{args.output}: {merged.bytes / 1e6:,.1f} MB in bf16; "
            f"mean KL {difference:.2g} nats against the tuned model",
            f"next: vllm serve {output}",
        ]
    if args.json:
        print(json.dumps(report, indent=2))
        return
    for line in lines:
        print(line)


def warn_of_distance(exported: ExportedFile) -> None:
    """Tell what to do where a file is not near the tuned model."""
    check = exported.check
    if check is None:
        return
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


def _next_command(args: argparse.Namespace, exported: ExportedFile) -> str:
    file = shell_path(Path(exported.file))
    if args.adapter and args.to == "gguf":
        base = shell_path(Path(exported.base)) if exported.base else "BASE.gguf"
        command = f"llama-server -m {base} --lora {file}"
        if exported.chat_template:
            command += f" --chat-template-file {shell_path(Path(exported.chat_template))}"
        return command
    if args.to == "ollama":
        folder = shell_path(Path(exported.output))
        name = shell_word(ollama_name(Path(exported.output)))
        return f"cd {folder} && ollama create {name} -f Modelfile && ollama run {name}"
    return f"llama-server -m {file} -c 8192"


def join_sharded(args: argparse.Namespace, location: RunLocation) -> None:
    """Assemble a checkpoint that several ranks saved."""
    output = Path(args.output)
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
