"""Preparation of a recipe's data for training: template, tokens, contract and schedule.

The commands `train` and `data` both call `prepare_data`.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from tunesmith.config.schema import FEW_STEPS, Data, Run
from tunesmith.data.batches.pixels import PixelReader
from tunesmith.data.batches.schedule import BatchSchedule, describe_long_warmup
from tunesmith.data.compare.describe_findings import count_repeating, describe_rows, row_warnings_of
from tunesmith.data.compare.row_checks import check_across
from tunesmith.data.compare.splits import Splits, read_checked_splits, read_splits
from tunesmith.data.rows.formats import SPLIT_COLUMNS
from tunesmith.data.rows.labels import rates_answers
from tunesmith.data.rows.row_reader import plain
from tunesmith.data.source.open_source import describe_layouts
from tunesmith.data.text.row_warnings import ROW_WARNINGS
from tunesmith.data.text.select_template import select_template
from tunesmith.data.text.template import Template
from tunesmith.data.tokens.contract import Contract, CutAnswers, check_tokens
from tunesmith.data.tokens.token_set import (
    Repeats,
    SourceTokens,
    TokenSet,
    find_repeats,
)
from tunesmith.data.tokens.tokenize import tokenize, tokenize_sides
from tunesmith.errors import DataError, TunesmithError, first_line
from tunesmith.host.files import cache_folder, relative_to_cwd
from tunesmith.host.memory import available_memory
from tunesmith.run_dir import HELD_OUT, with_earlier_runs
from tunesmith.units import count_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.text.placeholders import PictureProcessor

# Maximum fraction of a source's tokens that can be lost without a warning. Tokens are lost if rows
# are truncated or dropped.
MAX_LOST_TOKENS_SHARE = 0.01
# Bytes per example to shuffle an epoch: examples, keys, order and the sort take 8 bytes each.
BYTES_PER_EXAMPLE = 32


@dataclass(frozen=True)
class TrainingData:
    """The examples of a run, their batch schedule, and the results of all checks.

    Attributes:
        validation: the validation examples, or None if there are none.
        duplicates: training examples that repeat an earlier training example.
        overlap: validation examples that are also training examples.
        splits: the training rows and the validation rows, with the problems that were found in
            them.
        across: pairs of near-duplicates. The first row number is from `data.validation` and the
            second is from `data.train`. Rows are counted over all sources of a split.
        validation_digest: sha256 (hex) of all validation examples, including examples that
            `validate.max_examples` excludes.
        position_limit: maximum sequence length of the model, or None if it has no limit.
    """

    run: Run
    train: TokenSet
    validation: TokenSet | None
    template: Template
    schedule: BatchSchedule
    contracts: tuple[Contract, ...]
    duplicates: Repeats
    overlap: Repeats
    splits: Splits
    across: tuple[tuple[int, ...], ...] = ()
    validation_digest: str | None = None
    position_limit: int | None = None

    @property
    def digest(self) -> str:
        """sha256 (hex) of the training examples: tokens, mask, order in the source, and weights."""
        return self.train.counts.digest

    def repeated(self, steps: int) -> Self:
        """Return the data with repeated examples, so that the first `steps` steps are full."""
        schedule = self.schedule
        repeats = self.train.repeats
        while schedule.ends_short and schedule.steps_per_epoch(0) <= steps:
            repeats = repeats * 2
            schedule = BatchSchedule.of(self.run, self.train, repeats)
        return replace(self, schedule=schedule)

    def sources(self) -> list[tuple[str, SourceTokens]]:
        """Return each source with the name of its split, `train` or `validation`."""
        sources = [("train", part) for part in self.train.parts]
        if self.validation is not None:
            sources += [("validation", part) for part in self.validation.parts]
        return sources

    def describe(self, *, why: bool = False) -> str:
        """Return lines for the user: which rows are used, which are left out, and how many steps.

        If `why` is True, the lines include the template and the results of the checks. The template
        is also shown if no chat template is used, or if tunesmith has chosen the alpaca template.
        """
        lines = []
        # Whether tunesmith has chosen the alpaca template, because the model has no chat template.
        is_chosen = self.run.data.template == "auto" and self.template.name == "alpaca"
        if why or self.template.raw or is_chosen:
            lines.append(self.template.describe())
        for split, part in self.sources():
            figures = ", ".join(self.figures(part))
            lines.append(f"{split}: {relative_to_cwd(part.counts.source)}: {figures}")
        lines += describe_layouts(part.rows for _, part in self.sources())
        lines += describe_rows(self.splits)
        if self.run.data.hold_out and self.validation is not None:
            lines.append(self.describe_held_out())
        lines.append(self.describe_schedule())
        lines += self.warnings()
        if why:
            lines += self.describe_checks()
        return "\n".join(lines)

    def describe_checks(self) -> list[str]:
        """Return a line with the results of the token contract for each split.

        The line contains the number of passed rules, the number of checked rows, and the notes of
        the rules.
        """
        lines = []
        for contract in self.contracts:
            checks = contract.checks
            # Kind of item, such as "row" -> the largest number of these items that a rule has
            # checked.
            counts: dict[str, int] = {}
            notes = []
            for check in checks:
                counts[check.of] = max(check.checked, counts.get(check.of, 0))
                if check.note and not check.broken:
                    notes.append(check.note)
            things = ", ".join(count_of(count, kind) for kind, count in counts.items())
            passed = count_of(len(checks), "check")
            if contract.broken:
                passed = f"{len(checks) - len(contract.broken)} of {passed}"
            line = f"token contract of {contract.split}: passed {passed} of {things}"
            lines.append("; ".join([line, *notes]))
        return lines

    def describe_held_out(self) -> str:
        """Return a line that says how many rows are held out, and where the user finds their
        list.
        """
        assert self.validation is not None
        count = count_of(self.validation.counts.kept_rows, "held-out row")
        if self.run.validate.max_examples is not None:
            count = "held-out rows"  # the validation set has fewer rows than are held out
        listed = relative_to_cwd(Path(self.run.output_dir) / HELD_OUT)
        return (
            f"this run does not train on the {count} (listed in {listed}); to train on all rows, "
            "set data.hold_out=null"
        )

    def figures(self, part: SourceTokens) -> Iterator[str]:
        """Yield texts with the counts of rows, tokens and pictures of one source.

        Dropped rows are counted separately, with the reason.
        """
        counts = part.counts
        rows = f"{counts.kept_rows:,} of {count_of(counts.available, 'row')}"
        left_out = ", ".join(_left_out(part))
        if left_out:
            rows += f" ({left_out})"
        yield rows
        if part.weight != 1:
            yield f"weight {part.weight:g}"
        supervised = counts.supervised / max(1, counts.tokens)
        yield f"{count_of(counts.tokens, 'token')}, {supervised:.1%} supervised"
        if counts.split:
            parts = counts.kept - counts.kept_rows + counts.split
            rows = count_of(counts.split, "row")
            yield f"{rows} split into {count_of(parts, 'example')} (data.seq_len)"
        if counts.cut:
            yield f"{count_of(counts.cut, 'row')} truncated (data.too_long: {part.too_long})"
        if counts.lost_share:
            yield f"{_percent(counts.lost_share)} of the tokens lost"
        if "empty" in counts.flaws:
            count, _ = counts.flaws["empty"]
            yield f"{count_of(count, 'row')} with an empty answer"
        yield f"longest {count_of(counts.longest, 'token')}"
        if counts.pictures:
            all_tokens = counts.tokens + counts.cut_tokens + counts.dropped_tokens
            share = counts.placeholders / all_tokens
            yield f"{count_of(counts.pictures, 'picture')}, {share:.1%} of the tokens"
            tokens_each = counts.placeholders / counts.pictures
            yield f"{tokens_each:,.0f} tokens per picture"
        if counts.scaled_pictures:
            limit = f"data.image_max_pixels: {self.run.data.image_max_pixels}"
            yield f"{counts.scaled_pictures:,} of them scaled down ({limit})"

    def describe_schedule(self) -> str:
        """Return a line with the number of optimizer steps and the number of examples per epoch."""
        duration = self.run.train.duration
        summary = self.schedule.summary(duration)
        steps = f"as many as fit in {duration.in_words()}"
        if summary.steps is not None:
            steps = f"{summary.steps:,}"
            if duration.unit != "steps":
                steps += f", {duration.in_words()}"
        kind = "row"
        if self.schedule.packed:
            kind = "packed row"
        rows = count_of(summary.rows, kind)
        if self.schedule.packed:
            rows += f" of {self.schedule.row_length:,} tokens"
        examples = count_of(summary.examples, "example")
        return (
            f"steps: {steps}; an epoch has {count_of(summary.steps_per_epoch, 'step')}: "
            f"{examples} in {rows}, {summary.fill:.1%} filled"
        )

    def warnings(self) -> list[str]:
        """Return warnings about valid but rarely intended data, each with its fix."""
        train = self.run.train
        warnings = list(self._few_steps_warnings())
        warnings += describe_long_warmup(train, self.schedule.steps(train.duration))
        for contract in self.contracts:
            warnings += [f"{contract.split}: {text}" for text in contract.warnings]
        for warn in (self._warn_bad_rows, self._warn_unread, self._warn_control_tokens):
            warnings += self._warn_by_source(warn)
        if self.template.pictures is not None and not self.train.counts.pictures:
            warnings.append(
                "model.vision is true, but no row has a picture; fix: set model.vision=false, or"
                " name the column of the pictures, such as columns: {images: COLUMN}"
            )
        # Remove repeated warnings. Held-out rows are in the same folder as the training rows, so
        # both give the same warning.
        warnings += dict.fromkeys(
            f"files in {relative_to_cwd(part.counts.source)} are not read: {part.rows.skipped}"
            for _, part in self.sources()
            if part.rows.skipped
        )
        warnings += self._warn_by_source(self._warn_lost_tokens)
        warnings += self._warn_by_source(self._warn_flaws)
        # Most duplicate examples come from near-duplicate rows, which have a separate warning. Warn
        # only if there are more duplicate examples than near-duplicate rows.
        if self.duplicates.count > count_repeating(self.splits):
            what = "training examples are duplicates"
            text = _describe_repeats(self.duplicates, len(self.train), what)
            fix = "delete the duplicates, or set 'data.leave_out=[near-duplicates]'"
            warnings.append(f"{text}; fix: {fix}")
        if self.overlap.count and self.validation is not None:
            what = (
                "validation examples are also in the training data, so val_loss is too optimistic"
            )
            text = _describe_repeats(self.overlap, len(self.validation), what)
            warnings.append(
                f"{text}; fix: use splits that share no row, such as train[:95%] and train[95%:];"
                " or delete the duplicates"
            )
        warnings += row_warnings_of(self.splits, self.across)
        return [f"warning: {text}" for text in warnings]

    def _few_steps_warnings(self) -> Iterator[str]:
        steps = self.schedule.steps(self.run.train.duration)
        steps_per_epoch = self.schedule.steps_per_epoch(0)
        if steps is None or steps >= FEW_STEPS or not steps_per_epoch:
            return
        if self.run.adapter.from_ is not None:
            return  # The adapter was trained before, so few steps can be enough.
        only = f"the run has only {count_of(steps, 'optimizer step')}"
        epochs = math.ceil(FEW_STEPS / steps_per_epoch)
        fix = f'set train.duration="{epochs} epochs"'
        yield f"{only}, but a model hardly changes in fewer than {FEW_STEPS} steps; fix: {fix}"

    def _warn_by_source(self, warn: Callable[[SourceTokens], Iterator[str]]) -> list[str]:
        """Collect the warnings about each source.

        Each warning starts with the name of the source's split.
        """
        return [f"{split}: {text}" for split, part in self.sources() for text in warn(part)]

    def _warn_bad_rows(self, part: SourceTokens) -> Iterator[str]:
        """Yield a warning about rows that are skipped because they cannot be read."""
        counts = part.counts
        if not counts.bad:
            return
        first, what = counts.bad_rows[0]
        yield (
            f"left out by data.bad_rows=skip: {counts.bad:,} of {count_of(counts.rows, 'row')},"
            f" first {part.rows.where(first)}: {what}; fix: correct these rows, which"
            " `tunesmith data --json` lists"
        )

    def _warn_unread(self, part: SourceTokens) -> Iterator[str]:
        """Yield warnings about columns and message keys that may be important but are not read.

        Warnings about columns that may rate the answers come first.
        """
        names = []
        columns = part.source.columns.values() if part.source else ()
        unread = sorted(part.counts.unread.items(), key=lambda entry: not rates_answers(entry[0]))
        for name, (count, first) in unread:
            if name == "rejected" and "chosen" in columns:
                # a recipe that maps the chosen answers leaves out the rejected answers on purpose
                continue
            if plain(name) in SPLIT_COLUMNS and count == part.counts.rows:
                # The column contains the name of a split, and all rows of the file belong to the
                # chosen split.
                continue
            some = f" in {count_of(count, 'row')} (first {part.rows.where(first)})"
            names.append(name + some * (count < part.counts.rows))
        if names:
            yield (
                f"training does not read {', '.join(names)}; fix: map the columns with `columns`,"
                " or delete the information that is not needed"
            )

    def _warn_control_tokens(self, part: SourceTokens) -> Iterator[str]:
        """Yield a warning about special tokens in the text of rows."""
        if self.run.data.template == "raw":
            return  # raw texts contain their special tokens on purpose
        tokens = []
        for token, (count, first) in part.counts.control_tokens.items():
            # Do not warn about tokens of `model.added_tokens`, because they are expected in the
            # rows.
            if token not in self.run.model.added_tokens:
                where = part.rows.where(first)
                tokens.append(f"{token} in {count_of(count, 'row')} (first {where})")
        if tokens:
            yield (
                "the text of rows contains special tokens of the tokenizer:"
                f" {', '.join(tokens)}. The model sees such a text as a control token, which may"
                " end the turn or begin another; fix: remove it from the rows, or put a space"
                " into it"
            )

    def _warn_lost_tokens(self, part: SourceTokens) -> Iterator[str]:
        """Yield a warning if too many tokens of a source are lost in truncated or dropped rows."""
        counts = part.counts
        if counts.lost_share <= MAX_LOST_TOKENS_SHARE:
            return
        left_out = counts.dropped + counts.emptied
        lost = []
        if left_out:
            lost.append(f"{count_of(left_out, 'row')} dropped")
        if counts.cut:
            lost.append(f"{count_of(counts.cut, 'row')} truncated")
        fixes = []
        if part.source is not None and part.source.format == "text":
            fixes.append("set data.too_long=auto, which splits texts")
        seq_len = self.run.data.seq_len
        for length in dict.fromkeys((counts.longest_of_99, counts.longest)):
            if seq_len < length <= (self.position_limit or length):
                fixes.append(f"set data.seq_len={length}")
        if not fixes:
            fixes.append("shorten or split these rows: the model does not support longer rows")
        yield (
            f"{_percent(counts.lost_share)} of the tokens of {relative_to_cwd(counts.source)} are "
            f"lost: {' and '.join(lost)} at data.seq_len {seq_len:,}; fix: {', or '.join(fixes)}"
        )

    def _warn_flaws(self, part: SourceTokens) -> Iterator[str]:
        for name, (count, first) in part.counts.flaws.items():
            # Skip the warning "joined" if the recipe sets `data.template: raw`, because joining the
            # texts is then intended.
            if name != "joined" or self.run.data.template == "auto":
                warning = ROW_WARNINGS[name]
                what = f"{count:,} of {count_of(part.counts.rows, 'row')} with {warning.what}"
                yield f"{what}, first {part.rows.where(first)}: {warning.why}; fix: {warning.fix}"


def _left_out(part: SourceTokens) -> Iterator[str]:
    """Yield texts with the number of rows of a source that are left out, and the reason."""
    counts = part.counts
    # If fewer rows were read than are available, a recipe key selects a part of the rows.
    read = counts.kept_rows + counts.dropped + counts.emptied
    if read < counts.available and counts.taken:
        yield counts.taken
    if counts.bad:
        yield f"{counts.bad:,} that cannot be read (data.bad_rows: skip)"
    if counts.dropped:
        yield f"{counts.dropped:,} dropped (data.too_long: {part.too_long})"
    if counts.emptied:
        yield f"{counts.emptied:,} dropped because truncation left no supervised token"


def _percent(share: float) -> str:
    """Format a fraction as a percentage. A value above 0 is never shown as 0."""
    return "less than 0.1%" if share < 0.001 else f"{share:.1%}"


def _describe_repeats(repeats: Repeats, total: int, what: str) -> str:
    first = f"{repeats.where} ({repeats.earlier})"
    return f"{repeats.count:,} of {total:,} {what}; first {first}"


def prepare_data(
    run: Run,
    tokenizer: "PreTrainedTokenizerBase",
    eos_ids: Collection[int],
    vocab_size: int,
    *,
    cache: Path | None = None,
    strict: bool = True,
    cut_answers: CutAnswers = "refuse",
    position_limit: int | None = None,
    shares_prompts: bool = False,
    pictures: "PictureProcessor | None" = None,
) -> TrainingData:
    """Read, tokenize and check the rows of a recipe.

    Args:
        eos_ids: ids that end a turn, from the model's generation config.
        vocab_size: number of rows of the model's embedding.
        cache: folder of the token cache. If None, the folder `tokens` in tunesmith's cache folder.
        strict: whether a broken token contract raises DataError. If False, the caller must check
            `contracts`.
        cut_answers: what happens if many training rows have a truncated answer, see `check_tokens`.
            `data.allow_cut_answers` overrides this argument.
        position_limit: maximum sequence length of the model, or None if it has no limit.
        shares_prompts: see `TokenSet`.
        pictures: see `Template`.

    Raises:
        DataError: a source or a row is invalid, or the contract is broken.
    """
    data = run.data
    cache = cache or cache_folder("tokens")
    template = select_template(data, tokenizer, eos_ids, pictures)
    splits = read_checked_splits(data, run.train.seed)
    across: list[list[int]] = []
    if data.validation:
        across = check_across(splits.validation, splits.train)
    sides = {"train": splits.train}
    if splits.validation:
        sides["validation"] = splits.validation
    token_sets = tokenize_sides(sides, data, template, cache=cache)
    if pictures is not None:
        reader = PixelReader(pictures)
        for tokens in token_sets.values():
            tokens.pictures = reader
    train = token_sets["train"]
    validation = token_sets.get("validation")
    validation_digest = None
    if data.allow_cut_answers:
        cut_answers = "accept"
    checked = [("train", train, cut_answers)]
    if validation is not None:
        validation_digest = validation.counts.digest
        if run.validate.max_examples is not None:
            validation = validation.first(run.validate.max_examples)
        # The model does not learn from validation rows, so a warning about truncated answers is
        # enough.
        for_validation: CutAnswers = "accept" if cut_answers == "accept" else "warn"
        checked.append(("validation", validation, for_validation))
    contracts = []
    for split, tokens, cut in checked:
        contract = check_tokens(
            tokens,
            template,
            vocab_size=vocab_size,
            split=split,
            cut_answers=cut,
            position_limit=position_limit,
        )
        contracts.append(contract)
        tokens.shares_prompts = shares_prompts
    if strict:
        for contract in contracts:
            contract.raise_if_broken()
        _check_labels(train)
    schedule = _make_schedule(run, train)
    duplicates = find_repeats(train)
    overlap = Repeats()
    if validation is not None:
        overlap = find_repeats(validation, train)
    return TrainingData(
        run=run,
        train=train,
        validation=validation,
        template=template,
        schedule=schedule,
        contracts=tuple(contracts),
        duplicates=duplicates,
        overlap=overlap,
        splits=splits,
        across=tuple(map(tuple, across)),
        validation_digest=validation_digest,
        position_limit=position_limit,
    )


def find_trained_rows(
    tokens: TokenSet, trained: Run, data: Data, template: Template
) -> tuple[Repeats | None, str]:
    """Find the examples of `tokens` on which a run, or a run that it continues, was trained.

    For pairs, only the chosen answers are compared.

    Return the found examples, and the reason why some training rows are unknown, such as a deleted
    file. The reason is empty if all rows are known. If there is a reason and no example was found,
    the first value is None.

    Args:
        trained: the recipe of the run.
        data: settings for the tokenization. They must be the settings with which `tokens` was made.
    """
    parts: list[SourceTokens] = []
    runs, fault = with_earlier_runs(trained)
    for run in runs:
        try:
            rows, _ = read_splits(replace(run.data, validation=()), run.train.seed)
            cache = cache_folder("tokens")
            parts += tokenize(rows, data, template, cache=cache, what="train").parts
        except TunesmithError as error:
            fault = f"{error.what} ({error.where})" if error.where else error.what
        except OSError as error:
            fault = first_line(error)
    seen = Repeats()
    if parts:
        seen = find_repeats(tokens, TokenSet(parts), chosen=True)
    if fault and not seen.count:
        return None, fault
    return seen, fault


def _check_labels(train: TokenSet) -> None:
    """Raise DataError if all answers have the same label. KTO requires good and bad answers."""
    labels: set[int] = set()
    for part in train.parts:
        labels.update(np.unique(part.arrays.labels).tolist())
    if labels in ({0}, {1}):
        kind = "good" if labels == {1} else "bad"
        raise DataError(
            f"every answer has the label {kind}; the data has {count_of(len(train), 'answer')}",
            where=train.counts.source,
            why="kto needs both good and bad answers",
            fix="add answers with the other label; or train on good answers only with method: sft",
        )


def _make_schedule(run: Run, train: TokenSet) -> BatchSchedule:
    """Build the batch schedule of a run.

    Raise DataError if an epoch has no examples, or more examples than can be shuffled in memory.
    """
    examples = float(train.repeats.sum())
    if BYTES_PER_EXAMPLE * examples > available_memory():
        raise DataError(
            f"an epoch would have {examples:,.0f} examples because of the weights in data.train",
            where="data.train",
            why="the memory is too small to shuffle so many examples",
            fix="use lower weights (data.train.weight); the default is 1",
        )
    schedule = BatchSchedule.of(run, train)
    if len(train) and schedule.steps_per_epoch(0) == 0:
        weights = ", ".join(str(source.weight) for source in run.data.train)
        raise DataError(
            "an epoch would have no examples because of the weights in data.train",
            where="data.train",
            why=f"{count_of(len(train), 'example')} with weights {weights}",
            fix="raise the weights (data.train.weight)",
        )
    return schedule
