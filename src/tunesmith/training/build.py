"""The composition root: a recipe becomes a Session, in the order in which faults are cheapest to find.

machine -> model files -> configuration -> tokenizer -> data and token contract -> weights -> optimizer -> checkpoint
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedTokenizerBase

from tunesmith import packages
from tunesmith.build_model import Weights, attention_backend
from tunesmith.checkpoint.export import read_optimizer
from tunesmith.checkpoint.resume import RECIPE, Start, check_data
from tunesmith.config.dump import digest, dump
from tunesmith.config.schema import Run
from tunesmith.data.batch import Batch
from tunesmith.data.loader import GlobalBatch, Loader
from tunesmith.data.prepare import TrainingData, prepare_data
from tunesmith.errors import MachineError, UsageError
from tunesmith.fit_model import fit_model
from tunesmith.fp8_base import PROBED
from tunesmith.host_files import write_atomically
from tunesmith.hub import fetch
from tunesmith.methods.base import TrainModel
from tunesmith.metrics import hardware
from tunesmith.model import load
from tunesmith.model import spec as model_facts
from tunesmith.model.spec import ModelSpec
from tunesmith.optim import Optimizer, checkpoint_bytes_per_parameter
from tunesmith.quant import nf4
from tunesmith.runtime.choices import Choice, choices_line, choices_table
from tunesmith.runtime.compilation import compile_reason, should_compile
from tunesmith.runtime.memory_plan import MemoryPlan, describe_recompute, micro_batch_size, plan_memory
from tunesmith.runtime.transfer import DevicePrefetcher
from tunesmith.units import Size

LOSS_SCALE = 2.0**16
# Compiled graphs: rows of steps that differ are padded to a multiple of so many tokens, a hundredth of a usual step...
MULTIPLE = 128
# ... and the longest document is stated in blocks of the attention kernel.
BOUND = 128


@dataclass(frozen=True)
class MicroBatchLayout:
    """How micro batches are laid out; the fields are the Loader's."""

    micro_batch: Size
    pad_to: int | None = None
    multiple: int = 1
    bound: int | None = None


