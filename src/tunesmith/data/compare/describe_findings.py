"""Output of the row checks, as text for the user and as JSON."""

from collections.abc import Sequence
from typing import Any

from tunesmith.config.schema import RowFault
from tunesmith.data.compare.row_checks import ROW_FAULTS, RowFindings, place
from tunesmith.data.compare.row_texts import MAX_CHARACTERS, MAX_ROWS
from tunesmith.data.compare.splits import SourceRows, Splits
from tunesmith.units import count_of

# Maximum number of row locations (`file:line`) in a line of text.
SHOWN_PLACES = 3
# Maximum number of row locations in each list in the output of `tunesmith data --json`.
LISTED_PLACES = 100


def describe_rows(splits: Splits) -> list[str]:
    """Return lines about the rows that `data.leave_out` removes or that were not compared."""
    lines = []
    for fault, rows in splits.left_out.items():
        line = f"{count_of(len(rows), 'row')} left out by data.leave_out ({fault})"
        if rows:
            places = [place(splits.sources, row) for row in rows[:SHOWN_PLACES]]
            line += f", first {', '.join(places)}"
        lines.append(line)
    findings = splits.findings
    if findings.compared < findings.rows:
        lines.append(
            f"only {findings.compared:,} of {findings.rows:,} rows (evenly spaced) are compared, "
            f"at most {MAX_ROWS:,} rows or {MAX_CHARACTERS // 10**6:,} million characters"
        )
    return lines


def count_repeating(splits: Splits) -> int:
    """Count the kept rows that are near-duplicates of an earlier row."""
    return len(_kept_findings(splits).faulty_rows("near-duplicates"))


def row_warnings_of(splits: Splits, across: Sequence[Sequence[int]]) -> list[str]:
    """Return one warning with a fix for each kind of problem in the rows that are kept.

    Args:
        splits: the rows of the recipe and the findings in them.
        across: pairs [row of `data.validation`, row of `data.train`] that are near-duplicates.
    """
    findings = _kept_findings(splits)
    sources = splits.sources
    total = count_of(sum(len(rows) for _, rows in sources), "row")
    lines = []
    near = count_repeating(splits)
    if near:
        places = _group_places(sources, findings.near_duplicates)
        lines.append(
            f"near-duplicates: {near:,} of {total} (equal to an earlier row except for case, "
            f"punctuation or a few words), first {places}; {_fix('near-duplicates')}"
        )
    pairs = _pairs_across(splits, findings, across)
    if pairs:
        fix = "delete these rows, or set 'data.leave_out=[near-duplicates]'"
        if across:
            fix = (
                "delete these rows from data.validation or data.train, or set data.validation=null"
                " data.hold_out='5 %', which keeps nearly equal rows in the same split"
            )
        shown = ", ".join(f"{a} ({b})" for a, b in pairs[:SHOWN_PLACES])
        lines.append(
            f"val_loss is too optimistic, because of {count_of(len(pairs), 'validation row')} "
            f"that nearly equal a training row, first {shown}; fix: {fix}"
        )
    if findings.contradictions:
        rows = len(findings.faulty_rows("contradictions"))
        prompts = count_of(len(findings.contradictions), "prompt")
        places = _group_places(sources, findings.contradictions)
        lines.append(
            f"{prompts} with contradictory answers, in {rows:,} of {total}, first {places}; "
            f"{_fix('contradictions')}"
        )
    return lines


def _kept_findings(splits: Splits) -> RowFindings:
    """Return the findings without the rows that `data.leave_out` removes."""
    removed = [row for rows in splits.left_out.values() for row in rows]
    return splits.findings.without(removed)


def _pairs_across(
    splits: Splits, findings: RowFindings, across: Sequence[Sequence[int]]
) -> list[list[str]]:
    """Return pairs of row locations: a validation row, and its near-duplicate in the training rows.

    Such pairs are rare if the validation rows are held out from `data.train`, because
    near-duplicates then stay in the same split, unless their group is too large.
    """
    pairs = []
    if not splits.held_out:
        for validated, trained in across:
            pairs.append([place(splits.validation, validated), place(splits.train, trained)])
        return pairs
    held_out = set(splits.held_out)
    for group in findings.near_duplicates:
        trained_rows = [row for row in group if row not in held_out]
        if not trained_rows:
            continue
        for row in group:
            if row in held_out:
                pairs.append([place(splits.sources, row), place(splits.sources, trained_rows[0])])
    return pairs


def _fix(fault: RowFault) -> str:
    return f"fix: correct or delete these rows, or set 'data.leave_out=[{fault}]'"


def _group_places(sources: SourceRows, groups: Sequence[Sequence[int]]) -> str:
    """Return the locations of rows as text such as `b (a)`: row b is a near-duplicate of row a.

    Only the first SHOWN_PLACES groups are included.
    """
    shown = []
    for first, second, *_ in groups[:SHOWN_PLACES]:
        shown.append(f"{place(sources, second)} ({place(sources, first)})")
    return ", ".join(shown)


def findings_as_json(splits: Splits, across: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the number and the row locations of all findings, for `tunesmith data --json`."""
    findings = _kept_findings(splits)
    sources = splits.sources

    def places(rows: Sequence[int]) -> list[str]:
        return [place(sources, row) for row in rows[:LISTED_PLACES]]

    def groups(row_groups: Sequence[Sequence[int]]) -> list[list[str]]:
        return [places(group) for group in row_groups[:LISTED_PLACES]]

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
