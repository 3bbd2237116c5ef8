"""Generate an answer for every row of a file.

example:
  tunesmith generate runs/my-run --input questions.jsonl --output answers.jsonl
  tunesmith generate runs/my-run --input questions.jsonl \\
    --output answers.jsonl --resume
  echo '{"prompt": "Say hello"}' |
    tunesmith generate runs/my-run --input - --output -
  tunesmith generate runs/my-run --input train.jsonl --output kept.jsonl \\
    --samples 8 --temperature 1 --score exact --keep "score >= 1"

Each output row is the input row with the key `output` added, and the key
`reference` if the row had an answer. Rows are written in input order as soon as
they are ready. After ctrl-C, --resume continues.

--samples N writes N rows for each row. --score adds the key `score`, by a
scorer of `tunesmith eval`. --keep writes only the answers with such a score.
They replace the answer in the row, so that the output can be trained on.
"""

import argparse
import json
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.answers.load_run import add_vision_if_needed, load_run, locate_run
from tunesmith.answers.scoring.scorers import TOOL_CALL, check_scorer_names
from tunesmith.cli import options
from tunesmith.config.schema import Source
from tunesmith.errors import DataError, StoppedError, UsageError
from tunesmith.host.signals import StopRequest
from tunesmith.host.streams import visible
from tunesmith.rows.detect import sample_rows
from tunesmith.rows.source.files import check_is_file
from tunesmith.rows.source.open_source import Rows, from_list, read_rows
from tunesmith.tools.evaluate.resumed_file import ResumedFile, json_line, write_error
from tunesmith.tools.evaluate.row_source import find_source
from tunesmith.units import count_of

if TYPE_CHECKING:
    from tunesmith.tools.evaluate.kept_answers import Condition

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
    parser.add_argument(
        "--samples",
        type=options.whole_number,
        default=1,
        metavar="N",
        help="number of answers to each row (default: 1)",
    )
    parser.add_argument(
        "--score",
        metavar="SCORER",
        help="score the answers with a scorer of `eval --score`, or your file.py:function",
    )
    parser.add_argument(
        "--keep",
        metavar="CONDITION",
        help='with --score: keep only these answers, as rows for training; such as "score >= 1"',
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue an output file: answer only the rows without an answer",
    )
    existing.add_argument("--force", action="store_true", help="overwrite an existing output file")