@dataclass
class Session:
    """All the live objects of one run.

    Attributes:
        folder: the model's files.
        rows: how micro batches are laid out.
        recomputed_layers: decoder layers that are run again in the backward.
        choices: what was decided for this machine, and why.
        total_steps: optimizer steps of the whole run, or None where it ends by the clock.
    """

    run: Run
    folder: Path
    facts: ModelSpec
    tokenizer: PreTrainedTokenizerBase
    data: TrainingData
    model: TrainModel
    optimizer: Optimizer
    device: torch.device
    rows: MicroBatchLayout
    recomputed_layers: int
    choices: list[Choice]
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
        """Global batches from step `start_step` (0 for the first) to the end of the run, on the device."""
        return Loader(
            self.data.train,
            self.data.course,
            **vars(self.rows),
            pad_id=self.pad_id,
            start_step=start_step,
            stop_step=self.total_steps,
            place=DevicePrefetcher(self.device) if self.device.type == "cuda" else None,
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
    if run.model.quantize == "nf4":
        nf4.check_nf4(device)
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


def build(
    run: Run,
    start: Start,
    *,
    say: Callable[[str], None],
    why: bool = False,
    weights: Weights = "stored",
    checkpoints: bool = True,
) -> Session:
    """Make a Session, checking before each slow thing what can be checked without it.

    Args:
        run: the resolved recipe.
        start: where the run goes on from, if it does.
        say: takes one line for the user about each choice made here.
        why: say the reason of each choice too.
        weights: "random" draws them on the device; `model.name` is then a folder that needs none.
        checkpoints: False where none will be written, so that no room is asked for them.
    """
    device = choose_device()
    check_machine(run, device)
    folder = fetch.fetch(run.model, progress=say) if weights == "stored" else Path(run.model.name)
    config = load.load_config(folder, run.model)
    facts = model_facts.read_spec(config.to_dict(), where=str(folder))
    tokenizer = load.load_tokenizer(folder, run.model)
    data = prepare_data(run, tokenizer, load.eos_ids(folder, tokenizer), load.vocab_rows(config, tokenizer))
    check_data(start, run, data.digest)
    say(data.describe())
    warn_of_length(data, facts, say)
    total_steps = data.course.steps(run.train.duration)

    trained, compiled = trained_parameters(run, facts), should_compile(run.train.compile, device)
    fixed = compiled and data.course.packed and run.train.global_batch.unit == "tokens" and not micro_examples(run)
    memory = plan_memory(run, facts, device, trained=trained, step=data.course.step_size(), fixed=fixed)
    if checkpoints:
        check_disk(run, checkpoint_bytes(run, facts))
    rows = rows_of(run, data, memory.micro_tokens, compiled=compiled, fixed=fixed)
    loader = Loader(data.train, data.course, pad_id=int(tokenizer.pad_token_id), **vars(rows))
    saved = start.found.path if start.found else None
    model, base, recomputed = fit_model(
        run,
        saved if saved and run.adapter.kind == "none" else folder,
        saved if run.adapter.kind == "lora" else None,
        [batch.to(device) for batch in first_batches(loader, PROBED if run.model.quantize == "fp8" else 1)],
        memory,
        trained=trained,
        varied=not fixed,
        weights=weights,
        say=say,
    )
    optimizer = make_optimizer(run, model, start)
    choices = choices_of(run, model, memory, rows, base, recomputed)
    say(model.describe())
    for text in choices_table(choices) if why else [choices_line(choices)]:
        say(text)
    session = Session(
        run, folder, facts, tokenizer, data, model, optimizer, device, rows, recomputed, choices, total_steps
    )
    check_first_step(session, start.progress.step if start.progress else 0)
    return session


def warn_of_length(data: TrainingData, facts: ModelSpec, say: Callable[[str], None]) -> None:
    """Tell of examples that are longer than the model was made for."""
    if (longest := data.train.counts.longest) > facts.context:
        say(
            f"warning: the longest example has {longest:,} tokens, and the model was made for {facts.context:,}; "
            f"mend: data.seq_len={facts.context}"
        )


def first_batches(loader: Loader, tokens: int) -> list[Batch]:
    """Micro batches from the first step on, until they hold so many tokens; epochs repeat."""
    found: list[Batch] = []
    for batch in (micro for step in itertools.count() for micro in loader.batch(step).micro):
        found.append(batch)
        if sum(batch.tokens for batch in found) >= tokens:
            break
    return found


def micro_examples(run: Run) -> int | None:
    """Examples of a micro batch, if the recipe counts in examples."""
    micro = micro_batch_size(run.train)
    return micro.amount if micro != "auto" and micro.unit == "examples" else None


def rows_of(run: Run, data: TrainingData, tokens: int, *, compiled: bool, fixed: bool) -> MicroBatchLayout:
    """How micro batches are laid out: freely, or for compiled graphs so that little varies (`parallel.compiled`)."""
    examples = micro_examples(run)
    size = Size(examples, "examples") if examples else Size(tokens, "tokens")
    if not compiled:
        return MicroBatchLayout(size)
    longest = data.train.counts.longest
    bound = -(-longest // BOUND) * BOUND
    if fixed:
        room = max(tokens, longest)
        return MicroBatchLayout(Size(room, "tokens"), pad_to=room, bound=bound)
    return MicroBatchLayout(size, multiple=MULTIPLE if data.course.packed else BOUND // 8, bound=bound)


def choices_of(
    run: Run, model: TrainModel, memory: MemoryPlan, rows: MicroBatchLayout, base: Choice, recomputed: int
) -> list[Choice]:
    """What this machine decided, for the line at the start and for env.json."""
    layers, device = len(model.layers), next(model.parameters()).device
    door = attention_backend(run, model.model.config, device)
    on = should_compile(run.train.compile, device)
    rerun = "as train.recompute says" if run.train.recompute != "auto" else "no more than the memory needs"
    return [
        Choice("attention", door.name, door.why),
        Choice("loss", "chunked, compiled" if on else "chunked", "head and loss on supervised positions alone"),
        base,
        Choice("compile", "per layer" if on else "off", compile_reason(run.train.compile, device)),
        Choice("recompute", describe_recompute(recomputed, layers), rerun),
        Choice(
            "micro batch",
            f"{rows.micro_batch.amount:,} {rows.micro_batch.unit}",
            memory.why,
        ),
    ]


def trained_parameters(run: Run, facts: ModelSpec) -> int:
    """How many parameters are trained; for LoRA an upper estimate from rank and the layers' widths."""
    if run.adapter.kind == "none":
        return facts.parameters
    widths = (
        4 * facts.hidden + 2 * facts.head_dim * (facts.heads + facts.kv_heads) + 3 * (facts.hidden + facts.intermediate)
    )
    saved = 2 * facts.vocab * facts.hidden if run.adapter.modules_to_save else 0
    return run.adapter.rank * facts.layers * widths + saved


def checkpoint_bytes(run: Run, facts: ModelSpec) -> int:
    """What one checkpoint takes: trained weights and the optimizer's state; for LoRA an upper estimate."""
    weight = 4 if run.adapter.kind == "lora" else load.DTYPES[run.model.dtype].itemsize
    return int(trained_parameters(run, facts) * (weight + checkpoint_bytes_per_parameter(run.train, weight)))


def check_first_step(session: Session, step: int) -> None:
    """`check_one_pass` before anything is trained: on the step, from 0, that this start begins with."""
    more = session.total_steps is None or step < session.total_steps
    if session.run.train.optimizer_in_backward and more:
        check_one_pass(session.run, session.loader(step).batch(step))


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
        tensors, saved, where = read_optimizer(start.found.path), start.progress, str(start.found.path)
        optimizer.load_state_dict(tensors, scale=saved.loss_scale, growth_tracker=saved.good_steps, where=where)
    return optimizer


def write_identity(session: Session, argv: list[str] | None) -> None:
    """Write config.yaml and env.json: what was run, on what, from which data."""
    out = Path(session.run.output_dir)
    write_atomically(out / RECIPE, dump(session.run))
    found = {"recipe_hash": digest(session.run), "data_hash": session.data.digest}
    choices = {c.part: {"taken": c.taken, "why": c.why} for c in session.choices}
    env = {**hardware.describe(argv), **found, "choices": choices}
    write_atomically(out / "env.json", json.dumps(env, indent=1))
