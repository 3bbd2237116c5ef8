"""The rules that span several keys of a recipe, or that a type and its bounds cannot express."""

import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tunesmith.config.names import nearest
from tunesmith.config.paths import TEMPLATES
from tunesmith.config.row_formats import FORMAT_COLUMNS, ROW_FORMATS, FormatName
from tunesmith.config.schema import METHOD_KEYS, PAIR_METHODS, Run, Source
from tunesmith.errors import RecipeError
from tunesmith.units import Length, Size

# The format of the rows that a method other than sft learns from.
METHOD_FORMATS: dict[str, FormatName] = {
    "dpo": "preference",
    "orpo": "preference",
    "simpo": "preference",
    "kto": "feedback",
}
# Formats with turns, and so with a system message.
CHATS = tuple(name for name, form in ROW_FORMATS.items() if form.has_turns)


class Problem(NamedTuple):
    """A broken rule.

    Attributes:
        what: what is wrong with the key, read after it.
        why: the reason, where it is not plain.
    """

    key: str
    what: str
    fix: str
    why: str = ""


# The place of a dotted key; "" if the recipe does not give it.
Place = Callable[[str], str]


def check_run(run: Run, where: Place) -> None:
    """RecipeError for the first rule that a recipe breaks."""
    problems = chain(
        _method(run, where),
        _model(run),
        _adapter(run, where),
        _data(run, where),
        _train(run),
        _batch(run),
        _optimizer_in_backward(run),
        _lengths(run),
        _validate(run),
    )
    for problem in problems:
        raise RecipeError(
            f"{problem.key} {problem.what}",
            where=where(problem.key) or problem.key,
            why=problem.why,
            fix=problem.fix,
        )


def _no_effect(key: str, beside: str, fix: str) -> Problem:
    return Problem(key, f"has no effect {beside}", f"remove it, or {fix}")


def _method(run: Run, where: Place) -> Iterator[Problem]:
    method = run.method
    keys_of_others = {key for keys in METHOD_KEYS.values() for key in keys}
    for name in sorted(keys_of_others - set(METHOD_KEYS[method.name])):
        if where(f"method.{name}"):
            readers = [other for other, keys in METHOD_KEYS.items() if name in keys]
            fix = f"method.name: {' or '.join(readers)}"
            yield _no_effect(f"method.{name}", f"with method: {method.name}", fix)
    if method.label_smoothing and method.loss_type != "robust":
        beside = f"with method.loss_type: {method.loss_type}"
        yield _no_effect("method.label_smoothing", beside, "method.loss_type: robust")
    if method.loss_type == "robust" and not method.label_smoothing:
        yield Problem(
            "method.loss_type",
            "is robust, which is sigmoid without method.label_smoothing",
            fix="method.label_smoothing: 0.1, or method.loss_type: sigmoid",
        )
    if method.name == "kto":
        yield from _kto(run)
    yield from _method_formats(run, where)


def _kto(run: Run) -> Iterator[Problem]:
    if run.adapter.kind == "none" and run.train.duration.seconds is not None:
        yield Problem(
            "train.duration",
            f"is {run.train.duration}, and full fine-tuning with kto needs a duration in "
            "steps or epochs",
            fix="train.duration: 1 epochs, or adapter.kind: lora",
            why="before training the base scores the answers that each step compares with",
        )
    if run.train.global_batch == Size(1, "examples"):
        yield Problem(
            "train.global_batch",
            "of one example leaves kto no other answer to compare with",
            fix="train.global_batch: 16 examples",
            why="its reference point uses prompts paired with other answers of the batch",
        )


def _method_formats(run: Run, where: Place) -> Iterator[Problem]:
    """Rows that the method cannot learn from."""
    method_format = METHOD_FORMATS.get(run.method.name)
    for key, source in _numbered(run, where):
        other = next((m for m, form in METHOD_FORMATS.items() if form == source.format), None)
        if source.format == method_format or not (method_format or other):
            continue
        fixes = []
        if method_format:
            fixes.append(f"rows of format {method_format}, and {key}.format: {method_format}")
        if other:
            fixes.append(f"method: {other}")
        yield Problem(
            f"{key}.format",
            f"is {source.format}, which method: {run.method.name} does not learn from",
            fix=", or ".join(fixes),
            why="dpo, orpo and simpo learn from pairs (preference), kto from answers that are"
            " labeled good or bad (feedback), and sft from answers",
        )


