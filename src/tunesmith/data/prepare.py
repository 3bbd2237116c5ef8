"""A recipe's data, ready to train on: template, tokens, contract and course. `train` and `data` both come here."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.config.schema import Run
from tunesmith.data import contract as contracts
from tunesmith.data.cache import cache_folder
from tunesmith.data.contract import Contract
from tunesmith.data.loader import BatchSchedule
from tunesmith.data.template import Template, select_template
from tunesmith.data.tokens import Counts, TokenSet, tokenise
from tunesmith.errors import DataError

FEW_STEPS = 50  # with fewer, the schedule is mostly warm-up and little is learnt


@dataclass(frozen=True)
class TrainingData:
    """What the loop needs of the data. validation: None where the recipe names none.
    contracts: of train and, where there is one, of validation.
    overlap: validation examples that are among the training examples, token for token."""

    run: Run
    train: TokenSet
    validation: TokenSet | None
    template: Template
    course: BatchSchedule
    contracts: tuple[Contract, ...]
    overlap: int = 0

    @property
    def digest(self) -> str:
        """sha256 (hex) of the training examples: tokens, mask, order in the source, and weights."""
        return self.train.counts.digest

    def describe(self) -> str:
        """A few lines for the user: what is learnt from which rows, what was left out, how many steps, what was checked."""
        lines = [self.template.describe()]
        for what, tokens in (("train", self.train), ("validation", self.validation)):
            lines += [f"{what}: {counts_text(counts)}" for counts in (tokens.sources if tokens is not None else ())]
        lines += [course_text(self.course, self.run)[0], *self.warnings()]
        for contract in self.contracts:
            checks = ", ".join(f"{c.name} ({c.looked:,} {c.of})" for c in contract.checks)
            lines.append(f"token contract of {contract.what}: {'BROKEN' if contract.broken else 'holds'}: {checks}")
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """What is not wrong but seldom meant, each with its mend."""
        found = [course_text(self.course, self.run)[1]]
        if self.overlap:
            found.append(
                f"warning: {self.overlap:,} of {len(self.validation or ()):,} validation examples are trained on too, so "
                "val_loss says little of new rows; mend: splits that share no row, such as train[:95%] and train[95%:]"
            )
        return [text for text in found if text]


def prepare_data(
    run: Run,
    tokenizer: Any,
    eos_ids: Collection[int],
    vocab_size: int,
    *,
    cache: Path | None = None,
    strict: bool = True,
) -> TrainingData:
    """Read, tokenise and check the rows of a recipe.

    Args:
        eos_ids: ids that end a turn, by the model's generation config.
        vocab_size: entries of the model's embedding.
        cache: folder of the token cache; None takes `cache_folder()`.
        strict: raise on a broken contract; False leaves it to the caller to look at `contracts`.

    Raises:
        DataError: a source, a row or the contract is broken.
    """
    folder = cache or cache_folder()
    template = select_template(run.data, tokenizer, eos_ids)
    train = tokenise(run.data.train, run.data, template, tokenizer, cache=folder, what="train")
    held = None
    if run.data.validation:
        held = tokenise(run.data.validation, run.data, template, tokenizer, cache=folder, what="validation")
        if run.validate.max_examples is not None:
            held = held.first(run.validate.max_examples)
    found = []
    for what, tokens in (("train", train), ("validation", held)):
        if tokens is not None:
            found.append(contracts.inspect(tokens, template, tokenizer, vocab_size=vocab_size, what=what))
            if strict:
                found[-1].raise_if_broken()
    course = BatchSchedule(train.lengths, run.data, run.train, repeats=train.repeats)
    if len(train) and course.steps_per_epoch(0) == 0:
        raise DataError(
            "the weights of the sources leave no example in an epoch",
            where="data.train",
            why=f"{len(train)} examples with weights {', '.join(str(s.weight) for s in run.data.train)}",
            fix="raise weight",
        )
    shared = overlap(train, held) if held is not None else 0
    return TrainingData(run, train, held, template, course, tuple(found), shared)


def overlap(train: TokenSet, held: TokenSet) -> int:
    """How many examples of `held` are in `train`, token for token."""
    wanted = Counter(example.ids.tobytes() for example in held)
    alike = np.flatnonzero(np.isin(train.lengths, held.lengths)).tolist()  # only these can be equal
    return sum(wanted.pop(train[i].ids.tobytes(), 0) for i in alike)


def counts_text(counts: Counts) -> str:
    """One source in one line."""
    share = counts.supervised / max(1, counts.tokens)
    text = f"{counts.source}: {counts.kept:,} of {counts.rows:,} rows, {counts.tokens:,} tokens, {share:.1%} learnt"
    if counts.cut:
        text += f", {counts.cut:,} cut"
    if counts.dropped:
        text += f", {counts.dropped:,} dropped as too long"
    if counts.emptied:
        text += f", {counts.emptied:,} dropped because the cut left nothing to learn"
    return f"{text}; longest {counts.longest:,} tokens"


def course_text(course: BatchSchedule, run: Run) -> tuple[str, str]:
    """Two lines for the user: examples -> rows -> optimizer steps, and a warning with its mend, empty if none is due."""
    sums = course.summary(run.train.duration)
    kind = f"packed rows of {course.row_length}" if course.packed else "rows"
    steps = f"{sums.steps:,} optimizer steps" if sums.steps is not None else "optimizer steps until the time is up"
    line = (
        f"{sums.examples:,} examples ({sums.tokens:,} tokens) -> {sums.rows:,} {kind}, {sums.fill:.1%} filled"
        f" -> {sums.steps_per_epoch:,} steps an epoch -> {run.train.duration}: {steps}"
    )
    if sums.steps is None or sums.steps >= FEW_STEPS or not sums.steps_per_epoch:
        return line, ""
    epochs = math.ceil(FEW_STEPS / sums.steps_per_epoch)
    size = run.train.global_batch
    whole = course.row_length if size.unit == "tokens" else 1  # a step takes whole rows
    smaller = max(1, size.amount * sums.steps // FEW_STEPS // whole) * whole
    mend = f'train.duration="{epochs} epochs"'
    if smaller < size.amount:
        mend += f' or train.global_batch="{smaller} {size.unit}"'
    return line, f"warning: only {sums.steps} optimizer steps: little is learnt in fewer than {FEW_STEPS}; mend: {mend}"
