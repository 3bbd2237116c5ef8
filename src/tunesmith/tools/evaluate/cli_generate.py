"""Generate an answer for every row of a file.

example:
  tunesmith generate runs/my-run --input questions.jsonl --output answers.jsonl
  tunesmith generate runs/my-run --input questions.jsonl \\
    --output answers.jsonl --resume
  echo '{"prompt": "Say hello"}' |
    tunesmith generate runs/my-run --input - --output -

Each output row is the input row with `output` added, and `reference` if the row
had an answer. Rows are written in input order as soon as they are ready; after
ctrl-C, --resume continues.
"""

import argparse
import json
import sys
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

from tunesmith.cli import options
from tunesmith.config.schema import Source
from tunesmith.data.rows.detect import sample_rows
from tunesmith.data.source.open_source import Rows, from_list, read_rows
from tunesmith.errors import (
    DataError,
    StoppedError,
    UsageError,
)
from tunesmith.host.signals import StopRequest
from tunesmith.host.streams import visible
from tunesmith.inference.load_run import load_run, locate_run, that_sees
from tunesmith.tools.evaluate.resumed_file import ResumedFile, write_error
from tunesmith.units import count_of

LOADS_TORCH = "here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_run(parser)
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="jsonl, json, csv, parquet; - is stdin (jsonl)",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="output file (jsonl); - is stdout"
    )
    parser.add_argument(
        "--base", action="store_true", help="answer with the base model instead of the tuned one"
    )
    options.add_rows(parser, batch_size="rows answered at once")
    options.add_decoding(parser, max_new_tokens=256)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="keep the rows that are already in the output"
    )
    existing.add_argument("--force", action="store_true", help="overwrite the output")


def run(args: argparse.Namespace) -> None:
    location = locate_run(args.run, base_only=args.base, trust_remote_code=args.trust_remote_code)
    rows = _read_input(args.input)
    output = None if args.output == "-" else Path(args.output)
    check_output(output, args)
    sink = ResumedFile(output) if output and not _is_stream(output) else _Stream(output)
    # Rows that are answered already need no model.
    answer_count = _answered_rows(sink, rows, args)
    if answer_count == len(rows) and args.resume:
        options.notify(f"{count_of(len(rows), 'row')}, i.e. all of them, are already in {output}")
        return
    from tunesmith.tools.evaluate.decoding_options import decoding_of
    from tunesmith.tools.evaluate.generate import generate

    decoding = decoding_of(args)
    location = that_sees(location, sample_rows(rows)[0].values())
    stop = StopRequest(interactive=True)
    # An output that cannot be written is reported before the model is loaded.
    with sink:
        loaded = load_run(location, device=args.device)
        with options.fixes_as_options():
            answers = generate(
                loaded,
                rows,
                decoding,
                format_name=args.format_name,
                columns=dict(args.columns) or None,
                batch_size=args.batch_size,
                start=answer_count,
                cancelled=stop.requested,
            )
        if location.note:
            options.notify(location.note)
        rows_left = count_of(len(rows) - answer_count, "row")
        print(f"{rows_left}, {decoding.describe()}", file=sys.stderr)
        with stop, options.ProgressCounter() as progress:
            progress("answers", answer_count, len(rows))
            for row in answers:
                sink.write(row, why=f"it holds {answer_count} of {count_of(len(rows), 'row')}")
                answer_count += 1
                progress("answers", answer_count, len(rows))
    if answer_count < len(rows):
        go_on = ""
        if output and output.is_file():
            go_on = "; to continue, run the same command again with --resume"
            go_on += " instead of --force" if args.force else ""
        held = f"{answer_count} of {count_of(len(rows), 'row')}"
        raise StoppedError(f"stopped: {output or 'standard output'} holds {held}{go_on}")


def _is_stream(output: Path) -> bool:
    """Tell whether it is a pipe or device: it can be written to, but not read again."""
    return output.exists() and not (output.is_file() or output.is_dir())


