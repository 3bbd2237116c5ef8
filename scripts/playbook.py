"""Shared code of the four DGX Spark playbook scripts in this folder.

`Llama3_8B_LoRA_finetuning.py` and the other three scripts have the same names, flags, defaults,
training rows, prompt text and final output lines as the playbook. They convert their flags into a
recipe (`make_recipe`) and call `train`. `DIFFERENCES` lists all differences from the playbook, and
`--help` shows them.
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

# The playbook's prompt as a chat template. If a row has no input, the field for the input is empty.
# The space before the response belongs to the response, because a byte-pair tokenizer merges the
# space with the first word.
TEMPLATE = Path(__file__).with_name("configs") / "alpaca.jinja"
SEED = 42
RULE = "=" * 60
ALONE = LauncherSettings()  # no launcher requests anything
SHARED = "playbook"  # id of ranks that a script started itself; they share its batch
DTYPES: dict[str, Literal["auto", "fp32", "fp16", "bf16"]] = {
    "auto": "auto",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
}

DIFFERENCES = (
    "checkpoints are written; the same command resumes an interrupted run (--fresh starts anew)",
    "without --output_dir, the result is saved under runs/; the playbook discards it",
    "--output_dir is a run directory: it has metrics, log and checkpoints next to the model files",
    "rows are shuffled with seed 42 by tunesmith's sampler, in the playbook by datasets and torch",
    "LoRA parameters are fp32; so are the master weights in full fine-tuning of a bf16 model",
    "--use_torch_compile has no warm-up: it compiles in the first step; the playbook trains the "
    "model twice",
    "every text begins with the BOS token if the tokenizer has one",
    "Python code of a model's repository runs only with --trust_remote_code; some of the "
    "playbook's scripts always run it",
    "--dtype is auto: bfloat16 as in the playbook, but float32 if the processor has no bf16 "
    "hardware and the weights fit",
    "every --batch_size and --seq_length is accepted; every script has all common flags",
    "without a launcher, a script starts one process per GPU, and the processes share "
    "--batch_size; in the playbook one process uses all GPUs",
)


@dataclass(frozen=True)
class Script:
    """Title and defaults of one of the four scripts."""

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
    """Return the finite number above 0 that a text represents.

    Raise ArgumentTypeError for any other text.
    """
    with suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")


def main(name: str, argv: Sequence[str] | None = None) -> int:
    """Run the script `name` (a key of SCRIPTS). Return the same exit codes as `tunesmith train`."""

    words = list(sys.argv[1:] if argv is None else argv)

    def run() -> int:
        args = parser(name).parse_args(words)
        try:
            if (ranks := ranks_to_start(args)) > 1:
                return start_ranks(name, words, ranks)
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
    """Return the number of ranks that this process must start.

    Return 1 if this process itself trains, either as the only rank or as a rank of a launcher.
    """
    if is_launched() or "ACCELERATE_MIXED_PRECISION" in os.environ:
        if args.ranks and os.environ.get("TORCHELASTIC_RUN_ID") != SHARED:
            what, fix = (
                "another launcher started this script, and --ranks is given",
                "remove --ranks: the launcher sets the number of ranks",
            )
            raise UsageError(what, where=f"--ranks {args.ranks}", fix=fix)
        return 1
    require_one_process("train")
    from tunesmith.launch.node import count_gpus

    return args.ranks or count_gpus() or 1


def start_ranks(name: str, words: Sequence[str], ranks: int) -> int:
    """Run the script as `ranks` processes on this machine, as `tunesmith launch local` does.

    Return the exit code.
    """
    from tunesmith.launch import node

    flags = node.parser().parse_args(["--id", SHARED, "--", name])
    program = [str(Path(__file__).with_name(f"{name}.py")), *words]
    return node.run_program(flags, ranks, program)


def read_settings(name: str, args: argparse.Namespace, words: Sequence[str]) -> LauncherSettings:
    """Return the settings that `accelerate launch` requests.

    Also set the requested flags in `args`. Flags in `words` are not overridden.
    """
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
    """Return the number of batches of --batch_size per optimizer step.

    Each process of a launcher has its own batches. Ranks that the script started share a batch.
    """
    env = started_as()
    own = env is not None and os.environ.get("TORCHELASTIC_RUN_ID") != SHARED
    return int(args.gradient_accumulation_steps) * (env["WORLD_SIZE"] if env and own else 1)


def parser(name: str) -> argparse.ArgumentParser:
    """Return the script's parser, with the defaults of the playbook's latest version."""
    script = SCRIPTS[name]
    p = Parser(
        prog=f"{name}.py",
        description=f"{script.title} on alpaca rows. The script converts its flags into a recipe "
        "and trains as `tunesmith train` does.",
        epilog="this script differs from the playbook's script:\n"
        + "\n".join(f"  - {line}" for line in DIFFERENCES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(flag: str, text: str, default: object, **more: Any) -> None:
        p.add_argument(flag, default=default, help=f"{text} (default: {default})", **more)

    count, amount = {"type": whole_number}, {"type": positive_number}
    dtype = (
        "dtype of weights and matmuls; float16 uses loss scaling; auto: bfloat16 if the processor "
        "has bf16 hardware"
    )
    add("--model_name", "model: a Hub id or a local folder", script.model)
    add("--dtype", dtype, "auto", choices=list(DTYPES))
    text = "examples per batch; under accelerate launch or torchrun, per batch of each process"
    add("--batch_size", text, script.batch_size, **count)
    add("--seq_length", "max tokens per example; longer ones are cut and counted", 2048, **count)
    add("--num_epochs", "number of passes over the rows", 1, **amount)
    text = "batches per optimizer step"
    add("--gradient_accumulation_steps", text, 1, **count)
    text = "initial learning rate; it decreases linearly to 0"
    add("--learning_rate", text, script.learning_rate, **amount)
    text = "recompute each layer in the backward pass, to save memory"
    action = argparse.BooleanOptionalAction
    add("--gradient_checkpointing", text, script.checkpointing, action=action)
    if script.mode != "full":
        add("--lora_rank", "LoRA rank r; alpha is 16", 8, **count)
    add("--dataset_size", "use only the first N rows", script.dataset_size, **count)
    add("--logging_steps", "print a line every N steps", 1, **count)
    add("--log_dir", "folder for TensorBoard event files", "logs")
    add("--use_torch_compile", "use torch.compile", False, action="store_true")
    add("--output_dir", "run directory; if not given, a folder under runs/", None)
    ours = p.add_argument_group("flags that the playbook does not have")
    text = "supervised tokens: all, as in the playbook, or only the response, which is better"
    choices = ["all", "response"]
    ours.add_argument("--train_on", default="all", choices=choices, help=f"{text} (default: all)")
    text = "local file of alpaca rows (json, jsonl, csv, parquet) instead of tatsu-lab/alpaca"
    ours.add_argument("--data", metavar="FILE", help=text)
    text = "start a new run; an earlier run in the run directory is moved to another folder"
    ours.add_argument("--fresh", action="store_true", help=text)
    text = "run Python code from the model's repository"
    ours.add_argument("--trust_remote_code", action="store_true", help=text)
    text = "number of processes on this machine; they share the batch (default: one per GPU, or 1)"
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
    """Return the recipe for a script's flags.

    Args:
        folder: the run directory.
        batches: number of batches of --batch_size per optimizer step (`batches_a_step`).
        sharing: number of ranks that share one batch.
        asked: the settings that a launcher requests. The recipe uses the mesh and the offload.
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
        # A full checkpoint is large: it contains all weights and both moments of the optimizer.
        # Therefore full checkpoints are written less often, and only one is kept.
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
    """Return the number of trained parameters.

    The model is built on the meta device, because its weights may not be downloaded yet.
    """
    from tunesmith.build_model import count_trained, define_model
    from tunesmith.hub.fetch import fetch_for_tokens
    from tunesmith.hub.model_files import read_model_files

    # The count does not depend on the dtype, and `auto` would have to be resolved first.
    recipe = replace(recipe, model=replace(recipe.model, dtype="bf16"))
    files = read_model_files(fetch_for_tokens(recipe.model), recipe.model)
    return count_trained(recipe, define_model(recipe, files))


