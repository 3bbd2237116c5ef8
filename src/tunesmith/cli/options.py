"""Shared parts of the commands: options and their types, notes, tables, stdin and progress."""

import argparse
import io
import logging
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.config.row_formats import FORMAT_COLUMNS
from tunesmith.distributed.ranks import started_as
from tunesmith.errors import DataError, UsageError
from tunesmith.host.logger import PACKAGE
from tunesmith.host.shell import shell_path
from tunesmith.host.streams import is_terminal, show, visible
from tunesmith.units import format_seconds

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from tunesmith.answers.load_run import RunLocation

# Seconds between two progress lines if stderr is not a terminal.
SECONDS_BETWEEN_LINES = 10.0
# Fraction of the work after which the remaining time is shown. An earlier estimate would be too
# low, because the first answer of a batch is much shorter than the others.
MIN_DONE_FRACTION = 0.1


def require_folder(folder: Path, option: str) -> None:
    """Raise UsageError if `folder`, in which the file of an option is written, does not exist."""
    if not folder.is_dir():
        raise UsageError(
            f"there is no folder {folder}", where=option, fix=f"mkdir -p {shell_path(folder)}"
        )


def notify(text: str) -> None:
    """Print a note for the user on stderr, because stdout is for results."""
    show(text, sys.stderr)


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Print the rows of a table in aligned columns.

    On a terminal the last column is broken into several lines. In a pipe each row is one line, for
    use with grep.
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
    """Return whether this process prints to the user. Only rank 0 does."""
    ranks = started_as()
    return ranks is None or ranks["RANK"] == 0


def notify_weights(location: "RunLocation") -> None:
    """Print which weights of a run are used, unless they are the final weights."""
    if location.is_note_shown and is_main_process():
        notify(location.note)


def leave_lines_to_rank_0() -> None:
    """Let all ranks except rank 0 log only warnings, until the command ends."""
    if not is_main_process():
        PACKAGE.setLevel(logging.WARNING)


def whole_number(text: str) -> int:
    """Convert the text of an option to an integer of at least 1."""
    with suppress(ValueError):
        if (value := int(text)) >= 1:
            return value
    raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")


def add_json(options: argparse._ActionsContainer) -> None:
    """Add the option --json to a parser or to a group of options."""
    options.add_argument(
        "--json", action="store_true", help="print the result as JSON on stdout, for scripts"
    )


def add_columns(options: argparse._ActionsContainer) -> None:
    """Add the option --columns, which maps column names of a row format to names in the user's
    file.
    """
    options.add_argument(
        "--columns",
        type=column_names,
        action="extend",
        default=[],
        metavar="NAME=COLUMN",
        help="names of the columns in the file, such as prompt=question,completion=answer",
    )