class _Stream:
    """Standard output, a pipe or a device, which takes a line for each answer. A context."""

    lines: tuple[bytes, ...] = ()
    torn = b""

    def __init__(self, output: Path | None) -> None:
        self.name = str(output or "standard output")
        self.file = sys.stdout if output is None else output.open("w", encoding="utf-8")

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not sys.stdout:
            with suppress(OSError):
                self.file.close()

    def write(self, record: dict[str, object], *, why: str = "") -> None:
        line = _line(record)
        try:
            print(visible(line) if self.file.isatty() else line, end="", file=self.file, flush=True)
        except BrokenPipeError:
            raise  # the reader of a pipe has gone: that is its end, and no fault
        except OSError as error:
            raise write_error(self.name, error, why) from error


def _line(record: dict[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def _read_input(name: str) -> Rows:
    """Rows of a file, or JSON lines from stdin; DataError where there is none, or one is broken."""
    if name != "-":
        path = Path(name)
        if not path.is_file():
            fix = "name a jsonl, json, csv or parquet file, or - for stdin"
            raise DataError(f"there is no file {name}", where=name, fix=fix)
        return read_rows(Source(source=str(path.absolute())))
    fix = 'send one JSON object per line: {"prompt": "..."}'
    rows = []
    for number, line in options.stdin_lines():
        row = None
        why = ""
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = str(error)
        if not isinstance(row, dict):
            what = "the line is not a JSON object"
            raise DataError(what, where=f"stdin:{number}", why=why, fix=fix)
        rows.append(row)
    if not rows:
        raise DataError("stdin has no rows", where="stdin", fix=fix)
    return from_list(rows, "stdin")


def check_output(output: Path | None, args: argparse.Namespace) -> None:
    """UsageError for an output that cannot be gone on with, or that is the input."""
    where = "--output"
    if args.resume and (output is None or _is_stream(output)):
        place = f"{where} {args.output}"
        raise UsageError("--resume requires an output file", where=place, fix="name a file")
    if output is None:
        return
    # Opening the output would empty the input.
    if args.input != "-" and output.exists() and output.samefile(args.input):
        raise UsageError("input and output are the same file", where=where, fix="name another file")


def _answered_rows(file: "ResumedFile | _Stream", rows: Rows, args: argparse.Namespace) -> int:
    """Count the rows that --resume finds answered in the output, without a last line cut off.

    With --force the file will begin anew.
    """
    if args.force:
        file.lines = []
        return 0
    if not file.lines and not file.torn:
        return 0
    if not args.resume:
        fix = "add --resume to continue it, --force to overwrite it, or use another file"
        raise UsageError(f"{args.output} already exists", where="--output", fix=fix)
    # The output must begin with answers to the rows, in their order.
    matching = 0
    end = min(len(file.lines), len(rows))
    while matching < end and _is_answer_to(file.lines[matching], rows[matching]):
        matching += 1
    is_torn = matching < len(rows) and _begins_answer_to(file.torn, rows[matching])
    if matching < len(file.lines) or (file.torn and not is_torn):
        what = "the rows in the output differ from those in the input"
        fix = "use the input it was made from, or --force instead of --resume"
        raise UsageError(what, where=f"{args.output}:{matching + 1}", fix=fix)
    return matching


def _is_answer_to(line: bytes, row: dict[str, object]) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    if not isinstance(record, dict) or "output" not in record:
        return False
    # As the record was written: a date of the row is text there.
    fields = json.loads(json.dumps(row, default=str))
    fields.pop("output", None)
    fields.pop("reference", None)
    return bool(fields.items() <= record.items())


def _begins_answer_to(line: bytes, row: dict[str, object]) -> bool:
    """Tell whether an incomplete line is the beginning of the record that answers `row`."""
    fields = dict(takewhile(lambda item: item[0] != "output", row.items()))
    record = _line({**fields, "output": ""}).removesuffix('"}\n')
    start = record.encode("utf-8", "backslashreplace")
    return line.startswith(start) or start.startswith(line)
