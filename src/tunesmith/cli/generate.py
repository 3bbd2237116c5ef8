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

from tunesmith.errors import EXIT_OK, EXIT_STOPPED, DataError, MachineError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tunesmith.data.source import Rows
    from tunesmith.inference.prompts import Prompt

FORMATS = ("auto", "messages", "sharegpt", "alpaca", "prompt-completion", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="run directory, checkpoint, final/, adapter or model folder")
    parser.add_argument(
        "--input", required=True, metavar="FILE", help="rows: jsonl, json, csv, parquet; - is stdin (jsonl)"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="where answers go (jsonl); - is stdout")
    parser.add_argument(
        "--format", choices=FORMATS, default="auto", help="what a row looks like (default: by its columns)"
    )
    parser.add_argument("--base", action="store_true", help="ask the base model, without what was trained")
    add_decoding(parser, max_new_tokens=256)
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="rows answered at once (default: 16)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="keep the rows that are already in the output")
    existing.add_argument("--force", action="store_true", help="overwrite the output")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda where there is one)")


def add_decoding(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    """The options that say how tokens are chosen; greedy unless a temperature is given."""
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"longest answer (default: {max_new_tokens})",
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default); 1.0 draws as the model says"
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="with a temperature: draw from the likeliest tokens that make up P",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="with a temperature: draw from the K likeliest tokens"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")


def run(args: argparse.Namespace) -> int:
    from tunesmith.inference.load_run import locate_run

    if args.batch_size < 1:
        raise UsageError(f"--batch-size {args.batch_size} is out of range", where="--batch-size", fix="give at least 1")
    place = locate_run(args.run, base_only=args.base)
    rows = read_rows(args.input)
    output = None if args.output == "-" else Path(args.output)
    done = _already(output, rows, resume=args.resume, force=args.force, source=args.input)
    if done == len(rows) and args.resume:
        print(f"all {done} rows are already in {output}", file=sys.stderr)
        return EXIT_OK

    from tunesmith.inference.generate import Decoding, check_room
    from tunesmith.inference.load_run import context_of, known_sources, load_run, system_of
    from tunesmith.inference.prompts import prompts_of

    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed)
    opened = load_run(args.run, device=args.device, place=place)
    asked = prompts_of(
        rows,
        opened.template,
        opened.tokenizer,
        asked=args.format,
        known=known_sources(opened.run),
        system=system_of(opened.run),
    )
    check_room([len(q.prompt) for q in asked], [q.where for q in asked], decoding, context_of(opened.model))
    if place.note:
        print(place.note, file=sys.stderr)
    print(f"{len(asked) - done} rows, {decoding.describe()}", file=sys.stderr)
    return _write(opened, asked, decoding, args.batch_size, done, output)


def _write(opened: Any, asked: list[Prompt], decoding: Any, batch_size: int, done: int, output: Path | None) -> int:
    from tunesmith.cli.progress import Counter
    from tunesmith.cli.signals import stop_on_interrupt
    from tunesmith.inference.generate import answer_all, merged_meanwhile

    count = done
    with (
        _opened(output, append=done > 0) as file,
        stop_on_interrupt() as stop,
        Counter("answers", len(asked), start=done) as shown,
        merged_meanwhile(opened.model),
    ):
        answers = answer_all(
            opened.model,
            opened.tokenizer,
            [q.prompt for q in asked],
            decoding,
            stops=opened.template.stops,
            batch_size=batch_size,
            start=done,
            stop=stop,
        )
        for index, answer in answers:
            file.write(line_of(asked[index], answer.text) + "\n")
            file.flush()
            count += 1
            shown.to(count)
    if count < len(asked):
        name = output or "the output"
        print(f"stopped: {count} of {len(asked)} rows are in {name}; go on with --resume", file=sys.stderr)
        return EXIT_STOPPED
    return EXIT_OK


def line_of(question: Prompt, answer: str) -> str:
    """One output row: the input's fields, `output`, and `reference` where the input held the answer."""
    row = {**question.row, "output": answer}
    if question.reference is not None:
        row["reference"] = question.reference
    line = json.dumps(row, ensure_ascii=False, default=str)
    # Half a character (a lone surrogate) in a field that no prompt uses has no UTF-8: it goes back as it was escaped.
    return line if line.isascii() or _encodes(line) else json.dumps(row, default=str)


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_rows(name: str) -> Rows:
    """Rows of a file, or JSON lines from stdin.

    Raises:
        DataError: it cannot be read, a line is broken, or there is none.
    """
    from tunesmith.cli.lines import stdin_lines
    from tunesmith.config.schema import Source
    from tunesmith.data.source import from_list, read_rows

    if name != "-":
        path = Path(name)
        if not path.is_file():
            raise DataError(
                f"there is no file {name}", where=name, fix="name a jsonl, json, csv or parquet file, or - for stdin"
            )
        return read_rows(Source(source=str(path.absolute())))
    rows = []
    for number, line in stdin_lines():
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(
                "the line is not JSON", where=f"stdin:{number}", why=str(error), fix="one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise DataError("the line is not a JSON object", where=f"stdin:{number}", fix='write {"prompt": "..."}')
        rows.append(row)
    if not rows:
        raise DataError("stdin holds no rows", where="stdin", fix="send one JSON object a line")
    return from_list(rows, "stdin")


def _already(output: Path | None, rows: Rows, *, resume: bool, force: bool, source: str) -> int:
    """How many leading rows are already answered; a last line that was cut off is taken away.

    Raises:
        UsageError: the output is there and neither --resume nor --force was given, or it answers other rows.
    """
    if output is None:
        if resume:
            raise UsageError("--resume needs an output file", where="--output -", fix="name a file")
        return 0
    if source != "-" and output.exists() and output.samefile(source):
        raise UsageError("input and output are the same file", where="--output", fix="name another file")
    if not output.exists() or (force and output.is_file()) or (output.is_file() and output.stat().st_size == 0):
        return 0
    if output.is_dir():
        raise UsageError(f"{output} is a folder", where="--output", fix="name a file in it")
    if not resume:
        raise UsageError(
            f"{output} is already there",
            where="--output",
            fix="add --resume to go on with it, --force to overwrite it, or name another file",
        )
    data = output.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    lines = whole.splitlines()
    for i, line in enumerate(lines):
        if i >= len(rows) or not _answers(line, rows[i]):
            raise UsageError(
                "the output answers other rows than the input holds",
                where=f"{output}:{i + 1}",
                fix="give the input that it was made from, or --force to start over",
            )
    if len(whole) < len(data):
        with output.open("r+b") as file:
            file.truncate(len(whole))
    return len(lines)


def _answers(line: bytes, row: dict[str, Any]) -> bool:
    try:
        written = json.loads(line)
    except ValueError:
        return False
    same = json.loads(json.dumps(row, default=str))
    return (
        isinstance(written, dict)
        and "output" in written
        and all(written.get(k) == v for k, v in same.items() if k not in ("output", "reference"))
    )


@contextmanager
def _opened(output: Path | None, *, append: bool) -> Iterator[TextIO]:
    if output is None:
        yield sys.stdout
        return
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        file = output.open("a" if append else "w", encoding="utf-8")
    except OSError as error:
        raise MachineError(
            f"{output} cannot be written", where="--output", why=str(error), fix="name a file that you may write"
        ) from error
    with file:
        yield file
