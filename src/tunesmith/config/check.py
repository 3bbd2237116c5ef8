"""Checks of a recipe that involve several keys, or that the type of a key cannot express."""

import math
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tunesmith.config.dump import flatten
from tunesmith.config.layers import COMMAND_LINE
from tunesmith.config.names import last_part, nearest, suggest
from tunesmith.config.paths import TEMPLATES, is_place, is_valid_path
from tunesmith.config.row_formats import FORMAT_COLUMNS, ROW_FORMATS, FormatName
from tunesmith.config.schema import METHOD_KEYS, PAIR_METHODS, Run, Source
from tunesmith.config.yaml_file import RecipeLayer
from tunesmith.errors import RecipeError
from tunesmith.host.shell import shell_word
from tunesmith.units import Size

# The row format that each training method needs. sft is not listed, because it accepts several
# formats.
METHOD_FORMATS: dict[str, FormatName] = {
    "dpo": "preference",
    "orpo": "preference",
    "simpo": "preference",
    "kto": "feedback",
}
# Formats that `sft` cannot use.
FORMATS_OF_METHODS = {*METHOD_FORMATS.values(), "prompt"}
# Row formats with turns. Only rows in these formats can have a system message.
CHATS = tuple(name for name, form in ROW_FORMATS.items() if form.has_turns)


class Problem(NamedTuple):
    """A recipe key that breaks a rule.

    Attributes:
        key: the dotted key.
        what: the problem. The error message is the key followed by this text.
        fix: the line to write instead.
        why: the reason for the rule, if the reason is not obvious.
    """

    key: str
    what: str
    fix: str
    why: str = ""


# Dotted key of each value that the recipe has -> its position, such as "recipe.yaml:3".
Places = Mapping[str, str]


def find_problems(run: Run, layer: RecipeLayer) -> dict[str, RecipeError]:
    """Return the first problem of each key that breaks a rule."""
    places = layer.positions
    problems = chain(
        _paths(run),
        _method(run, places),
        _model(run),
        _adapter(run, places),
        _data(run, places),
        _train(run),
        _batch(run),
        _optimizer_in_backward(run),
        _lengths(run),
        _validate(run),
    )
    errors: dict[str, RecipeError] = {}
    for problem in problems:
        place = layer.where(problem.key)
        fix = problem.fix
        if place.startswith(COMMAND_LINE):
            # The command line needs a setting in the form `key=value`.
            fix = _SETTING_IN_FIX.sub(lambda found: shell_word(f"{found[1]}={found[2]}"), fix)
        what = f"{problem.key} {problem.what}"
        errors.setdefault(problem.key, RecipeError(what, where=place, why=problem.why, fix=fix))
    return errors


# A setting in a fix, such as `train.duration: 1 epochs`: the key, and the value, which is one word,
# a quantity with its unit, a list or a mapping.
_SETTING_IN_FIX = re.compile(
    r"\b((?:\w+\.)+\w+|method): "
    r"(\{.*?\}|\[.*?\]|[^\s,;()]+(?: (?:%|steps|epochs|examples|tokens)(?!\w))?)"
)
_HUB = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+)")


def _paths(run: Run) -> Iterator[Problem]:
    for key, value in flatten(run).items():
        text = str(value)
        if not is_place(key) or is_valid_path(text):
            continue
        hub = _HUB.match(text)
        yield Problem(
            key,
            f"must be a path or a Hub id, without $, :// and null characters, but is {text!r}",
            fix=f"write the Hub id: {hub[1]}"
            if hub
            else "write the path itself: the file of a URL must be downloaded first, and only the "
            "command line expands variables",
        )


def _no_effect(key: str, context: str, fix: str) -> Problem:
    return Problem(key, f"has no effect {context}", f"remove the key, or {fix}")


