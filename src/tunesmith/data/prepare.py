"""A recipe's data, ready to train on: template, tokens, contract and schedule.

`train` and `data` both start here.
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
from tunesmith.host.files import cache_folder, from_here
from tunesmith.host.memory import available_memory
from tunesmith.run_dir import HELD_OUT, with_earlier_runs
from tunesmith.units import count_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.data.text.placeholders import PictureProcessor

# Of a source's tokens; where more are lost, a warning says so.
MOST_LOST_TOKENS = 0.01
# Memory to order an epoch: indices, random keys and their sort take 8 bytes an example each.
BYTES_PER_EXAMPLE = 32


@dataclass(frozen=True)
class TrainingData:
    """The data of a run as training needs it.

    Attributes:
        validation: None where the recipe names none.
        duplicates: training examples that repeat an earlier one.
        overlap: validation examples that are trained on too.
        splits: the rows that all of it is made of, and what was found in them.
        across: pairs of a row of `data.validation` and one of `data.train` that are
            near-duplicates, by their indices over all sources of either.
        validation_digest: sha256 (hex) of all validation examples, also of those that
            `validate.max_examples` leaves out.
        position_limit: the model's longest sequence, where it has one.
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
        """The same where all of the first `steps` steps are full.

        Each example comes several times in an epoch if need be.
        """
        schedule = self.schedule
        repeats = self.train.repeats
        while schedule.ends_short and schedule.steps_per_epoch(0) <= steps:
            repeats = repeats * 2
            schedule = BatchSchedule.of(self.run, self.train, repeats)
        return replace(self, schedule=schedule)

    def sources(self) -> list[tuple[str, SourceTokens]]:
        """Each source with its split, `train` or `validation`."""
        sources = [("train", part) for part in self.train.parts]
        if self.validation is not None:
            sources += [("validation", part) for part in self.validation.parts]
        return sources

    def describe(self, *, why: bool = False) -> str:
        """Lines for the user: which rows are trained on, what was left out, how many steps.

        With `why` also the template, which is always shown where rows are not a chat or the model
        has none, and what was checked.
        """
        lines = []
        # A base has no template of its own: its prompt is our choice.
        is_chosen = self.run.data.template == "auto" and self.template.name == "alpaca"
        if why or self.template.raw or is_chosen:
            lines.append(self.template.describe())
        for split, part in self.sources():
            figures = ", ".join(self.figures(part))
            lines.append(f"{split}: {from_here(part.counts.source)}: {figures}")
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
        """A line for each split: how many rules its tokens passed, how many rows were looked at,
        and what the rules noted."""
        lines = []
        for contract in self.contracts:
            # The most that a rule checked of each kind of thing, as rows or tokens.
            counts: dict[str, int] = {}
            for check in contract.checks:
                counts[check.of] = max(check.checked, counts.get(check.of, 0))
            things = ", ".join(count_of(count, kind) for kind, count in counts.items())
            count = count_of(len(contract.checks), "check")
            if contract.broken:
                count = f"{len(contract.checks) - len(contract.broken)} of {count}"
            line = f"token contract of {contract.split}: passed {count} of {things}"
            notes = [check.note for check in contract.checks if check.note and not check.broken]
            lines.append("; ".join([line, *notes]))
        return lines

    def describe_held_out(self) -> str:
        """A line for the user: what it means that rows are held out, and where they are listed."""
        assert self.validation is not None
        count = count_of(self.validation.counts.kept_rows, "held-out row")
        if self.run.validate.max_examples is not None:
            count = "held-out rows"  # more than those that are measured
        listed = from_here(Path(self.run.output_dir) / HELD_OUT)
        return (
            f"this run does not train on the {count} (listed in {listed}); "
            "data.hold_out=null trains on all rows"
        )

    def figures(self, part: SourceTokens) -> list[str]:
        """Describe what one source gives, and what of it is left out and why."""
        counts = part.counts
        left_out = _left_out(part)
        rows = f"{counts.kept_rows:,} of {count_of(counts.available, 'row')}"
        if left_out:
            rows += f" ({', '.join(left_out)})"
        supervised = counts.supervised / max(1, counts.tokens)

        figures = [rows]
        if part.weight != 1:
            figures.append(f"weight {part.weight:g}")
        figures.append(f"{count_of(counts.tokens, 'token')}, {supervised:.1%} supervised")
        if counts.split:
            parts = counts.kept - counts.kept_rows + counts.split
            figures.append(f"{counts.split:,} split into {parts:,} (data.seq_len)")
        if counts.cut:
            figures.append(f"{counts.cut:,} cut (data.too_long: {part.too_long})")
        if counts.lost_share:
            figures.append(f"{_percent(counts.lost_share)} of the tokens lost")
        if "empty" in counts.flaws:
            figures.append(f"{counts.flaws['empty'][0]:,} with an empty answer")
        figures.append(f"longest {count_of(counts.longest, 'token')}")
        if counts.pictures:
            all_tokens = counts.tokens + counts.cut_tokens + counts.dropped_tokens
            share = f"{counts.placeholders / all_tokens:.1%} of the tokens"
            figures.append(f"{count_of(counts.pictures, 'picture')}, {share}")
            figures.append(f"{counts.placeholders / counts.pictures:,.0f} tokens a picture")
        if counts.scaled_pictures:
            limit = f"data.image_max_pixels: {self.run.data.image_max_pixels}"
            figures.append(f"{counts.scaled_pictures:,} of them scaled down ({limit})")
        return figures

    def describe_schedule(self) -> str:
        """A line for the user: how many optimizer steps, and of which examples."""
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
            f"steps: {steps}; an epoch has {summary.steps_per_epoch:,}: "
            f"{examples} in {rows}, {summary.fill:.1%} filled"
        )

    def warnings(self) -> list[str]:
        """List what is valid but seldom meant, each with its fix."""
        train = self.run.train
        warnings = self._few_steps_warnings()
        warnings += describe_long_warmup(train, self.schedule.steps(train.duration))
        for contract in self.contracts:
            warnings += [f"{contract.split}: {text}" for text in contract.warnings]
        for tell in (self._tell_bad_rows, self._tell_unread, self._tell_control_tokens):
            warnings += self._of_sources(tell)
        if self.template.pictures is not None and not self.train.counts.pictures:
            warnings.append(
                "model.vision is true, and no row has a picture; fix: model.vision=false, or name"
                " the column of the pictures, such as columns: {images: COLUMN}"
            )
        # Rows that are held out are of the same folder.
        warnings += dict.fromkeys(
            f"files in {from_here(part.counts.source)} are not read: {part.rows.skipped}"
            for _, part in self.sources()
            if part.rows.skipped
        )
        warnings += self._of_sources(self._tell_lost_tokens)
        warnings += self._of_sources(self._tell_flaws)
        # Most of them are repeated rows, which have their line below.
        if self.duplicates.count > count_repeating(self.splits):
            what = "training examples are duplicates"
            text = _describe_repeats(self.duplicates, len(self.train), what)
            warnings.append(f"{text}; fix: delete them, or 'data.leave_out=[near-duplicates]'")
        if self.overlap.count and self.validation is not None:
            what = (
                "validation examples are also in the training data, so val_loss is too optimistic"
            )
            text = _describe_repeats(self.overlap, len(self.validation), what)
            warnings.append(
                f"{text}; fix: splits that share no row, such as train[:95%] and train[95%:];"
                " or delete the duplicates"
            )
        warnings += row_warnings_of(self.splits, self.across)
        return [f"warning: {text}" for text in warnings]

    def _few_steps_warnings(self) -> list[str]:
        steps = self.schedule.steps(self.run.train.duration)
        steps_per_epoch = self.schedule.steps_per_epoch(0)
        if steps is None or steps >= FEW_STEPS or not steps_per_epoch:
            return []
        if self.run.adapter.from_ is not None:
            return []  # an adapter that is continued has learned before
        only = f"only {count_of(steps, 'optimizer step')}"
        fix = f'train.duration="{math.ceil(FEW_STEPS / steps_per_epoch)} epochs"'
        return [f"{only}: a model hardly changes in fewer than {FEW_STEPS}; fix: {fix}"]

    def _of_sources(self, tell: Callable[[SourceTokens], Iterator[str]]) -> list[str]:
        """Collect the lines about each source, behind its split."""
        return [f"{split}: {text}" for split, part in self.sources() for text in tell(part)]

    def _tell_bad_rows(self, part: SourceTokens) -> Iterator[str]:
        """The rows that are left out because they cannot be read."""
        counts = part.counts
        if not counts.bad:
            return
        first, what = counts.bad_rows[0]
        yield (
            f"left out by data.bad_rows=skip: {counts.bad:,} of {count_of(counts.rows, 'row')},"
            f" first {part.rows.where(first)}: {what}; fix: fix these rows, which"
            " `tunesmith data --json` lists"
        )

    def _tell_unread(self, part: SourceTokens) -> Iterator[str]:
        """Yield warnings about columns, and keys of turns, that nothing reads and that may matter.

        Columns that may rate the answers come first.
        """
        names = []
        columns = part.source.columns.values() if part.source else ()
        unread = sorted(part.counts.unread.items(), key=lambda entry: not rates_answers(entry[0]))
        for name, (count, first) in unread:
            if name == "rejected" and "chosen" in columns:
                continue  # who names the chosen answers leaves out the others
            if plain(name) in SPLIT_COLUMNS and count == part.counts.rows:
                continue  # a file of one split was chosen for it
            some = f" in {count_of(count, 'row')} (first {part.rows.where(first)})"
            names.append(name + some * (count < part.counts.rows))
        if names:
            yield (
                f"nothing reads {', '.join(names)}: if one changes what is to be learned, it is"
                " lost; fix: map a column by columns, or delete what is not needed"
            )

    def _tell_control_tokens(self, part: SourceTokens) -> Iterator[str]:
        """Special tokens that rows spell in their own text."""
        if self.run.data.template == "raw":
            return  # the recipe asks for texts that hold their own
        tokens = []
        for token, (count, first) in part.counts.control_tokens.items():
            # Tokens that the recipe adds are for the rows to use.
            if token not in self.run.model.added_tokens:
                where = part.rows.where(first)
                tokens.append(f"{token} in {count_of(count, 'row')} (first {where})")
        if tokens:
            yield (
                "the text of a row contains special tokens of the tokenizer:"
                f" {', '.join(tokens)}: the model sees the control token, which may end the turn or"
                " begin another, and not its characters; fix: remove it from the text, or put a"
                " space into it"
            )

    def _tell_lost_tokens(self, part: SourceTokens) -> Iterator[str]:
        """More than a few tokens that are not trained on."""
        counts = part.counts
        if counts.lost_share <= MOST_LOST_TOKENS:
            return
        left_out = counts.dropped + counts.emptied
        lost = []
        if left_out:
            lost.append(f"{count_of(left_out, 'row')} dropped")
        if counts.cut:
            lost.append(f"{count_of(counts.cut, 'row')} cut")
        fixes = []
        if part.source is not None and part.source.format == "text":
            fixes.append("data.too_long=auto, which splits text")
        seq_len = self.run.data.seq_len
        for length in dict.fromkeys((counts.longest_of_99, counts.longest)):
            if seq_len < length <= (self.position_limit or length):
                fixes.append(f"data.seq_len={length}")
        if not fixes:
            fixes.append("shorten or split these rows: the model takes no longer ones")
        yield (
            f"{_percent(counts.lost_share)} of the tokens of {from_here(counts.source)} are lost:"
            f" {' and '.join(lost)} at data.seq_len {seq_len:,}; fix: {', or '.join(fixes)}"
        )

    def _tell_flaws(self, part: SourceTokens) -> Iterator[str]:
        for name, (count, first) in part.counts.flaws.items():
            # Without a template the texts are joined as the recipe asks.
            if name != "joined" or self.run.data.template == "auto":
                warning = ROW_WARNINGS[name]
                what = f"{count:,} of {count_of(part.counts.rows, 'row')} with {warning.what}"
                yield f"{what}, first {part.rows.where(first)}: {warning.why}; fix: {warning.fix}"


