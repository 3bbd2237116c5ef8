"""Show what a recipe trains on, token by token, before it trains.

Supervised tokens are green, or without colours between ⟦ and ⟧. Below them: counts, lengths, packing, the number of
optimizer steps, and the token contract. The exit code is 2 where the contract is broken.
Of a model on the Hub only the tokenizer and the configuration are downloaded.

examples:
  tunesmith data smollm2-135m-lora
  tunesmith data --model HuggingFaceTB/SmolLM2-135M-Instruct --data faq.csv     # before training on rows of your own
  tunesmith data my-recipe.yaml data.train_on=last --rows 10
  tunesmith data my-recipe.yaml --json > tokens.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.cli.options import add_recipe, chosen_recipe

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tunesmith.data.prepare import TrainingData
    from tunesmith.data.tokens import TokenSet

_BARS = 16  # of the length histogram
_ROW_TOKENS = 800  # tokens of a row that are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--rows", type=int, default=3, metavar="N", help="how many rows to show (default 3)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")


def run(args: argparse.Namespace) -> None:
    recipe, _ = chosen_recipe(args, partial(print, file=sys.stderr))
    from tunesmith.data.prepare import prepare_data
    from tunesmith.hub import fetch
    from tunesmith.model.load import load_config, read_stated_spec
    from tunesmith.model.spec import check_seq_len
    from tunesmith.model.tokenizer import eos_ids, load_tokenizer, vocab_rows

    folder = fetch.fetch_for_tokens(recipe.model)
    spec = read_stated_spec(folder, recipe.model)
    check_seq_len(spec, recipe.data.seq_len, where=f"{folder}/config.json")
    tokenizer = load_tokenizer(fetch.tokenizer_folder(recipe.model, folder), recipe.model)
    rows = vocab_rows(load_config(folder, recipe.model), tokenizer, recipe.model)
    prepared = prepare_data(
        recipe,
        tokenizer,
        eos_ids(folder, tokenizer),
        rows,
        strict=False,
        position_limit=spec.position_limit,
    )
    if args.json:
        print(json.dumps(values(prepared, tokenizer, args.rows), ensure_ascii=False, indent=2))
    else:
        print_data(prepared, tokenizer, args.rows)
    for contract in prepared.contracts:
        contract.raise_if_broken()


def print_data(
    prepared: TrainingData, tokenizer: Any, rows: int, console: Console | None = None
) -> None:
    """Everything, on stdout: rows, counts, lengths, packing, contract."""
    from rich.bar import Bar
    from rich.console import Console

    from tunesmith.data.source import is_local

    # A file or a pipe has no width; rich would assume 80 columns and fold the tables.
    console = console or Console(
        highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160
    )
    _print_rows(console, prepared.train, tokenizer, rows)
    console.print(prepared.describe_template(), markup=False)
    counts = _table("what is trained on", "source", "figures", text=(1,))
    for split, part in prepared.sources():
        name = part.counts.source
        counts.add_row(
            f"{split}: {Path(name).name if is_local(name) else name}",
            "\n".join(prepared.figures(part)),
        )
    console.print(counts)
    bars = histogram(prepared.train)
    most = max((n for _, _, n in bars), default=1)
    lengths = _table("tokens of an example", "from - to", "examples", "", text=(2,))
    lengths.columns[0].no_wrap, lengths.columns[2].max_width = True, 40
    for low, high, n in bars:
        lengths.add_row(f"{low:,} - {high:,}", f"{n:,}", Bar(most, 0, n and max(n, most / 40)))
    console.print(lengths)
    console.print(prepared.describe_schedule(), markup=False)
    for warning in prepared.warnings():
        console.print(warning, style="yellow", markup=False)
    console.print(_contracts_table(prepared))


def segments(
    tokens: TokenSet, tokenizer: Any, i: int, limit: int = _ROW_TOKENS
) -> list[tuple[str, bool, bool]]:
    """Example i as (text, supervised, special) stretches; of one longer than `limit` tokens the beginning and the end."""
    ids, trained, special = (
        tokens[i].ids.tolist(),
        tokens[i].trained.tolist(),
        set(tokenizer.all_special_ids),
    )
    kinds = [(supervised, token in special) for supervised, token in zip(trained, ids, strict=True)]
    half, long = limit // 2, len(ids) > limit

    def decode(
        end: int,
    ) -> str:  # whole: alone, a piece of a character or a leading space is something else
        return str(
            tokenizer.decode(
                ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    out: list[tuple[str, bool, bool]] = []
    for start, stop in ((0, half), (len(ids) - half, len(ids))) if long else ((0, len(ids)),):
        if start:
            out.append((f"\n… {start - half:,} tokens …\n", False, False))
        begin, before = start, decode(start)
        for at in range(start + 1, stop + 1):
            if at == stop or kinds[at] != kinds[begin]:
                text = decode(at)
                out.append((text[len(before) :], *kinds[begin]))
                begin, before = at, text
    return out


def _print_rows(console: Console, tokens: TokenSet, tokenizer: Any, count: int) -> None:
    from rich.text import Text

    coloured = (
        console.color_system is not None and not console.no_color and "NO_COLOR" not in os.environ
    )
    for i in range(min(count, len(tokens))):
        example = tokens[i]
        title = f"{tokens.where(i)}: {len(example.ids):,} tokens, {int(example.trained.sum()):,} supervised"
        console.print(Text(f"── {title}"))
        text, inside = Text(), False
        for piece, supervised, special in segments(tokens, tokenizer, i):
            if not coloured and supervised != inside:
                text.append("⟦" if supervised else "⟧")
                inside = supervised
            style = ("bold green" if supervised else "dim") + (" reverse" if special else "")
            text.append(piece, style=style if coloured else "")
        console.print(text.append("⟧" if inside else ""))
    console.print()


def _table(title: str, *columns: str, text: tuple[int, ...] = ()) -> Table:
    """A table of a first column and those numbered `text`, which wrap, and columns of figures, which never do."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, column in enumerate(columns):
        wraps = number == 0 or number in text
        justify: Literal["left", "right"] = "left" if wraps else "right"
        table.add_column(column, justify=justify, no_wrap=not wraps, overflow="fold")
    return table


