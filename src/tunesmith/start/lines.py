"""Text about the start of a run: its machine, its model and its plan.

The texts about its data are in `presentation/data.py`.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tunesmith.adapter.lora import ALL_LINEAR, Unreached, find_unreached
from tunesmith.adapter.peft_files import Misread, find_misread
from tunesmith.checkpoint.resume import Start
from tunesmith.checkpoint.start_adapter import find_adapter
from tunesmith.config.schema import Run
from tunesmith.distributed.ranks import Ranks
from tunesmith.host.chips import Peak
from tunesmith.host.files import relative_to_cwd
from tunesmith.host.shell import shell_word
from tunesmith.hub.model_files import ModelFiles
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.model.known.gguf_writers import describe_gguf_export, gguf_writer
from tunesmith.model.weights.shipped import AS_SHIPPED
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.compare_eight_bit import LossChange
from tunesmith.planning.run_plan import RunPlan
from tunesmith.presentation.data import data_warnings
from tunesmith.presentation.plan import plan_warnings
from tunesmith.quant.linear_layers import parameter_count
from tunesmith.run_dir import read_recipe
from tunesmith.start.plan import MachineFacts, PlanFacts


def machine_lines(facts: MachineFacts) -> Iterator[str]:
    """Yield lines about the dtype, and warnings about settings that do not suit the device."""
    run = facts.run
    if facts.dtype_reason:
        yield f"model.dtype: {run.model.dtype}, {facts.dtype_reason}"
    if facts.dtype == "bf16" and not facts.chip.bf16:
        yield (
            "warning: this CPU has no bf16 hardware, so bf16 matmuls take up to 200 times as long "
            "as fp32; fix: set model.dtype=fp32"
        )
    if run.train.cpu_offload and facts.device.type == "cpu":
        yield "warning: train.cpu_offload has no effect on a CPU"


def model_files_lines(files: ModelFiles) -> Iterator[str]:
    """Yield lines about the files of the model: how its rows and weights are used, and which tools
    an export to GGUF requires.
    """
    support = files.support
    if support.state == "padded":
        yield f"warning: {support.why}; this is slower than packed rows"
    elif support.recurrent:
        yield (
            f"{', '.join(support.recurrent)}: recurrent layers run on one row per document, "
            "padded to a common length"
        )
    model = files.model
    if files.form is not None:
        storage = model.dtype if model.quantize == "none" else model.quantize
        use = f"the weights are converted to {storage} while loading"
        if model.quantize == AS_SHIPPED:
            use = "the weights stay quantized and are dequantized for one matmul at a time"
        yield f"the base model is stored in {files.form.describe()}: {use}"
    embedding_rows = int(files.config.vocab_size)
    tokens = len(files.tokenizer)
    if tokens > embedding_rows:
        sizes = f"{tokens:,} tokens, but the embedding has {embedding_rows:,} rows"
        if model.added_tokens:
            names = ", ".join(model.added_tokens)
            yield f"the tokenizer has {sizes}: rows are added for {names}, the mean of all rows"
        else:
            yield (
                f"warning: the tokenizer has {sizes}, so data with other tokens is rejected; fix: "
                "list the tokens that you need in model.added_tokens, which adds rows"
            )
    entire = files.config if files.full_config is None else files.full_config
    if gguf_writer(entire.model_type, files.config.model_type) != "own":
        yield f"GGUF: {describe_gguf_export(entire.model_type, files.config.model_type)}"


def planned_lines(facts: PlanFacts) -> Iterator[str]:
    """Yield lines before the weights are loaded: what is trained, whether it fits, and warnings."""
    run = facts.run
    plan = facts.plan
    yield from model_files_lines(facts.files)
    trained = "all weights"
    if run.adapter.kind == "lora":
        trained = f"LoRA of rank {run.adapter.rank}"
    if plan.base not in DTYPES:
        trained += f", base: {plan.base}"
    name = run.model.name
    if Path(name).exists():
        name = Path(name).absolute().name  # print only the name; config.yaml has the full path
    yield f"model: {name}: {trained}: {trained_text(facts.model, facts.trained)}"
    memory = plan.memory
    yield (
        f"memory: about {memory.total / 2**30:.1f} of {memory.free / 2**30:.1f} GiB, "
        f"micro batch: {plan.choices['micro batch']}, recompute: {plan.choices['recompute']}"
    )
    # All warnings come after the lines that describe the run.
    yield from data_warnings(facts.data)
    yield from _adapter_warnings(run, facts.start)
    spec = facts.files.spec
    limit = spec.position_limit or spec.context
    longest = int(facts.data.train.lengths.max())
    if longest > limit:
        text = f"the longest example has {longest:,} tokens, but the model supports {limit:,}"
        yield f"warning: {text}; fix: set data.seq_len={limit}"


def trained_text(model: PreTrainedModel, trained: int) -> str:
    """Return the class of a model and the fraction of its parameters that are trained."""
    count = parameter_count(model)
    share = f"{trained:,} of {count:,} parameters are trained ({trained / count:.2%})"
    return f"{type(model).__name__}, {share}"


def _adapter_warnings(run: Run, start: Start) -> Iterator[str]:
    """Yield a warning if `adapter.from` was trained on a base with another name."""
    adapter = run.adapter.from_
    if adapter is None or start.checkpoint is not None:
        return
    folder = find_adapter(adapter).parent
    # `base` is None if the adapter was not trained by tunesmith.
    base = read_recipe(folder).value.get("model", {}).get("name")
    if base and base != run.model.name:
        yield (
            f"warning: the adapter in {relative_to_cwd(folder)} was trained on {base}, but this "
            f"recipe uses {run.model.name}; if these are different models, set "
            f"{shell_word(f'model.name={base}')}"
        )


def session_lines(
    facts: PlanFacts, model: PreTrainedModel, plan: RunPlan, peak: Peak, *, why: bool
) -> Iterator[str]:
    """Yield lines after the weights are loaded: what the adapter excludes, and warnings.

    Args:
        plan: the plan with the changes that a memory trial has made.
        why: whether to yield each choice of the plan with its reason.
    """
    run = facts.run
    if run.adapter.kind == "lora" and run.adapter.target == ALL_LINEAR:
        yield from unreached_lines(find_unreached(model))
    if why:
        yield from choice_lines(plan)
        if "threads" in plan.why:
            yield f"threads: {torch.get_num_threads()}, {plan.why['threads']}"
    if peak.tflops and not peak.published:
        yield f"MFU is relative to {peak.tflops:.0f} TFLOP/s, {peak.source}"
    yield from plan_warnings(run, plan)
    if run.adapter.kind == "lora":
        yield from misread_warnings(find_misread(model))
    previous = facts.start.micro_batch
    now = plan.layout.micro_batch
    if previous is not None and now != previous:
        reason = f"to keep the micro batch, set train.micro_batch='{previous}'"
        if run.train.micro_batch == "auto":
            reason = f"a micro batch of {previous} no longer fits into memory"
        yield (
            f"the micro batch changes from {previous} to {now}, so rounding and dropout masks "
            f"differ from an uninterrupted run; {reason}"
        )


def loss_change_text(change: LossChange, exact: str = "in bf16") -> str:
    """Return the loss of the base in 8 bits, and its change by the rounding.

    Args:
        exact: how the loss without the rounding was computed.
    """
    losses = f"loss is {change.rounded:.4f}, and {change.exact:.4f} {exact}"
    return f"{losses} ({change.relative:+.3%}), on {change.tokens:,} tokens of the data"


def sums_line(base: str, change: LossChange) -> str:
    """Return a line about the accumulation in 8-bit matmuls, and how it changes the loss.

    Args:
        base: storage of the base's weights.
    """
    chosen = "fast" if change.is_tolerable else "full"
    losses = loss_change_text(change, "with full accumulation")
    return (
        f"{base}: {chosen} accumulation in the forward, because with fast accumulation the {losses}"
        f"; fast is used up to {change.limit:.1%}"
    )


def ranks_line(ranks: Ranks, shape: MeshShape, plan: RunPlan, idle_share: float) -> str:
    """Return a line about the hosts and the mesh of a run.

    Args:
        idle_share: fraction of a step in which ranks have no work.
    """
    hosts = ", ".join(dict.fromkeys(ranks.hosts))
    mesh = f"{shape.describe()}, {plan.why['mesh']}"
    idle = f"idle time of the ranks per step: {idle_share:.1%}"
    return f"{ranks.world} ranks on {hosts}: {mesh}; {idle}"


def unreached_lines(unreached: Unreached) -> Iterator[str]:
    """Yield a line about the parts of the decoder that `all-linear` does not adapt."""
    parts = []
    if unreached.matrices:
        names = ", ".join(unreached.matrices)
        parts.append(f"{names}, which are not linear layers ({unreached.share:.0%} of the model)")
    if unreached.bypassed:
        parts.append(f"{', '.join(unreached.bypassed)}, where an adapter would get no gradient")
    if unreached.has_routers:
        parts.append("the routers")
    if parts:
        yield f"the adapter excludes {'; '.join(parts)}"


def misread_warnings(misread: Misread | None) -> Iterator[str]:
    """Yield a warning if PEFT would not load the entire adapter."""
    if misread is None:
        return
    if misread.error:
        yield f"warning: PEFT does not open this adapter: {misread.error}"
        return
    yield (
        f"warning: PEFT treats {', '.join(misread.layers)} of a {misread.model_type} "
        "as experts, and does not load these adapters; merge the adapter (tunesmith merge), or set "
        f"adapter.target: [{', '.join(misread.targets)}]"
    )


def choice_lines(plan: RunPlan) -> Iterator[str]:
    """Yield one line for each choice of a plan, with its reason."""
    choices = {part: f"{part}: {value}" for part, value in plan.choices.items()}
    width = max(map(len, choices.values()))
    for part, text in choices.items():
        yield f"{text:<{width}}  {plan.why[part]}"


def choices_line(plan: RunPlan) -> str:
    """Return one line with all choices of a plan, such as `attention: varlen; loss: chunked`."""
    return "; ".join(f"{part}: {value}" for part, value in plan.choices.items())
