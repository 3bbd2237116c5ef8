"""What several commands share: options, the types of their values, the lines of standard input, a count of progress."""

import argparse
import io
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.config.check import COLUMNS
from tunesmith.errors import DataError, UsageError
from tunesmith.host.shell import shell_word
from tunesmith.host.streams import is_terminal

if TYPE_CHECKING:
    from tunesmith.config.schema import Run
    from tunesmith.inference.decoding import Decoding
    from tunesmith.training.make_recipe import MadeRecipe

SECONDS_BETWEEN_LINES = 10.0  # of progress


def whole_number(text: str) -> int:
    """A count of at least 1."""
    with suppress(ValueError):
        if (value := int(text)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN and the device to load it to."""
    parser.add_argument(
        "run", metavar="RUN", help="run directory, checkpoint, final/, adapter or model folder"
    )
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda where there is one)"
    )


def tell_left_out(errors: Sequence[UsageError], *, shown: int) -> None:
    """Say which of several runs could not be opened; where none of them could, the first error is raised."""
    if errors and not shown:
        raise errors[0]
    for error in errors:
        print(f"left out: {error.where}: {error.what}", file=sys.stderr, flush=True)


def column_names(text: str) -> list[tuple[str, str]]:
    """`prompt=question,completion=answer`, or a mapping as recipes write it: `{prompt: question, completion: answer}`."""
    pairs = [pair.partition("=") for pair in re.split(r",(?=[\w-]+=)", text)]
    given = [(name.strip(), column.strip()) for name, _, column in pairs]
    if text.lstrip().startswith("{"):
        from tunesmith.config.tree import read_value

        given = list(read_value(text, where="--columns", base=Path()).plain().items())
    if not all(isinstance(part, str) and part for pair in given for part in pair):
        raise argparse.ArgumentTypeError(f"{text} is not name=column, such as prompt=question")
    return given


def add_rows(parser: argparse.ArgumentParser, *, batch_size: str) -> None:
    """How rows are read (`format_name`, `columns`) and how many are answered at once (`batch_size`)."""
    look = (
        "what a row looks like (default: as in training where its columns fit, else by their names)"
    )
    parser.add_argument(
        "--format", choices=("auto", *COLUMNS), default="auto", dest="format_name", help=look
    )
    names = "the file's name of a column: --columns prompt=question --columns completion=answer"
    parser.add_argument(
        "--columns",
        type=column_names,
        action="extend",
        default=[],
        metavar="NAME=COLUMN",
        help=names,
    )
    parser.add_argument(
        "--batch-size",
        type=whole_number,
        default=16,
        metavar="N",
        help=f"{batch_size} (default: 16)",
    )


# `columns: {name: column, ...}`, whose names may be in double quotes
_COLUMNS = re.compile(r"""\bcolumns: (\{(?:"(?:[^"\\]|\\.)*"|[^}"])*\})""")


def _columns_option(mapping: str) -> str:
    """The option for a mapping as recipes write it."""
    return "--columns " + shell_word(
        ",".join(f"{name}={column}" for name, column in column_names(mapping))
    )


@contextmanager
def fixes_as_options() -> Iterator[None]:
    """Fixes that name keys of a recipe name options instead, for commands that have no recipe."""
    try:
        yield
    except DataError as error:
        error.fix = re.sub(_COLUMNS, lambda match: _columns_option(match[1]), error.fix)
        error.fix = re.sub(r"\b(format|split): ", r"--\1 ", error.fix)
        raise


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """A recipe with overrides; or a model and rows, from which one is made."""
    recipe = "a recipe file, or the name of one that ships (see `tunesmith recipes`)"
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help=recipe)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe keys that win over the file's"
    )
    own = parser.add_argument_group("without a recipe: look at rows of your own, and make one")
    own.add_argument("--model", metavar="NAME", help="Hub id, folder or .gguf file")
    own.add_argument(
        "--data",
        metavar="FILE",
        action="append",
        help="json, jsonl, csv, parquet, arrow, or a Hub id",
    )
    own.add_argument(
        "--split", metavar="SPLIT", help="of a Hub data set, or a slice such as train[:1000]"
    )
    own.add_argument("--format", choices=COLUMNS, help="what a row looks like, where unclear")
    names = "which columns are meant, where unclear: prompt=question,completion=answer"
    own.add_argument(
        "--columns",
        type=column_names,
        action="extend",
        default=[],
        metavar="NAME=COLUMN",
        help=names,
    )


def chosen_recipe(
    args: argparse.Namespace, say: Callable[[str], None]
) -> "tuple[Run, MadeRecipe | None]":
    """The recipe that the options of `add_recipe` name; or one that is made, in its file's form too."""
    words = [word for word in (args.recipe, *args.overrides) if word is not None]
    given = [
        f"--{name}" for name in ("model", "data", "split", "format", "columns") if vars(args)[name]
    ]
    named = words[0] if words and not (given and "=" in words[0]) else None
    example = "tunesmith train --model HuggingFaceTB/SmolLM2-135M-Instruct --data faq.csv"
    if named is not None and given:
        what, fix = (
            f"a recipe and {given[0]} exclude each other",
            f"leave out {named}, or {', '.join(given)}",
        )
        why = f"{given[0]} is of those that make a recipe; keys of one that is there are given as key=value"
        raise UsageError(what, where="command line", why=why, fix=fix)
    if named is not None:
        from tunesmith.config.load import load_recipe

        return load_recipe(named, words[1:], say=say), None
    if not args.model or len(args.data or ()) != 1:
        what = "a recipe is needed, or one --model and one --data to make it from"
        if args.data and not args.model:
            what += "; --model is missing"
        elif args.model and not args.data:
            what += "; --data is missing"
        raise UsageError(
            what, where="command line", fix=f"tunesmith recipes lists recipes; or {example}"
        )
    from tunesmith.training.make_recipe import make_recipe

    how = {"split": args.split, "format": args.format, "columns": dict(args.columns)}
    words += [
        f"data.train.{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in how.items()
        if value
    ]
    with fixes_as_options():
        made = make_recipe(args.model, args.data[0], words)
    say(made.about_data)
    return made.run, made


