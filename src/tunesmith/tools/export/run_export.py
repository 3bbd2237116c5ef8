"""Functions that run the command `export` and print its result."""

import argparse
import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from tunesmith.answers.load_run import RunLocation
from tunesmith.checkpoint.manifest import check_sums
from tunesmith.checkpoint.sharded import export_sharded, is_sharded
from tunesmith.cli.options import ProgressCounter, notify
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.host.streams import width_of
from tunesmith.tools.export.gguf.export import (
    DEFAULT_QUANT,
    export_adapter,
    export_gguf,
)
from tunesmith.tools.export.gguf.ollama import ollama_name
from tunesmith.tools.export.merge import merge
from tunesmith.tools.export.record import ExportedFile
from tunesmith.tools.export.vllm_adapter import export_peft


def export_for_gguf(args: argparse.Namespace) -> None:
    """Write a .gguf file or a folder for Ollama, and print its difference to the tuned model."""
    with ProgressCounter() as progress:
        options = {
            "converter": args.converter,
            "force": args.force,
            "threads": args.threads,
            "trust_remote_code": args.trust_remote_code,
        }
        if args.adapter:
            exported = export_adapter(args.run, args.output, **options)
        else:
            exported = export_gguf(
                args.run,
                args.output,
                quant=args.quant or DEFAULT_QUANT,
                for_ollama=args.to == "ollama",
                check=not args.no_check,
                device=args.device,
                checking=partial(progress, "steps of the check in llama.cpp"),
                progress=lambda size, total: progress("MB written", size // 10**6, total // 10**6),
                **options,
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
        # By default vLLM uses the chat template and the end tokens of the base model. Pass the
        # run's template and end tokens, because training may have used different ones.
        template = Path(location.folder or args.run, "chat_template.jinja")
        options = f" --chat-template {shell_path(template)}" if template.is_file() else ""
        options += f" --generation-config {output}"
        report = {"output": args.output, "max_lora_rank": rank}
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
    """Print a warning and a fix if the outputs of the file and of the tuned model differ much."""
    if exported.check is None or exported.check.is_near:
        return
    notify(
        "warning: the answers differ from those of the tuned model, because the quantization has "
        "few bits; to get closer answers, use --quant q8_0 or f16"
    )


def _next_command(args: argparse.Namespace, exported: ExportedFile) -> str:
    file = shell_path(Path(exported.file))
    if args.adapter:
        return f"llama-server -m BASE.gguf --lora {file}"
    if args.to == "ollama":
        folder = shell_path(Path(exported.output))
        name = shell_word(ollama_name(Path(exported.output)))
        return f"cd {folder} && ollama create {name} -f Modelfile && ollama run {name}"
    return f"llama-server -m {file} -c 8192"


def join_sharded(args: argparse.Namespace, location: RunLocation) -> None:
    """Convert a checkpoint that several ranks saved to one model in Transformers format."""
    output = Path(args.output)
    folder = location.folder
    if folder is None or location.run is None or not is_sharded(folder):
        fix = "use the folder or model directly"
        if location.holds == "adapter":
            fix = "run `tunesmith merge RUN --output FOLDER` to merge the adapter into its base"
        raise UsageError(
            f"{args.run} cannot be exported with --to transformers",
            where=str(folder or args.run),
            why="--to transformers only joins the parts of a checkpoint that several ranks saved "
            "in full fine-tuning",
            fix=f"{fix}, or use --to gguf, which writes a file for llama.cpp",
        )
    # Verify the checksums of all files, because the export reads the shards of every rank.
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
