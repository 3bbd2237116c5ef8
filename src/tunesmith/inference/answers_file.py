"""The answers of an `eval`, a line each, so that a killed one goes on where it was.

    {"tunesmith": "eval answers", "data": "held.jsonl", "rows": 100, "prompts": "<sha256>", ...}
    {"model": "tuned", "row": 0, "where": "held.jsonl:1", "answer": "Oslo", "tokens": 2, ...}
    {"model": "base", "row": 0, ...}

The first line says what was answered, by which weights and how. Answers of anything else are not
gone on with: their mean would be one of two models. A file that is killed while it is written has
at most a last line without its end, which is answered again.
"""

import fcntl
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tunesmith.checkpoint.manifest import free_name
from tunesmith.errors import DataError, MachineError, RunError, UsageError, disk_fault
from tunesmith.host.files import write_atomically
from tunesmith.run_dir import parse_json, read_bytes

KIND = "eval answers"


@dataclass(frozen=True)
class SavedAnswer:
    """One line.

    Attributes:
        model: base | tuned | model.
        row: its index among the rows that are answered.
        where: the row's place.
        answer: without special tokens.
        raw: with them; None where that is the same.
        tokens: how many the model wrote.
        finished: it ended by itself, and was not cut at --max-new-tokens.
        reference: the row's own answer, for those who read the file.
    """

    model: str
    row: int
    where: str
    answer: str
    raw: str | None
    tokens: int
    finished: bool
    reference: str

    @property
    def raw_answer(self) -> str:
        """With special tokens."""
        return self.answer if self.raw is None else self.raw


@dataclass(frozen=True)
class AnswersHeader:
    """What was answered, and how.

    Attributes:
        data: the rows' name.
        rows: how many there are.
        prompts: sha256 (hex) of the token ids of all prompts.
        weights: identify what was trained; empty for a plain model.
        base: the base model.
        decoding: the fields of `Decoding`, the seed among them.
        batch_size: rows answered at once; it changes what sampling draws.
    """

    data: str
    rows: int
    prompts: str
    weights: str
    base: str
    decoding: dict[str, Any]
    batch_size: int

    def differences(self, earlier: dict[str, Any]) -> list[str]:
        """What is not as in the header of a file, a clause each."""
        clauses = []
        if earlier.get("prompts") != self.prompts:
            clauses.append("its prompts differ: the rows, the template or the tokenizer changed")
        if earlier.get("weights") != self.weights or earlier.get("base") != self.base:
            clauses.append("its model differs: another checkpoint, or trained further")
        decoding = earlier.get("decoding")
        decoding = decoding if isinstance(decoding, dict) else {}
        for name, value in self.decoding.items():
            if decoding.get(name) != value:
                option = f"--{name.replace('_', '-')}"
                clauses.append(f"{option} was {decoding.get(name)}, and is {value}")
        if earlier.get("batch_size") != self.batch_size:
            was = earlier.get("batch_size")
            clauses.append(f"--batch-size was {was}, and is {self.batch_size}")
        return clauses


