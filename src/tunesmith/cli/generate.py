"""Answer every row of a file.

example:
  tunesmith generate runs/my-run --input questions.jsonl --output answers.jsonl
  tunesmith generate runs/my-run --input questions.jsonl --output answers.jsonl --resume
  echo '{"prompt": "Say hello"}' | tunesmith generate runs/my-run --input - --output -

Each output row is the input row with `output` added, and `reference` where the row held an answer. Rows are written
as they are ready, in the order of the input; ctrl-C keeps what is written, and --resume goes on from there.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tunesmith.cli.options import add_decoding, add_rows, add_run, decoding_of, stdin_lines
from tunesmith.errors import EXIT_OK, EXIT_STOPPED, DataError, MachineError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunesmith.data.source import Rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument(
        "--input", required=True, metavar="FILE", help="rows: jsonl, json, csv, parquet; - is stdin (jsonl)"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="where answers go (jsonl); - is stdout")
    parser.add_argument("--base", action="store_true", help="ask the base model, without what was trained")
    add_rows(parser, batch_size="rows answered at once")
    add_decoding(parser, max_new_tokens=256)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="keep the rows that are already in the output")
    existing.add_argument("--force", action="store_true", help="overwrite the output")


def run(args: argparse.Namespace) -> int:
    from tunesmith.inference.load_run import locate_run

    location = locate_run(args.run, base_only=args.base)
    rows = _read_input(args.input)
    output = None if args.output == "-" else Path(args.output)
    done = _rows_done(output, rows, args)
    if done == len(rows) and args.resume:
        print(f"all {done} rows are already in {output}", file=sys.stderr)
        return EXIT_OK

    from tunesmith.cli.progress import ProgressCounter
    from tunesmith.inference.generate import generate
    from tunesmith.inference.load_run import load_run
    from tunesmith.signals import StopRequest

    decoding, stop = decoding_of(args), StopRequest(interactive=True)
    loaded = load_run(location, device=args.device)
    options = {
        "format_name": args.format_name,
        "batch_size": args.batch_size,
        "start": done,
        "cancelled": stop.requested,
    }
    answers = generate(loaded, rows, decoding, **options)
    if location.note:
        print(location.note, file=sys.stderr)
    print(f"{len(rows) - done} rows, {decoding.describe()}", file=sys.stderr)
    with _open_output(output, append=done > 0) as file, stop, ProgressCounter() as progress:
        progress("answers", done, len(rows))
        for row in answers:
            file.write(_json_line(row))
            file.flush()
            done += 1
            progress("answers", done, len(rows))
    if done < len(rows):
        name = output or "the output"
        print(f"stopped: {done} of {len(rows)} rows are in {name}; go on with --resume", file=sys.stderr)
        return EXIT_STOPPED
    return EXIT_OK


def _json_line(row: dict[str, Any]) -> str:
    line = json.dumps(row, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a character (a lone surrogate) in a field that no prompt uses: escape it
        line = json.dumps(row, default=str)
    return line + "\n"


def _read_input(name: str) -> Rows:
    """Rows of a file, or JSON lines from stdin.

    Raises:
        DataError: it cannot be read, a line is broken, or there is none.
    """
    from tunesmith.config.schema import Source
    from tunesmith.data.source import from_list, read_rows

    if name != "-":
        path = Path(name)
        if not path.is_file():
            fix = "name a jsonl, json, csv or parquet file, or - for stdin"
            raise DataError(f"there is no file {name}", where=name, fix=fix)
        return read_rows(Source(source=str(path.absolute())))
    rows = []
    for number, line in stdin_lines():
        where, fix = f"stdin:{number}", 'write one JSON object a line: {"prompt": "..."}'
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError("the line is not JSON", where=where, why=str(error), fix=fix) from error
        if not isinstance(row, dict):
            raise DataError("the line is not a JSON object", where=where, fix=fix)
        rows.append(row)
    if not rows:
        raise DataError("stdin holds no rows", where="stdin", fix="send one JSON object a line")
    return from_list(rows, "stdin")


def _rows_done(output: Path | None, rows: Rows, args: argparse.Namespace) -> int:
    """How many leading rows are already answered; an incomplete last line is removed.

    Raises:
        UsageError: the output is there and neither --resume nor --force was given, or it answers other rows.
    """
    if output is None:
        if args.resume:
            raise UsageError("--resume needs an output file", where="--output -", fix="name a file")
        return 0
    if args.input != "-" and output.exists() and output.samefile(args.input):
        raise UsageError("input and output are the same file", where="--output", fix="name another file")
    if output.is_dir():
        raise UsageError(f"{output} is a folder", where="--output", fix="name a file in it")
    if not output.exists() or args.force or output.stat().st_size == 0:
        return 0
    if not args.resume:
        fix = "add --resume to go on with it, --force to overwrite it, or name another file"
        raise UsageError(f"{output} is already there", where="--output", fix=fix)
    data = output.read_bytes()
    complete = data[: data.rfind(b"\n") + 1]
    lines = complete.splitlines()
    for i, line in enumerate(lines):
        if i >= len(rows) or not _is_answer_to(line, rows[i]):
            raise UsageError(
                "the output answers other rows than the input holds",
                where=f"{output}:{i + 1}",
                fix="give the input that it was made from, or --force to start over",
            )
    if len(complete) < len(data):
        with output.open("r+b") as file:
            file.truncate(len(complete))
    return len(lines)


def _is_answer_to(line: bytes, row: dict[str, Any]) -> bool:
    try:
        written = json.loads(line)
    except ValueError:
        return False
    fields = json.loads(json.dumps(row, default=str)).items()
    same = (
        all(written.get(k) == v for k, v in fields if k not in ("output", "reference"))
        if isinstance(written, dict)
        else False
    )
    return same and "output" in written


@contextmanager
def _open_output(output: Path | None, *, append: bool) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        file = output.open("a" if append else "w", encoding="utf-8")
    except OSError as error:
        what, fix = f"{output} cannot be written", "name a file that you may write"
        raise MachineError(what, where="--output", why=str(error), fix=fix) from error
    with file:
        yield file