def _model(run: Run) -> Iterator[Problem]:
    model = run.model
    adapter = run.adapter
    if model.quantize == "fp8" and model.dtype not in ("auto", "bf16"):
        yield Problem(
            "model.quantize",
            f"is fp8, but model.dtype is {model.dtype}",
            fix="model.dtype: bf16",
            why="fp8 matmuls return bf16",
        )
    if model.train_projector and not model.vision:
        yield _no_effect("model.train_projector", "without model.vision", "model.vision: true")
    if model.quantize not in ("auto", "none") and adapter.kind == "none":
        fix = "train an adapter on it (adapter.kind: lora), or model.quantize: none"
        if model.quantize == "as-shipped":
            fix += ", which trains dequantized 16-bit weights"
        yield Problem(
            "model.quantize",
            f"is {model.quantize}, but adapter.kind is none",
            fix=fix,
            why="full fine-tuning trains the base weights, and quantized ones are frozen",
        )
    if len(set(model.added_tokens)) < len(model.added_tokens):
        yield Problem("model.added_tokens", "has a repeated token", fix="name each one once")
    last_names = [name.rpartition(".")[2] for name in adapter.modules_to_save]
    trains_embeddings = any(name.startswith("embed") for name in last_names)
    if model.added_tokens and adapter.kind == "lora" and not trains_embeddings:
        yield Problem(
            "model.added_tokens",
            "needs trained embeddings",
            fix="adapter.modules_to_save: [embed_tokens, lm_head]"
            "   # both, even if tied: each is trained as its own copy",
            why="their embeddings are random, and a LoRA adapter alone does not train them",
        )


def _adapter(run: Run, where: Place) -> Iterator[Problem]:
    if run.adapter.kind == "none":
        # `where` has a place only for keys that somebody wrote: a default is no mistake.
        for name in ("rank", "alpha", "dropout", "target", "rslora", "modules_to_save", "from"):
            key = f"adapter.{name}"
            if where(key):
                fix = f"remove {key}, or train an adapter: adapter.kind: lora"
                yield Problem(key, "has no effect with adapter.kind: none", fix)
        return
    target = run.adapter.target
    names = (target,) if isinstance(target, str) else target
    is_mistyped = target != "all-linear" and any(nearest(name, ["all-linear"]) for name in names)
    if not names or is_mistyped:
        yield Problem(
            "adapter.target",
            f"is {target}, which names no modules",
            fix="adapter.target: all-linear, or a list of module names such as [q_proj, v_proj]",
        )


def _data(run: Run, where: Place) -> Iterator[Problem]:
    data = run.data
    if not data.train:
        fix = "data.train: {source: rows.jsonl, format: messages}"
        yield Problem("data.train", "is empty", fix)
    yield from _columns(run, where)
    if data.hold_out is not None:
        if data.validation:
            yield Problem(
                "data.hold_out",
                "and data.validation are both set",
                fix="remove data.hold_out, or data.validation: null",
                why="both define the validation rows",
            )
        # A share must leave rows to train on; a count is checked once the rows are read.
        limit = 100 if data.hold_out.unit == "%" else math.inf
        if not 0 < data.hold_out.amount < limit:
            what = f"is {data.hold_out}: above 0 % and below 100 %"
            yield Problem("data.hold_out", what, fix="data.hold_out: 5 %")
    elif data.hold_out_seed is not None:
        yield _no_effect("data.hold_out_seed", "without data.hold_out", "data.hold_out: 5 %")
    yield from _template(run)
    formats = {source.format for source in data.train}
    if data.system is not None and not formats & set(CHATS):
        beside = f"on rows of format {' and '.join(sorted(formats))}"
        yield _no_effect("data.system", beside, f"use a format with turns: {', '.join(CHATS)}")