def add_decoding(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """How tokens are chosen; greedy unless a temperature is given."""
    for flag, value, metavar, text in (
        ("--max-new-tokens", max_new_tokens, "N", f"longest answer (default: {max_new_tokens})"),
        (
            "--temperature",
            0.0,
            "T",
            "0 is greedy (default); 1.0 draws from the model's own probabilities",
        ),
        ("--top-p", 1.0, "P", "with a temperature: draw from the likeliest tokens that make up P"),
        ("--top-k", 0, "K", "with a temperature: draw from the K likeliest tokens"),
        ("--seed", 0, "N", "of the draws (default: 0)"),
    ):
        parser.add_argument(flag, type=type(value), default=value, metavar=metavar, help=text)


def decoding_of(args: argparse.Namespace) -> "Decoding":
    """The options of `add_decoding`, checked."""
    from tunesmith.inference.decoding import Decoding

    return Decoding(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed)


def stdin_lines() -> Iterator[tuple[int, str]]:
    """(number from 1, text) of every line that is not blank; UTF-8 in any locale, else DataError."""
    stream = sys.stdin.buffer if isinstance(sys.stdin, io.TextIOWrapper) else sys.stdin
    for number, line in enumerate(stream, 1):
        try:
            text = (
                line.decode("utf-8-sig" if number == 1 else "utf-8")
                if isinstance(line, bytes)
                else line
            )
        except UnicodeDecodeError as error:
            why = f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}: {error.reason}"
            fix = "convert it first: iconv -f latin1 -t utf-8 rows.jsonl | tunesmith ..."
            raise DataError(
                "the line is not UTF-8 text", where=f"stdin:{number}", why=why, fix=fix
            ) from None
        if text.strip():
            yield number, text


class ProgressCounter:
    """A count that goes up, on stderr: a bar on a terminal, a line every ten seconds elsewhere.

    `progress("answers", 7, 100)` in its block; another name starts another count, from where its first call says.
    """

    def __enter__(self) -> "ProgressCounter":
        self._what, self._done, self._start, self._bar = "", 0, 0, None
        if is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
        return self

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` are done."""
        now = time.monotonic()
        if what != self._what:
            self._line()
            self._what, self._start, self._began, self._printed = what, done, now, now
            self._task = (
                self._bar.add_task(what, total=total, completed=done) if self._bar else None
            )
        self._done, self._total = done, total
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done)
        elif now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            self._line()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar:
            self._bar.stop()
        elif kind is None:
            self._line()

    def _line(self) -> None:
        if self._bar is None and self._done > self._start:
            rate = (self._done - self._start) / max(time.monotonic() - self._began, 1e-9)
            print(
                f"{self._what}: {self._done}/{self._total}  {rate:.1f}/s",
                file=sys.stderr,
                flush=True,
            )