def histogram(tokens: TokenSet) -> list[tuple[int, int, int]]:
    """(shortest, longest, examples) of equal steps of length, in tokens."""
    import numpy as np

    if not len(tokens):
        return []
    top = int(tokens.lengths.max())
    step = max(1, -(-top // _BARS))
    counts = np.bincount((tokens.lengths - 1) // step)
    return [(k * step + 1, min((k + 1) * step, top), int(n)) for k, n in enumerate(counts)]


def _contracts_table(prepared: TrainingData) -> Table:
    from rich.text import Text

    table = _table("token contract", "check", "result", text=(1,))
    for contract in prepared.contracts:
        for check in contract.checks:
            note, checked = f"; {check.note}" if check.note else "", f"{check.checked:,} {check.of}"
            result = Text(f"holds: {checked}{note}", style="green" if check.checked else "")
            if check.broken:
                broken = f"BROKEN: {check.broken:,} of {checked}, first in {check.where}"
                result = Text(f"{broken}\n{check.why}\nfix: {check.fix}", style="red")
            table.add_row(f"{contract.split}: {check.name}", result)
    return table


def values(prepared: TrainingData, tokenizer: Any, rows: int) -> dict[str, Any]:
    """The same as plain values, for --json."""
    train, names = prepared.train, ("text", "supervised", "special")
    shown = []
    for i in range(min(rows, len(train))):
        parts = [
            dict(zip(names, part, strict=True))
            for part in segments(train, tokenizer, i, limit=1 << 30)
        ]
        shown.append({"where": train.where(i), "tokens": len(train[i].ids), "segments": parts})
    return {
        "template": {"name": prepared.template.name, "end_ids": sorted(prepared.template.end_ids)},
        "train": [{**asdict(part.counts), "weight": part.weight} for part in train.parts],
        "validation": [
            asdict(part.counts) for split, part in prepared.sources() if split == "validation"
        ],
        "lengths": [{"from": low, "to": high, "examples": n} for low, high, n in histogram(train)],
        "schedule": asdict(prepared.schedule.summary(prepared.run.train.duration)),
        "duplicates": asdict(prepared.duplicates),
        "overlap": asdict(prepared.overlap),
        "warnings": prepared.warnings(),
        "contract": [
            {"split": c.split, **asdict(check)} for c in prepared.contracts for check in c.checks
        ],
        "rows": shown,
    }