def add_run(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add the argument RUN, and the options that control how a run is loaded.

    Args:
        several: accept several runs, in `args.runs` instead of `args.run`.
    """
    forms = "run directory, checkpoint, final/, adapter or model folder"
    if several:
        parser.add_argument("runs", nargs="+", metavar="RUN", help=forms)
    else:
        parser.add_argument("run", metavar="RUN", help=forms)
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="device, such as cpu, cuda or cuda:1 (default: cuda if available)",
    )
    add_trust(parser)


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add the option that lets a command run the code of another person."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with a model or a recipe; review the code first",
    )


def report_unreadable(errors: Sequence[UsageError], *, shown: int) -> None:
    """Print which of several runs could not be opened.

    Raise the first error if no run was opened.
    """
    if errors and not shown:
        raise errors[0]
    for error in errors:
        notify(f"{error.where} is skipped: {error.what}")


def column_names(text: str) -> list[tuple[str, str]]:
    """Parse the option --columns, such as `prompt=question,completion=answer`."""
    # Split only at a comma before "name=", because the name of a column may contain a comma.
    words = (pair.partition("=") for pair in re.split(r",(?=\s*[\w-]+=)", text))
    pairs = [(name.strip(), column.strip()) for name, _, column in words]
    for pair in pairs:
        if not all(pair):
            raise argparse.ArgumentTypeError(
                f"{text} does not have the form name=column, for example prompt=question"
            )
    return pairs


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Add the options for the row format, the columns and the batch size."""
    formats = ("auto", *FORMAT_COLUMNS)
    parser.add_argument(
        "--format",
        choices=formats,
        default="auto",
        dest="format_name",
        metavar="FORMAT",
        help=f"format of the rows: one of {', '.join(formats)}; auto (the default) uses the run's "
        "format if the columns match, else detects the format",
    )
    add_columns(parser)
    parser.add_argument(
        "--batch-size",
        type=whole_number,
        default=16,
        metavar="N",
        help="number of rows that are answered at once (default: 16)",
    )


def check_not_given(
    args: argparse.Namespace,
    names: Iterable[str],
    what: str,
    *,
    fix: str = "remove {option}",
) -> None:
    """Raise UsageError if the user has given one of the options `names`.

    Args:
        names: the options, as names of attributes of `args`.
        what: the predicate of the error message, such as "requires --data".
        fix: the fix, in which `{option}` is replaced by the option.
    """
    for name in names:
        option = args.typed.get(name)
        if option:
            fix = fix.format(option=option)
            raise UsageError(f"{option} {what}", where=f"command line: {option}", fix=fix)


def add_decoding(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """Add the options of decoding. Decoding is greedy if there is no temperature."""
    options = {
        "--max-new-tokens": (
            max_new_tokens,
            "N",
            f"maximum number of tokens of an answer (default: {max_new_tokens})",
        ),
        "--temperature": (
            0.0,
            "T",
            "0 (the default) is greedy decoding; 1.0 samples from the model's probabilities",
        ),
        "--top-p": (
            1.0,
            "P",
            "if a temperature is set: sample from the most likely tokens with a total "
            "probability of P",
        ),
        "--top-k": (0, "K", "if a temperature is set: sample from the K most likely tokens"),
        "--seed": (0, "N", "random seed (default: 0)"),
    }
    for option, (default, metavar, text) in options.items():
        parser.add_argument(option, type=type(default), default=default, metavar=metavar, help=text)


def stdin_lines() -> Iterator[tuple[int, str]]:
    """Yield the number (from 1) and the text of every non-blank line of stdin.

    The lines are decoded as UTF-8 in every locale. Raise DataError if a line is not UTF-8.
    """
    stream = sys.stdin.buffer if isinstance(sys.stdin, io.TextIOWrapper) else sys.stdin
    for number, line in enumerate(stream, 1):
        text = line
        if isinstance(line, bytes):
            try:
                # Remove a byte order mark from the first line.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    "the line is not UTF-8 text",
                    where=f"stdin:{number}",
                    why=str(error),
                    fix="convert the text to UTF-8, for example with "
                    "`iconv -f cp1252 -t utf-8 rows.jsonl | tunesmith ...`",
                ) from None
        if text.strip():
            yield number, text


class ProgressCounter:
    """Progress display on stderr: a bar on a terminal, else a line every ten seconds.

    Use it as a context manager, and call `progress("answers", 7, 100)` inside the `with` block. A
    new name starts a new count. The count begins with the number in the first call with this name.
    If the number of tokens is given, the speed is also shown in tokens per second.
    """

    _what = ""
    _start = 0
    _began = 0.0
    _shown = 0.0
    _line = ""  # the newest line, which is not yet printed
    _bar: "Progress | None" = None
    _task: "TaskID | None" = None

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
        """Show that `count` of `total` items are complete.

        Args:
            what: the name of the items.
            tokens: the number of tokens generated since the first call.
        """
        now = time.monotonic()
        if what != self._what:
            # A new count begins, so print the last line of the previous count.
            self._show()
            self._what = what
            self._start = count
            self._began = self._shown = now
            if self._bar is not None:
                self._task = self._bar.add_task(what, total=total, completed=count, speed="")
        # Compute the rate only from the items of this process. If the work was resumed, `_start`
        # items were already done.
        rate = (count - self._start) / max(now - self._began, 1e-9)
        speed = f"{tokens / max(now - self._began, 1e-9):,.0f} tokens/s" if tokens else ""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=count, speed=speed)
        elif rate:
            parts = [f"{what}: {count}/{total}", f"{rate:.1f}/s", speed]
            if MIN_DONE_FRACTION * (total - self._start) <= count - self._start and count < total:
                parts.append(f"about {format_seconds((total - count) / rate)} left")
            self._line = "  ".join(filter(None, parts))
            # Print a line only every SECONDS_BETWEEN_LINES, because the output may be a log file.
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