def _method(run: Run, places: Places) -> Iterator[Problem]:
    method = run.method
    for key in places:
        section, _, key_name = key.rpartition(".")
        readers = [name for name, keys in METHOD_KEYS.items() if key_name in keys]
        if section == "method" and readers and method.name not in readers:
            fix = f"set method.name: {' or '.join(readers)}"
            yield _no_effect(key, f"with method: {method.name}", fix)
    if method.label_smoothing and method.loss_type != "robust":
        yield _no_effect(
            "method.label_smoothing",
            f"with method.loss_type: {method.loss_type}",
            "set method.loss_type: robust",
        )
    if method.loss_type == "robust" and not method.label_smoothing:
        yield Problem(
            "method.loss_type",
            "is robust, but method.label_smoothing is 0, so the loss is the same as with sigmoid",
            fix="set method.label_smoothing: 0.1, or method.loss_type: sigmoid",
        )
    if "beta" in METHOD_KEYS[method.name] and not run.samples_answers and method.beta == 0:
        yield Problem("method.beta", "is 0, but must be above 0", fix="set method.beta: 0.1")
    if run.samples_answers:
        yield from _grpo(run)
    if method.name == "kto":
        if run.adapter.kind == "none" and run.train.duration.seconds is not None:
            yield Problem(
                "train.duration",
                f"is {run.train.duration}, but full fine-tuning with kto needs a duration in "
                "steps or epochs",
                fix="set train.duration: 1 epochs, or adapter.kind: lora",
                why="the base model computes the log probabilities of all answers before training;"
                " therefore the number of steps must be known",
            )
        if run.train.global_batch == Size(1, "examples"):
            yield Problem(
                "train.global_batch",
                "is one example, but kto needs at least two examples per batch",
                fix="set train.global_batch: 16 examples",
                why="kto's reference point pairs each prompt with the answer to another prompt of"
                " the batch",
            )
    yield from _method_formats(run, places)


def _grpo(run: Run) -> Iterator[Problem]:
    """Yield a problem for each setting that reinforcement learning does not support."""
    method = run.method
    rewards = [method.reward] if isinstance(method.reward, str) else method.reward
    if method.reward_weights and len(method.reward_weights) != len(rewards):
        count = len(method.reward_weights)
        yield Problem(
            "method.reward_weights",
            f"has {count} values, but method.reward has {len(rewards)}",
            fix="give one weight for each scorer",
        )
    elif method.reward_weights and max(method.reward_weights) <= 0:
        yield Problem(
            "method.reward_weights",
            "has no weight above 0, so the best answers would get no reward",
            fix="set a weight above 0; use a negative weight only for a scorer that detects faults",
        )
    if not rewards:
        yield Problem(
            "method.reward",
            "names no scorer",
            fix="set method.reward: exact, or your own file.py:function",
        )
    if run.data.train_on != "last":
        yield Problem(
            "data.train_on",
            f"is {run.data.train_on}, but grpo answers the last question of a row",
            fix="set data.train_on: last",
        )
    conflicts = {
        "method.beta": (
            method.beta > 0 and run.adapter.kind == "none",
            f"is {method.beta}, but the base model is not available in full fine-tuning",
            "set method.beta: 0, or adapter.kind: lora",
        ),
        "adapter.dropout": (
            run.adapter.dropout > 0,
            f"is {run.adapter.dropout}, but the sampled answers have the probabilities without "
            "dropout",
            "set adapter.dropout: 0",
        ),
        "parallel.tensor": (
            run.parallel.tensor not in (1, "auto"),
            "is set, but grpo does not support tensor parallelism",
            "set parallel.tensor: 1",
        ),
        "model.vision": (
            run.model.vision,
            "is true, but grpo does not support pictures",
            "set model.vision: false",
        ),
        "train.cpu_offload": (
            "parameters" in run.train.cpu_offload,
            "has parameters, which are too slow for the sampling of answers",
            "remove parameters from train.cpu_offload",
        ),
        "train.optimizer_in_backward": (
            run.train.optimizer_in_backward,
            "is true, but a batch of sampled answers needs several micro batches",
            "set train.optimizer_in_backward: false",
        ),
        "train.global_batch": (
            run.train.global_batch.unit == "tokens",
            f"is {run.train.global_batch}, but with grpo a batch is a number of prompts",
            "set train.global_batch: 16 examples",
        ),
        "method.answer_tokens": (
            method.answer_tokens >= run.data.seq_len,
            f"is {method.answer_tokens}, which leaves no token of data.seq_len "
            f"{run.data.seq_len} for the prompt",
            f"set data.seq_len: {2 * method.answer_tokens}",
        ),
    }
    for key, (is_set, what, fix) in conflicts.items():
        if is_set:
            yield Problem(key, what, fix=fix)
    for key in ("data.train", "data.validation"):
        sources = run.data.train if key == "data.train" else run.data.validation
        if any(source.format == "text" for source in sources):
            yield Problem(
                f"{key}.format",
                "is text, which has no prompt",
                fix="use rows of format prompt-completion or messages",
            )