# For each recipe key that warnings and errors name: the script's flag that sets the key.
FLAGS = {
    "model.name": "--model_name", "model.dtype": "--dtype", "adapter.rank": "--lora_rank", "data.seq_len": "--seq_length",
    "data.train.source": "--data", "data.train_on": "--train_on", "train.duration": "--num_epochs",
    "train.global_batch": "--batch_size", "train.micro_batch": "--batch_size", "train.learning_rate": "--learning_rate",
    "train.recompute": "--gradient_checkpointing", "train.compile": "--use_torch_compile",
    "log.tensorboard_dir": "--log_dir", "log.every": "--logging_steps", "output_dir": "--output_dir",
}  # fmt: skip


def flags_of(name: str) -> set[str]:
    """Return the flags of the script `name`, with their dashes."""
    return {flag for action in parser(name)._actions for flag in action.option_strings}


def not_here(fix: str, flags: Collection[str]) -> str:
    """Return a remark for a fix that names flags or keys that this script does not have.

    Return an empty text if the script has all of them, or if the fix contains a command of
    tunesmith.
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
    return (
        f" ({', '.join(absent)}: not a flag of this script; use `tunesmith train` with a recipe, "
        "see `tunesmith recipes`)"
    )


def in_flags(text: str, accumulation: int, flags: Collection[str]) -> str:
    """Return a warning or an error with each recipe key replaced by the script's flag.

    Args:
        accumulation: number of batches of --batch_size per optimizer step. A global batch in the
            text is divided by this number.
        flags: the flags of the script. Keys of other flags are not replaced.
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
    """Formatter that replaces recipe keys in log records by flags, see `in_flags`."""

    def __init__(self, accumulation: int, flags: Collection[str]) -> None:
        super().__init__()
        self.accumulation, self.flags = accumulation, flags

    def format(self, record: logging.LogRecord) -> str:
        return in_flags(super().format(record), self.accumulation, self.flags)


