"""The rules that span several keys of a recipe, or that a type alone cannot say.

Each rule is one line: what is wrong, at which key, and the edit that mends it. `check` stops at the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tunesmith.config.names import nearest
from tunesmith.config.paths import TEMPLATES
from tunesmith.config.schema import Adapter, Checkpoint, Data, Model, Run, Source, Train
from tunesmith.errors import MachineError, RecipeError
from tunesmith.units import Length

# The names that a format gives to its columns; `columns` maps them to those of a file.
COLUMNS = {
    "alpaca": ("instruction", "input", "output", "system", "history"),
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "prompt-completion": ("prompt", "completion"),
    "text": ("text",),
}
CHATS = ("alpaca", "messages", "sharegpt")  # the formats that have turns, and so a place for a system message


class RecipeProblem(NamedTuple):
    """One broken rule: the key it is shown at, what is wrong, the edit, and the reason where it is not plain."""

    key: str
    what: str
    fix: str
    why: str = ""
    error: type[RecipeError] | type[MachineError] = RecipeError


def check_run(run: Run, where: Callable[[str], str]) -> None:
    """Hold a typed recipe against every rule.

    Args:
        run: the recipe, all of its types right.
        where: the place of a dotted key (`data.train.0.columns`), or "" if the key was not given.

    Raises:
        RecipeError: the first rule that is broken.
        MachineError: something asked for that this version cannot do on any machine.
    """
    for problem in problems(run, where):
        place = where(problem.key) or problem.key
        raise problem.error(problem.what, where=place, why=problem.why, fix=problem.fix)


def problems(run: Run, given: Callable[[str], str]) -> Iterator[RecipeProblem]:
    """Every broken rule, in the order of the schema."""
    yield from _model(run.model, run.adapter)
    yield from _adapter(run.adapter, run.model, given)
    yield from _data(run.data, given)
    yield from _train(run.train, run)
    yield from _batch(run.train, run.data)
    yield from _in_backward(run.train, run)
    yield from _course(run.train)
    yield from _parallel(run)
    yield from _on_the_way(run, run.checkpoint)
    yield from _profile(run)


def _at_least(key: str, value: float | None, least: float) -> Iterator[RecipeProblem]:
    if value is not None and value < least:
        yield RecipeProblem(key, f"{key} is {value}, the least is {least}", f"write {least} or more")


def _above_zero(key: str, value: float | None, example: str, otherwise: str = "") -> Iterator[RecipeProblem]:
    if value is not None and value <= 0:
        yield RecipeProblem(
            key, f"{key} is {value}, it must be above 0", f"write a number such as {example}{otherwise}"
        )


def _model(model: Model, adapter: Adapter) -> Iterator[RecipeProblem]:
    if model.quantize == "fp8" and model.dtype != "bf16":
        why = "the products of an fp8 base come out in bf16"
        yield RecipeProblem(
            "model.quantize", f"model.quantize: fp8 with model.dtype: {model.dtype}", "model.dtype: bf16", why
        )
    if model.quantize != "none" and adapter.kind == "none":
        why = "full fine-tuning changes the base, and a quantised base is frozen"
        fix = "train an adapter on it (adapter.kind: lora), or model.quantize: none"
        yield RecipeProblem("model.quantize", f"model.quantize: {model.quantize} with adapter.kind: none", fix, why)
    if len(set(model.added_tokens)) < len(model.added_tokens) or "" in model.added_tokens:
        yield RecipeProblem(
            "model.added_tokens", "model.added_tokens has an empty or repeated token", "name each one once"
        )
    embeds = any(name.rpartition(".")[2].startswith("embed") for name in adapter.modules_to_save)
    if model.added_tokens and adapter.kind == "lora" and not embeds:
        why = "their embeddings are new, and an adapter alone leaves them as random as they start"
        fix = "adapter.modules_to_save: [embed_tokens, lm_head]   # both, tied or not: each is trained as a copy of its own"
        yield RecipeProblem("model.added_tokens", "model.added_tokens without trained embeddings", fix, why)


def _adapter(adapter: Adapter, model: Model, given: Callable[[str], str]) -> Iterator[RecipeProblem]:
    if adapter.kind == "none":
        for name in ("rank", "alpha", "dropout", "target", "rslora", "modules_to_save", "from"):
            key = f"adapter.{name}"
            if given(key):
                fix = f"remove {key}, or train an adapter: adapter.kind: lora"
                yield RecipeProblem(key, f"{key} has no effect with adapter.kind: none", fix)
        return
    yield from _at_least("adapter.rank", adapter.rank, 1)
    yield from _above_zero("adapter.alpha", adapter.alpha, "16")
    if not 0 <= adapter.dropout < 1:
        yield RecipeProblem(
            "adapter.dropout", f"adapter.dropout is {adapter.dropout}", "write 0, or a share such as 0.05"
        )
    names = (adapter.target,) if isinstance(adapter.target, str) else adapter.target
    if not names or "" in names:
        yield RecipeProblem("adapter.target", "adapter.target names nothing", "adapter.target: all-linear")
    elif any(name != "all-linear" and nearest(name, ["all-linear"]) for name in names):
        what = f"adapter.target: {', '.join(names)} is no module's name"
        yield RecipeProblem(
            "adapter.target", what, "adapter.target: all-linear, or a list of names such as [q_proj, v_proj]"
        )
    elif "all-linear" in names and isinstance(adapter.target, tuple):
        yield RecipeProblem("adapter.target", "all-linear stands alone, not in a list", "adapter.target: all-linear")


def _data(data: Data, given: Callable[[str], str]) -> Iterator[RecipeProblem]:
    for part, sources in (("train", data.train), ("validation", data.validation)):
        if not sources and part == "train":
            yield RecipeProblem(
                "data.train", "data.train is empty", "data.train: {source: rows.jsonl, format: messages}"
            )
        for i, source in enumerate(sources):
            # A single source is written without an index, and its places are known without one.
            key = f"data.{part}.{i}" if given(f"data.{part}.{i}") or len(sources) > 1 else f"data.{part}"
            yield from _source(source, key)
    yield from _at_least("data.seq_len", data.seq_len, 2)
    if data.template not in TEMPLATES and not Path(data.template).is_file():
        near = nearest(Path(data.template).name, TEMPLATES)
        fix = f"did you mean {near}?" if near else f"one of {', '.join(TEMPLATES)}, or a Jinja file that exists"
        yield RecipeProblem("data.template", f"no such file: {data.template}", fix)
    formats = {source.format for source in data.train}
    if data.system is not None and not formats & set(CHATS):
        what = f"data.system has no effect on rows of format {' and '.join(sorted(formats))}"
        yield RecipeProblem("data.system", what, f"remove it, or use a format with turns: {', '.join(CHATS)}")


def _source(source: Source, key: str) -> Iterator[RecipeProblem]:
    known = COLUMNS[source.format]
    for name in source.columns:
        if name not in known:
            near = nearest(name, known)
            swapped = f"write {source.columns[name]}: {name}" if source.columns[name] in known else ""
            fix = swapped or (f"did you mean {near}?" if near else f"its columns: {', '.join(known)}")
            what = f"{key}.columns: format {source.format} has no column {name!r}"
            yield RecipeProblem(
                f"{key}.columns.{name}", what, fix, "it is written as the format's name: the file's name"
            )
    yield from _at_least(f"{key}.max_examples", source.max_examples, 1)
    yield from _above_zero(f"{key}.weight", source.weight, "2.0", "; remove the source to leave it out")


def _train(train: Train, run: Run) -> Iterator[RecipeProblem]:
    yield from _above_zero("train.learning_rate", train.learning_rate, "1e-4")
    yield from _at_least("train.min_learning_rate", train.min_learning_rate, 0)
    if train.min_learning_rate > train.learning_rate:
        what = f"train.min_learning_rate {train.min_learning_rate} is above train.learning_rate {train.learning_rate}"
        yield RecipeProblem("train.min_learning_rate", what, "write a smaller one, such as 0")
    if train.schedule == "constant" and train.min_learning_rate:
        fix = "remove it, or train.schedule: cosine"
        what = "train.min_learning_rate has no effect with train.schedule: constant"
        yield RecipeProblem("train.min_learning_rate", what, fix)
    if isinstance(train.recompute, int):
        yield from _at_least("train.recompute", train.recompute, 0)
    for i, beta in enumerate(train.betas):
        if not 0 <= beta < 1:
            yield RecipeProblem(
                "train.betas", f"train.betas.{i} is {beta}, outside [0, 1)", "train.betas: [0.9, 0.999]"
            )
    yield from _above_zero("train.eps", train.eps, "1e-8")
    yield from _at_least("train.weight_decay", train.weight_decay, 0)
    yield from _above_zero("train.clip_norm", train.clip_norm, "1.0", ", or null for no clipping")
    if not 0 <= train.seed < 2**32:
        yield RecipeProblem("train.seed", f"train.seed {train.seed} is outside 0 to 2^32 - 1", "train.seed: 42")
    if train.master_weights == "stochastic" and (run.model.dtype != "bf16" or run.adapter.kind != "none"):
        why = "it rounds bf16 parameters that are trained; an adapter's are fp32, and so are those of model.dtype: fp32"
        fix = "remove it, or model.dtype: bf16 with adapter.kind: none"
        yield RecipeProblem(
            "train.master_weights", "train.master_weights: stochastic has nothing to round here", fix, why
        )


def _batch(train: Train, data: Data) -> Iterator[RecipeProblem]:
    batch, micro, seq_len = train.global_batch, train.micro_batch, data.seq_len
    if batch.unit == "tokens":
        if not data.pack:
            fix = "train.global_batch: 64 examples, or data.pack: true"
            yield RecipeProblem("train.global_batch", "train.global_batch in tokens needs packed rows", fix)
        if batch.amount < seq_len:
            fix = f"train.global_batch: {seq_len} tokens or more, or a smaller data.seq_len"
            what = f"train.global_batch of {batch} is smaller than one row of data.seq_len {seq_len}"
            yield RecipeProblem("train.global_batch", what, fix)
    if micro == "auto":
        return
    if micro.unit == "tokens" and micro.amount < seq_len:
        fix = f"train.micro_batch: {seq_len} tokens or more, or auto"
        what = f"train.micro_batch of {micro} is smaller than one row of data.seq_len {seq_len}"
        yield RecipeProblem("train.micro_batch", what, fix)
    if micro.unit == batch.unit and micro.amount > batch.amount:
        what = f"train.micro_batch of {micro} is larger than train.global_batch of {batch}"
        yield RecipeProblem("train.micro_batch", what, f"train.micro_batch: {batch}, or auto")


def _in_backward(train: Train, run: Run) -> Iterator[RecipeProblem]:
    """An update in the backward knows one gradient and one backward: nothing that looks at all of them fits with it."""
    if not train.optimizer_in_backward:
        return
    key, off = "train.optimizer_in_backward", "train.optimizer_in_backward: false"
    if run.adapter.kind != "none":
        why = "it saves the memory of gradients, and those of an adapter are small beside its frozen base"
        yield RecipeProblem(
            key, f"{key} gains nothing with adapter.kind: {run.adapter.kind}", f"remove it, or {off}", why
        )
    if train.clip_norm is not None:
        why = "the norm is known after the last gradient, when the weights are already updated"
        yield RecipeProblem(
            key, f"{key} with train.clip_norm: {train.clip_norm}", f"train.clip_norm: null, or {off}", why
        )
    if run.model.dtype == "fp16":
        why = "an overflow of the scaled loss is known after the last gradient, when the weights are already updated"
        yield RecipeProblem(key, f"{key} with model.dtype: fp16", f"model.dtype: bf16, or {off}", why)
    if train.micro_batch not in ("auto", train.global_batch):
        why = "the first forward pass of a step would update the weights before the next one: it takes the global batch whole"
        what = f"{key} with train.micro_batch of {train.micro_batch} and train.global_batch of {train.global_batch}"
        yield RecipeProblem("train.micro_batch", what, f"train.micro_batch: auto, or {off}", why)


def _course(train: Train) -> Iterator[RecipeProblem]:
    duration, warmup = train.duration, train.warmup
    yield from _lasting("train.duration", duration, "1 epochs", ("steps", "epochs", "s", "min", "h"))
    if warmup.unit not in ("%", "steps", "epochs"):
        what = f"train.warmup: {warmup}: a warm-up is counted in %, steps or epochs"
        yield RecipeProblem("train.warmup", what, "train.warmup: 3 %")
    if warmup.unit == "%" and warmup.amount > 100:
        yield RecipeProblem("train.warmup", f"train.warmup: {warmup} is more than the whole run", "train.warmup: 3 %")
    if warmup.unit == duration.unit and warmup.amount > duration.amount:
        what = f"train.warmup of {warmup} is longer than train.duration of {duration}"
        yield RecipeProblem("train.warmup", what, "train.warmup: 3 %")


def _lasting(key: str, length: Length | None, example: str, units: tuple[str, ...]) -> Iterator[RecipeProblem]:
    if length is None:
        return
    if length.unit not in units:
        yield RecipeProblem(key, f"{key}: {length}: here it is counted in {', '.join(units)}", f"{key}: {example}")
    if length.amount <= 0:
        yield RecipeProblem(key, f"{key} is {length}, it must be above 0", f"{key}: {example}")


def _parallel(run: Run) -> Iterator[RecipeProblem]:
    sizes = (("replicate", run.parallel.replicate), ("shard", run.parallel.shard), ("tensor", run.parallel.tensor))
    for name, size in sizes:
        key, default = f"parallel.{name}", "1" if name == "tensor" else "auto"
        if size == "auto":
            continue
        yield from _at_least(key, size, 1)
        if size > 1:
            what = f"{key}: {size}: this version trains on one rank"
            yield RecipeProblem(key, what, f"{key}: {default}", error=MachineError)


def _on_the_way(run: Run, checkpoint: Checkpoint) -> Iterator[RecipeProblem]:
    # A share of the run is a number of steps, which a run that ends by the clock does not know.
    often = ("steps", "epochs", "s", "min", "h", *(("%",) if run.train.duration.seconds is None else ()))
    yield from _lasting("validate.every", run.validate.every, "100 steps", often)
    yield from _at_least("validate.max_examples", run.validate.max_examples, 1)
    yield from _at_least("validate.patience", run.validate.patience, 1)
    if run.validate.patience is not None and not run.data.validation:
        fix = "add data.validation, or remove validate.patience"
        yield RecipeProblem("validate.patience", "validate.patience without data.validation", fix)
    if run.validate.patience is not None and run.validate.every is None:
        what = "validate.patience with validate.every: null, which validates once, at the end"
        yield RecipeProblem("validate.patience", what, "validate.every: 100 steps")
    yield from _lasting("checkpoint.every", checkpoint.every, "200 steps", often)
    yield from _at_least("checkpoint.keep", checkpoint.keep, 1)
    yield from _lasting("log.every", run.log.every, "1 steps", often)
    yield from _at_least("log.samples", run.log.samples, 0)


def _profile(run: Run) -> Iterator[RecipeProblem]:
    yield from _at_least("profile.wait", run.profile.wait, 0)
    yield from _at_least("profile.warmup", run.profile.warmup, 0)
    yield from _at_least("profile.active", run.profile.active, 1)
    yield from _at_least("profile.cycles", run.profile.cycles, 1)
