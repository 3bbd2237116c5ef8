"""The rules that span several keys of a recipe, or that a type and its bounds cannot express."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tunesmith.config.dump import flatten
from tunesmith.config.names import nearest, without_indices
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
    rules = (
        _texts,
        _method,
        _model,
        _adapter,
        _data,
        _train,
        _batch,
        _optimizer_in_backward,
        _lengths,
        _validate,
    )
    for rule in rules:
        for problem in rule(run, where):
            raise RecipeError(
                f"{problem.key} {problem.what}",
                where=where(problem.key) or problem.key,
                why=problem.why,
                fix=problem.fix,
            )


def _texts(run: Run, where: Place) -> Iterator[Problem]:
    """Empty texts: a branch, a split or a token without a name.

    An empty system message is one that some models need.
    """
    for key, value in flatten(run).items():
        if value != "" or key in ("data.system", "adapter.target"):
            continue
        name = key
        # A single source is written without an index.
        if not where(key) and without_indices(key).startswith("data."):
            name = without_indices(key)
        yield Problem(name, "is empty", f"write its value, or remove {name}")


def _method(run: Run, where: Place) -> Iterator[Problem]:
    method = run.method
    keys_of_others = {key for keys in METHOD_KEYS.values() for key in keys}
    for name in sorted(keys_of_others - set(METHOD_KEYS[method.name])):
        key = f"method.{name}"
        if where(key):
            readers = [other for other, keys in METHOD_KEYS.items() if name in keys]
            what = f"has no effect with method: {method.name}"
            yield Problem(key, what, f"remove it, or method.name: {' or '.join(readers)}")
    if method.label_smoothing and method.loss_type != "robust":
        yield Problem(
            "method.label_smoothing",
            f"has no effect with method.loss_type: {method.loss_type}",
            fix="remove it, or method.loss_type: robust",
        )
    if method.loss_type == "robust" and not method.label_smoothing:
        yield Problem(
            "method.loss_type",
            "is robust, which is sigmoid without method.label_smoothing",
            fix="method.label_smoothing: 0.1, or method.loss_type: sigmoid",
        )
    weights = (method.desirable_weight, method.undesirable_weight)
    if method.name == "kto" and not any(weights):
        what = "and method.undesirable_weight are 0, so nothing is learned"
        yield Problem("method.desirable_weight", what, fix="method.desirable_weight: 1")
    is_timed = run.train.duration.seconds is not None
    if method.name == "kto" and run.adapter.kind == "none" and is_timed:
        yield Problem(
            "train.duration",
            f"is {run.train.duration}, and full fine-tuning with kto needs a duration in "
            "steps or epochs",
            fix="train.duration: 1 epochs, or adapter.kind: lora",
            why="before training the base scores the answers that each step compares with",
        )
    one_example = run.train.global_batch.unit == "examples" and run.train.global_batch.amount < 2
    if method.name == "kto" and one_example:
        yield Problem(
            "train.global_batch",
            "of one example leaves kto no other answer to compare with",
            fix="train.global_batch: 16 examples",
            why="its reference point uses prompts paired with other answers of the batch",
        )
    yield from _method_formats(run, where)


def _method_formats(run: Run, where: Place) -> Iterator[Problem]:
    """Rows that the method cannot learn from."""
    method_format = METHOD_FORMATS.get(run.method.name)
    for key, sources in (("data.train", run.data.train), ("data.validation", run.data.validation)):
        for i, source in enumerate(sources):
            other = next((m for m, form in METHOD_FORMATS.items() if form == source.format), None)
            learns_from_it = other is None
            if method_format is not None:
                learns_from_it = source.format == method_format
            if learns_from_it:
                continue
            format_key = f"{key}.{i}.format" if where(f"{key}.{i}") else f"{key}.format"
            fix = f"method: {other}"
            if method_format:
                fix = f"rows of format {method_format}, and {format_key}: {method_format}"
            if method_format and other:
                fix += f", or method: {other}"
            yield Problem(
                format_key,
                f"is {source.format}, which method: {run.method.name} does not learn from",
                fix=fix,
                why="dpo, orpo and simpo learn from pairs (preference), kto from answers that are"
                " labeled good or bad (feedback), and sft from answers",
            )


def _model(run: Run, where: Place) -> Iterator[Problem]:
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
        fix = "model.vision: true, or remove model.train_projector"
        yield Problem("model.train_projector", "has no effect without model.vision", fix)
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
    has_repeated = len(set(model.added_tokens)) < len(model.added_tokens)
    if has_repeated or "" in model.added_tokens:
        what = "has an empty or repeated token"
        yield Problem("model.added_tokens", what, fix="name each one once")
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
    if "" in run.adapter.modules_to_save:
        key = "adapter.modules_to_save"
        yield Problem(key, "has an empty name", fix="adapter.modules_to_save: []")
    if not names or "" in names:
        yield Problem("adapter.target", "names no module", fix="adapter.target: all-linear")
    elif any(name != "all-linear" and nearest(name, ["all-linear"]) for name in names):
        yield Problem(
            "adapter.target",
            f"is {', '.join(names)}, which is not a module name",
            fix="adapter.target: all-linear, or a list of module names such as [q_proj, v_proj]",
        )
    elif "all-linear" in names and isinstance(target, tuple):
        what = "has all-linear in a list"
        yield Problem("adapter.target", what, fix="adapter.target: all-linear")


def _data(run: Run, where: Place) -> Iterator[Problem]:
    data = run.data
    if not data.train:
        fix = "data.train: {source: rows.jsonl, format: messages}"
        yield Problem("data.train", "is empty", fix)
    for key, sources in (("data.train", data.train), ("data.validation", data.validation)):
        yield from _columns(key, sources, where)
        yield from _splits(key, sources, data.train, where)
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
        yield Problem(
            "data.hold_out_seed",
            "has no effect without data.hold_out",
            fix="remove it, or data.hold_out: 5 %",
        )
    yield from _template(run)
    formats = {source.format for source in data.train}
    if data.system is not None and not formats & set(CHATS):
        yield Problem(
            "data.system",
            f"has no effect on rows of format {' and '.join(sorted(formats))}",
            fix=f"remove it, or use a format with turns: {', '.join(CHATS)}",
        )


def _numbered(key: str, sources: tuple[Source, ...], where: Place) -> Iterator[tuple[str, Source]]:
    """Each source with its key."""
    for i, source in enumerate(sources):
        # A single source is written without an index, and its places are known without one.
        is_indexed = where(f"{key}.{i}") or len(sources) > 1
        yield f"{key}.{i}" if is_indexed else key, source


def _splits(
    key: str, sources: tuple[Source, ...], trained: tuple[Source, ...], where: Place
) -> Iterator[Problem]:
    """A split of a file that no file has."""
    for source_key, source in _numbered(key, sources, where):
        split = source.split or "train"
        if re.match(r"\s*train\b", split) or not Path(source.source).is_file():
            continue
        fix = f"{source_key}.split=train"
        if key == "data.validation" and any(source.source == other.source for other in trained):
            fix = "data.validation=null data.hold_out='5 %'"
        yield Problem(
            f"{source_key}.split",
            f"is {split}, and a file has one split, train",
            fix=fix,
        )


def _columns(key: str, sources: tuple[Source, ...], where: Place) -> Iterator[Problem]:
    for source_key, source in _numbered(key, sources, where):
        columns = FORMAT_COLUMNS[source.format]
        for name, column in source.columns.items():
            if name in columns:
                continue
            near = nearest(name, columns)
            if column in columns:
                fix = f"write {column}: {name}"
            elif near:
                fix = f"did you mean {near}?"
            else:
                fix = f"its columns are {', '.join(columns)}"
            yield Problem(
                f"{source_key}.columns.{name}",
                f"is not a column of format {source.format}",
                fix=fix,
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
        yield Problem(
            "data.template_args",
            f"has no effect with data.template: {data.template}",
            fix="remove it, or data.template: chat",
        )
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


def _train(run: Run, where: Place) -> Iterator[Problem]:
    train = run.train
    if train.min_learning_rate > train.learning_rate:
        yield Problem(
            "train.min_learning_rate",
            f"is {train.min_learning_rate}, above train.learning_rate {train.learning_rate}",
            fix="write a smaller one, such as 0",
        )
    if train.schedule == "constant" and train.min_learning_rate:
        yield Problem(
            "train.min_learning_rate",
            "has no effect with train.schedule: constant",
            fix="remove it, or train.schedule: cosine",
        )
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


def _batch(run: Run, where: Place) -> Iterator[Problem]:
    batch = run.train.global_batch
    micro = run.train.micro_batch
    row_tokens = run.row_tokens
    if batch.unit == "tokens" and not run.data.pack:
        fix = "train.global_batch: 64 examples, or data.pack: true"
        yield Problem("train.global_batch", "in tokens needs packed rows", fix)
    if batch.unit == "tokens" and batch.amount < row_tokens:
        yield _smaller_than_row("train.global_batch", batch, run, "a smaller data.seq_len")
    # `auto` is chosen later, within the other limits.
    if micro == "auto":
        return
    if micro.unit == "tokens" and micro.amount < row_tokens:
        yield _smaller_than_row("train.micro_batch", micro, run, "auto")
    if micro.unit == batch.unit and micro.amount > batch.amount:
        what = f"of {micro} is larger than train.global_batch of {batch}"
        yield Problem("train.micro_batch", what, f"train.micro_batch: {batch}, or auto")


def _smaller_than_row(key: str, size: Size, run: Run, alternative: str) -> Problem:
    row = f"one row of data.seq_len {run.data.seq_len}"
    if run.row_tokens != run.data.seq_len:
        row = f"one pair, of two sequences of data.seq_len {run.data.seq_len}"
    what = f"of {size} is smaller than {row}"
    return Problem(key, what, f"{key}: {run.row_tokens} tokens or more, or {alternative}")


def _optimizer_in_backward(run: Run, where: Place) -> Iterator[Problem]:
    """Find settings that need all gradients, or several backward passes, before the update."""
    key = "train.optimizer_in_backward"
    off = "train.optimizer_in_backward: false"
    train = run.train
    if not train.optimizer_in_backward:
        return
    too_late = "is only known after the last gradient, when the weights are already updated"
    if run.adapter.kind != "none":
        yield Problem(
            key,
            f"saves nothing with adapter.kind: {run.adapter.kind}",
            fix=f"remove it, or {off}",
            why="it saves the memory of gradients, which is small for an adapter",
        )
    if train.clip_norm is not None:
        yield Problem(
            key,
            f"cannot be combined with train.clip_norm: {train.clip_norm}",
            fix=f"train.clip_norm: null, or {off}",
            why=f"the norm {too_late}",
        )
    if run.model.dtype == "fp16":
        yield Problem(
            key,
            "cannot be combined with model.dtype: fp16",
            fix=f"model.dtype: bf16, or {off}",
            why=f"an overflow of the scaled loss {too_late}",
        )
    if "parameters" in train.cpu_offload:
        yield Problem(
            key,
            "cannot be combined with train.cpu_offload: parameters",
            fix=f"remove one of them, or {off}",
            why="a gradient is still on its way to the host when the next one is made",
        )
    if train.micro_batch not in ("auto", train.global_batch):
        yield Problem(
            "train.micro_batch",
            f"of {train.micro_batch} differs from train.global_batch of {train.global_batch}",
            fix=f"train.micro_batch: auto, or {off}",
            why="optimizer_in_backward updates the weights in each backward pass, so one pass"
            " must take the global batch",
        )


def _lengths(run: Run, where: Place) -> Iterator[Problem]:
    """Units and amounts of the durations and intervals."""
    duration = run.train.duration
    warmup = run.train.warmup
    units: tuple[str, ...] = ("steps", "epochs", "s", "min", "h")
    # A share of the run is a number of steps, which a run of a fixed time does not know.
    interval_units = units if duration.seconds is not None else (*units, "%")
    yield from _length("train.duration", duration, units, "1 epochs")
    yield from _length("train.warmup", warmup, ("%", "steps", "epochs"), "3 %", may_be_zero=True)
    yield from _length("validate.every", run.validate.every, interval_units, "100 steps")
    yield from _length("checkpoint.every", run.checkpoint.every, interval_units, "200 steps")
    yield from _length("log.every", run.log.every, interval_units, "1 steps")
    if warmup.unit == "%":
        longest = 100.0
    elif warmup.unit == duration.unit:
        longest = duration.amount
    else:
        longest = math.inf
    if warmup.amount > longest:
        what = f"is {warmup}, longer than train.duration of {duration}"
        yield Problem("train.warmup", what, fix="train.warmup: 3 %")


def _length(
    key: str,
    length: Length | None,
    units: tuple[str, ...],
    example: str,
    *,
    may_be_zero: bool = False,
) -> Iterator[Problem]:
    if length is None:
        return
    fix = f"{key}: {example}"
    if length.unit not in units:
        yield Problem(key, f"is {length}, but is counted in {', '.join(units)}", fix)
    elif length.amount <= 0 and not may_be_zero:
        yield Problem(key, f"is {length}: it must be above 0", fix)


def _validate(run: Run, where: Place) -> Iterator[Problem]:
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
