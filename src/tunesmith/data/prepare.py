"""A recipe's data, ready to train on: template, tokens, contract and schedule. `train` and `data` both start here."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from tunesmith.config.schema import Run
from tunesmith.data.contract import Contract, CutAnswers, check_tokens, excerpt
from tunesmith.data.flaws import FLAWS
from tunesmith.data.hold_out import read_splits
from tunesmith.data.schedule import BatchSchedule
from tunesmith.data.template import Template, select_template
from tunesmith.data.tokens import Repeats, SourceTokens, TokenSet, find_repeats, tokenise, tokenizer_hash
from tunesmith.errors import DataError
from tunesmith.host_files import cache_folder, from_here
from tunesmith.host_memory import available_memory

BYTES_PER_EXAMPLE = 32  # of an epoch's order: indices, random keys and their sort, 8 bytes each
FEW_STEPS = 50  # with fewer, the learning rate is mostly in its warm-up and the model changes little


@dataclass(frozen=True)
class TrainingData:
    """What training needs of the data."""

    run: Run
    train: TokenSet
    validation: TokenSet | None  # None where the recipe names none
    template: Template
    schedule: BatchSchedule
    contracts: tuple[Contract, ...]
    duplicates: Repeats  # training examples that repeat an earlier one
    overlap: Repeats  # validation examples that are trained on too
    # sha256 (hex) of all validation examples, also of those that `validate.max_examples` leaves out.
    validation_digest: str | None = None
    tokenizer_hash: str = ""

    @property
    def digest(self) -> str:
        """sha256 (hex) of the training examples: tokens, mask, order in the source, and weights."""
        return self.train.counts.digest

    def repeated(self, steps: int) -> Self:
        """The same where all of the first `steps` steps are full: each example comes several times in an epoch if need be."""
        schedule, repeats = self.schedule, self.train.repeats
        while schedule.ends_short and schedule.steps_per_epoch(0) <= steps:
            repeats = repeats * 2
            schedule = BatchSchedule(self.train.lengths, self.run.data, self.run.train, repeats=repeats)
        return replace(self, schedule=schedule)

    def sources(self) -> list[tuple[str, SourceTokens]]:
        validation = self.validation.parts if self.validation is not None else ()
        return [*(("train", part) for part in self.train.parts), *(("validation", part) for part in validation)]

    def describe(self) -> str:
        """Lines for the user: which rows are trained on, what was left out, how many steps, what was checked."""
        lines = [self.describe_template()]
        for split, part in self.sources():
            lines.append(f"{split}: {from_here(part.counts.source)}: {', '.join(self.figures(part))}")
        lines += [self.describe_schedule(), *self.warnings()]
        for contract in self.contracts:
            kinds = dict.fromkeys(check.of for check in contract.checks)
            counts = {of: max(check.checked for check in contract.checks if check.of == of) for of in kinds}
            found = f"{len(contract.checks)} checks of {', '.join(f'{n:,} {of}' for of, n in counts.items())}"
            lines.append(f"token contract of {contract.split}: {'BROKEN' if contract.broken else 'holds'}: {found}")
        return "\n".join(lines)

    def describe_template(self) -> str:
        """A line for the user: the prompt in use, and without a template how the first row reads where its answer begins."""
        line, tokens = self.template.describe(), self.train
        if not self.template.raw or not len(tokens):
            return line
        return f"{line}; such as {excerpt(tokens, self.template.tokenizer, 0, int(tokens[0].trained.argmax()))}"

    def figures(self, part: SourceTokens) -> list[str]:
        """What one source gives, and what of it is left out and why."""
        counts, too_long = part.counts, f"(data.too_long: {self.run.data.too_long})"
        left_out = [
            counts.taken if counts.kept + counts.dropped + counts.emptied < counts.available else "",
            f"{counts.dropped:,} dropped {too_long}" if counts.dropped else "",
            f"{counts.emptied:,} dropped because the cut left no supervised token" if counts.emptied else "",
        ]
        why = f" ({', '.join(filter(None, left_out))})" if any(left_out) else ""
        found = [
            f"{counts.kept:,} of {counts.available:,} rows{why}",
            f"weight {part.weight:g}" if part.weight != 1 else "",
            f"{counts.tokens:,} tokens, {counts.supervised / max(1, counts.tokens):.1%} supervised",
            f"{counts.cut:,} cut {too_long}" if counts.cut else "",
            f"{counts.flaws['empty'][0]:,} with an empty answer" if "empty" in counts.flaws else "",
            f"longest {counts.longest:,} tokens",
        ]
        return [text for text in found if text]

    def describe_schedule(self) -> str:
        """A line for the user: examples -> rows -> optimizer steps."""
        plan, duration = self.schedule.summary(self.run.train.duration), self.run.train.duration
        kind = f"packed rows of {self.schedule.row_length}" if self.schedule.packed else "rows"
        steps = f"{plan.steps:,} optimizer steps" if plan.steps is not None else "optimizer steps until the time is up"
        rows = f"{plan.rows:,} {kind}, {plan.fill:.1%} filled -> {plan.steps_per_epoch:,} steps an epoch"
        return f"{plan.examples:,} examples ({plan.tokens:,} tokens) -> {rows} -> {duration}: {steps}"

    def warnings(self) -> list[str]:
        """What is valid but seldom meant, each with its fix."""
        found = []
        steps, per_epoch = self.schedule.steps(self.run.train.duration), self.schedule.steps_per_epoch(0)
        if steps is not None and steps < FEW_STEPS and per_epoch:
            size = self.run.train.global_batch
            whole = self.schedule.row_length if size.unit == "tokens" else 1  # a step takes whole rows
            smaller = max(1, size.amount * steps // FEW_STEPS // whole) * whole
            fix = f'train.duration="{math.ceil(FEW_STEPS / per_epoch)} epochs"'
            if smaller < size.amount:
                fix += f' or train.global_batch="{smaller} {size.unit}"'
            found.append(f"only {steps} optimizer steps: a model changes little in fewer than {FEW_STEPS}; fix: {fix}")
        for contract in self.contracts:
            found += [f"{contract.split}: {text}" for text in contract.warnings]
        for split, part in self.sources():
            for name, (count, first) in part.counts.flaws.items():
                if name == "joined" and self.run.data.template != "auto":
                    continue  # it was asked for
                what, why, fix = FLAWS[name]
                what = f"{count:,} of {part.counts.rows:,} rows with {what}"
                found.append(f"{split}: {what}, first {part.rows.where(first)}: {why}; fix: {fix}")
        for repeats, tokens, what, fix in (
            (self.duplicates, self.train, "training examples repeat an earlier one", "delete them"),
            (self.overlap, self.validation, "validation examples are trained on too, so val_loss says little of new rows",
             "splits that share no row, such as train[:95%] and train[95%:]; or delete the rows that are there twice"),
        ):  # fmt: skip
            if repeats.count:
                where = f"{repeats.where} ({repeats.earlier})"
                found.append(f"{repeats.count:,} of {len(tokens or ()):,} {what}; first {where}; fix: {fix}")
        return [f"warning: {text}" for text in found]


def prepare_data(
    run: Run,
    tokenizer: Any,
    eos_ids: Collection[int],
    vocab_size: int,
    *,
    cache: Path | None = None,
    strict: bool = True,
    cut_answers: CutAnswers = "refuse",
    position_limit: int | None = None,
) -> TrainingData:
    """Read, tokenise and check the rows of a recipe; DataError where a source, a row or the contract is broken.

    Args:
        eos_ids: ids that end a turn, by the model's generation config.
        vocab_size: entries of the model's embedding.
        cache: folder of the token cache; None takes `tokens` in the cache folder.
        strict: raise on a broken contract; False leaves it to the caller to look at `contracts`.
        cut_answers: as for `check_tokens`, of the training rows; `data.allow_cut_answers` accepts them in any case.
        position_limit: the model's longest sequence, where it has one.
    """
    cache = cache or cache_folder("tokens")
    template = select_template(run.data, tokenizer, eos_ids)
    rows, held_out = read_splits(run.data, run.train.seed)
    own_hash = tokenizer_hash(tokenizer)
    train = tokenise(rows, run.data, template, tokenizer, cache=cache, what="train", of_tokenizer=own_hash)
    if run.data.allow_cut_answers:
        cut_answers = "accept"
    contracts = [
        check_tokens(
            train, template, tokenizer, vocab_size=vocab_size, split="train",
            cut_answers=cut_answers, position_limit=position_limit,
        )
    ]  # fmt: skip
    validation = held_digest = None
    if held_out:
        validation = tokenise(
            held_out, run.data, template, tokenizer, cache=cache, what="validation", of_tokenizer=own_hash
        )
        held_digest = validation.counts.digest
        if run.validate.max_examples is not None:
            validation = validation.first(run.validate.max_examples)
        # Nothing is learned from these: a warning will do.
        contracts.append(
            check_tokens(
                validation, template, tokenizer, vocab_size=vocab_size, split="validation",
                cut_answers="accept" if cut_answers == "accept" else "warn", position_limit=position_limit,
            )
        )  # fmt: skip
    for contract in contracts if strict else ():
        contract.raise_if_broken()
    if BYTES_PER_EXAMPLE * float(train.repeats.sum()) > available_memory():
        many = f"{train.repeats.sum():,.0f} examples an epoch"
        what = f"the weights of the sources make {many}, more than memory can order"
        raise DataError(what, where="data.train", fix="lower weight, to 1 where it is not needed")
    schedule = BatchSchedule(train.lengths, run.data, run.train, repeats=train.repeats)
    if len(train) and schedule.steps_per_epoch(0) == 0:
        why = f"{len(train)} examples with weights {', '.join(str(s.weight) for s in run.data.train)}"
        what = "the weights of the sources leave no example in an epoch"
        raise DataError(what, where="data.train", why=why, fix="raise weight")
    duplicates, overlap = find_repeats(train), find_repeats(validation, train) if validation is not None else Repeats()
    return TrainingData(
        run, train, validation, template, schedule, tuple(contracts), duplicates, overlap, held_digest,
        own_hash,
    )  # fmt: skip
