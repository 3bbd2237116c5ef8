"""The composition root: a recipe becomes a Session, in the order in which faults are cheapest to find.

machine -> model files -> configuration -> tokenizer -> data and token contract -> weights -> optimizer -> checkpoint
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from tunesmith import packages
from tunesmith.adapter import peft_io
from tunesmith.checkpoint import state
from tunesmith.checkpoint.export import read_optimizer
from tunesmith.checkpoint.resume import RECIPE, Start, check_data
from tunesmith.config.dump import digest, dump
from tunesmith.config.schema import Run
from tunesmith.data.loader import GlobalBatch, Loader
from tunesmith.data.prepare import Prepared, prepare
from tunesmith.errors import MachineError, UsageError
from tunesmith.method.base import TrainModel
from tunesmith.metrics import hardware
from tunesmith.model import facts as model_facts
from tunesmith.model import hub, load
from tunesmith.model.facts import Facts
from tunesmith.optim import Optimizer, checkpoint_bytes_per_parameter
from tunesmith.parallel.apply import prepare as prepare_model
from tunesmith.parallel.memory import plan

LOSS_SCALE = 2.0**16


@dataclass
class Session:
    """All the live objects of one run.

    Attributes:
        folder: the model's files.
        micro_tokens, micro_examples: what one forward pass takes; exactly one of them is set.
        total_steps: optimizer steps of the whole run, or None where it ends by the clock.
    """

    run: Run
    folder: Path
    facts: Facts
    tokenizer: PreTrainedTokenizerBase
    data: Prepared
    model: TrainModel
    optimizer: Optimizer
    device: torch.device
    micro_tokens: int | None
    micro_examples: int | None
    total_steps: int | None

    @property
    def trained(self) -> Literal["full", "lora"]:
        """What is trained, in the word of `facts.flops`."""
        return "lora" if self.run.adapter.kind == "lora" else "full"

    @property
    def adapter_parameters(self) -> int:
        """Parameters trained beside a frozen base; 0 for full fine-tuning."""
        return sum(p.numel() for p in self.optimizer.params.values()) if self.trained == "lora" else 0

    @property
    def dtype(self) -> torch.dtype:
        """Type of the products."""
        return load.DTYPES[self.run.model.dtype]

    @property
    def pad_id(self) -> int:
        """The token that fills rows; never attended to nor trained."""
        return int(self.tokenizer.pad_token_id)

    def loader(self, start_step: int) -> Loader:
        """Global batches from step `start_step` (0 for the first) to the end of the run."""
        return Loader(
            self.data.train,
            self.data.course,
            micro_tokens=self.micro_tokens,
            micro_examples=self.micro_examples,
            pad_id=self.pad_id,
            start_step=start_step,
            stop_step=self.total_steps,
        )


def choose_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def check_machine(run: Run, device: torch.device) -> None:
    """Refuse what this machine cannot do, before anything is fetched.

    Raises:
        MachineError: a type of weights that the device has no products for, or a package that is not installed.
    """
    if run.train.optimizer == "adamw-8bit":
        packages.bitsandbytes("8-bit moments", "train.optimizer")
    if run.model.dtype == "fp16" and device.type == "cpu":
        raise MachineError(
            "fp16 cannot be trained on a CPU",
            where="model.dtype",
            why="its products are emulated, hundreds of times slower than bf16",
            fix="model.dtype=bf16, or model.dtype=fp32",
        )
    if run.model.dtype == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise MachineError(
            "this GPU has no bf16",
            where="model.dtype",
            why=f"{torch.cuda.get_device_name(device)} is older than Ampere",
            fix="model.dtype=fp16 (the loss is scaled), or model.dtype=fp32",
        )


def check_disk(run: Run, trained_bytes: int) -> None:
    """Refuse to begin a run whose checkpoints cannot be written.

    Args:
        run: `checkpoint.keep` and `output_dir` count.
        trained_bytes: what one checkpoint takes: trained weights and optimizer state.
    """
    copies = run.checkpoint.keep + 3  # the one being written, the best one, and final/
    needed, free = trained_bytes * copies, shutil.disk_usage(run.output_dir).free
    if free < needed:
        raise MachineError(
            f"no room for the checkpoints: {needed / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free",
            where=run.output_dir,
            why=f"one takes {trained_bytes / 2**30:.2f} GiB, and {copies} may lie there at once",
            fix="checkpoint.keep=1, or output_dir on a larger disk",
        )


def build(run: Run, start: Start, *, say: Callable[[str], None]) -> Session:
    """Make a Session, checking before each slow thing what can be checked without it.

    Args:
        run: the resolved recipe.
        start: where the run goes on from, if it does.
        say: takes one line for the user about each choice made here.
    """
    device = choose_device()
    check_machine(run, device)
    folder = hub.fetch(run.model, progress=say)
    config = load.config_of(folder, run.model)
    facts = model_facts.read(config.to_dict(), where=str(folder))
    tokenizer = load.tokenizer_of(folder, run.model)
    data = prepare(run, tokenizer, load.eos_ids(folder, tokenizer), load.vocab_rows(config, tokenizer))
    check_data(start, run, data.digest)
    say(data.describe())
    if (longest := data.train.counts.longest) > facts.context:
        say(
            f"warning: the longest example has {longest:,} tokens, and the model was made for {facts.context:,}; "
            f"mend: data.seq_len={facts.context}"
        )
    total_steps = data.course.steps(run.train.duration)

    memory = plan(run, facts, device, trained=trained_parameters(run, facts))
    check_disk(run, checkpoint_bytes(run, facts))
    resolved = replace(run, train=replace(run.train, recompute="full" if memory.recompute else "none"))
    torch.manual_seed(run.train.seed)
    saved = start.found.path if start.found else None
    model = prepare_model(resolved, saved if saved and run.adapter.kind == "none" else folder, device=device)
    if saved and run.adapter.kind == "lora":
        peft_io.load(model.model, saved)
    optimizer = make_optimizer(run, model, start)
    micro = run.train.global_batch if run.train.optimizer_in_backward else run.train.micro_batch
    tokens = memory.micro_tokens if micro == "auto" else micro.amount if micro.unit == "tokens" else None
    examples = None if micro == "auto" or micro.unit == "tokens" else micro.amount
    say(model.describe())
    session = Session(run, folder, facts, tokenizer, data, model, optimizer, device, tokens, examples, total_steps)
    first = start.progress.step if start.progress else 0
    if run.train.optimizer_in_backward and (total_steps is None or first < total_steps):
        check_one_pass(run, session.loader(first).batch(first))
    return session


def trained_parameters(run: Run, facts: Facts) -> int:
    """How many parameters are trained; for LoRA an upper estimate from rank and the layers' widths."""
    if run.adapter.kind == "none":
        return facts.parameters
    widths = (
        4 * facts.hidden + 2 * facts.head_dim * (facts.heads + facts.kv_heads) + 3 * (facts.hidden + facts.intermediate)
    )
    saved = 2 * facts.vocab * facts.hidden if run.adapter.modules_to_save else 0
    return run.adapter.rank * facts.layers * widths + saved


