"""Generation of answers to rows with a trained model. Prompts are rendered as in training.

A row can have any training format, with or without an answer. The answer in the row (the last
assistant turn, the output or the completion) becomes the reference, and is not in the prompt.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tunesmith.answers.answers import Answer, answer_all, decode
from tunesmith.answers.decoding import Decoding
from tunesmith.answers.load_run import LoadedModel
from tunesmith.answers.scoring.rows import make_scored_row
from tunesmith.answers.scoring.scorers import RewardedAnswer, ScoredRow
from tunesmith.config.row_formats import CHAT_ROLES, ROW_FORMATS
from tunesmith.config.schema import Source
from tunesmith.errors import DataError, UsageError
from tunesmith.host.logger import lines_by_default
from tunesmith.rows.columns import is_absent, role_key_of
from tunesmith.rows.formats import convert_sample
from tunesmith.rows.row_reader import RowReader
from tunesmith.rows.samples import Picture, pictures_of
from tunesmith.rows.source.open_source import Rows, from_list
from tunesmith.tools.evaluate.row_source import find_source
from tunesmith.training.program_rows import mappings
from tunesmith.units import count_of


@lines_by_default()
def generate(
    loaded: LoadedModel,
    rows: Rows | Sequence[dict[str, Any]],
    decoding: Decoding | None = None,
    *,
    format_name: str = "auto",
    columns: Mapping[str, str] | None = None,
    samples: int = 1,
    batch_size: int = 16,
    start: int = 0,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[dict[str, Any]]:
    """Generate answers to rows of any training format, with the chat template of the training.

    >>> next(tunesmith.generate(loaded, [{"prompt": "Hello"}]))["output"]

    Args:
        loaded: a model from `load_run`.
        rows: rows such as `[{"prompt": "Hello"}]`. The model does not see the answer in a row.
        decoding: how tokens are chosen; None: greedy, up to 256 tokens.
        format_name, columns: format and columns of all rows, as `format` and `columns` of a recipe.
            If `columns` is None and the rows have the columns of one of the run's sources, the
            format and columns of this source are used. Otherwise format and columns are detected as
            in `train`.
        samples: number of answers to each row. More than one needs a temperature.
        batch_size: number of rows that are answered at once. In 16-bit dtypes, answers can depend
            on it, because matmuls of other sizes round differently.
        start: index of the first row to answer. The answers are the same as in a job that started
            at row 0.
        cancelled: function that is called after each token. If it returns True, generation stops,
            and the iterator ends after the rows whose answers are complete.

    Returns:
        An iterator over the rows from `start` on, with `samples` copies of each row. Each copy has
        the key `output` added, and the key `reference` if the row contained an answer.

    Raises:
        UsageError: `loaded` is not a loaded model, or several answers would be equal.
        DataError: a row is invalid, or a prompt is too long for the model's context. This error is
            raised by the call of `generate`, not during the iteration.
    """
    if not isinstance(loaded, LoadedModel):
        raise UsageError(
            f"generate takes a loaded model, not {type(loaded).__name__}",
            where="generate(loaded)",
            fix='load the model: loaded = tunesmith.load_run("runs/my-run"); '
            "generate(loaded, rows)",
        )
    if not isinstance(rows, Rows):
        rows = from_list([dict(row) for row in mappings(rows, "generate(rows)")])
    if not len(rows):
        return iter(())
    source = find_source(rows, loaded.location.sources, format_name, columns)
    answered = answer_rows(
        loaded,
        make_prompts(loaded, rows, source),
        decoding or Decoding(),
        samples=samples,
        batch_size=batch_size,
        start=start,
        cancelled=cancelled,
    )
    return (row for rows_of_prompt in answered for row in rows_of_prompt.with_output())


class RowPrompt(NamedTuple):
    """Prompt of a row, and the answer in the row.

    Attributes:
        ids: token ids up to the start of the answer, including the run's system message.
        scored: the row and its answer, for scorers.
        pictures: the pictures of the prompt.
    """

    ids: list[int]
    scored: ScoredRow
    pictures: tuple[Picture, ...]


class AnsweredRow(NamedTuple):
    """A row and the model's answers to it.

    Attributes:
        scored: the row and its answer, for scorers.
        answers: the model's answers.
    """

    scored: ScoredRow
    answers: list[RewardedAnswer]

    def with_output(self) -> Iterator[dict[str, Any]]:
        """Yield a copy of the row for each answer, with the keys `output` and `reference`."""
        reference = {"reference": self.scored.reference} if self.scored.is_answered else {}
        for answer in self.answers:
            yield {**self.scored.row, "output": answer.text_for(""), **reference}


def answer_rows(
    loaded: LoadedModel,
    prompts: Sequence[RowPrompt],
    decoding: Decoding,
    *,
    samples: int = 1,
    **options: Any,
) -> Iterator[AnsweredRow]:
    """Check the prompts, then return an iterator that answers the rows.

    Args:
        samples: as for `generate`.
        options: further arguments of `answer_all`, such as `batch_size`.

    Raise UsageError and DataError as `generate`.
    """
    check_samples(samples, decoding)
    check_prompt_lengths(prompts, loaded.context, decoding)
    answers = answer_all(
        loaded.train_model,
        loaded.tokenizer,
        [
            loaded.prompt(prompt.ids, prompt.pictures, prompt.scored.where, row)
            for row, prompt in enumerate(prompts)
        ],
        decoding,
        stops=loaded.template.end_ids,
        answers=samples,
        **options,
    )

    def rewarded(answer: Answer, row: ScoredRow) -> RewardedAnswer:
        raw = decode(loaded.tokenizer, answer.ids, with_special=True)
        final = loaded.template.final_answer(raw)
        return RewardedAnswer(answer.text, raw, row, answer.ids, answer.finished, final)

    rows = ((prompts[i].scored, group) for i, group in answers)
    return (AnsweredRow(row, [rewarded(answer, row) for answer in group]) for row, group in rows)


def check_samples(samples: int, decoding: Decoding) -> None:
    """Raise UsageError if several answers to a row would be equal."""
    if samples > 1 and decoding.temperature == 0:
        raise UsageError(
            f"the {samples} answers to a row would be equal",
            where="--samples",
            why="temperature 0 always picks the most likely token",
            fix="set a temperature, such as 1.0",
        )


def make_prompts(loaded: LoadedModel, rows: Rows, source: Source) -> list[RowPrompt]:
    """Build the prompts of all rows. Raise DataError if a row is invalid."""
    return [make_prompt(rows[i], rows.where(i), loaded, source) for i in range(len(rows))]


def check_prompt_lengths(
    prompts: Sequence[RowPrompt], context: int | None, decoding: Decoding
) -> None:
    """Raise DataError if a prompt plus the longest answer does not fit into the model's context.

    If the model's context is not limited, `context` is None.
    """
    if context is None:
        return
    room = context - decoding.max_new_tokens
    too_long = [prompt for prompt in prompts if len(prompt.ids) > room]
    if not too_long:
        return
    longest = max(too_long, key=lambda prompt: len(prompt.ids))
    raise DataError(
        f"the model's context is too short for {len(too_long)} of "
        f"{count_of(len(prompts), 'prompt')}",
        where=longest.scored.where,
        why=f"the longest prompt has {len(longest.ids)} tokens, and the context has {context} "
        f"tokens, of which {decoding.max_new_tokens} are reserved for the answer",
        fix="shorten the long rows, or use a smaller --max-new-tokens",
    )


def make_prompt(
    row: dict[str, object], where: str, loaded: LoadedModel, source: Source
) -> RowPrompt:
    """Build the prompt of a row, and separate the answer that the row contains.

    Raise DataError if the row is invalid.

    Args:
        source: format and columns of the row.
    """
    sample = convert_sample(row, source, where=where, system=loaded.system)
    return RowPrompt(
        loaded.template.prompt(sample, where=where),
        make_scored_row(loaded.template, sample, row, where),
        pictures_of(sample),
    )


def row_with_answer(
    row: dict[str, object], source: Source, where: str, answer: str
) -> dict[str, object]:
    """Return a row for SFT: a copy of the row in which `answer` replaces the answer."""
    form = ROW_FORMATS[source.format]
    name = form.answer or form.key
    column = source.columns.get(name, name)
    reader = RowReader(row, source, where)
    # The column can contain messages as JSON text.
    value = reader.text_or_messages(row.get(column), column)
    # If the prompt is a list of messages, the answer must also be a list of messages.
    prompt = reader.text_or_messages(reader.optional("prompt"), "prompt")
    role = role_key_of(prompt if is_absent(value) else value)
    if not role:
        return {**row, column: answer}
    turns = value if isinstance(value, list) else []
    if turns and CHAT_ROLES[str(turns[-1][role]).strip().lower()] in ("assistant", "call"):
        turns = turns[:-1]
    turn = {"from": "gpt", "value": answer}
    if role == "role":
        turn = {"role": "assistant", "content": answer}
    return {**row, column: [*turns, turn]}
