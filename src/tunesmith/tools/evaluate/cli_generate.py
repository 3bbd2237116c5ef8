"""Generate an answer for every row of a file.

example:
  tunesmith generate runs/my-run --input questions.jsonl --output answers.jsonl
  tunesmith generate runs/my-run --input questions.jsonl \\
    --output answers.jsonl --resume
  echo '{"prompt": "Say hello"}' |
    tunesmith generate runs/my-run --input - --output -

Each output row is the input row with the key `output` added, and the key
`reference` if the row had an answer. Rows are written in input order as soon as
they are ready. After ctrl-C, --resume continues.
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
from tunesmith.errors import DataError, StoppedError, UsageError
from tunesmith.host.signals import StopRequest
from tunesmith.host.streams import visible
from tunesmith.inference.load_run import add_vision_if_needed, load_run, locate_run
from tunesmith.tools.evaluate.resumed_file import ResumedFile, write_error
from tunesmith.units import count_of

LOADS_TORCH = "here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_run(parser)
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="file of rows: jsonl, json, csv or parquet; - reads jsonl from stdin",
    )
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="output file (jsonl); - writes to stdout"
    )
    parser.add_argument(
        "--base", action="store_true", help="answer with the base model, not with the tuned model"
    )
    options.add_rows(parser)
    options.add_decoding(parser, max_new_tokens=256)
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue an output file: answer only the rows without an answer",
    )
    existing.add_argument("--force", action="store_true", help="overwrite an existing output file")


def run(args: argparse.Namespace) -> None:
    location = locate_run(args.run, base_only=args.base, trust_remote_code=args.trust_remote_code)
    rows = _read_input(args.input)
    output = None if args.output == "-" else Path(args.output)
    check_output(output, args)
    answer_count = 0
    if output is None or _is_stream(output):
        sink: _Stream | ResumedFile = _Stream(output)
    else:
        sink = ResumedFile(output)
        answer_count = _answered_rows(sink, rows, args)
    # If all rows are already answered, do not load the model.
    if answer_count == len(rows) and args.resume:
        options.notify(f"all answers are already in {output} ({count_of(len(rows), 'row')})")
        return
    from tunesmith.tools.evaluate.decoding_options import read_decoding
    from tunesmith.tools.evaluate.generate import generate

    decoding = read_decoding(args)
    location = add_vision_if_needed(location, sample_rows(rows)[0].values())
    stop = StopRequest(interactive=True)
    # Open the output before the model is loaded, so that the user gets the error for an unwritable
    # output early.
    with sink:
        loaded = load_run(location, device=args.device)
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
                held = f"{answer_count} of {count_of(len(rows), 'row')}"
                sink.write(row, why=f"the output holds answers to {held}")
                answer_count += 1
                progress("answers", answer_count, len(rows))
    if answer_count < len(rows):
        resume_hint = ""
        if output and output.is_file():
            resume_hint = "; to continue, run the same command again with --resume"
            resume_hint += " instead of --force" if args.force else ""
        raise StoppedError(
            f"the command was stopped: {output or 'standard output'} has the answers for "
            f"{answer_count} of {count_of(len(rows), 'row')}{resume_hint}"
        )


def _is_stream(output: Path) -> bool:
    """Return whether the output is a pipe or a device, which cannot be read again."""
    return output.exists() and not (output.is_file() or output.is_dir())


class _Stream:
    """Output to stdout, a pipe or a device, with one line per answer. Use it in a `with` statement.

    It has the same method `write` as `ResumedFile`.
    """

    def __init__(self, output: Path | None) -> None:
        self.file = sys.stdout if output is None else output.open("w", encoding="utf-8")
        self.name = str(output or "standard output")

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
            raise  # the reader closed the pipe, which ends the command without an error message
        except OSError as error:
            raise write_error(self.name, error, why) from error


def _line(record: dict[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def _read_input(name: str) -> Rows:
    """Read the rows of a file, or JSON lines from stdin.

    Raise DataError if there are no rows, or if a line is not a JSON object.
    """
    if name != "-":
        path = Path(name)
        if not path.is_file():
            raise DataError(
                f"there is no file {name}",
                where=name,
                fix="use a jsonl, json, csv or parquet file, or - for stdin",
            )
        return read_rows(Source(source=str(path.absolute())))
    fix = 'send one JSON object per line: {"prompt": "..."}'
    rows = []
    for number, line in options.stdin_lines():
        why = ""
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            why = str(error)
        if why or not isinstance(rows[-1], dict):
            raise DataError(
                "the line is not a JSON object", where=f"stdin:{number}", why=why, fix=fix
            )
    if not rows:
        raise DataError("stdin contains no rows", where="stdin", fix=fix)
    return from_list(rows, "stdin")


def check_output(output: Path | None, args: argparse.Namespace) -> None:
    """Raise UsageError if the output cannot be used with --resume, or is the input file."""
    if args.resume and (output is None or _is_stream(output)):
        raise UsageError(
            "--resume requires an output file",
            where=f"--output {args.output}",
            fix="give a file with --output",
        )
    if output is None:
        return
    # Opening the same file for writing would delete the input.
    if args.input != "-" and output.exists() and output.samefile(args.input):
        raise UsageError(
            "input and output are the same file", where="--output", fix="use another file"
        )


def _answered_rows(file: ResumedFile, rows: Rows, args: argparse.Namespace) -> int:
    """Return the number of rows that are already answered in the output.

    An incomplete last line is not counted. Return 0 with --force, because the file will be
    overwritten. Raise UsageError if the output has lines and --resume is not given, or if the lines
    are not answers to these rows.
    """
    if args.force:
        file.lines = []
        return 0
    if not file.lines and not file.torn:
        return 0
    if not args.resume:
        raise UsageError(
            f"{args.output} already exists",
            where="--output",
            fix="add --resume to continue the file or --force to overwrite it, or use another file",
        )
    # The lines of the output must be answers to the first rows of the input, in the same order.
    matching = 0
    end = min(len(file.lines), len(rows))
    while matching < end and _is_answer_to(file.lines[matching], rows[matching]):
        matching += 1
    is_torn = matching < len(rows) and _begins_answer_to(file.torn, rows[matching])
    if matching < len(file.lines) or (file.torn and not is_torn):
        raise UsageError(
            "a line of the output does not answer the input row with the same number",
            where=f"{args.output}:{matching + 1}",
            fix="give the input that the output was made from, or use --force instead of --resume",
        )
    return matching


def _is_answer_to(line: bytes, row: dict[str, object]) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return False
    if not isinstance(record, dict) or "output" not in record:
        return False
    # Convert the row to JSON and back, so that it can be compared with the record in the file. For
    # example, JSON stores a date as text.
    fields = json.loads(json.dumps(row, default=str))
    fields.pop("output", None)
    fields.pop("reference", None)
    return bool(fields.items() <= record.items())


def _begins_answer_to(line: bytes, row: dict[str, object]) -> bool:
    """Return whether an incomplete line can be the start of the record that answers `row`."""
    fields = dict(takewhile(lambda item: item[0] != "output", row.items()))
    record = _line({**fields, "output": ""}).removesuffix('"}\n')
    start = record.encode("utf-8", "backslashreplace")
    return line.startswith(start) or start.startswith(line)
