"""File with the answers of an `eval`, one JSON line each, so that a killed `eval` can resume.

    {"tunesmith": "eval answers", "data": "held.jsonl", "rows": 100, "prompts": "<sha256>", ...}
    {"model": "tuned", "row": 0, "where": "held.jsonl:1", "answer": "Oslo", "tokens": 2, ...}
    {"model": "base", "row": 0, ...}

The first line identifies the rows, the weights and the decoding. An `eval` resumes a file only if
the first line matches, because otherwise the scores would mix answers of different models.
"""

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
    from tunesmith.answers.decoding import Decoding

KIND = "eval answers"


@dataclass(frozen=True)
class SavedAnswer:
    """One line of the file: the answer of a model to one row.

    Attributes:
        model: the model that answered: `base`, `tuned`, or `model` for a base model without a run.
        row: index of the row in the list of all rows that are answered.
        where: file and line of the row.
        answer: the answer without special tokens.
        raw: the answer with special tokens; None if the two are equal.
        tokens: number of tokens in the answer.
        finished: whether the answer ended by itself, before --max-new-tokens.
        reference: the expected answer from the row, for people who read the file.
    """

    # Refuse unknown keys, because a user may have edited the file.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    model: str
    row: int
    where: str
    answer: str
    raw: str | None
    tokens: int
    finished: bool
    reference: str


@dataclass(frozen=True)
class AnswersHeader:
    """First line of the file: the answered rows, the model and the decoding.

    Attributes:
        data: name of the rows.
        rows: number of rows.
        prompts: SHA-256 (hex) of the token ids of all prompts.
        weights: hash of the trained weights; empty for a base model.
        base: the base model.
        decoding: how tokens are chosen, including the seed.
        batch_size: number of rows that are answered at once. Sampled answers depend on it.
    """

    data: str
    rows: int
    prompts: str
    weights: str
    base: str
    decoding: "Decoding"
    batch_size: int

    def differences(self, earlier: dict[str, JsonValue]) -> list[str]:
        """Return a clause for each value that differs from `earlier`, an existing file's header.

        `data` and `rows` are not compared, because `prompts` is a hash of all prompts.
        """
        texts = {
            "prompts": "the prompts differ: the rows, the template or the tokenizer has changed",
            "weights": "the model differs: it is another checkpoint, or it was trained further",
            "base": "the model differs: it is another base model",
        }
        before = {**earlier, **(cast("dict[str, JsonValue]", earlier.get("decoding")) or {})}
        clauses = []
        for name, value in {**asdict(self), **asdict(self.decoding)}.items():
            if name not in ("data", "rows", "decoding") and before.get(name) != value:
                option = f"--{name.replace('_', '-')}"
                changed = f"{option} was {before.get(name)} and is now {value}"
                clauses.append(texts.get(name, changed))
        return clauses


class AnswersFile(ResumedFile):
    """File of answers. The object reads the existing answers and appends new answers.

    Attributes:
        answers: model -> its answers in the existing file, in the order of the rows.
    """

    def __init__(self, path: Path, header: AnswersHeader, *, fresh: bool = False) -> None:
        """Read the existing answers. The file is not changed before the `with` block starts.

        Args:
            header: the first line of the file; an existing file must have the same first line.
            fresh: rename an existing file to `<name>.previous-1` instead of resuming.

        Raises:
            UsageError: the file holds answers of another evaluation, or is not a file of answers.
            MachineError: the file cannot be read.
            DataError: a line of the file is damaged.
        """
        super().__init__(path)
        self.header = header
        self.fresh = fresh
        self.answers: dict[str, list[SavedAnswer]] = {}
        if self.lines or self.torn:
            self._check_header()
            # If `fresh` is set, `__enter__` renames the file, so its answers are not needed.
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
                fix="use another file: --output FILE",
            )
        differences = self.header.differences(earlier)
        if differences and not self.fresh:
            raise UsageError(
                "the file contains the answers of a different evaluation",
                where=self.path,
                why="; ".join(differences),
                fix="add --fresh to rename the old file, or use another file with --output FILE, "
                "or use the previous options to continue the old evaluation",
            )

    def _read_answers(self) -> None:
        saved = TypeAdapter(SavedAnswer)
        for number, line in enumerate(self.lines[1:], 2):
            answer = None
            with suppress(ValueError):
                answer = saved.validate_python(parse_json(line))
            answers = self.answers.setdefault(answer.model, []) if answer else []
            # `append` writes the answers of a model with consecutive row numbers, so a gap means
            # that the file is damaged.
            if answer is None or answer.row != len(answers) or answer.row >= self.header.rows:
                raise DataError(
                    "a line of the answers file is damaged or out of order",
                    where=f"{self.path}:{number}",
                    fix="run the same command with --fresh, which renames the file and answers "
                    "all rows again",
                )
            answers.append(answer)

    def __enter__(self) -> Self:
        """Open the file for appending, and write the header if the file is new.

        With `fresh`, an existing file is renamed first.
        """
        if self.fresh and self.lines:
            self.path.rename(free_name(self.path))
            self.lines = []
        super().__enter__()
        if not self.lines:
            self.write({"tunesmith": KIND, **asdict(self.header)})
        return self

    def append(self, answer: SavedAnswer) -> None:
        """Write an answer as the next line. Raise RunError if the file cannot be written."""
        self.write(
            asdict(answer),
            why=f"the file holds {answer.row} of {count_of(self.header.rows, 'answer')} of "
            f"{answer.model}",
        )