def _left_out(part: SourceTokens) -> list[str]:
    """Describe the rows of a source that are left out, and why."""
    counts = part.counts
    left_out = []
    # Rows that a key of the recipe left out before tokenization.
    read = counts.kept_rows + counts.dropped + counts.emptied
    if read < counts.available and counts.taken:
        left_out.append(counts.taken)
    if counts.bad:
        left_out.append(f"{counts.bad:,} that cannot be read (data.bad_rows: skip)")
    if counts.dropped:
        left_out.append(f"{counts.dropped:,} dropped (data.too_long: {part.too_long})")
    if counts.emptied:
        left_out.append(f"{counts.emptied:,} dropped because truncation left no supervised token")
    return left_out


def _percent(share: float) -> str:
    """A share as words; one that is not 0 is never shown as 0."""
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
        eos_ids: ids that end a turn, by the model's generation config.
        vocab_size: entries of the model's embedding.
        cache: folder of the token cache; None takes `tokens` in the cache folder.
        strict: raise on a broken contract; False leaves it to the caller to look at `contracts`.
        cut_answers: as for `check_tokens`, of the training rows; `data.allow_cut_answers` accepts
            them in any case.
        position_limit: the model's longest sequence, where it has one.
        shares_prompts: as of `TokenSet`.
        pictures: as of `Template`.

    Raises:
        DataError: a source, a row or the contract is broken.
    """
    cache = cache or cache_folder("tokens")
    template = select_template(run.data, tokenizer, eos_ids, pictures)
    splits = read_checked_splits(run.data, run.train.seed)
    across: list[list[int]] = []
    if run.data.validation:
        across = check_across(splits.validation, splits.train)
    sides = {"train": splits.train}
    if splits.validation:
        sides["validation"] = splits.validation
    token_sets = tokenize_sides(sides, run.data, template, cache=cache)
    if pictures is not None:
        reader = PixelReader(pictures)
        for tokens in token_sets.values():
            tokens.pictures = reader
    train = token_sets["train"]
    validation = token_sets.get("validation")
    validation_digest = None
    if run.data.allow_cut_answers:
        cut_answers = "accept"
    checked = [("train", train, cut_answers)]
    if validation is not None:
        validation_digest = validation.counts.digest
        if run.validate.max_examples is not None:
            validation = validation.first(run.validate.max_examples)
        # Nothing is learned from these: a warning will do.
        checked.append(("validation", validation, "accept" if cut_answers == "accept" else "warn"))
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
    overlap = Repeats() if validation is None else find_repeats(validation, train)
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
    """The examples of `tokens` that a run was trained on, or one that it continues; and why not all
    of that is known: None where no example was found by what is.

    The training rows are read again, and may be gone. Of a pair the chosen answer is compared.

    Args:
        trained: the recipe of that run.
        data: how rows become tokens, as for `tokenize`; those of `tokens` did so too.
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
    seen = find_repeats(tokens, TokenSet(parts), chosen=True) if parts else Repeats()
    return None if fault and not seen.count else seen, fault