def _method_formats(run: Run, places: Places) -> Iterator[Problem]:
    """Yield a problem for each source whose row format does not fit the training method."""
    method_format = METHOD_FORMATS.get(run.method.name)
    for key, source in sources_with_keys(run, places):
        default = "sft" if method_format else None
        methods = [m for m, form in METHOD_FORMATS.items() if form == source.format]
        other = "grpo" if source.format == "prompt" else next(iter(methods), default)
        if source.format == method_format or other in (None, run.method.name):
            continue
        fixes = [f"set method: {other}"]
        if method_format:
            fixes.append(
                f"use rows of format {method_format} and set {key}.format: {method_format}"
            )
        yield Problem(
            f"{key}.format",
            f"is {source.format}, a row format that method {run.method.name} cannot use",
            fix=", or ".join(fixes),
            why="dpo, orpo and simpo need pairs of answers (preference), kto needs answers that are"
            " labeled good or bad (feedback), only grpo uses rows without an answer (prompt), and"
            " sft uses all other formats",
        )


def _model(run: Run) -> Iterator[Problem]:
    model = run.model
    adapter = run.adapter
    if model.quantize == "fp8" and model.dtype not in ("auto", "bf16"):
        yield Problem(
            "model.quantize",
            f"is fp8, but model.dtype is {model.dtype}",
            fix="set model.dtype: bf16",
            why="fp8 matmuls return bf16",
        )
    if model.train_projector and not model.vision:
        yield _no_effect("model.train_projector", "without model.vision", "set model.vision: true")
    if model.quantize not in ("auto", "none") and adapter.kind == "none":
        fix = "train an adapter instead (adapter.kind: lora), or set model.quantize: none"
        if model.quantize == "as-shipped":
            fix += ", which trains dequantized 16-bit weights"
        yield Problem(
            "model.quantize",
            f"is {model.quantize}, but adapter.kind is none",
            fix=fix,
            why="full fine-tuning trains the base weights, and quantized weights are frozen",
        )
    if len(set(model.added_tokens)) < len(model.added_tokens):
        yield Problem("model.added_tokens", "has a repeated token", fix="list each token once")
    saved = map(last_part, adapter.modules_to_save)
    trains_embeddings = any(name.startswith("embed") for name in saved)
    if model.added_tokens and adapter.kind == "lora" and not trains_embeddings:
        yield Problem(
            "model.added_tokens",
            "needs trained embeddings",
            fix="set adapter.modules_to_save: [embed_tokens, lm_head]"
            "   # list both even if they are tied: each is trained as a separate copy",
            why="the embeddings of new tokens are random, and LoRA does not train embeddings",
        )


def _adapter(run: Run, places: Places) -> Iterator[Problem]:
    if run.adapter.kind == "none":
        # `places` has only the keys that the user wrote, and no key with its default value.
        for key in places:
            if key.startswith("adapter.") and key != "adapter.kind":
                yield Problem(
                    key,
                    "has no effect with adapter.kind: none",
                    f"remove {key}, or train an adapter with adapter.kind: lora",
                )
        return
    target = run.adapter.target
    names = (target,) if isinstance(target, str) else target
    is_mistyped = target != "all-linear" and any(nearest(name, ["all-linear"]) for name in names)
    if not names or is_mistyped:
        yield Problem(
            "adapter.target",
            f"is {target}, which is not the name of a module",
            fix="set adapter.target: all-linear, or a list of module names: [q_proj, v_proj]",
        )


def _data(run: Run, places: Places) -> Iterator[Problem]:
    data = run.data
    if not data.train:
        yield Problem(
            "data.train", "is empty", "set data.train: {source: rows.jsonl, format: messages}"
        )
    yield from _columns(run, places)
    if data.hold_out is not None:
        if data.validation:
            yield Problem(
                "data.hold_out",
                "and data.validation are both set",
                fix="remove data.hold_out, or set data.validation: null",
                why="both define the validation rows",
            )
        # A percentage must be below 100, so that rows for training are left. A number of rows is
        # checked later, when the size of the data set is known.
        if data.hold_out.unit == "%" and not 0 < data.hold_out.amount < 100:
            what = f"is {data.hold_out}, but must be above 0 % and below 100 %"
            yield Problem("data.hold_out", what, fix="set data.hold_out: 5 %")
    elif data.hold_out_seed is not None:
        yield _no_effect("data.hold_out_seed", "without data.hold_out", "set data.hold_out: 5 %")
    yield from _template(run)
    formats = {source.format for source in data.train}
    if data.system is not None and not formats & set(CHATS):
        yield _no_effect(
            "data.system",
            f"on rows of format {' and '.join(sorted(formats))}",
            f"use a row format with turns: {', '.join(CHATS)}",
        )


