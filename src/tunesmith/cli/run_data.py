"""Output of the command `data`: rows with their supervised tokens, counts, lengths and findings."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from tunesmith.batches.training_data import TrainingData
from tunesmith.config.schema import Run
from tunesmith.host.streams import show, visible, width_of
from tunesmith.presentation.data import data_lines, data_warnings, histogram
from tunesmith.rows.compare.row_checks import ROW_FAULTS, place
from tunesmith.rows.compare.splits import Splits
from tunesmith.start.inputs import read_inputs
from tunesmith.start.model import ModelFacts
from tunesmith.start.request import Request
from tunesmith.start.rewards import own_rewards, reward_lines
from tunesmith.tokens.token_set import SourceTokens, TokenSet
from tunesmith.units import count_of

# Maximum number of row locations in each list of findings in the JSON output.
_LISTED_PLACES = 100
# Maximum number of tokens that are shown of one row.
_SHOWN_ROW_TOKENS = 800


def show_data(args: argparse.Namespace, recipe: Run, known: ModelFacts | None) -> None:
    """Tokenize the rows of a recipe as in training, and print them as text or JSON.

    Args:
        known: facts that were found when the recipe was created.
    """
    # Errors of the token contract (the checks of the tokens) are first shown with the other
    # results, and raised at the end.
    tokens = read_inputs(Request(recipe, purpose="show"), known=known)
    prepared = tokens.data
    tokenizer = tokens.model.tokenizer
    own = own_rewards(prepared.run, prepared) if recipe.samples_answers else None
    if args.json:
        report = values(prepared, tokenizer, args.rows)
        if own is not None:
            report["own_rewards"] = own._asdict()
        print(json.dumps(report, ensure_ascii=False, indent=2))
    else:
        # Print rows, counts, lengths, packing and the checks of the token contract.
        console = Console(highlight=False, soft_wrap=True, width=width_of(sys.stdout))
        _print_rows(console, prepared.train, tokenizer, args.rows)
        show("\n".join(data_lines(prepared)), sys.stdout)
        if recipe.samples_answers:
            show("\n".join(reward_lines(own)), sys.stdout)
    for contract in prepared.contracts:
        contract.raise_if_broken()


def segments(
    tokens: TokenSet, tokenizer: Any, i: int, limit: int = _SHOWN_ROW_TOKENS
) -> list[tuple[str, bool, bool]]:
    """Split example i into segments of tokens of the same kind.

    Return tuples (text, is supervised, is special), one for each segment.

    If the example has more than `limit` tokens, only its beginning and its end are used.
    """
    ids = tokens[i].ids.tolist()
    special_ids = set(tokenizer.all_special_ids)
    is_special = [token in special_ids for token in ids]
    # The kind of each token: (is supervised, is special).
    kinds = [*zip(tokens[i].trained.tolist(), is_special, strict=True)]

    def decode(end: int) -> str:
        # Always decode from the first token. If only one token is decoded, the result can be an
        # incomplete character, or lack the leading space.
        text = tokenizer.decode(
            ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return str(text)

    ranges = [(0, len(ids))]
    if len(ids) > limit:
        half = limit // 2
        ranges = [(0, half), (len(ids) - half, len(ids))]
    found = []
    end = 0
    for start, stop in ranges:
        if start:
            found.append((f"\n… {count_of(start - end, 'token')} …\n", False, False))
        end = start
        prefix = decode(start)
        for kind, group in groupby(kinds[start:stop]):
            end += len([*group])
            text = decode(end)
            found.append((text[len(prefix) :], *kind))
            prefix = text
    return found


def _print_rows(console: Console, tokens: TokenSet, tokenizer: Any, count: int) -> None:
    has_colors = console.color_system is not None and not console.no_color
    for i in range(min(count, len(tokens))):
        example = tokens[i]
        supervised = f"{int(example.trained.sum()):,} supervised"
        title = f"{tokens.where(i)}: {count_of(len(example.ids), 'token')}, {supervised}"
        console.print(Text(f"── {visible(title)}"))
        text = Text()
        is_inside = False
        for piece, is_supervised, is_special in segments(tokens, tokenizer, i):
            shown = visible(piece)
            if has_colors:
                style = "bold green" if is_supervised else "dim"
                if is_special:
                    style += " reverse"
                text.append(shown, style=style)
                continue
            # Without colors, put brackets around the supervised text.
            if is_supervised != is_inside:
                text.append("⟦" if is_supervised else "⟧")
                is_inside = is_supervised
            text.append(shown)
        if is_inside:
            text.append("⟧")
        console.print(text)
    console.print()


def _count_values(part: SourceTokens) -> dict[str, Any]:
    """Return the counts of a data source, and the file and line of its bad rows."""
    bad_rows = [{"where": part.rows.where(row), "what": what} for row, what in part.counts.bad_rows]
    return {**asdict(part.counts), "bad_rows": bad_rows}


def values(prepared: TrainingData, tokenizer: Any, rows: int) -> dict[str, Any]:
    """Return the result of the command as plain values for --json."""
    train = prepared.train
    examples = []
    for i in range(min(rows, len(train))):
        parts = [
            {"text": text, "supervised": supervised, "special": special}
            for text, supervised, special in segments(train, tokenizer, i, limit=1 << 30)
        ]
        examples.append({"where": train.where(i), "tokens": len(train[i].ids), "segments": parts})
    checks = [
        {"split": contract.split, **asdict(check)}
        for contract in prepared.contracts
        for check in contract.checks
    ]
    validation = [part for split, part in prepared.sources() if split == "validation"]
    return {
        "template": {"name": prepared.template.name, "end_ids": sorted(prepared.template.end_ids)},
        "train": [{**_count_values(part), "weight": part.weight} for part in train.parts],
        "validation": [_count_values(part) for part in validation],
        "lengths": [{"from": low, "to": high, "examples": n} for low, high, n in histogram(train)],
        "schedule": asdict(prepared.schedule.summary(prepared.run.train.duration)),
        "duplicates": asdict(prepared.duplicates),
        "overlap": asdict(prepared.overlap),
        "findings": findings_as_json(prepared.splits, prepared.across),
        "warnings": data_warnings(prepared),
        "contract": checks,
        "rows": examples,
    }


def findings_as_json(splits: Splits, across: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the number and the row locations of all findings."""
    findings = splits.kept_findings
    sources = splits.sources

    def places(rows: Sequence[int]) -> list[str]:
        return [place(sources, row) for row in rows[:_LISTED_PLACES]]

    def groups(row_groups: Sequence[Sequence[int]]) -> list[list[str]]:
        return [places(group) for group in row_groups[:_LISTED_PLACES]]

    pairs = splits.pairs_across(across)
    counts = {fault: len(findings.faulty_rows(fault)) for fault in ROW_FAULTS}
    return {
        "rows": findings.rows,
        "compared": findings.compared,
        "left_out": {fault: len(rows) for fault, rows in splits.left_out.items()},
        "counts": {**counts, "across": len(pairs)},
        "near-duplicates": groups(findings.near_duplicates),
        "across": pairs[:_LISTED_PLACES],
        "contradictions": groups(findings.contradictions),
    }