def run(args: argparse.Namespace) -> None:
    condition = _check_options(args)
    location = locate_run(args.run, base_only=args.base, trust_remote_code=args.trust_remote_code)
    rows = _read_input(args.input)
    source = find_source(rows, location.sources, args.format_name, dict(args.columns) or None)
    output = None if args.output == "-" else Path(args.output)
    # A pipe or a device cannot be read again.
    is_stream = output is None or (output.exists() and not (output.is_file() or output.is_dir()))
    _check_output(output, args, is_stream=is_stream)
    total = count_of(len(rows), "row")
    answer_count = 0
    if output is None or is_stream:
        sink: _Stream | ResumedFile = _Stream(output)
    else:
        sink = ResumedFile(output)
        answer_count = _answered_rows(sink, rows, args)
    # If all rows are already answered, do not load the model.
    if answer_count == len(rows) and args.resume:
        options.notify(f"all answers are already in {output} ({total})")
        return
    from tunesmith.tools.evaluate.decoding_options import read_decoding
    from tunesmith.tools.evaluate.generate import (
        answer_rows,
        check_samples,
        make_prompts,
    )
    from tunesmith.tools.evaluate.kept_answers import KeptAnswers

    decoding = read_decoding(args)
    check_samples(args.samples, decoding)
    stop = StopRequest(interactive=True)
    kept = KeptAnswers(args.score, condition, source, stop.requested) if args.score else None
    location = add_vision_if_needed(location, sample_rows(rows)[0].values())
    # Open the output before the model is loaded, so that the user gets the error for an unwritable
    # output early.
    with sink, kept.pool if kept else nullcontext():
        loaded = load_run(location, device=args.device)
        prompts = make_prompts(loaded, rows, source)
        if kept is not None:
            kept.check(prompts)
        answers = answer_rows(
            loaded,
            prompts,
            decoding,
            samples=args.samples,
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
            for answered in answers:
                written = answered.with_output() if kept is None else kept.select(answered)
                for row in written:
                    sink.write(row, why=f"the output holds answers to {answer_count} of {total}")
                answer_count += 1
                progress("answers", answer_count, len(rows))
    if answer_count < len(rows):
        resume_hint = ""
        if output and output.is_file():
            resume_hint = "; to continue, run the same command again with --resume"
            resume_hint += " instead of --force" if args.force else ""
        raise StoppedError(
            f"the command was stopped: {output or 'standard output'} has the answers for "
            f"{answer_count} of {total}{resume_hint}"
        )
    if kept is not None and condition is not None:
        options.notify(kept.summary())


def _check_options(args: argparse.Namespace) -> "Condition | None":
    """Return the condition of `--keep`. Raise UsageError if the options do not fit together."""
    if args.score is not None:
        check_scorer_names(args.score)
        if args.score == TOOL_CALL:
            raise UsageError(
                "tool calls are scored only by `tunesmith eval`",
                where="--score",
                fix="write your own scorer: --score my_scorer.py:function",
            )
    if args.keep is None:
        return None
    if args.score is None:
        raise UsageError(
            "--keep needs the scores of the answers",
            where="--keep",
            fix="add a scorer, such as --score exact",
        )
    from tunesmith.tools.evaluate.kept_answers import read_condition

    return read_condition(args.keep)


class _Stream(AbstractContextManager["_Stream"]):
    """Output to stdout, a pipe or a device, with one line per answer. Use it in a `with` statement.

    It has the same method `write` as `ResumedFile`.
    """

    def __init__(self, output: Path | None) -> None:
        self.file = sys.stdout if output is None else output.open("w", encoding="utf-8")
        self.name = str(output or "standard output")

    def __exit__(self, *_: object) -> None:
        if self.file is not sys.stdout:
            with suppress(OSError):
                self.file.close()

    def write(self, record: dict[str, object], *, why: str = "") -> None:
        line = json_line(record)
        try:
            print(visible(line) if self.file.isatty() else line, end="", file=self.file, flush=True)
        except BrokenPipeError:
            raise  # the reader closed the pipe, which ends the command without an error message
        except OSError as error:
            raise write_error(self.name, error, why) from error


def _read_input(name: str) -> Rows:
    """Read the rows of a file, or JSON lines from stdin.

    Raise DataError if there are no rows, or if a line is not a JSON object.
    """
    if name != "-":
        path = Path(name)
        check_is_file(path)
        return read_rows(Source(source=str(path.absolute())))
    fix = 'send one JSON object per line: {"prompt": "..."}'
    rows = []
    for number, line in options.stdin_lines():
        row = _record_of(line)
        if not row:
            raise DataError("the line is not a JSON object", where=f"stdin:{number}", fix=fix)
        rows.append(row)
    if not rows:
        raise DataError("stdin contains no rows", where="stdin", fix=fix)
    return from_list(rows, "stdin")


def _check_output(output: Path | None, args: argparse.Namespace, *, is_stream: bool) -> None:
    """Raise UsageError if the output cannot be used with --resume, or is the input file."""
    if args.resume and is_stream:
        raise UsageError(
            "--resume requires an output file",
            where=f"--output {args.output}",
            fix="give a file with --output",
        )
    # Opening the same file for writing would delete the input.
    if output and args.input != "-" and output.exists() and output.samefile(args.input):
        raise UsageError(
            "input and output are the same file", where="--output", fix="use another file"
        )


def _answered_rows(file: ResumedFile, rows: Rows, args: argparse.Namespace) -> int:
    """Return the number of rows that are already answered in the output, and drop later lines.

    Return 0 with --force, because the file will be overwritten. Raise UsageError if the output has
    lines and --resume is not given, or if a line does not come from the rows.
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
    places = {Path(rows.where(i)).name: i for i in range(len(rows))}
    numbers = []
    for i, line in enumerate(file.lines):
        number = i // args.samples
        # The lines of an output without --keep are answers to the first rows, in order.
        if args.keep is not None:
            number = places.get(str(_record_of(line).get("where")), -1)
        elif number >= len(rows) or not _is_answer_to(_record_of(line), rows[number]):
            number = -1
        numbers.append(number)
    # An incomplete last line is written again if it follows answers and an answer is missing. With
    # --keep, it is not known how many lines are missing.
    if file.torn and args.keep is None and len(numbers) in (0, len(rows) * args.samples):
        numbers.append(-1)
    if -1 in numbers:
        raise UsageError(
            "a line of the output does not come from a row of the input",
            where=f"{args.output}:{numbers.index(-1) + 1}",
            fix="give the input that the output was made from, or use --force instead of --resume",
        )
    if not numbers:
        return 0
    last = numbers[-1]
    first = numbers.index(last)
    if args.keep is None and len(numbers) - first == args.samples:
        return last + 1
    # Some answers to the last row may be missing, so all its answers are generated again.
    file.lines = file.lines[:first]
    return last


def _record_of(line: str | bytes) -> dict[str, object]:
    """Return the JSON object of a line, or an empty object if the line has none."""
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        if isinstance(record, dict):
            return record
    return {}


def _is_answer_to(record: dict[str, object], row: dict[str, object]) -> bool:
    # Convert the row to JSON and back, so that it can be compared with the record in the file. For
    # example, JSON stores a date as text.
    fields = json.loads(json.dumps(row, default=str))
    for name in ("output", "reference", "score"):
        fields.pop(name, None)
    return "output" in record and bool(fields.items() <= record.items())