def sources_with_keys(run: Run, places: Places) -> Iterator[tuple[str, Source]]:
    """Yield each data source with its dotted key: `data.train.0` in a list, else `data.train`."""
    for key, sources in (("data.train", run.data.train), ("data.validation", run.data.validation)):
        for i, source in enumerate(sources):
            is_in_list = f"{key}.{i}" in places or len(sources) > 1
            yield f"{key}.{i}" if is_in_list else key, source


def _columns(run: Run, places: Places) -> Iterator[Problem]:
    for key, source in sources_with_keys(run, places):
        columns = FORMAT_COLUMNS[source.format]
        otherwise = f"use one of the format's columns: {', '.join(columns)}"
        for format_name, names in FORMAT_COLUMNS.items():
            needs_method = format_name in FORMATS_OF_METHODS
            if source.columns.keys() <= set(names) and not needs_method:
                otherwise = f"set {key}.format: {format_name}, or {otherwise}"
        for name in set(source.columns) - set(columns):
            yield Problem(
                f"{key}.columns.{name}",
                f"is not a column of format {source.format}",
                fix=suggest(name, columns, otherwise=otherwise),
                why="`columns` maps the format's column name to the file's column name",
            )


def _template(run: Run) -> Iterator[Problem]:
    data = run.data
    if data.template not in TEMPLATES and not Path(data.template).is_file():
        fix = suggest(
            Path(data.template).name,
            TEMPLATES,
            otherwise=f"set data.template: auto, or use one of {', '.join(TEMPLATES[1:])}, or the"
            " path of an existing Jinja file",
        )
        yield Problem("data.template", f"is a file that does not exist: {data.template}", fix)
    # Only Jinja templates take arguments. `raw` and `alpaca` build the text without Jinja.
    if data.template in ("raw", "alpaca") and data.template_args:
        yield _no_effect(
            "data.template_args", f"with data.template: {data.template}", "set data.template: chat"
        )
    formats = {source.format for source in (*data.train, *data.validation)}
    plain = {name for name, form in ROW_FORMATS.items() if form.is_plain}
    with_turns = sorted(formats & set(CHATS) - plain - FORMATS_OF_METHODS)
    if data.template == "raw" and with_turns:
        yield Problem(
            "data.template",
            f"is raw, which cannot write the turns of format {' and '.join(with_turns)}",
            fix="set data.template: auto, or use rows of format prompt-completion",
            why="raw has no template: it joins a prompt and a completion, or takes a text as it is",
        )


def _train(run: Run) -> Iterator[Problem]:
    train = run.train
    key = "train.min_learning_rate"
    if train.min_learning_rate > train.learning_rate:
        yield Problem(
            key,
            f"is {train.min_learning_rate}, but train.learning_rate is {train.learning_rate}",
            fix="set a smaller value, such as 0",
        )
    if train.schedule == "constant" and train.min_learning_rate:
        yield _no_effect(key, "with train.schedule: constant", "set train.schedule: cosine")
    trains_bf16 = run.model.dtype in ("auto", "bf16") and run.adapter.kind == "none"
    if train.master_weights == "stochastic" and not trains_bf16:
        yield Problem(
            "train.master_weights",
            "is stochastic, but this run trains no bf16 parameters",
            fix="remove the key, or set model.dtype: bf16 with adapter.kind: none",
            why="stochastic rounding is for trained bf16 parameters; the parameters of an adapter"
            " and of a model with model.dtype: fp32 are fp32",
        )
    if "activations" in train.cpu_offload and train.recompute in ("none", 0):
        yield Problem(
            "train.cpu_offload",
            "has activations, the inputs of recomputed layers, but train.recompute is none",
            fix="set train.recompute: full, or auto",
        )


