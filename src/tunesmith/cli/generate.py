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
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tunesmith.cli.options import add_decoding, add_rows, add_run, decoding_of, stdin_lines
from tunesmith.errors import EXIT_OK, EXIT_STOPPED, DataError, MachineError, UsageError

if TYPE_CHECKING:
    from tunesmith.data.source import Rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    rows_help = "rows: jsonl, json, csv, parquet; - is stdin (jsonl)"
    parser.add_argument("--input", required=True, metavar="FILE", help=rows_help)
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
    options = {"format_name": args.format_name, "batch_size": args.batch_size, "cancelled": stop.requested}
    answers = generate(loaded, rows, decoding, start=done, **options)
    if location.note:
        print(location.note, file=sys.stderr)
    print(f"{len(rows) - done} rows, {decoding.describe()}", file=sys.stderr)
    with _open_output(output, "a" if done else "w") as file, stop, ProgressCounter() as progress:
        progress("answers", done, len(rows))
        for row in answers:
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            file.flush()
            done += 1
            progress("answers", done, len(rows))
    if done < len(rows):
        name = output or "the output"
        print(f"stopped: {done} of {len(rows)} rows are in {name}; go on with --resume", file=sys.stderr)
        return EXIT_STOPPED
    return EXIT_OK


def _open_output(output: Path | None, mode: str) -> AbstractContextManager[IO[str]]:
    """The file or stdout, which stays open; half a character (a lone surrogate) is written as its JSON escape."""
    if output is None:
        return nullcontext(sys.stdout)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        return output.open(mode, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        what, fix = f"{output} cannot be written", "name a file that you may write"
        raise MachineError(what, where="--output", why=str(error), fix=fix) from error


def _read_input(name: str) -> Rows:
    """Rows of a file, or JSON lines from stdin; DataError where there is none, or one is broken."""
    from tunesmith.config.schema import Source
    from tunesmith.data.source import from_list, read_rows

    if name != "-":
        path, fix = Path(name), "name a jsonl, json, csv or parquet file, or - for stdin"
        if not path.is_file():
            raise DataError(f"there is no file {name}", where=name, fix=fix)
        return read_rows(Source(source=str(path.absolute())))
    rows, fix = [], 'send one JSON object a line: {"prompt": "..."}'
    for number, line in stdin_lines():
        try:
            row, why = json.loads(line), ""
        except ValueError as error:
            row, why = None, str(error)
        if not isinstance(row, dict):
            raise DataError("the line is not a JSON object", where=f"stdin:{number}", why=why, fix=fix)
        rows.append(row)
    if not rows:
        raise DataError("stdin holds no rows", where="stdin", fix=fix)
    return from_list(rows, "stdin")


def _rows_done(output: Path | None, rows: Rows, args: argparse.Namespace) -> int:
    """How many leading rows the output already answers; an incomplete last line is removed."""
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
            what, fix = "the output answers other rows than the input holds", "name its own input, or add --force"
            raise UsageError(what, where=f"{output}:{i + 1}", fix=fix)
    os.truncate(output, len(complete))
    return len(lines)


def _is_answer_to(line: bytes, row: dict[str, Any]) -> bool:
    fields = json.loads(json.dumps(row, default=str)).items()
    try:
        written = json.loads(line)
    except ValueError:
        return False
    asked = {name: value for name, value in fields if name not in ("output", "reference")}
    return isinstance(written, dict) and "output" in written and asked.items() <= written.items()
