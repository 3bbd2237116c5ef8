"""Text about the data of a run, for the start of a training and for the command `data`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.config.schema import FEW_STEPS, Train
from tunesmith.host.files import relative_to_cwd
from tunesmith.rows.columns import plain
from tunesmith.rows.compare.row_checks import place
from tunesmith.rows.compare.splits import SourceRows, Splits
from tunesmith.rows.formats import SPLIT_COLUMNS
from tunesmith.rows.source.open_source import is_local
from tunesmith.rows.source.table import Rows
from tunesmith.run_dir import HELD_OUT
from tunesmith.tokens.contract import Contract
from tunesmith.tokens.text import builtin_templates
from tunesmith.tokens.text.row_warnings import ROW_WARNINGS
from tunesmith.tokens.text.template import Template, title_of
from tunesmith.tokens.text.template_args import split_arguments
from tunesmith.tokens.token_set import RowsByName, SourceTokens, TokenSet
from tunesmith.units import ceil_div, count_of

if TYPE_CHECKING:
    # Import only for type checks: it imports Transformers, which is slow and which a plan does not
    # need.
    from tunesmith.batches.training_data import TrainingData
    from tunesmith.checkpoint.resume import Resumed

# Maximum fraction of a source's tokens that can be lost without a warning. Tokens are lost if rows
# are truncated or dropped.
MAX_LOST_TOKENS_SHARE = 0.01
# Maximum number of row locations (`file:line`) in a line of text.
SHOWN_PLACES = 1
# Fraction of the validation rows that must be usable. If fewer are, a warning is shown.
MIN_VALIDATION_FRACTION = 0.5
# Number of bars in the histogram of lengths, and the length of the longest bar in columns.
_BARS = 16
_BAR_COLUMNS = 40


def start_data_lines(data: TrainingData, *, why: bool = False) -> Iterator[str]:
    """Yield lines about the rows that are trained on, the rows that are left out, and the steps.

    If `why` is True, the lines include the template and the results of the checks. The template
    is also shown if no chat template is used, or if tunesmith has chosen the alpaca template.
    """
    # Whether tunesmith has chosen the alpaca template, because the model has no chat template.
    is_chosen = data.run.data.template == "auto" and data.template.name == "alpaca"
    if why or data.template.raw or is_chosen:
        yield template_line(data.template)
    for split, part in data.sources():
        figures = ", ".join(source_figures(data, split, part))
        yield f"{split}: {relative_to_cwd(part.counts.source)}: {figures}"
    yield from layout_lines(part.rows for _, part in data.sources())
    yield from left_out_lines(data.splits)
    if data.run.data.hold_out and data.validation is not None:
        listed = relative_to_cwd(Path(data.run.output_dir) / HELD_OUT)
        yield f"{listed} lists the held-out rows; to train on all rows, set data.hold_out=null"
    yield schedule_line(data)
    if why:
        yield from contract_lines(data.contracts)


def resume_lines(resumed: Resumed | None, train: Train) -> Iterator[str]:
    """Yield lines about a resumed run: its first step and its new duration."""
    if resumed is None:
        return
    yield f"resuming from step {resumed.step:,} of {resumed.end}, {resumed.checkpoint}"
    if resumed.has_new_duration:
        yield f"train.duration: {resumed.previous_duration} -> {resumed.duration}"
        if train.schedule != "constant":
            yield f"the learning rate may jump, because its schedule now spans {resumed.duration}"


def data_lines(data: TrainingData) -> Iterator[str]:
    """Yield the lines of the command `data`: counts, lengths, packing and checks."""
    yield template_line(data.template)
    for split, part in data.sources():
        name = part.counts.source
        yield f"{split}: {Path(name).name if is_local(name) else name}"
        yield from (f"  {figure}" for figure in source_figures(data, split, part))
    yield "tokens per example:"
    bars = histogram(data.train)
    largest = max((count for _, _, count in bars), default=0)
    for low, high, count in bars:
        if count:
            # Round up, so that even a few examples have a visible bar.
            bar = "█" * ceil_div(_BAR_COLUMNS * count, largest)
            yield f"  {low:>7,} - {high:<7,} {count:>9,}  {bar}"
    yield from left_out_lines(data.splits)
    yield schedule_line(data)
    yield from data_warnings(data)
    for contract in data.contracts:
        for check in contract.broken:
            broken = f"{check.broken:,} of {count_of(check.checked, check.of)}"
            yield f"BROKEN, {contract.split}: {check.name}: {broken}, first in {check.where}"
            yield f"  {check.why}"
            yield f"  fix: {check.fix}"
    yield from contract_lines(data.contracts)


def histogram(tokens: TokenSet) -> list[tuple[int, int, int]]:
    """Count the examples by their length in tokens, in intervals of equal width.

    Returns:
        Tuples of the minimum length, the maximum length and the number of examples.
    """
    if not len(tokens.lengths):
        return []
    first = int(tokens.lengths.min())
    last = int(tokens.lengths.max())
    step = ceil_div(last - first + 1, _BARS)
    return [
        (first + k * step, min(first + (k + 1) * step - 1, last), count)
        for k, count in enumerate(np.bincount((tokens.lengths - first) // step).tolist())
    ]


def template_line(template: Template) -> str:
    """Return one line with the template, the end tokens and the kind of loss mask."""
    decode = template.tokenizer.decode
    raw_end = repr(decode([template.raw_end]))
    if template.chat is None:
        return (
            "raw: no template; prompt and completion joined without a template; each row ends "
            f"with {raw_end}"
        )
    if template.name == "text":
        return f"text: rows as they are; each ends with {raw_end}"
    parts = [f"{template.name}: {title_of(template.name)}"]
    if builtin_templates.HERMES in (template.jinja or ""):
        parts.append("tool calls in Hermes' form (plain ChatML has none)")
    arguments, _ = split_arguments(template.jinja or "")
    for argument, value in arguments.items():
        parts.append(f"its argument {argument} is {json.dumps(value)}, also in the saved template")
    if template.has_fixed_date:
        parts.append(
            f"its date is fixed at {builtin_templates.DATE:%d %b %Y}, for all starts and in the "
            "saved template"
            " (data.template_args.strftime_now sets another date)"
        )
    ends = [repr(decode([id_])) for id_ in sorted(template.end_ids)]
    parts.append(f"answers end with {', '.join(ends)}")
    if template.chat.ends.earlier:
        earlier = ", ".join(map(repr, template.chat.ends.earlier))
        parts.append(f"earlier answers end with {earlier}, which is not supervised")
    blocks = "its {% generation %} blocks"
    parts.append(f"answers are located by {blocks if template.chat.tagged else 'rendering'}")
    return "; ".join(parts)


def source_figures(data: TrainingData, split: str, part: SourceTokens) -> Iterator[str]:
    """Yield texts with the counts of rows, tokens and pictures of one source.

    Dropped rows are counted separately, with the reason.
    """
    counts = part.counts
    reasons = {
        "that cannot be read (data.bad_rows: skip)": counts.bad,
        f"dropped (data.too_long: {part.too_long})": counts.dropped,
        "dropped because truncation left no supervised token": counts.emptied,
    }
    left_out = [f"{count:,} {why}" for why, count in reasons.items() if count]
    rows = count_of(counts.kept_rows, "held-out row")
    if split != "validation" or data.run.data.hold_out is None:
        rows = f"{counts.kept_rows:,} of {count_of(counts.available, 'row')}"
        # If fewer rows were read than are available, a recipe key selects a part of the rows.
        if counts.kept_rows + counts.dropped + counts.emptied < counts.available and counts.taken:
            left_out.insert(0, counts.taken)
    yield f"{rows} ({', '.join(left_out)})" if left_out else rows
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
        yield f"{counts.lost_share:.2%} of the tokens lost"
    yield f"longest {count_of(counts.longest, 'token')}"
    if counts.pictures:
        share = counts.placeholders / (counts.tokens + counts.cut_tokens + counts.dropped_tokens)
        yield f"{count_of(counts.pictures, 'picture')}, {share:.1%} of the tokens"
    if counts.scaled_pictures:
        yield (
            f"{counts.scaled_pictures:,} of them scaled down (data.image_max_pixels: "
            f"{data.run.data.image_max_pixels})"
        )


def layout_lines(sources: Iterable[Rows]) -> list[str]:
    """Return lines with the detected form of the files, such as the separator of a CSV file."""
    lines = [f"{relative_to_cwd(rows.name)}: {rows.layout}" for rows in sources if rows.layout]
    # Remove repeated lines, because training and validation rows can come from the same source.
    return list(dict.fromkeys(lines))


def left_out_lines(splits: Splits) -> Iterator[str]:
    """Yield lines about the rows that `data.leave_out` removes or that were not compared."""
    for fault, rows in splits.left_out.items():
        line = f"{count_of(len(rows), 'row')} left out by data.leave_out ({fault})"
        if rows:
            places = [place(splits.sources, row) for row in rows[:SHOWN_PLACES]]
            line += f", first {', '.join(places)}"
        yield line
    findings = splits.findings
    if findings.compared < findings.rows:
        yield f"only {findings.compared:,} of {findings.rows:,} rows are compared, evenly spaced"


def schedule_line(data: TrainingData) -> str:
    """Return a line with the number of optimizer steps and the number of examples per epoch."""
    duration = data.run.train.duration
    summary = data.schedule.summary(duration)
    steps = f"as many as fit in {duration}"
    if summary.steps is not None:
        steps = f"{summary.steps:,}"
        if duration.unit != "steps":
            # `1 epoch` instead of the recipe's `1 epochs`
            steps += f", {duration}".removesuffix("s" if duration.amount == 1 else "")
    if data.run.samples_answers:
        method = data.run.method
        prompts = count_of(data.run.train.global_batch.amount, "prompt")
        return (
            f"steps: {steps}; each step takes {prompts} and samples {method.group} answers of up "
            f"to {count_of(method.answer_tokens, 'token')} to each; an epoch has "
            f"{count_of(summary.steps_per_epoch, 'step')}"
        )
    rows = count_of(summary.rows, "row")
    if data.schedule.packed:
        rows = count_of(summary.rows, "packed row") + f" of {data.schedule.row_length:,} tokens"
    examples = count_of(summary.examples, "example")
    return (
        f"steps: {steps}; an epoch has {count_of(summary.steps_per_epoch, 'step')}: "
        f"{examples} in {rows}, {summary.fill:.1%} filled"
    )


def contract_lines(contracts: Iterable[Contract]) -> list[str]:
    """Return a line with the results of the token contract for each split.

    The line contains the number of passed rules, the number of checked rows, and the notes of
    the rules.
    """
    lines = []
    for contract in contracts:
        checks = contract.checks
        # Kind of item, such as "row" -> the largest number of these items that a rule has checked.
        counts: dict[str, int] = {}
        notes = []
        for check in checks:
            counts[check.of] = max(check.checked, counts.get(check.of, 0))
            if check.note and not check.broken:
                notes.append(check.note)
        things = ", ".join(count_of(count, kind) for kind, count in counts.items())
        passed = len(checks) - len(contract.broken)
        result = f"passed {passed} of {count_of(len(checks), 'check')} of {things}"
        if "answer" in counts and not contract.broken:
            answers = count_of(counts["answer"], "answer")
            result = f"the loss covers exactly the {answers} ({passed} checks passed: {things})"
        lines.append("; ".join([f"token contract of {contract.split}: {result}", *notes]))
    return lines


def data_warnings(data: TrainingData) -> list[str]:
    """Return warnings about valid but rarely intended data, each with its fix."""
    texts = [text for warn in DATA_WARNINGS for text in warn(data)]
    texts += row_warnings_of(data.splits, data.across)
    return [f"warning: {text}" for text in texts]


def _sum_rows(
    data: TrainingData, counts_of: Callable[[SourceTokens], RowsByName]
) -> dict[str, tuple[int, str]]:
    """Return the number of rows by name in all sources, and the location of the first row.

    Args:
        counts_of: returns the rows of one source by name.
    """
    found: dict[str, tuple[int, str]] = {}
    for _, part in data.sources():
        for name, (count, first) in counts_of(part).items():
            earlier, where = found.get(name, (0, part.rows.where(first)))
            found[name] = (earlier + count, where)
    return found


def _all_rows(data: TrainingData) -> int:
    """Return the number of rows that were read from all sources."""
    return sum(part.counts.rows for _, part in data.sources())


def _few_steps(data: TrainingData) -> Iterator[str]:
    train = data.run.train
    steps = data.schedule.steps(train.duration)
    steps_per_epoch = data.schedule.steps_per_epoch(0)
    # An adapter that was trained before may need few steps only.
    is_new = data.run.adapter.from_ is None
    if is_new and steps is not None and steps < FEW_STEPS and steps_per_epoch:
        only = f"the run has only {count_of(steps, 'optimizer step')}"
        fix = f'set train.duration="{math.ceil(FEW_STEPS / steps_per_epoch)} epochs"'
        yield f"{only}, but a model hardly changes in fewer than {FEW_STEPS} steps; fix: {fix}"
    yield from long_warmup(train, steps)


def long_warmup(train: Train, steps: int | None) -> Iterator[str]:
    """Yield a warning if the warmup is at least as long as the run."""
    warmup = train.warmup
    if steps is None or warmup.unit != "steps" or warmup.amount < max(2, steps):
        return
    what = f"train.warmup is {warmup}, but the run has only {count_of(steps, 'step')}"
    yield (
        f"{what}, so the learning rate still rises when the run ends; fix: set train.warmup='3 %'"
    )


def _few_validation_rows(data: TrainingData) -> Iterator[str]:
    """Yield a warning if the validation split has less than half of the rows that it should have.

    The other rows are bad or too long, or groups of near-duplicates are too large to be held out.
    """
    if data.validation is None:
        return
    kept = data.validation.counts.kept_rows
    wanted = data.validation.counts.rows
    hold_out = data.run.data.hold_out
    if hold_out is not None:
        splits = data.splits
        wanted = hold_out.of(sum(len(rows) for _, rows in (*splits.train, *splits.validation)))
    if kept < MIN_VALIDATION_FRACTION * wanted:
        yield (
            f"val_loss is measured on {count_of(kept, 'row')} in place of {wanted:,}: the others"
            " are left out as bad or too long, or have too many near-duplicates to be held out;"
            " fix: correct these rows, or hold out more, such as data.hold_out='10 %'"
        )


def _contract_warnings(data: TrainingData) -> Iterator[str]:
    # The splits are parts of the same rows in most runs, so the first split's text is enough.
    warned = [contract for contract in data.contracts if contract.warnings]
    for contract in warned[:1]:
        splits = " and ".join(each.split for each in warned)
        for text in contract.warnings:
            yield f"{splits}: {text}"


def _bad_rows(data: TrainingData) -> Iterator[str]:
    """Yield a warning about rows that are skipped because they cannot be read."""
    bad = [part for _, part in data.sources() if part.counts.bad]
    for part in bad[:1]:
        first, what = part.counts.bad_rows[0]
        count = sum(each.counts.bad for each in bad)
        yield (
            f"left out by data.bad_rows=skip: {count:,} of {count_of(_all_rows(data), 'row')},"
            f" first {part.rows.where(first)}: {what};"
            " fix: correct these rows, which `tunesmith data --json` lists"
        )


def _unread_columns(data: TrainingData) -> Iterator[str]:
    """Yield a warning about columns and message keys that may be important but are not read."""
    names = []
    columns = [part.source.columns.values() for _, part in data.sources() if part.source]
    unread = _sum_rows(data, lambda part: part.counts.unread)
    for name in sorted(unread):
        count, where = unread[name]
        # A recipe that maps the chosen answers leaves out the rejected answers on purpose.
        is_left_out = name == "rejected" and any("chosen" in mapped for mapped in columns)
        if count < _all_rows(data) and not is_left_out:
            names.append(f"{name} in {count_of(count, 'row')} (first {where})")
        # A column with the name of a split is not needed: all rows belong to the chosen split.
        elif plain(name) not in SPLIT_COLUMNS and not is_left_out:
            names.append(name)
    # The scorer of sampled answers gets all columns.
    if names and not data.run.samples_answers:
        yield (
            f"training does not read {', '.join(names)}; fix: map the columns with"
            " `columns`, or delete the information that is not needed"
        )


def _control_tokens(data: TrainingData) -> Iterator[str]:
    """Yield a warning about special tokens in the text of rows."""
    # Do not warn about tokens of `model.added_tokens`, because they are expected in the rows.
    tokens = [
        f"{token} in {count_of(count, 'row')} (first {where})"
        for token, (count, where) in _sum_rows(
            data, lambda part: part.counts.control_tokens
        ).items()
        if token not in data.run.model.added_tokens
    ]
    # Raw texts contain their special tokens on purpose.
    if tokens and data.run.data.template != "raw":
        yield (
            f"the text of rows contains special tokens of the tokenizer: {', '.join(tokens)}. The"
            " model sees such a text as a control token, which may end the turn or begin another;"
            " fix: remove it from the rows, or put a space into it"
        )


def _unread_files(data: TrainingData) -> Iterator[str]:
    """Yield warnings about missing pictures and about files of a folder that are not read."""
    if data.template.pictures is not None and not data.train.counts.pictures:
        yield (
            "model.vision is true, but no row has a picture; fix: set model.vision=false, or"
            " name the column of the pictures, such as columns: {images: COLUMN}"
        )
    # Remove repeated warnings. Held-out rows are in the same folder as the training rows, so
    # both give the same warning.
    yield from dict.fromkeys(
        f"files in {relative_to_cwd(part.counts.source)} are not read: {part.rows.skipped}"
        for _, part in data.sources()
        if part.rows.skipped
    )


def _lost_tokens(data: TrainingData) -> Iterator[str]:
    """Yield a warning if too many tokens of a source are lost in truncated or dropped rows."""
    seq_len = data.run.data.seq_len
    lossy = [part for _, part in data.sources() if part.counts.lost_share > MAX_LOST_TOKENS_SHARE]
    if not lossy:
        return
    longest = [part.counts.longest_of_99 for part in lossy] + [
        part.counts.longest for part in lossy
    ]
    fixes = [
        f"set data.seq_len={length}"
        for length in sorted({max(longest[: len(lossy)]), max(longest)})
        if seq_len < length <= (data.position_limit or length)
    ]
    if any(part.source is not None and part.source.format == "text" for part in lossy):
        fixes.append("set data.too_long=auto, which splits texts")
    names = dict.fromkeys(relative_to_cwd(part.counts.source) for part in lossy)
    dropped = sum(part.counts.dropped + part.counts.emptied for part in lossy)
    yield (
        f"{max(part.counts.lost_share for part in lossy):.1%} of the tokens of {', '.join(names)} "
        f"are lost at data.seq_len {seq_len:,}: {count_of(dropped, 'row')} dropped, "
        f"{sum(part.counts.cut for part in lossy):,} truncated; "
        f"fix: {', or '.join(fixes) or 'shorten or split these rows'}"
    )


def _flaws(data: TrainingData) -> Iterator[str]:
    for name, (count, where) in _sum_rows(data, lambda part: part.counts.flaws).items():
        # Skip the warning "joined" if the recipe sets `data.template: raw`, because joining the
        # texts is then intended.
        is_meant = name == "joined" and data.run.data.template != "auto"
        if not is_meant:
            # The warning about pictures is followed by the name of their column.
            kind, _, column = name.partition(" ")
            warning = ROW_WARNINGS[kind]
            rows = f"{count:,} of {count_of(_all_rows(data), 'row')} with {warning.what}"
            fix = warning.fix.replace("COLUMN", json.dumps(column))
            yield f"{rows}, first {where}: {warning.why}; fix: {fix}"


def _repeats(data: TrainingData) -> Iterator[str]:
    """Yield warnings about examples that repeat a training example."""
    # Most duplicate examples come from near-duplicate rows, which have a separate warning. Warn
    # only if there are more duplicate examples than near-duplicate rows.
    near = data.splits.kept_findings.faulty_rows("near-duplicates")
    repeats = data.duplicates
    if repeats.count > len(near):
        yield (
            f"{repeats.count:,} of {len(data.train):,} training examples are duplicates, first "
            f"{repeats.where} ({repeats.earlier}); fix: delete the duplicates, or set "
            "'data.leave_out=[near-duplicates]'"
        )
    overlap = data.overlap
    if overlap.count:
        yield (
            f"val_loss is too optimistic, because {count_of(overlap.count, 'validation example')} "
            f"of the data repeat a training example, first {overlap.where} ({overlap.earlier}); "
            "fix: use splits that share no row, such as train[:95%] and train[95%:]; or delete the "
            "duplicates"
        )


def row_warnings_of(splits: Splits, across: Sequence[Sequence[int]]) -> Iterator[str]:
    """Yield one warning with a fix for each kind of problem in the rows that are kept.

    Args:
        splits: the rows of the recipe and the findings in them.
        across: pairs [row of `data.validation`, row of `data.train`] that are near-duplicates.
    """
    findings = splits.kept_findings
    sources = splits.sources
    total = count_of(sum(len(rows) for _, rows in sources), "row")
    near = len(findings.faulty_rows("near-duplicates"))
    if near:
        places = _group_places(sources, findings.near_duplicates)
        yield (
            f"near-duplicates: {near:,} of {total} (equal to an earlier row except for case, "
            f"punctuation or a few words), first {places}; fix: correct or delete these rows, or "
            "set 'data.leave_out=[near-duplicates]'"
        )
    pairs = splits.pairs_across(across)
    if pairs:
        fix = "delete these rows, or set 'data.leave_out=[near-duplicates]'"
        if across:
            fix = (
                "delete these rows from data.validation or data.train, or set data.validation=null"
                " data.hold_out='5 %', which keeps nearly equal rows in the same split"
            )
        shown = ", ".join(f"{a} ({b})" for a, b in pairs[:SHOWN_PLACES])
        yield (
            f"val_loss is too optimistic, because of {count_of(len(pairs), 'validation row')} "
            f"that nearly equal a training row, first {shown}; fix: {fix}"
        )
    if findings.contradictions:
        rows = len(findings.faulty_rows("contradictions"))
        prompts = count_of(len(findings.contradictions), "prompt")
        places = _group_places(sources, findings.contradictions)
        yield (
            f"{prompts} with contradictory answers, in {rows:,} of {total}, first {places}; "
            "fix: correct or delete these rows, or set 'data.leave_out=[contradictions]'"
        )


def _group_places(sources: SourceRows, groups: Sequence[Sequence[int]]) -> str:
    """Return the locations of rows as text such as `b (a)`: row b is a near-duplicate of row a.

    Only the first SHOWN_PLACES groups are included.
    """
    return ", ".join(
        f"{place(sources, second)} ({place(sources, first)})"
        for first, second, *_ in groups[:SHOWN_PLACES]
    )


# Warnings about all sources together, in the order in which they are printed.
DATA_WARNINGS: tuple[Callable[[TrainingData], Iterator[str]], ...] = (
    _few_steps,
    _few_validation_rows,
    _contract_warnings,
    _unread_files,
    _bad_rows,
    _unread_columns,
    _control_tokens,
    _lost_tokens,
    _flaws,
    _repeats,
)
