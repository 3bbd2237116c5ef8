"""Share options and their types, notes, columns, lines of stdin and a progress count."""

import argparse
import io
import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.config.row_formats import FORMAT_COLUMNS
from tunesmith.config.tree import read_value
from tunesmith.distributed.ranks import started_as
from tunesmith.errors import DataError, UsageError
from tunesmith.host.logger import PACKAGE
from tunesmith.host.shell import shell_path, shell_word
from tunesmith.host.streams import is_terminal, show, visible
from tunesmith.units import format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from tunesmith.inference.load_run import RunLocation

# Of progress, without a terminal.
SECONDS_BETWEEN_LINES = 10.0
# The time left is shown once this share of the work is done: of answers that are written in one
# batch, the first one to end says nothing of the others.
TELLING_SHARE = 0.1


def require_folder(folder: Path, option: str) -> None:
    """UsageError where the folder of a file that an option names is not there."""
    if not folder.is_dir():
        fix = f"mkdir -p {shell_path(folder)}"
        raise UsageError(f"there is no folder {folder}", where=option, fix=fix)


def notify(text: str) -> None:
    """A note to the user, on stderr: stdout is for answers."""
    show(text, sys.stderr)


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in aligned columns; on a terminal the last one is folded, in a pipe each row is a
    line, for grep.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for *cells, last in rows:
        line = ""
        for cell, width in zip(cells, widths, strict=False):
            line += f"{cell:<{width}}  "
        if sys.stdout.isatty():
            show(line + last, sys.stdout, indent=len(line))
        else:
            print(visible(line + last))


def is_main_process() -> bool:
    """Tell whether this process speaks to the user: of several ranks rank 0 does."""
    ranks = started_as()
    return ranks is None or ranks["RANK"] == 0


def notify_weights(location: "RunLocation") -> None:
    """Say which weights stand for a run, where they are not those of its end."""
    if location.is_worth_telling and is_main_process():
        notify(location.note)


def leave_lines_to_rank_0() -> None:
    """On another rank log warnings alone, until the command ends."""
    if not is_main_process():
        PACKAGE.setLevel(logging.WARNING)


