"""The answers of an `eval`, a line each, so that a killed one goes on where it was.

    {"tunesmith": "eval answers", "data": "held.jsonl", "rows": 100, "prompts": "<sha256>", ...}
    {"model": "tuned", "row": 0, "where": "held.jsonl:1", "answer": "Oslo", "tokens": 2, ...}
    {"model": "base", "row": 0, ...}

The first line says what was answered, by which weights and how. Answers of anything else are not
gone on with: their mean would be one of two models.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self, cast

from pydantic import JsonValue, TypeAdapter

from tunesmith.checkpoint.manifest import free_name
from tunesmith.errors import DataError, UsageError
from tunesmith.run_dir import parse_json
from tunesmith.tools.evaluate.resumed_file import ResumedFile
from tunesmith.units import count_of

if TYPE_CHECKING:
    from tunesmith.inference.decoding import Decoding

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

    # A file may have been edited.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

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
    """The rows that were answered, by which model, and how.

    Attributes:
        data: the rows' name.
        rows: how many there are.
        prompts: sha256 (hex) of the token ids of all prompts.
        weights: identify what was trained; empty for a plain model.
        base: the base model.
        decoding: how tokens are chosen, the seed among it.
        batch_size: rows answered at once; it changes what sampling draws.
    """

    data: str
    rows: int
    prompts: str
    weights: str
    base: str
    decoding: "Decoding"
    batch_size: int

    def differences(self, earlier: dict[str, JsonValue]) -> list[str]:
        """List the differences from the header of a file, a clause each."""
        clauses = []
        if earlier.get("prompts") != self.prompts:
            clauses.append("its prompts differ: the rows, the template or the tokenizer changed")
        if earlier.get("weights") != self.weights or earlier.get("base") != self.base:
            clauses.append("its model differs: another checkpoint, or trained further")
        before = {**earlier, **(cast("dict[str, JsonValue]", earlier.get("decoding")) or {})}
        for name, value in {**asdict(self.decoding), "batch_size": self.batch_size}.items():
            if before.get(name) != value:
                option = f"--{name.replace('_', '-')}"
                clauses.append(f"{option} was {before.get(name)}, and is {value}")
        return clauses


class AnswersFile(ResumedFile):
    """The answers that are there, and a place for those to come.

    Attributes:
        answers: by model, in the order of the rows.
    """

    def __init__(self, path: Path, header: AnswersHeader, *, fresh: bool = False) -> None:
        """Nothing is written before the context is entered.

        Args:
            fresh: move existing answers aside, as `<name>.previous-1`.

        Raises:
            UsageError: the file holds other answers or is none of ours.
            MachineError: it cannot be read.
            DataError: a line of it is broken.
        """
        super().__init__(path)
        self.header = header
        self.fresh = fresh
        self.answers: dict[str, list[SavedAnswer]] = {}
        if self.lines or self.torn:
            self._check_header()
            # Whatever the file holds, it is moved aside.
            if not fresh:
                self._read_answers()

    def _check_header(self) -> None:
        earlier: object = None
        with suppress(ValueError, IndexError):
            earlier = parse_json(self.lines[0])
        if not isinstance(earlier, dict) or earlier.get("tunesmith") != KIND:
            raise UsageError(
                f"{self.path.name} exists but does not contain answers from eval",
                where=f"--output {self.path}",
                fix="name another file: --output FILE",
            )
        differences = self.header.differences(earlier)
        if differences and not self.fresh:
            raise UsageError(
                "the existing answers are from another evaluation",
                where=str(self.path),
                why="; ".join(differences),
                fix="the same command with --fresh moves them aside, --output FILE keeps both "
                "in use, and the previous options continue them",
            )

    def _read_answers(self) -> None:
        saved = TypeAdapter(SavedAnswer)
        for number, line in enumerate(self.lines[1:], 2):
            answer = None
            with suppress(ValueError):
                answer = saved.validate_python(parse_json(line))
            answers = self.answers.setdefault(answer.model, []) if answer else []
            # Answers of a model follow each other by row; `append` leaves no gap.
            if answer is None or answer.row != len(answers) or answer.row >= self.header.rows:
                raise DataError(
                    "a line of the answers is damaged, or out of order",
                    where=f"{self.path}:{number}",
                    fix="the same command with --fresh moves the file aside and answers again",
                )
            answers.append(answer)

    def __enter__(self) -> Self:
        """Write the header, or cut off a last line without its end."""
        if self.fresh and self.lines:
            self.path.rename(free_name(self.path))
            self.lines = []
        super().__enter__()
        if not self.lines:
            self.write({"tunesmith": KIND, **asdict(self.header)})
        return self

    def append(self, answer: SavedAnswer) -> None:
        """Write one more answer; RunError where the disk takes no more."""
        why = f"it holds {answer.row} of {count_of(self.header.rows, 'answer')} of {answer.model}"
        self.write(asdict(answer), why=why)
        self.answers.setdefault(answer.model, []).append(answer)

    def unfinished(self) -> dict[str, int]:
        """Count the answers of each model that were cut at --max-new-tokens."""
        counts = {}
        for model, answers in self.answers.items():
            counts[model] = sum(not answer.finished for answer in answers)
        return counts

    def of(self, model: str) -> Sequence[SavedAnswer]:
        """The answers of one model so far."""
        return self.answers.get(model, ())