def _check_labels(train: TokenSet) -> None:
    """DataError where all answers have one label: a method learns what tells them apart."""
    labels: set[int] = set()
    for part in train.parts:
        labels.update(np.unique(part.arrays.labels).tolist())
    if labels in ({0}, {1}):
        kind = "good" if labels == {1} else "bad"
        raise DataError(
            f"each answer is labeled {kind}: {count_of(len(train), 'answer')}",
            where=train.counts.source,
            why="kto needs both good and bad answers",
            fix="add answers with the other label; or train on good ones only with method: sft",
        )


def _make_schedule(run: Run, train: TokenSet) -> BatchSchedule:
    """The schedule; DataError where an epoch is empty, or too long to be ordered in memory."""
    examples = float(train.repeats.sum())
    if BYTES_PER_EXAMPLE * examples > available_memory():
        raise DataError(
            f"the weights of the sources make {examples:,.0f} examples an epoch",
            where="data.train",
            why="they are more than memory can order",
            fix="lower weight, to 1 where it is not needed",
        )
    schedule = BatchSchedule.of(run, train)
    if len(train) and schedule.steps_per_epoch(0) == 0:
        weights = ", ".join(str(source.weight) for source in run.data.train)
        raise DataError(
            "the weights of the sources leave no example in an epoch",
            where="data.train",
            why=f"{count_of(len(train), 'example')} with weights {weights}",
            fix="raise weight",
        )
    return schedule
