"""How good a run is on a held-out file, beside its base.

example:
  tunesmith eval runs/my-run --data held-out.jsonl
  tunesmith eval runs/my-run --data held-out.jsonl --exact-match --max-examples 100
  tunesmith eval runs/my-run --data held-out.jsonl --no-base --json

Loss, perplexity and token accuracy are over the supervised tokens, given all true tokens before, computed as in
training. Exact match answers greedily and compares with the row's answer after taking outer whitespace off and making
every run of whitespace one space.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from tunesmith.cli.generate import FORMATS
from tunesmith.errors import EXIT_OK, UsageError

if TYPE_CHECKING:
    from tunesmith.inference.evaluate import Score
    from tunesmith.inference.load_run import LoadedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, checkpoint, final/, adapter or model folder")
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        help="held-out rows with answers: jsonl, json, csv, parquet, or a Hub id",
    )
    parser.add_argument("--split", metavar="SPLIT", help="of a Hub dataset, or a slice such as train[:100]")
    parser.add_argument(
        "--format", choices=FORMATS, default="auto", help="what a row looks like (default: by its columns)"
    )
    parser.add_argument(
        "--base", action=argparse.BooleanOptionalAction, default=True, help="score the base beside it (default: yes)"
    )
    parser.add_argument("--exact-match", action="store_true", help="answer every row greedily and compare texts")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="for exact match: longest answer (default: 256)"
    )
    parser.add_argument("--max-examples", type=int, metavar="N", help="take the first N rows")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="for exact match: rows answered at once (default: 16)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda where there is one)")


def run(args: argparse.Namespace) -> int:
    from tunesmith.inference.load_run import locate_run

    for name, value in (("--max-examples", args.max_examples), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            raise UsageError(f"{name} {value} is out of range", where=name, fix="give at least 1")
    place = locate_run(args.run)
    from tunesmith.inference.load_run import load_run

    opened = load_run(args.run, device=args.device, place=place)
    exam = EvalSet(args, opened)
    scores = {"model" if place.kind == "base" else "tuned": exam.score(opened, nullcontext())}
    if args.base and place.kind == "adapter":
        from tunesmith.adapter.lora import disabled

        scores = {"base": exam.score(opened, disabled(opened.model)), **scores}
    elif args.base and place.kind == "full":
        del opened  # one model at a time
        scores = {"base": exam.score(load_run(args.run, device=args.device, base_only=True), nullcontext()), **scores}
    if args.json:
        about = {"run": str(args.run), "data": args.data, "dropped": exam.dropped, "cut": exam.cut}
        print(json.dumps(about | {name: plain(score) for name, score in scores.items()}, indent=2))
    else:
        show(scores, exam)
    return EXIT_OK


def plain(score: Score) -> dict[str, Any]:
    """The score for JSON, which knows neither NaN nor infinity: such values become null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(score).items()}


class EvalSet:
    """The rows of one file as tokens and, for exact match, as questions; the same for every model that sits it."""

    def __init__(self, args: argparse.Namespace, opened: LoadedModel) -> None:
        from tunesmith.config.schema import Data, Source
        from tunesmith.data.source import read_rows
        from tunesmith.data.tokens import tokenise
        from tunesmith.inference.generate import Decoding, check_room
        from tunesmith.inference.load_run import context_of, known_sources, system_of
        from tunesmith.inference.prompts import prompts_of, source_of

        self.args, self.template, self.tokenizer = args, opened.template, opened.tokenizer
        source = Source(source=args.data, split=args.split, max_examples=args.max_examples)
        rows = read_rows(source)
        known = known_sources(opened.run)
        told = source_of(rows[0], rows.where(0), args.format, known)
        source = replace(source, format=told.format, columns=told.columns)
        data = opened.run.data if opened.run else Data(train=(source,), seq_len=min(context_of(opened.model), 1 << 20))
        self.tokens = tokenise((source,), data, opened.template, opened.tokenizer, cache=None, what=args.data)
        counts = self.tokens.sources[0]
        self.rows, self.dropped, self.cut = len(rows), counts.dropped + counts.emptied, counts.cut
        if not len(self.tokens):
            raise UsageError(
                f"none of the {self.rows} rows can be scored",
                where=args.data,
                why=f"all are longer than data.seq_len: {data.seq_len} and were dropped",
                fix="give shorter rows",
            )
        self.decoding = Decoding(max_new_tokens=args.max_new_tokens)
        self.asked = []
        if args.exact_match:
            asked = prompts_of(
                rows, self.template, self.tokenizer, asked=told.format, known=known, system=system_of(opened.run)
            )
            self.asked = [q for q in asked if q.reference is not None]
            if not self.asked:
                raise UsageError(
                    "no row holds an answer to compare with",
                    where=args.data,
                    why=f"rows of the format {told.format} were read",
                    fix="leave --exact-match out, or give rows with answers",
                )
            places = [q.where for q in self.asked]
            check_room([len(q.prompt) for q in self.asked], places, self.decoding, context_of(opened.model))

    def score(self, opened: LoadedModel, view: AbstractContextManager[None]) -> Score:
        """One model's score; `view` switches the adapter off for the base."""
        from tunesmith.cli.progress import Counter
        from tunesmith.inference.evaluate import exact_matches, score
        from tunesmith.inference.generate import answer_all, merged_meanwhile
        from tunesmith.inference.load_run import for_loss

        texts: list[str] = []
        with view:
            with for_loss(opened) as train_model, Counter("rows scored", len(self.tokens)) as shown:
                device = opened.model.device
                result = score(train_model, self.tokens, pad_id=opened.pad_id, device=device, done=shown.to)
            if not self.asked:
                return result
            with merged_meanwhile(opened.model), Counter("answers", len(self.asked)) as shown:
                prompts = [q.prompt for q in self.asked]
                stops, size = self.template.stops, self.args.batch_size
                answers = answer_all(opened.model, self.tokenizer, prompts, self.decoding, stops=stops, batch_size=size)
                for _, answer in answers:
                    texts.append(answer.text)
                    shown.to(len(texts))
        hits = exact_matches(texts, [q.reference or "" for q in self.asked])
        return replace(result, exact_match=sum(hits) / len(hits), asked=len(hits))


def show(scores: dict[str, Score], exam: EvalSet) -> None:
    """The table, on stdout; what was left out, below it."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *scores)
    rows: list[tuple[str, Any]] = [
        ("loss (nats a token)", lambda s: f"{s.loss:.4f}"),
        ("perplexity", lambda s: f"{s.perplexity:.3f}" if math.isfinite(s.perplexity) else "above 1e308"),
        ("token accuracy", lambda s: f"{s.token_accuracy:.2%}"),
        ("rows", lambda s: str(s.rows)),
        ("supervised tokens", lambda s: str(s.tokens)),
    ]
    if exam.asked:
        rows.insert(3, ("exact match", lambda s: f"{s.exact_match:.1%} ({round(s.exact_match * s.asked)}/{s.asked})"))
    for name, cell in rows:
        table.add_row(name, *(cell(score) for score in scores.values()))
    Console(file=sys.stdout).print(table)
    for count, what in ((exam.dropped, "dropped"), (exam.cut, "cut short")):
        if count:
            print(f"{count} of {exam.rows} rows were {what}, being longer than the recipe's seq_len", file=sys.stderr)