def whole_number(text: str) -> int:
    """A count of at least 1."""
    with suppress(ValueError):
        if (value := int(text)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")


def add_json(options: argparse._ActionsContainer) -> None:
    """The result for scripts, on stdout; an option of a parser or of one of its groups."""
    options.add_argument(
        "--json", action="store_true", help="print the result as JSON on stdout, for scripts"
    )


def add_columns(options: argparse._ActionsContainer) -> None:
    """Names of a format's columns in the user's file."""
    names = "column names in the file: prompt=question,completion=answer"
    options.add_argument(
        "--columns",
        type=column_names,
        action="extend",
        default=[],
        metavar="NAME=COLUMN",
        help=names,
    )


def add_run(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add RUN, or `several` of them as `runs`, and the options of how a run is loaded."""
    forms = "run directory, checkpoint, final/, adapter or model folder"
    if several:
        parser.add_argument("runs", nargs="+", metavar="RUN", help=forms)
    else:
        parser.add_argument("run", metavar="RUN", help=forms)
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda if available)"
    )
    trust = "run Python code that comes with the base model, which you have reviewed"
    parser.add_argument("--trust-remote-code", action="store_true", help=trust)


def report_unreadable(errors: Sequence[UsageError], *, shown: int) -> None:
    """Print which of several runs could not be opened; if none could, raise the first error."""
    if errors and not shown:
        raise errors[0]
    for error in errors:
        notify(f"left out: {error.where}: {error.what}")


def column_names(text: str) -> list[tuple[str, str]]:
    """`prompt=question,completion=answer`, or a mapping as recipes write it.

    That is `{prompt: question, completion: answer}`.
    """
    if text.lstrip().startswith("{"):
        pairs = list(read_value(text, where="--columns", base=Path()).plain().items())
    else:
        pairs = []
        # A column's name may hold a comma.
        for pair in re.split(r",(?=[\w-]+=)", text):
            name, _, column = pair.partition("=")
            pairs.append((name.strip(), column.strip()))
    for pair in pairs:
        if not all(isinstance(part, str) and part for part in pair):
            raise argparse.ArgumentTypeError(f"{text} is not name=column, such as prompt=question")
    return pairs


def add_rows(parser: argparse.ArgumentParser, *, batch_size: str) -> None:
    """Add how rows are read (`format_name`, `columns`) and how many are answered at once."""
    formats = ("auto", *FORMAT_COLUMNS)
    parser.add_argument(
        "--format",
        choices=formats,
        default="auto",
        dest="format_name",
        metavar="FORMAT",
        help=f"one of {', '.join(formats)} (default: auto, as in training where its columns fit, "
        "else as `train` finds them)",
    )
    add_columns(parser)
    parser.add_argument(
        "--batch-size",
        type=whole_number,
        default=16,
        metavar="N",
        help=f"{batch_size} (default: 16)",
    )


# `columns: {name: column, ...}`, whose names may be in double quotes.
_COLUMNS_PATTERN = re.compile(r"""\bcolumns: (\{(?:"(?:[^"\\]|\\.)*"|[^}"])*\})""")


def _columns_option(mapping: str) -> str:
    """The option for a mapping as recipes write it."""
    pairs = ",".join(f"{name}={column}" for name, column in column_names(mapping))
    return f"--columns {shell_word(pairs)}"


@contextmanager
def fixes_as_options() -> Iterator[None]:
    """Fixes that name keys of a recipe name options instead, for commands that have no recipe."""
    try:
        yield
    except DataError as error:
        error.fix = re.sub(_COLUMNS_PATTERN, lambda match: _columns_option(match[1]), error.fix)
        error.fix = re.sub(r"\bsource: ", "--data ", error.fix)
        error.fix = re.sub(r"\b(format|split): ", r"--\1 ", error.fix)
        raise


def check_not_given(
    args: argparse.Namespace,
    names: Iterable[str],
    what: str,
    *,
    fix: str = "remove {option}",
) -> None:
    """UsageError for the first of these options that is given.

    what: the predicate of the error's sentence, such as "is for a whole model".
    names: attributes of `args`.
    """
    for name in names:
        option = args.typed.get(name)
        if option:
            fix = fix.format(option=option)
            raise UsageError(f"{option} {what}", where=f"command line: {option}", fix=fix)


def add_decoding(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """Add the options of how tokens are chosen; greedy without a temperature."""
    longest = f"longest answer (default: {max_new_tokens})"
    temperature = "0 is greedy (default); 1.0 samples from the model's probabilities"
    top_p = "with a temperature: sample from the likeliest tokens with total probability P"
    top_k = "with a temperature: sample from the K likeliest tokens"
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=longest)
    add("--temperature", type=float, default=0.0, metavar="T", help=temperature)
    add("--top-p", type=float, default=1.0, metavar="P", help=top_p)
    add("--top-k", type=int, default=0, metavar="K", help=top_k)
    add("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")


def stdin_lines() -> Iterator[tuple[int, str]]:
    """(number from 1, text) of every line that is not blank.

    It is read as UTF-8 in any locale, else DataError.
    """
    stream = sys.stdin.buffer if isinstance(sys.stdin, io.TextIOWrapper) else sys.stdin
    for number, line in enumerate(stream, 1):
        text = line
        if isinstance(line, bytes):
            try:
                # A byte order mark is no part of the first line.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}"
                raise DataError(
                    "the line is not UTF-8 text",
                    where=f"stdin:{number}",
                    why=f"{byte}: {error.reason}",
                    fix="convert it first: iconv -f cp1252 -t utf-8 rows.jsonl | tunesmith ...",
                ) from None
        if text.strip():
            yield number, text


class ProgressCounter:
    """A count that goes up, on stderr: a bar on a terminal, a line every ten seconds elsewhere.

    `progress("answers", 7, 100)` in its block; another name starts another count, from where its
    first call says. With the tokens since then, the speed is in tokens too.
    """

    def __init__(self) -> None:
        self._what = ""
        self._start = 0
        self._began = 0.0
        self._shown = 0.0
        self._line = ""  # that is still to be shown
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "ProgressCounter":
        if is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.start()
        return self

    def __call__(self, what: str, count: int, total: int, tokens: int = 0) -> None:
        """`count` of `total` are complete, with `tokens` written for them since the first call."""
        now = time.monotonic()
        if what != self._what:
            # Another task begins: the line of the last one is completed.
            self._show()
            self._what = what
            self._start = count
            self._began = self._shown = now
            if self._bar is not None:
                self._task = self._bar.add_task(what, total=total, completed=count, speed="")
        # The rate is that of this start: answers of an earlier one do not count.
        rate = (count - self._start) / max(now - self._began, 1e-9)
        speed = f"{tokens / max(now - self._began, 1e-9):,.0f} tokens/s" if tokens else ""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=count, speed=speed)
        elif rate:
            parts = [f"{what}: {count}/{total}", f"{rate:.1f}/s", speed]
            if TELLING_SHARE * (total - self._start) <= count - self._start and count < total:
                parts.append(f"about {format_seconds((total - count) / rate)} left")
            self._line = "  ".join(filter(None, parts))
            # As in a log, lines come seldom.
            if now - self._shown >= SECONDS_BETWEEN_LINES:
                self._shown = now
                self._show()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            self._show()

    def _show(self) -> None:
        if self._line:
            notify(self._line)
        self._line = ""