def _batch(run: Run) -> Iterator[Problem]:
    batch = run.train.global_batch
    micro = run.train.micro_batch
    if batch.unit == "tokens" and not run.data.pack:
        fix = "set train.global_batch: 64 examples, or data.pack: true"
        yield Problem("train.global_batch", f"is {batch}, but this needs packed rows", fix)
    is_pair = run.row_tokens != run.data.seq_len
    row = f"one {'pair of two sequences' if is_pair else 'row'} of data.seq_len {run.data.seq_len}"
    for key, size in (("train.global_batch", batch), ("train.micro_batch", micro)):
        # Skip `auto`, because the size that later replaces it fits these limits.
        if size == "auto" or size.unit != "tokens" or size.amount >= run.row_tokens:
            continue
        fix = f"set {key}: {run.row_tokens} tokens or more, or a smaller data.seq_len"
        yield Problem(key, f"of {size} is smaller than {row}", fix)
    if micro != "auto" and micro.unit == batch.unit and micro.amount > batch.amount:
        yield Problem(
            "train.micro_batch",
            f"of {micro} is larger than train.global_batch of {batch}",
            f"set train.micro_batch: {batch}, or auto",
        )


def _optimizer_in_backward(run: Run) -> Iterator[Problem]:
    """Yield a problem for each setting that cannot work with `train.optimizer_in_backward`.

    Such a setting needs all gradients, or several backward passes, before the weights are updated.
    """
    train = run.train
    if not train.optimizer_in_backward:
        return
    too_late = "is only known after the last gradient, when the weights are already updated"
    # The keys are settings that conflict with optimizer_in_backward. Each value has two parts:
    # whether the recipe has the setting, and the reason of the conflict.
    conflicts = {
        f"adapter.kind: {run.adapter.kind}": (
            run.adapter.kind != "none",
            "train.optimizer_in_backward saves the memory of the gradients, and the gradients of"
            " an adapter are small",
        ),
        f"train.clip_norm: {train.clip_norm}": (
            train.clip_norm is not None,
            f"the gradient norm {too_late}; null turns clipping off",
        ),
        "model.dtype: fp16": (
            run.model.dtype == "fp16",
            f"an overflow of the scaled loss {too_late}",
        ),
        "train.cpu_offload: parameters": (
            "parameters" in train.cpu_offload,
            "the gradient of one layer is still being copied to the host when the next one is"
            " computed",
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
                fix=f"change {setting.partition(':')[0]}, or set "
                "train.optimizer_in_backward: false",
                why=why,
            )


def _lengths(run: Run) -> Iterator[Problem]:
    """Yield a problem for each duration or interval with a wrong unit or amount."""
    duration = run.train.duration
    warmup = run.train.warmup
    units: tuple[str, ...] = ("steps", "epochs", "s", "min", "h")
    # An interval in % is converted to steps. This needs the number of steps of the run, which is
    # unknown if the duration is a time.
    interval_units = (*units, "%") if duration.seconds is None else units
    lengths = {
        "train.duration": (duration, units, "1 epochs"),
        "train.warmup": (warmup, ("%", "steps", "epochs"), "3 %"),
        "validate.every": (run.validate.every, interval_units, "100 steps"),
        "checkpoint.every": (run.checkpoint.every, interval_units, "200 steps"),
        "log.every": (run.log.every, interval_units, "1 steps"),
    }
    for key, (length, known, example) in lengths.items():
        fix = f"set {key}: {example}"
        if length is not None and length.unit not in known:
            yield Problem(key, f"is {length}, but its unit must be one of {', '.join(known)}", fix)
        elif length is not None and length.amount <= 0 and length is not warmup:
            yield Problem(key, f"is {length}, but must be above 0", fix)
    longest = {"%": 100.0, duration.unit: duration.amount}.get(warmup.unit, math.inf)
    if warmup.amount > longest:
        yield Problem(
            "train.warmup",
            f"is {warmup}, which is longer than train.duration of {duration}",
            fix="set train.warmup: 3 %",
        )


def _validate(run: Run) -> Iterator[Problem]:
    if run.validate.best_by == "accuracy" and run.method.name not in PAIR_METHODS:
        yield Problem(
            "validate.best_by",
            f"is accuracy, a score that method {run.method.name} does not compute",
            fix="set validate.best_by: loss",
            why="accuracy is the fraction of pairs whose chosen answer has the higher reward",
        )
    if run.validate.best_by == "reward" and not run.samples_answers:
        yield Problem(
            "validate.best_by",
            f"is reward, a score that method {run.method.name} does not compute",
            fix="set validate.best_by: loss",
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
            "needs several validations, but validate.every: null allows only one, at the end",
            fix="set validate.every: 100 steps, or validate.patience: null",
        )