def _numbered(run: Run, where: Place) -> Iterator[tuple[str, Source]]:
    """Each source with its key."""
    for key, sources in (("data.train", run.data.train), ("data.validation", run.data.validation)):
        for i, source in enumerate(sources):
            # A single source is written without an index, and its places are known without one.
            is_indexed = where(f"{key}.{i}") or len(sources) > 1
            yield f"{key}.{i}" if is_indexed else key, source


def _columns(run: Run, where: Place) -> Iterator[Problem]:
    for key, source in _numbered(run, where):
        columns = FORMAT_COLUMNS[source.format]
        for name in set(source.columns) - set(columns):
            near = nearest(name, columns)
            yield Problem(
                f"{key}.columns.{name}",
                f"is not a column of format {source.format}",
                fix=f"did you mean {near}?" if near else f"its columns are {', '.join(columns)}",
                why="columns are written as the format's name: the file's name",
            )


def _template(run: Run) -> Iterator[Problem]:
    data = run.data
    if data.template not in TEMPLATES and not Path(data.template).is_file():
        near = nearest(Path(data.template).name, TEMPLATES)
        fix = f"one of {', '.join(TEMPLATES)}, or a Jinja file that exists"
        if near:
            fix = f"did you mean {near}?"
        what = f"is a file that does not exist: {data.template}"
        yield Problem("data.template", what, fix)
    # `raw` and `alpaca` write text themselves; arguments are for Jinja.
    if data.template in ("raw", "alpaca") and data.template_args:
        beside = f"with data.template: {data.template}"
        yield _no_effect("data.template_args", beside, "data.template: chat")
    formats = {source.format for source in (*data.train, *data.validation)}
    plain = {name for name, form in ROW_FORMATS.items() if form.is_plain}
    with_turns = sorted(formats & set(CHATS) - plain - set(METHOD_FORMATS.values()))
    if data.template == "raw" and with_turns:
        yield Problem(
            "data.template",
            f"is raw, which cannot write the turns of format {' and '.join(with_turns)}",
            fix="data.template: auto, or rows of format prompt-completion",
            why="raw joins a prompt and a completion, or a text, without a template",
        )


def _train(run: Run) -> Iterator[Problem]:
    train = run.train
    key = "train.min_learning_rate"
    if train.min_learning_rate > train.learning_rate:
        what = f"is {train.min_learning_rate}, above train.learning_rate {train.learning_rate}"
        yield Problem(key, what, fix="write a smaller one, such as 0")
    if train.schedule == "constant" and train.min_learning_rate:
        yield _no_effect(key, "with train.schedule: constant", "train.schedule: cosine")
    trains_bf16 = run.model.dtype in ("auto", "bf16") and run.adapter.kind == "none"
    if train.master_weights == "stochastic" and not trains_bf16:
        yield Problem(
            "train.master_weights",
            "is stochastic, but has nothing to round here",
            fix="remove it, or model.dtype: bf16 with adapter.kind: none",
            why="it rounds trained bf16 parameters; those of an adapter and of model.dtype: fp32"
            " are fp32",
        )
    if "activations" in train.cpu_offload and train.recompute in ("none", 0):
        yield Problem(
            "train.cpu_offload",
            "moves the inputs of recomputed layers, and train.recompute is none",
            fix="train.recompute: full, or auto",
        )


def _batch(run: Run) -> Iterator[Problem]:
    batch = run.train.global_batch
    micro = run.train.micro_batch
    if batch.unit == "tokens" and not run.data.pack:
        fix = "train.global_batch: 64 examples, or data.pack: true"
        yield Problem("train.global_batch", "in tokens needs packed rows", fix)
    for key, size in (("train.global_batch", batch), ("train.micro_batch", micro)):
        # `auto` is chosen later, within the other limits.
        if size == "auto" or size.unit != "tokens" or size.amount >= run.row_tokens:
            continue
        row = f"one row of data.seq_len {run.data.seq_len}"
        if run.row_tokens != run.data.seq_len:
            row = f"one pair, of two sequences of data.seq_len {run.data.seq_len}"
        fix = f"{key}: {run.row_tokens} tokens or more, or a smaller data.seq_len"
        yield Problem(key, f"of {size} is smaller than {row}", fix)
    if micro != "auto" and micro.unit == batch.unit and micro.amount > batch.amount:
        what = f"of {micro} is larger than train.global_batch of {batch}"
        yield Problem("train.micro_batch", what, f"train.micro_batch: {batch}, or auto")


