"""What the four DGX Spark playbook scripts beside this file share.

`Llama3_8B_LoRA_finetuning.py` and the other three keep the names, flags, defaults, data selection,
text and closing lines of the playbook. They turn their flags into one recipe (`make_recipe`) and
call `train`. Each difference from the playbook is one line of `DIFFERENCES`, which `--help` shows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from accelerate_env import LauncherSettings, read_launcher
from tunesmith.checkpoint.claim import LOCK, claim_run_dir, is_run
from tunesmith.cli.main import Parser, run_command
from tunesmith.cli.options import whole_number
from tunesmith.config.dump import to_mapping
from tunesmith.config.load import from_mapping
from tunesmith.config.names import keys
from tunesmith.config.schema import Adapter, Checkpoint, Data, Log, Model, Run, Source, Train
from tunesmith.distributed.ranks import (
    is_launched,
    reported_once_a_node,
    require_one_process,
    started_as,
)
from tunesmith.errors import EXIT_OK, TunesmithError, UsageError
from tunesmith.host.logger import LineFormatter, lines_on_stderr
from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.units import Length, Size, ratio

# The playbook's text as a chat template: a row without an input keeps the empty field. The space
# before the response belongs to the response, because a byte-pair tokenizer joins it with the first
# word.
TEMPLATE = Path(__file__).with_name("configs") / "alpaca.jinja"
SEED = 42
RULE = "=" * 60
ALONE = LauncherSettings()  # no launcher asks for anything
SHARED = "playbook"  # id of the ranks that a script starts itself: they share its batch
DTYPES: dict[str, Literal["auto", "fp32", "fp16", "bf16"]] = {
    "auto": "auto",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
}

DIFFERENCES = (
    "checkpoints are written on the way; the same command after a kill goes on where it was (--fresh starts over)",
    "without --output_dir the result is kept under runs/, not thrown away",
    "--output_dir is a run directory: metrics, log and checkpoints lie beside the model files",
    "the order of the rows is drawn from seed 42 by our own sampler, theirs by datasets and torch",
    "LoRA parameters, and a bf16 model's master weights in full fine-tuning, are fp32",
    "--use_torch_compile has no warm-up: the first step compiles; theirs trained the model twice",
    "a text begins with the tokenizer's BOS token wherever it has one",
    "code that a model's repository ships is not run without --trust_remote_code (some of theirs always ran it)",
    "--dtype is auto: bfloat16 as theirs, but float32 where the processor has no units for it and the weights fit",
    "any --batch_size and --seq_length is taken; every script has every common flag",
    "started without a launcher, a script starts one process a GPU; they share --batch_size, which theirs took on all at once",
)


@dataclass(frozen=True)
class Script:
    """What one of the four scripts does when no flag is given."""

    title: str
    mode: str  # full | LoRA | QLoRA
    model: str
    batch_size: int
    learning_rate: float
    dataset_size: int
    checkpointing: bool = False


SCRIPTS = {
    "Llama3_3B_full_finetuning": Script(
        "LLAMA 3.2 3B FULL FINE-TUNING", "full", "meta-llama/Llama-3.2-3B-Instruct", 8, 5e-5, 512
    ),
    "Llama3_8B_LoRA_finetuning": Script(
        "LLAMA 3.1 8B LoRA FINE-TUNING", "LoRA", "meta-llama/Llama-3.1-8B-Instruct", 8, 1e-4, 512
    ),
    "Llama3_70B_LoRA_finetuning": Script(
        "LLAMA 3.1 70B LoRA FINE-TUNING",
        "LoRA",
        "meta-llama/Llama-3.1-70B-Instruct",
        4,
        1e-4,
        500,
        True,
    ),
    "Llama3_70B_qLoRA_finetuning": Script(
        "LLAMA 3.1 70B QLoRA FINE-TUNING",
        "QLoRA",
        "unsloth/Meta-Llama-3.1-70B-bnb-4bit",
        8,
        1e-4,
        512,
    ),
}


def positive_number(text: str) -> float:
    """A finite number above 0."""
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a number above 0")


def main(name: str, argv: Sequence[str] | None = None) -> int:
    """Run the script `name` (a key of SCRIPTS) -> exit code, as `tunesmith train` gives it."""

    words = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        args = parser(name).parse_args(words)
        try:
            if (ranks := ranks_to_start(args)) > 1:
                return start_ranks(name, args, words, ranks)
            return _run(name, args, read_settings(name, args, words))
        except TunesmithError as error:
            for part in ("what", "where", "why", "fix"):
                setattr(
                    error, part, in_flags(vars(error)[part], batches_a_step(args), flags_of(name))
                )
            error.fix += not_here(error.fix, flags_of(name))
            raise

    return run_command(run, process=argv is None)


def ranks_to_start(args: argparse.Namespace) -> int:
    """How many processes this one has to start in its place; 1: it trains itself, alone or as one
    of a launcher's.
    """
    if is_launched() or "ACCELERATE_MIXED_PRECISION" in os.environ:
        if args.ranks and os.environ.get("TORCHELASTIC_RUN_ID") != SHARED:
            what, fix = (
                "another launcher has started this script",
                "leave --ranks out: the launcher says how many",
            )
            raise UsageError(what, where=f"--ranks {args.ranks}", fix=fix)
        return 1
    require_one_process("train")
    from tunesmith.launch.node import count_gpus

    return args.ranks or count_gpus() or 1


def start_ranks(name: str, args: argparse.Namespace, words: Sequence[str], ranks: int) -> int:
    """Run the script as `ranks` processes on this machine, as `tunesmith launch local` does -> exit
    code.
    """
    from tunesmith.launch import node

    flags = node.parser().parse_args(["--id", SHARED, "--", name])
    return node.run_program(
        flags, ranks, [str(Path(__file__).with_name(f"{name}.py")), *words], run_folder(name, args)
    )


def read_settings(name: str, args: argparse.Namespace, words: Sequence[str]) -> LauncherSettings:
    """What `accelerate launch` asks for, of which `args` take the flags that `words` do not give."""
    unset = object()
    typed = argparse.Namespace(**dict.fromkeys(vars(args), unset))
    given = {
        flag
        for flag, value in vars(parser(name).parse_args(words, typed)).items()
        if value is not unset
    }
    env = started_as() or {"WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    settings = read_launcher(
        os.environ, given, world=env["WORLD_SIZE"], local_world=env["LOCAL_WORLD_SIZE"]
    )
    for flag, value in settings.flags.items():
        setattr(args, flag, value)
    if settings.on_cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return settings


def batches_a_step(args: argparse.Namespace) -> int:
    """Batches of --batch_size that one optimizer step learns from: each process of a launcher takes
    its own.
    """
    env = started_as()
    own = env is not None and os.environ.get("TORCHELASTIC_RUN_ID") != SHARED
    return int(args.gradient_accumulation_steps) * (env["WORLD_SIZE"] if env and own else 1)


def parser(name: str) -> argparse.ArgumentParser:
    """The script's flags, with the defaults of its latest version."""
    script = SCRIPTS[name]
    p = Parser(
        prog=f"{name}.py",
        description=f"{script.title} on alpaca rows: one recipe behind it, see `tunesmith train --help`.",
        epilog="differs from the playbook's script:\n"
        + "\n".join(f"  - {line}" for line in DIFFERENCES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(flag: str, text: str, default: object, **more: Any) -> None:
        p.add_argument(flag, default=default, help=f"{text} (default: {default})", **more)

    count, amount = {"type": whole_number}, {"type": positive_number}
    dtype = "of weights and products; float16 scales the loss; auto: bfloat16 where it is fast"
    add("--model_name", "Hub id, local folder or .gguf file", script.model)
    add("--dtype", dtype, "auto", choices=list(DTYPES))
    text = "examples at once; under accelerate launch or torchrun for each process"
    add("--batch_size", text, script.batch_size, **count)
    add("--seq_length", "longest example in tokens; longer ones are cut and counted", 2048, **count)
    add("--num_epochs", "passes over the rows", 1, **amount)
    text = "batches that one optimizer step learns from"
    add("--gradient_accumulation_steps", text, 1, **count)
    text = "at the start; it falls linearly to 0"
    add("--learning_rate", text, script.learning_rate, **amount)
    text = "run each layer's forward again in the backward, to save memory"
    action = argparse.BooleanOptionalAction
    add("--gradient_checkpointing", text, script.checkpointing, action=action)
    if script.mode != "full":
        add("--lora_rank", "LoRA's r; alpha is 16", 8, **count)
    add("--dataset_size", "take the first N rows", script.dataset_size, **count)
    add("--logging_steps", "print a line every N steps", 1, **count)
    add("--log_dir", "folder of the TensorBoard events", "logs")
    add("--use_torch_compile", "torch.compile", False, action="store_true")
    add("--output_dir", "where all is written; a folder under runs/ unless given", None)
    ours = p.add_argument_group("beside theirs")
    text = "tokens that carry loss: all, as theirs, or the response alone, which is better"
    choices = ["all", "response"]
    ours.add_argument("--train_on", default="all", choices=choices, help=f"{text} (default: all)")
    text = "local alpaca rows (json, jsonl, csv, parquet) in place of tatsu-lab/alpaca"
    ours.add_argument("--data", metavar="FILE", help=text)
    text = "start over where an earlier run lies in the folder"
    ours.add_argument("--fresh", action="store_true", help=text)
    text = "run Python code from the model's repository"
    ours.add_argument("--trust_remote_code", action="store_true", help=text)
    text = "processes on this machine that share the batch (default: one a GPU; without GPUs one)"
    ours.add_argument("--ranks", type=whole_number, metavar="N", help=text)
    return p


def make_recipe(
    name: str,
    args: argparse.Namespace,
    *,
    folder: Path,
    batches: int,
    sharing: int = 1,
    asked: LauncherSettings = ALONE,
) -> Run:
    """The recipe for a script's flags.

    Args:
        folder: the run directory.
        batches: of --batch_size that a step learns from (`batches_a_step`).
        sharing: ranks that share one such batch.
        asked: the mesh and the offload that a launcher asks for.
    """
    mode = SCRIPTS[name].mode
    adapter = Adapter(kind="none")
    if mode != "full":
        adapter = Adapter(
            kind="lora", rank=args.lora_rank, alpha=16.0, dropout=0.0, target="all-linear"
        )
    rows = Source(source="tatsu-lab/alpaca", split="train")
    if args.data:
        rows = Source(source=os.path.realpath(args.data))
    return Run(
        model=Model(
            name=args.model_name,
            dtype=DTYPES[args.dtype],
            quantize="nf4" if mode == "QLoRA" else "none",
            trust_remote_code=args.trust_remote_code,
        ),
        adapter=adapter,
        data=Data(
            train=(replace(rows, format="alpaca", max_examples=args.dataset_size),),
            template=str(TEMPLATE),
            seq_len=args.seq_length,
            pack=False,
            train_on=args.train_on,
        ),
        train=Train(
            duration=Length(args.num_epochs, "epochs"),
            global_batch=Size(args.batch_size * batches, "examples"),
            micro_batch=Size(-(-args.batch_size // sharing), "examples"),
            learning_rate=args.learning_rate,
            schedule="linear",
            warmup=Length(0, "steps"),
            weight_decay=0.0,
            clip_norm=1.0,
            seed=SEED,
            recompute="full" if args.gradient_checkpointing else "none",
            cpu_offload=asked.offload,
            compile="on" if args.use_torch_compile else "off",
        ),
        parallel=asked.parallel,
        # A full checkpoint holds every weight and the optimizer's two moments: fewer of them,
        # further apart.
        checkpoint=Checkpoint(
            every=Length(200 if mode == "full" else 25, "steps"),
            keep=1 if mode == "full" else 2,
        ),
        log=Log(
            every=Length(args.logging_steps, "steps"),
            tensorboard_dir=os.path.realpath(args.log_dir),
        ),
        output_dir=str(folder),
    )


def count_parameters(recipe: Run) -> int:
    """How many parameters are trained, counted on meta: weights that are not here come later."""
    from tunesmith.build_model import count_trained, define_model
    from tunesmith.hub.fetch import fetch_for_tokens
    from tunesmith.hub.model_files import read_model_files

    recipe = replace(recipe, model=replace(recipe.model, dtype="bf16"))  # any will do
    files = read_model_files(fetch_for_tokens(recipe.model), recipe.model)
    return count_trained(recipe, define_model(recipe, files))


# A recipe's key in a warning or an error -> the flag that sets it here.
FLAGS = {
    "model.name": "--model_name", "model.dtype": "--dtype", "adapter.rank": "--lora_rank", "data.seq_len": "--seq_length",
    "data.train.source": "--data", "data.train_on": "--train_on", "train.duration": "--num_epochs",
    "train.global_batch": "--batch_size", "train.micro_batch": "--batch_size", "train.learning_rate": "--learning_rate",
    "train.recompute": "--gradient_checkpointing", "train.compile": "--use_torch_compile",
    "log.tensorboard_dir": "--log_dir", "log.every": "--logging_steps", "output_dir": "--output_dir",
}  # fmt: skip


def flags_of(name: str) -> set[str]:
    """The flags of the script `name`."""
    return {flag for action in parser(name)._actions for flag in action.option_strings}


def not_here(fix: str, flags: Collection[str]) -> str:
    """What to say after a fix that names flags or keys which this script lacks; empty where it has
    them all.
    """
    flags_in_fix = re.findall(r"(?<![\w-])--[a-z][\w-]*", fix)
    keys_in_fix = [
        word
        for word in re.findall(r"(?<![\w./-])[a-z_]+(?:\.[a-z_]+)+(?=[=:])", fix)
        if word in keys()
    ]
    absent = [word for word in dict.fromkeys([*flags_in_fix, *keys_in_fix]) if word not in flags]
    if not absent or "tunesmith " in fix:
        return ""
    return f" ({', '.join(absent)}: no flag of this script; tunesmith train takes a recipe, see tunesmith recipes)"


def in_flags(text: str, accumulation: int, flags: Collection[str]) -> str:
    """A warning or an error in the words of a script that has these `flags`; it divides the global
    batch by `accumulation`.
    """

    def flag(found: re.Match[str]) -> str:
        key, value = found[1], found[2] or found[3]
        if FLAGS[key] not in flags:
            return found[0]
        if value is None or FLAGS[key] in ("--gradient_checkpointing", "--use_torch_compile"):
            return FLAGS[key]
        if key == "train.global_batch":
            value = str(max(1, int(value.partition(" ")[0]) // accumulation))
        elif key != "output_dir":
            value = value.partition(" ")[0]
        return f"{FLAGS[key]} {next((ours for ours, theirs in DTYPES.items() if theirs == value), value)}"

    listed = "|".join(map(re.escape, FLAGS))
    return re.sub(
        rf"""(?<![\w./-])({listed})(?![\w.])(?:(?:=|: )(?:["']([^"']*)["']|([^\s,;()"']+)))?""",
        flag,
        text,
    )


class FlagFormatter(LineFormatter):
    """A record as `in_flags` has it."""

    def __init__(self, accumulation: int, flags: Collection[str]) -> None:
        super().__init__()
        self.accumulation, self.flags = accumulation, flags

    def format(self, record: logging.LogRecord) -> str:
        return in_flags(super().format(record), self.accumulation, self.flags)


def default_folder(name: str, args: argparse.Namespace) -> Path:
    """Where a run without --output_dir goes: one name for each set of flags that changes what is
    trained.
    """
    free = {"output_dir", "log_dir", "logging_steps", "fresh", "ranks", "trust_remote_code"}
    free |= {"use_torch_compile", "gradient_checkpointing"}
    kept = {key: value for key, value in vars(args).items() if key not in free}
    kept["gradient_accumulation_steps"] = batches_a_step(args)
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return Path("runs", f"{name}-{digest[:8]}")


def run_folder(name: str, args: argparse.Namespace) -> Path:
    """The run directory."""
    return Path(args.output_dir) if args.output_dir else default_folder(name, args)


def _run(name: str, args: argparse.Namespace, asked: LauncherSettings) -> int:
    env = started_as() or {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    script, folder, batches = SCRIPTS[name], run_folder(name, args), batches_a_step(args)
    first = env["RANK"] == 0
    say: Callable[[str], None] = print if first else lambda line: None
    say(configuration_text(script, args, batches))
    for line in asked.lines:
        say(f"accelerate: {line}")
    sharing = 1 if batches > args.gradient_accumulation_steps else env["WORLD_SIZE"]
    recipe = make_recipe(name, args, folder=folder, batches=batches, sharing=sharing, asked=asked)
    with reported_once_a_node():
        if args.fresh and first:
            with claim_run_dir(folder):
                unlink_final(folder)
        if env["LOCAL_RANK"] == 0:
            refuse_foreign_folder(folder)
        # The rules that span several keys, and the paths, are those of every recipe.
        run = from_mapping(to_mapping(recipe), where=f"{name}.py", base=Path.cwd())
        say(f"Loading model: {args.model_name}")
        say(f"Trainable parameters = {count_parameters(run):,}")
    say(f"Loading dataset with {args.dataset_size} samples...")
    say(f"\nStarting {script.mode} fine-tuning for {args.num_epochs:g} epoch(s)...")
    from tunesmith.training.run import train

    with lines_on_stderr(FlagFormatter(batches, flags_of(name))):
        result = train(run, fresh=args.fresh, argv=sys.argv)
    if first:
        print(closing(read_records(folder / "metrics.jsonl"), result.seconds))
        if result.finished_before:
            print("This run was finished before: nothing was left to train (--fresh starts over)")
        print(f"Saving model to {folder}...")
        link_final(folder)
        print(
            f"Model saved successfully! Metrics, log and checkpoints: {folder}; TensorBoard: {args.log_dir}"
        )
    return EXIT_OK


def configuration_text(script: Script, args: argparse.Namespace, batches: int) -> str:
    """The block of lines that the scripts open with; a step learns from so many batches."""
    rows = [
        f"\n{RULE}",
        f"{script.title} CONFIGURATION",
        RULE,
        f"Model: {args.model_name}",
        f"Training mode: {script.mode}",
        f"Batch size: {args.batch_size}",
        f"Gradient accumulation: {args.gradient_accumulation_steps}",
        f"Effective batch size: {args.batch_size * batches}",
        f"Sequence length: {args.seq_length}",
        f"Number of epochs: {args.num_epochs:g}",
        f"Learning rate: {args.learning_rate}",
        *([f"LoRA rank: {args.lora_rank}"] if script.mode != "full" else []),
        f"Dataset size: {args.dataset_size}",
        f"Gradient checkpointing: {args.gradient_checkpointing}",
        f"Torch compile: {args.use_torch_compile}",
        f"Loss on: {'every token' if args.train_on == 'all' else 'the response'}",
        f"{RULE}\n",
    ]
    return "\n".join(rows)


def closing(records: Sequence[StepRecord], seconds: float) -> str:
    """The block of lines that the scripts close with; their train loss is the mean over all steps.

    Args:
        records: of all starts of the run.
        seconds: its training time; 0 takes the sum of the steps' times.
    """
    losses = [record.loss for record in records]
    seconds = seconds or sum(record.step_seconds for record in records)
    rows = [
        f"\n{RULE}",
        "TRAINING COMPLETED",
        RULE,
        f"Training runtime: {seconds:.2f} seconds",
        f"Samples per second: {ratio(sum(record.examples for record in records), seconds):.2f}",
        f"Steps per second: {ratio(len(losses), seconds):.2f}",
        f"Train loss: {sum(losses) / len(losses):.4f}",
        f"Final loss: {losses[-1]:.4f}",
        f"{RULE}\n",
    ]
    return "\n".join(rows)


def refuse_foreign_folder(folder: Path) -> None:
    """UsageError where --output_dir holds somebody's files: model files are put into its root."""
    found = [path.name for path in folder.glob("*") if path.name != LOCK]
    if found and not is_run(folder):
        raise UsageError(
            f"--output_dir holds files that no run wrote: {', '.join(found[:5])}",
            where=str(folder),
            why="they might be overwritten",
            fix="give a new or empty folder: --output_dir runs/my-run",
        )


def unlink_final(folder: Path) -> None:
    """Remove what `link_final` has linked; the files stay in final/."""
    for file in (folder / "final").glob("*"):
        if (folder / file.name).is_file() and file.samefile(folder / file.name):
            (folder / file.name).unlink()


def link_final(folder: Path) -> None:
    """Put the files of final/ into the folder itself too, as the playbook does: hard links, or
    copies.
    """
    for file in sorted((folder / "final").iterdir()):
        target = folder / file.name
        if file.name == "manifest.json" or not file.is_file():
            continue
        target.unlink(missing_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copy2(file, target)