def checkpoint_bytes(run: Run, facts: Facts) -> int:
    """What one checkpoint takes: trained weights and the optimizer's state; for LoRA an upper estimate."""
    weight = 4 if run.adapter.kind == "lora" else load.DTYPES[run.model.dtype].itemsize
    return int(trained_parameters(run, facts) * (weight + checkpoint_bytes_per_parameter(run.train, weight)))


def check_one_pass(run: Run, batch: GlobalBatch) -> None:
    """Refuse a step of several backwards where the first of them already updates the weights.

    Raises:
        UsageError: `train.optimizer_in_backward`, and the batch does not fit one micro batch.
    """
    if run.train.optimizer_in_backward and len(batch.micro) > 1:
        raise UsageError(
            f"step {batch.step + 1} takes {len(batch.micro)} forward passes, and train.optimizer_in_backward needs one",
            where="train.optimizer_in_backward",
            why="each parameter is updated as soon as its gradient is there, so no gradient can be added up",
            fix="a smaller train.global_batch, or train.optimizer_in_backward=false",
        )


def make_optimizer(run: Run, model: TrainModel, start: Start) -> Optimizer:
    """The optimizer over everything that is trained, in the state of the checkpoint if there is one."""
    scale = LOSS_SCALE if run.model.dtype == "fp16" else None
    optimizer = Optimizer(model.trained_parameters(), run.train, loss_scale=scale)
    if start.found and start.progress:
        tensors, progress = read_optimizer(start.found.path), start.progress
        optimizer.load(tensors, scale=progress.loss_scale, good_steps=progress.good_steps, where=str(start.found.path))
    return optimizer


def write_identity(session: Session, argv: list[str] | None) -> None:
    """Write config.yaml and env.json: what was run, on what, from which data."""
    out = Path(session.run.output_dir)
    state.write_text(out / RECIPE, dump(session.run))
    data = {"recipe_hash": digest(session.run), "data_hash": session.data.digest}
    state.write_json(out / "env.json", {**hardware.describe(argv), **data})
