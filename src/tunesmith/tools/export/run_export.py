"""The work of `export`, and what it prints of the result."""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

from tunesmith.checkpoint.manifest import check_sums
from tunesmith.checkpoint.sharded import export_sharded, is_sharded
from tunesmith.cli.options import ProgressCounter, notify
from tunesmith.errors import UsageError
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.inference.load_run import RunLocation
from tunesmith.tools.export.gguf.answers import answer_lines
from tunesmith.tools.export.gguf.check import FileCheck
from tunesmith.tools.export.gguf.export import (
    DEFAULT_QUANT,
    ExportedFile,
    export_adapter,
    export_gguf,
)
from tunesmith.tools.export.merge import merge
from tunesmith.tools.export.record import record_path
from tunesmith.tools.export.vllm import export_rounded
from tunesmith.tools.export.vllm_adapter import export_peft

MOST_TIMES = 1000  # larger factors are printed as this one
SAME_CHANGE_FACTOR = 1.5  # changes within this factor count as equal
# Those whose rounding is too small to show in three answers.
NEAREST_QUANTS = ("f32", "f16", "bf16", "q8_0")


class ExportOptions(TypedDict):
    """The arguments that `export_gguf` and `export_adapter` share."""

    for_ollama: bool
    force: bool
    threads: int | None
    check: bool
    device: str | None
    checking: Callable[[int, int], None]


def export_for_gguf(args: argparse.Namespace, location: RunLocation) -> None:
    """Write a .gguf file or Ollama's folder, and print how near it is to the tuned model."""
    with ProgressCounter() as progress:
        options: ExportOptions = {
            "for_ollama": args.to == "ollama",
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
    for line in _share_lines(args, exported, location.base.name):
        print(line)


def export_for_vllm(args: argparse.Namespace, location: RunLocation) -> None:
    """Write a folder for vLLM, and print the command that serves it."""
    output = shell_path(Path(args.output))
    if args.adapter:
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


def print_check(args: argparse.Namespace, exported: ExportedFile) -> None:
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
    for line in answer_lines(check.answers):
        print(line)
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
    elif (
        any(answer.differs_at for answer in check.answers) and exported.quant not in NEAREST_QUANTS
    ):
        notify("note: an answer differs; --quant q8_0 or f16 is nearer to the tuned model")


def _rounding(check: FileCheck) -> str:
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
        name = shell_word(Path(exported.output).name)
        return f"cd {folder} && ollama create {name} -f Modelfile && ollama run {name}"
    return f"llama-server -m {file} -c 8192"


def _share_lines(args: argparse.Namespace, exported: ExportedFile, base: str) -> list[str]:
    """List what a colleague needs of an exported file, and what to keep back."""
    file = Path(exported.file)
    record = record_path(file)
    answers = exported.check.answers if exported.check else ()
    # Without rows sentences were continued, which have no reference.
    has_rows = any(answer.reference is not None for answer in answers)
    needed = shell_path(file)
    if args.to == "ollama":
        needed = f"the folder {shell_path(Path(exported.output))}"
        if has_rows:
            needed += f" without {record.name}"
        if exported.base:
            needed += f", and {shell_path(Path(exported.base))}, which its Modelfile names"
    elif exported.base:
        needed += f" and {shell_path(Path(exported.base))}, the only base that it is for"
        if exported.chat_template:
            needed += f", with {shell_path(Path(exported.chat_template))}"
    elif args.adapter:
        needed += f" and BASE.gguf, its base {base}"
    lines = [f"to share: {needed}; the command above starts it"]
    if has_rows:
        lines.append(f"do not share: {shell_path(record)}, which contains rows of your data")
    return lines


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
        print(f"to share: the folder {shell_path(output)}")