class AnswersFile:
    """The answers that are there, and a place for those to come. A context; it holds a lock.

    Attributes:
        answers: by model, in the order of the rows.
    """

    def __init__(self, path: Path, header: AnswersHeader, *, fresh: bool = False) -> None:
        """Nothing is written before the context is entered.

        Args:
            fresh: move existing answers aside, as `<name>.previous-1`.

        Raises:
            UsageError: the file holds other answers or is none of ours.
            DataError: a line of it is broken.
        """
        self.path = path
        self.header = header
        self.fresh = fresh
        self.answers: dict[str, list[SavedAnswer]] = {}
        self._file: BinaryIO | None = None
        self._size = 0
        if path.is_dir():
            raise UsageError(
                f"{path} is a folder", where=f"--output {path}", fix="name a file in it"
            )
        if path.exists():
            self._read(path)

    def _read(self, path: Path) -> None:
        """The answers that are there, and the size of their whole lines."""
        try:
            content = read_bytes(path)
        except OSError as error:
            raise MachineError(
                f"{path.name} cannot be read",
                where=str(path),
                why=error.strerror or str(error),
                fix="name another file: --output FILE",
            ) from error
        lines = content.splitlines(keepends=True)
        # A kill may have cut the last line off: it is answered again.
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        header = _parse_object(lines[0]) if lines else {}
        if header.get("tunesmith") != KIND:
            raise UsageError(
                f"{path.name} exists but does not contain answers from eval",
                where=f"--output {path}",
                fix="name another file: --output FILE",
            )
        # Whatever the file holds, it is moved aside.
        if self.fresh:
            return
        differences = self.header.differences(header)
        if differences:
            raise UsageError(
                "the existing answers are from another evaluation",
                where=str(path),
                why="; ".join(differences),
                fix="the same command with --fresh moves them aside, --output FILE keeps both "
                "in use, and the previous options continue them",
            )
        for number, line in enumerate(lines[1:], 2):
            self._add(line, number)
        self._size = sum(map(len, lines))

    def _add(self, line: bytes, number: int) -> None:
        values = _parse_object(line)
        answer = None
        with suppress(TypeError):
            answer = SavedAnswer(**values)
        if answer is None or not _is_whole(answer):
            raise self._broken(number, "it has no answer")
        answers = self.answers.setdefault(answer.model, [])
        # Answers of a model follow each other by row; `append` leaves no gap.
        if answer.row != len(answers) or answer.row >= self.header.rows:
            raise self._broken(number, f"row {answer.row} is out of order")
        answers.append(answer)

    def _broken(self, number: int, why: str) -> DataError:
        return DataError(
            "a line of the answers is damaged",
            where=f"{self.path}:{number}",
            why=why,
            fix="the same command with --fresh moves the file aside and answers again",
        )

    def __enter__(self) -> "AnswersFile":
        """Write the header, or cut off a last line without its end."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.fresh and self.path.exists():
                self.path.rename(free_name(self.path))
            if not self.path.exists():
                first = json.dumps({"tunesmith": KIND, **asdict(self.header)}) + "\n"
                # The header is there as a whole or not at all.
                write_atomically(self.path, first)
                self._size = len(first)
            self._file = self.path.open("r+b")
            # A second eval of the same file would write between these lines.
            self._lock(self._file)
            # After the lock: the torn line is cut off.
            self._file.truncate(self._size)
            self._file.seek(self._size)
        except OSError as error:
            self.__exit__()
            raise MachineError(
                "the answers cannot be written",
                where=str(self.path),
                why=error.strerror or str(error),
                fix="use a writable file: --output FILE",
            ) from error
        return self

    def _lock(self, file: BinaryIO) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UsageError(
                "another eval is writing these answers",
                where=str(self.path),
                fix="wait for it, or name another file: --output FILE",
            ) from None
        if self.path.stat().st_size < self._size or self._grew():
            raise UsageError(
                "another eval wrote these answers in the meantime",
                where=str(self.path),
                fix="start the same command again",
            )

    def _grew(self) -> bool:
        """Whether there are whole lines more than were read."""
        content = read_bytes(self.path)
        return b"\n" in content[self._size :]

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def append(self, answer: SavedAnswer) -> None:
        """Write one more answer; RunError where the disk takes no more."""
        assert self._file is not None
        # UTF-8 has no lone surrogate: it is written as its JSON escape.
        line = json.dumps(asdict(answer), ensure_ascii=False) + "\n"
        try:
            self._file.write(line.encode("utf-8", "backslashreplace"))
            self._file.flush()
        except OSError as error:
            fault = disk_fault(error)
            raise RunError(
                fault or f"{self.path.name} cannot be written: {error.strerror}",
                where=str(self.path),
                why=f"{answer.row} of {self.header.rows} answers of {answer.model} are in it",
                fix="free disk space (df -h), then run the same command again",
                cause="disk" if fault else "",
            ) from error
        self.answers.setdefault(answer.model, []).append(answer)

    def unfinished(self) -> dict[str, int]:
        """How many answers of each model were cut at --max-new-tokens."""
        counts = {}
        for model, answers in self.answers.items():
            counts[model] = sum(not answer.finished for answer in answers)
        return counts

    def of(self, model: str) -> Sequence[SavedAnswer]:
        """The answers of one model so far."""
        return self.answers.get(model, ())


def _parse_object(line: bytes) -> dict[str, Any]:
    """A line's JSON object; empty for anything else."""
    try:
        value = parse_json(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_whole(answer: SavedAnswer) -> bool:
    """Whether each value has its type: the file may have been edited."""
    texts = (answer.model, answer.where, answer.answer, answer.reference, answer.raw or "")
    numbers = (answer.row, answer.tokens)
    are_numbers = all(isinstance(number, int) and number >= 0 for number in numbers)
    return are_numbers and all(isinstance(text, str) for text in texts)