def default_folder(name: str, args: argparse.Namespace) -> Path:
    """Return the run directory of a run without --output_dir.

    Its name depends on all flags that change the result of the training.
    """
    free = {"output_dir", "log_dir", "logging_steps", "fresh", "ranks", "trust_remote_code"}
    free |= {"use_torch_compile", "gradient_checkpointing"}
    kept = {key: value for key, value in vars(args).items() if key not in free}
    kept["gradient_accumulation_steps"] = batches_a_step(args)
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return Path("runs", f"{name}-{digest[:8]}")


def run_folder(name: str, args: argparse.Namespace) -> Path:
    """Return the run directory."""
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
        # Check the recipe and resolve its paths in the same way as for every other recipe.
        run = from_mapping(to_mapping(recipe), where=f"{name}.py", base=Path.cwd())
        say(f"Loading model: {args.model_name}")
        say(f"Trainable parameters = {count_parameters(run):,}")
    say(f"Loading dataset with {args.dataset_size} samples...")
    say(f"\nStarting {script.mode} fine-tuning for {args.num_epochs:g} epoch(s)...")
    from tunesmith.start.run import train

    with lines_on_stderr(FlagFormatter(batches, flags_of(name))):
        result = train(run, fresh=args.fresh, argv=sys.argv)
    if first:
        print(closing(read_records(folder / "metrics.jsonl"), result.seconds))
        if result.finished_before:
            print("This run was already complete: nothing was trained (--fresh starts a new run)")
        print(f"Saving model to {folder}...")
        link_final(folder)
        print(
            f"Model saved successfully! Metrics, log and checkpoints: {folder}; "
            f"TensorBoard: {args.log_dir}"
        )
    return EXIT_OK


def configuration_text(script: Script, args: argparse.Namespace, batches: int) -> str:
    """Return the first lines that a script prints.

    Args:
        batches: number of batches of --batch_size per optimizer step.
    """
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
    """Return the last lines that a script prints.

    As in the playbook, the train loss is the mean over all steps.

    Args:
        records: the records of all steps, including those before the run was resumed.
        seconds: the training time. If it is 0, the sum of the steps' times is used.
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
    """Raise UsageError if the folder contains files that are not from a run.

    The model files, which are linked into the folder, could overwrite such files.
    """
    found = [path.name for path in folder.glob("*") if path.name != LOCK]
    if found and not is_run(folder):
        raise UsageError(
            f"--output_dir contains files that are not from a run: {', '.join(found[:5])}",
            where=str(folder),
            why="the model files could overwrite them",
            fix="use a new or empty folder: --output_dir runs/my-run",
        )


def unlink_final(folder: Path) -> None:
    """Remove the links that `link_final` created. The files remain in final/."""
    for file in (folder / "final").glob("*"):
        if (folder / file.name).is_file() and file.samefile(folder / file.name):
            (folder / file.name).unlink()


def link_final(folder: Path) -> None:
    """Hard-link the files of final/ into the run directory, where the playbook saves its files.

    If a hard link is not possible, copy the file.
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
