"""The rules that span several keys of a recipe, or that a type and its bounds cannot say."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

from tunesmith.config.dump import flatten
from tunesmith.config.names import nearest, without_indices
from tunesmith.config.paths import TEMPLATES
from tunesmith.config.schema import Run
from tunesmith.errors import RecipeError

# The column names of each format, the first of which identifies it; `columns` maps them to those of a file.
COLUMNS = {
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
CHATS = tuple(name for name in COLUMNS if name != "text")  # formats with turns, and so with a system message

# A broken rule: the key, what is wrong with it (read after the key), the fix, and the reason if it is not plain.
Problem = tuple[str, str, str] | tuple[str, str, str, str]


def check_run(run: Run, where: Callable[[str], str]) -> None:
    """RecipeError for the first rule that a recipe breaks; `where` gives the place of a dotted key, "" if not given."""
    for rules in (_texts, _model, _adapter, _data, _train, _batch, _optimizer_in_backward, _lengths, _validate):
        for key, what, fix, *why in rules(run, where):
            raise RecipeError(f"{key} {what}", where=where(key) or key, why="".join(why), fix=fix)


def _texts(run: Run, given: Callable[[str], str]) -> Iterator[Problem]:
    """Empty texts: a branch, a split or a token without a name. An empty system message is one that some models need."""
    for key, value in flatten(run).items():
        if value == "" and key not in ("data.system", "adapter.target"):
            name = key if given(key) or not without_indices(key).startswith("data.") else without_indices(key)
            yield name, "is empty", f"write its value, or remove {name}"


def _model(run: Run, given: Callable[[str], str]) -> Iterator[Problem]:
    model, adapter = run.model, run.adapter
    if model.quantize == "fp8" and model.dtype != "bf16":
        why = "fp8 matmuls return bf16"
        yield "model.quantize", f"is fp8, but model.dtype is {model.dtype}", "model.dtype: bf16", why
    if model.quantize != "none" and adapter.kind == "none":
        why = "full fine-tuning trains the base weights, and quantized ones are frozen"
        fix = "train an adapter on it (adapter.kind: lora), or model.quantize: none"
        yield "model.quantize", f"is {model.quantize}, but adapter.kind is none", fix, why
    if len(set(model.added_tokens)) < len(model.added_tokens) or "" in model.added_tokens:
        yield "model.added_tokens", "has an empty or repeated token", "name each one once"
    embeds = any(name.rpartition(".")[2].startswith("embed") for name in adapter.modules_to_save)
    if model.added_tokens and adapter.kind == "lora" and not embeds:
        why = "their embeddings are random, and a LoRA adapter alone does not train them"
        fix = "adapter.modules_to_save: [embed_tokens, lm_head]   # both, even if tied: each is trained as its own copy"
        yield "model.added_tokens", "needs trained embeddings", fix, why


def _adapter(run: Run, given: Callable[[str], str]) -> Iterator[Problem]:
    if run.adapter.kind == "none":
        for name in ("rank", "alpha", "dropout", "target", "rslora", "modules_to_save", "from"):
            if given(f"adapter.{name}"):
                fix = f"remove adapter.{name}, or train an adapter: adapter.kind: lora"
                yield f"adapter.{name}", "has no effect with adapter.kind: none", fix
        return
    target = run.adapter.target
    names = (target,) if isinstance(target, str) else target
    if "" in run.adapter.modules_to_save:
        yield "adapter.modules_to_save", "has an empty name", "adapter.modules_to_save: []"
    if not names or "" in names:
        yield "adapter.target", "names no module", "adapter.target: all-linear"
    elif any(name != "all-linear" and nearest(name, ["all-linear"]) for name in names):
        fix = "adapter.target: all-linear, or a list of module names such as [q_proj, v_proj]"
        yield "adapter.target", f"is {', '.join(names)}, which is no module's name", fix
    elif "all-linear" in names and isinstance(target, tuple):
        yield "adapter.target", "has all-linear in a list", "adapter.target: all-linear"


def _data(run: Run, given: Callable[[str], str]) -> Iterator[Problem]:
    data = run.data
    if not data.train:
        yield "data.train", "is empty", "data.train: {source: rows.jsonl, format: messages}"
    for part, sources in (("train", data.train), ("validation", data.validation)):
        for i, source in enumerate(sources):
            # A single source is written without an index, and its places are known without one.
            indexed, known = given(f"data.{part}.{i}") or len(sources) > 1, COLUMNS[source.format]
            for name, column in source.columns.items():
                if name not in known:
                    near = nearest(name, known)
                    fix = f"did you mean {near}?" if near else f"its columns are {', '.join(known)}"
                    fix = f"write {column}: {name}" if column in known else fix
                    what = f"is not a column of format {source.format}"
                    key = f"data.{part}.{i}.columns.{name}" if indexed else f"data.{part}.columns.{name}"
                    yield key, what, fix, "columns are written as the format's name: the file's name"
    if data.hold_out is not None and data.validation:
        fix = "remove data.hold_out, or data.validation: null"
        yield "data.hold_out", "and data.validation are both given", fix, "either names the rows to validate on"
    if data.hold_out is not None and not 0 < data.hold_out.amount < {"%": 100}.get(data.hold_out.unit, math.inf):
        yield "data.hold_out", f"is {data.hold_out}: above 0 % and below 100 %", "data.hold_out: 5 %"
    if data.template not in TEMPLATES and not Path(data.template).is_file():
        near = nearest(Path(data.template).name, TEMPLATES)
        fix = f"did you mean {near}?" if near else f"one of {', '.join(TEMPLATES)}, or a Jinja file that exists"
        yield "data.template", f"is a file that does not exist: {data.template}", fix
    formats = {source.format for source in data.train}
    turns = sorted({source.format for source in (*data.train, *data.validation)} - {"prompt-completion", "text"})
    if data.template == "raw" and turns:
        why = "raw takes a prompt and a completion, or a text, as they stand"
        fix = "data.template: auto, or rows of format prompt-completion"
        yield "data.template", f"is raw, which cannot write the turns of format {' and '.join(turns)}", fix, why
    if data.system is not None and not formats & set(CHATS):
        fix = f"remove it, or use a format with turns: {', '.join(CHATS)}"
        yield "data.system", f"has no effect on rows of format {' and '.join(sorted(formats))}", fix


def _train(run: Run, given: Callable[[str], str]) -> Iterator[Problem]:
    train, least = run.train, "train.min_learning_rate"
    if train.min_learning_rate > train.learning_rate:
        what = f"is {train.min_learning_rate}, above train.learning_rate {train.learning_rate}"
        yield least, what, "write a smaller one, such as 0"
    if train.schedule == "constant" and train.min_learning_rate:
        yield least, "has no effect with train.schedule: constant", "remove it, or train.schedule: cosine"
    if train.master_weights == "stochastic" and (run.model.dtype != "bf16" or run.adapter.kind != "none"):
        why = "it rounds trained bf16 parameters; those of an adapter and of model.dtype: fp32 are fp32"
        fix = "remove it, or model.dtype: bf16 with adapter.kind: none"
        yield "train.master_weights", "is stochastic, but has nothing to round here", fix, why
    if "activations" in train.cpu_offload and train.recompute in ("none", 0):
        fix = "train.recompute: full, or auto"
        yield "train.cpu_offload", "moves the inputs of recomputed layers, and train.recompute is none", fix


def _batch(run: Run, given: Callable[[str], str]) -> Iterator[Problem]:
    batch, micro, seq_len = run.train.global_batch, run.train.micro_batch, run.data.seq_len
    if batch.unit == "tokens" and not run.data.pack:
        fix = "train.global_batch: 64 examples, or data.pack: true"
        yield "train.global_batch", "in tokens needs packed rows", fix
    for name, size, other in (("global_batch", batch, "a smaller data.seq_len"), ("micro_batch", micro, "auto")):
        if size != "auto" and size.unit == "tokens" and size.amount < seq_len:
            what = f"of {size} is smaller than one row of data.seq_len {seq_len}"
            yield f"train.{name}", what, f"train.{name}: {seq_len} tokens or more, or {other}"
    if micro != "auto" and micro.unit == batch.unit and micro.amount > batch.amount:
        what = f"of {micro} is larger than train.global_batch of {batch}"
        yield "train.micro_batch", what, f"train.micro_batch: {batch}, or auto"


def _optimizer_in_backward(run: Run, given: Callable[[str], str]) -> Iterator[Problem]:
    """Updating in backward excludes whatever needs all gradients, or several backward passes, before the update."""
    key, off, train = "train.optimizer_in_backward", "train.optimizer_in_backward: false", run.train
    if not train.optimizer_in_backward:
        return
    late = "is known after the last gradient, when the weights are already updated"
    if run.adapter.kind != "none":
        why = "it saves the memory of gradients, which is small for an adapter"
        yield key, f"saves nothing with adapter.kind: {run.adapter.kind}", f"remove it, or {off}", why
    if train.clip_norm is not None:
        fix = f"train.clip_norm: null, or {off}"
        yield key, f"excludes train.clip_norm: {train.clip_norm}", fix, f"the norm {late}"
    if run.model.dtype == "fp16":
        fix = f"model.dtype: bf16, or {off}"
        yield key, "excludes model.dtype: fp16", fix, f"an overflow of the scaled loss {late}"
    if "parameters" in train.cpu_offload:
        why = "a gradient is still on its way to the host when the next one is made"
        yield key, "excludes train.cpu_offload: parameters", f"remove one of them, or {off}", why
    if train.micro_batch not in ("auto", train.global_batch):
        why = "optimizer_in_backward updates the weights in each backward pass, so one pass takes the global batch"
        what = f"of {train.micro_batch} differs from train.global_batch of {train.global_batch}"
        yield "train.micro_batch", what, f"train.micro_batch: auto, or {off}", why


def _lengths(run: Run, given: Callable[[str], str]) -> Iterator[Problem]:
    """Units and amounts of the durations and intervals."""
    duration, warmup = run.train.duration, run.train.warmup
    units = ("steps", "epochs", "s", "min", "h")
    # A share of the run is a number of steps, which a run of a given time does not know.
    often = units if duration.seconds is not None else (*units, "%")
    for key, length, allowed, example in (
        ("train.duration", duration, units, "1 epochs"),
        ("train.warmup", warmup, ("%", "steps", "epochs"), "3 %"),
        ("validate.every", run.validate.every, often, "100 steps"),
        ("checkpoint.every", run.checkpoint.every, often, "200 steps"),
        ("log.every", run.log.every, often, "1 steps"),
    ):
        if length is not None and length.unit not in allowed:
            yield key, f"is {length}, but is counted in {', '.join(allowed)}", f"{key}: {example}"
        elif length is not None and length.amount <= 0 and key != "train.warmup":
            yield key, f"is {length}: it must be above 0", f"{key}: {example}"
    if warmup.amount > {"%": 100.0, duration.unit: duration.amount}.get(warmup.unit, math.inf):
        yield "train.warmup", f"is {warmup}, longer than train.duration of {duration}", "train.warmup: 3 %"


def _validate(run: Run, given: Callable[[str], str]) -> Iterator[Problem]:
    if run.validate.patience is not None and not run.data.validation and run.data.hold_out is None:
        fix = "add data.validation or data.hold_out, or remove validate.patience"
        yield "validate.patience", "needs data.validation or data.hold_out", fix
    if run.validate.patience is not None and run.validate.every is None:
        what = "needs several validations, and validate.every: null validates once, at the end"
        yield "validate.patience", what, "validate.every: 100 steps"