def _optimizer_in_backward(run: Run) -> Iterator[Problem]:
    """Find settings that need all gradients, or several backward passes, before the update."""
    train = run.train
    if not train.optimizer_in_backward:
        return
    too_late = "is only known after the last gradient, when the weights are already updated"
    # The setting, whether the recipe has it, and why the two cannot be combined.
    conflicts = {
        f"adapter.kind: {run.adapter.kind}": (
            run.adapter.kind != "none",
            "it saves the memory of gradients, which is small for an adapter",
        ),
        f"train.clip_norm: {train.clip_norm}": (
            train.clip_norm is not None,
            f"the norm {too_late}; null turns clipping off",
        ),
        "model.dtype: fp16": (
            run.model.dtype == "fp16",
            f"an overflow of the scaled loss {too_late}",
        ),
        "train.cpu_offload: parameters": (
            "parameters" in train.cpu_offload,
            "a gradient is still on its way to the host when the next one is made",
        ),
        f"train.micro_batch: {train.micro_batch}": (
            train.micro_batch not in ("auto", train.global_batch),
            "the weights are updated in each backward pass, so one pass must take the global"
            f" batch of {train.global_batch}",
        ),
    }
    for setting, (is_set, why) in conflicts.items():
        if is_set:
            yield Problem(
                "train.optimizer_in_backward",
                f"cannot be combined with {setting}",
                fix=f"change {setting.partition(':')[0]}, or train.optimizer_in_backward: false",
                why=why,
            )


def _lengths(run: Run) -> Iterator[Problem]:
    """Units and amounts of the durations and intervals."""
    duration = run.train.duration
    warmup = run.train.warmup
    units: tuple[str, ...] = ("steps", "epochs", "s", "min", "h")
    # A share of the run is a number of steps, which a run of a fixed time does not know.
    interval_units = units if duration.seconds is not None else (*units, "%")
    lengths: dict[str, tuple[Length | None, tuple[str, ...], str]] = {
        "train.duration": (duration, units, "1 epochs"),
        "train.warmup": (warmup, ("%", "steps", "epochs"), "3 %"),
        "validate.every": (run.validate.every, interval_units, "100 steps"),
        "checkpoint.every": (run.checkpoint.every, interval_units, "200 steps"),
        "log.every": (run.log.every, interval_units, "1 steps"),
    }
    for key, (length, known, example) in lengths.items():
        fix = f"{key}: {example}"
        if length is None:
            continue
        if length.unit not in known:
            yield Problem(key, f"is {length}, but is counted in {', '.join(known)}", fix)
        elif length.amount <= 0 and length is not warmup:
            yield Problem(key, f"is {length}: it must be above 0", fix)
    longest = {"%": 100.0, duration.unit: duration.amount}.get(warmup.unit, math.inf)
    if warmup.amount > longest:
        what = f"is {warmup}, longer than train.duration of {duration}"
        yield Problem("train.warmup", what, fix="train.warmup: 3 %")


def _validate(run: Run) -> Iterator[Problem]:
    if run.validate.best_by == "accuracy" and run.method.name not in PAIR_METHODS:
        yield Problem(
            "validate.best_by",
            f"is accuracy, which method: {run.method.name} does not have",
            fix="validate.best_by: loss",
            why="it is the share of pairs where the chosen answer has the higher reward",
        )
    if run.validate.patience is None:
        return
    if not run.data.validation and run.data.hold_out is None:
        yield Problem(
            "validate.patience",
            "needs data.validation or data.hold_out",
            fix="add data.validation or data.hold_out, or remove validate.patience",
        )
    if run.validate.every is None:
        yield Problem(
            "validate.patience",
            "needs several validations, and validate.every: null validates once, at the end",
            fix="validate.every: 100 steps, or validate.patience: null",
        )
