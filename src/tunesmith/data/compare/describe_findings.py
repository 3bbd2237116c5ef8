"""The findings in the rows, as lines for the user and as plain values."""

from collections.abc import Sequence
from typing import Any

from tunesmith.config.schema import RowFault
from tunesmith.data.compare.row_checks import ROW_FAULTS, RowFindings, place
from tunesmith.data.compare.row_texts import MAX_CHARACTERS, MAX_ROWS
from tunesmith.data.compare.splits import SourceRows, Splits
from tunesmith.units import count_of

# Places that a line names, and places in `tunesmith data --json`.
SHOWN_PLACES = 3
LISTED_PLACES = 100


def describe_rows(splits: Splits) -> list[str]:
    """Lines about the split: what is left out, and what was not compared."""
    lines = []
    for fault, rows in splits.left_out.items():
        where = ""
        if rows:
            where = f", first {_first_places(splits.sources, rows)}"
        lines.append(f"data.leave_out: {fault}: {count_of(len(rows), 'row')} left out{where}")
    findings = splits.findings
    if findings.compared < findings.rows:
        lines.append(
            f"compared with each other: {findings.compared:,} of {findings.rows:,} rows, evenly "
            f"spaced: at most {MAX_ROWS:,} rows or {MAX_CHARACTERS // 10**6:,} million characters"
        )
    return lines


def count_repeating(splits: Splits) -> int:
    """Count the rows, of those not left out, that repeat or nearly repeat one before them."""
    return len(_kept_findings(splits).faulty_rows("near-duplicates"))


def row_warnings_of(splits: Splits, across: Sequence[Sequence[int]]) -> list[str]:
    """A line for each fault that rows have and that `data.leave_out` keeps, with its fix.

    Args:
        across: pairs of a row of `data.validation` and one that is trained on.
    """
    findings = _kept_findings(splits)
    sources = splits.sources
    total = count_of(sum(len(rows) for _, rows in sources), "row")
    lines = []
    near = count_repeating(splits)
    if near:
        places = _group_places(sources, findings.near_duplicates)
        lines.append(
            f"repeated: {near:,} of {total}, equal to an earlier row but for case, punctuation or "
            f"a few words: first {places}; {_fix('near-duplicates')}"
        )
    pairs = _pairs_across(splits, findings, across)
    if pairs:
        fix = "delete them, or 'data.leave_out=[near-duplicates]'"
        if across:
            fix = (
                "delete them from one of the two, or data.validation=null data.hold_out='5 %',"
                " which keeps such rows on one side"
            )
        shown = ", ".join(f"{a} ({b})" for a, b in pairs[:SHOWN_PLACES])
        lines.append(
            f"{count_of(len(pairs), 'validation row')} nearly equal to a row that is trained on, "
            f"so val_loss is too optimistic: first {shown}; fix: {fix}"
        )
    if findings.contradictions:
        rows = len(findings.faulty_rows("contradictions"))
        prompts = count_of(len(findings.contradictions), "prompt")
        places = _group_places(sources, findings.contradictions)
        lines.append(
            f"{prompts} with contradicting answers, in {rows:,} of {total}: first {places}; "
            f"{_fix('contradictions')}"
        )
    return lines


def _kept_findings(splits: Splits) -> RowFindings:
    """Select the findings in the rows that are not left out."""
    gone = [row for rows in splits.left_out.values() for row in rows]
    return splits.findings.without(gone)


def _pairs_across(
    splits: Splits, findings: RowFindings, across: Sequence[Sequence[int]]
) -> list[list[str]]:
    """Places of rows to validate on, each with that of a near-duplicate that is trained on.

    Of rows that are held out: where one group is too large.
    """
    if not splits.held_out:
        return [[place(splits.validation, a), place(splits.train, b)] for a, b in across]
    held_out = set(splits.held_out)
    pairs = []
    for group in findings.near_duplicates:
        trained = [row for row in group if row not in held_out]
        if trained:
            pairs += [[row, trained[0]] for row in group if row in held_out]
    return [[place(splits.sources, row) for row in pair] for pair in pairs]


def _fix(fault: RowFault) -> str:
    return f"fix: correct or delete them, or 'data.leave_out=[{fault}]'"


def _first_places(sources: SourceRows, rows: Sequence[int]) -> str:
    return ", ".join(place(sources, row) for row in rows[:SHOWN_PLACES])


def _group_places(sources: SourceRows, groups: Sequence[Sequence[int]]) -> str:
    """`b (a)` of the first groups: a row, and the one before it that it is like."""
    shown = groups[:SHOWN_PLACES]
    return ", ".join(f"{place(sources, g[1])} ({place(sources, g[0])})" for g in shown)


def findings_as_json(splits: Splits, across: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Counts and places of all that was found, for `tunesmith data --json`."""
    findings = _kept_findings(splits)
    sources = splits.sources

    def places(rows: Sequence[int]) -> list[str]:
        return [place(sources, row) for row in rows[:LISTED_PLACES]]

    def groups(of: Sequence[Sequence[int]]) -> list[list[str]]:
        return [places(group) for group in of[:LISTED_PLACES]]

    pairs = _pairs_across(splits, findings, across)
    counts = {fault: len(findings.faulty_rows(fault)) for fault in ROW_FAULTS}
    return {
        "rows": findings.rows,
        "compared": findings.compared,
        "left_out": {fault: len(rows) for fault, rows in splits.left_out.items()},
        "counts": {**counts, "across": len(pairs)},
        "near-duplicates": groups(findings.near_duplicates),
        "across": pairs[:LISTED_PLACES],
        "contradictions": groups(findings.contradictions),
    }
