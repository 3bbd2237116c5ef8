"""Answers to three of the run's own rows side by side: the row's, the tuned model's, the file's.

llama.cpp answers from the file, greedily. The tuned model is not loaded for it: its layers pass
once over prompt and answer together (`check.py`), which says after each token of the file which one
it would write. Up to the first where it would write another, the answer is its own greedy one too;
what it would write behind that is not computed.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tunesmith.data.rows.formats import convert_sample
from tunesmith.data.rows.samples import Completion, Conversation, Sample
from tunesmith.data.source.open_source import read_rows
from tunesmith.errors import TunesmithError
from tunesmith.inference.decoding import cut_answer
from tunesmith.inference.load_run import OpenedRun
from tunesmith.tools.export.gguf.llama_cpp import CHECK_CONTEXT_TOKENS
from tunesmith.tools.export.merge_check import SENTENCES, probe_sources

ROWS = 3
ROWS_READ = 50  # in search of prompts that are short enough
MAX_ANSWER_TOKENS = 48
TERMINAL_COLUMNS = 80
_LABEL_FORMAT = "  {:<11}"
_CHARS_BEFORE = 20  # characters shown in front of a difference


@dataclass(frozen=True)
class Question:
    """A prompt that the file is to answer.

    Attributes:
        ids: of the whole prompt.
        text: what the user asks in it.
        reference: the row's own answer; None of a sentence that is to be continued.
    """

    ids: list[int]
    text: str
    reference: str | None


@dataclass(frozen=True)
class SideBySide:
    """The answers of the file and of the tuned model to a question.

    Attributes:
        file: llama.cpp's answer from the file.
        tuned: the tuned model's; where it differs, up to the first token that does.
        tokens: of the file's answer, its end among them.
        differs_at: the number of the first token that differs, from 1; None: none does.
    """

    question: str
    reference: str | None
    file: str
    tuned: str
    tokens: int
    differs_at: int | None


def questions_of(read: OpenedRun) -> list[Question]:
    """The first held-out or training rows whose prompts are short; sentences to be continued where
    there are no such rows.
    """
    for _, source in probe_sources(read):
        questions = []
        try:
            rows = read_rows(source)
            for number in range(min(ROWS_READ, len(rows))):
                where = rows.where(number)
                system = read.location.run.data.system if read.location.run else None
                sample = convert_sample(rows[number], source, where=where, system=system)
                question = _question(read, sample, where)
                if question is not None:
                    questions.append(question)
                if len(questions) == ROWS:
                    return questions
        # The data need not be on the machine that exports.
        except TunesmithError:
            continue
        if questions:
            return questions
    tokenizer = read.files.tokenizer
    return [Question(tokenizer(text)["input_ids"], text, None) for text in SENTENCES[:ROWS]]


def _question(read: OpenedRun, sample: Sample, where: str) -> Question | None:
    """None where there is no answer, or no room for the prompt."""
    template = read.template
    if isinstance(sample, Conversation):
        if sample.messages[-1]["role"] != "assistant":
            return None
        user_turns = [turn["content"] for turn in sample.messages if turn["role"] == "user"]
        text = str(user_turns[-1]) if user_turns else ""
    elif isinstance(sample, Completion):
        text = sample.prompt
    else:
        return None  # a text has no question
    ids = list(template.prompt(sample))
    if len(ids) + MAX_ANSWER_TOKENS >= CHECK_CONTEXT_TOKENS:
        return None
    answer = template.answer(sample, where=where)
    return Question(ids, text, template.without_special_tokens(answer))


def up_to_end(ids: Sequence[int], read: OpenedRun) -> list[int]:
    """An answer up to the first token that ends it for the run, with that one: llama.cpp knows one
    or two of them."""
    for number, token in enumerate(ids, 1):
        if token in read.template.end_ids:
            return list(ids[:number])
    return list(ids)


def answer_places(question: Question, answer: Sequence[int]) -> list[int]:
    """The positions of prompt and answer that predict the tokens of the answer."""
    first = len(question.ids) - 1
    return list(range(first, first + len(answer)))


def compare_answers(
    question: Question, answer: Sequence[int], logits: Tensor, read: OpenedRun
) -> SideBySide:
    """Compare the file's answer with the tuned model's.

    Args:
        answer: the ids of the file's answer, its end among them.
        logits: the tuned model's at `answer_places`: [tokens, vocabulary].
    """
    tokenizer = read.files.tokenizer
    ends = read.template.end_ids
    predicted = logits.argmax(-1).tolist()
    differs_at = None
    for number, (own_token, other) in enumerate(zip(answer, predicted, strict=True), 1):
        # Any token that ends an answer ends it alike.
        if own_token != other and not (own_token in ends and other in ends):
            differs_at = number
            break
    tuned = list(answer) if differs_at is None else predicted[:differs_at]
    return SideBySide(
        question.text,
        question.reference,
        _text(tokenizer, answer, ends),
        _text(tokenizer, tuned, ends),
        len(answer),
        differs_at,
    )


def _text(tokenizer: Any, ids: Sequence[int], ends: Collection[int]) -> str:
    return cut_answer(tokenizer, list(ids), ends).text


def answer_lines(answers: Sequence[SideBySide]) -> list[str]:
    """The answers for a terminal: a line each, cut to its width, a difference in sight."""
    lines = []
    for answer in answers:
        lines.append(_line("asked", answer.question))
        if answer.reference is not None:
            lines.append(_line("reference", answer.reference))
        if answer.differs_at is None:
            lines.append(_line("file", answer.file))
            lines.append(_line("tuned", f"(the same {answer.tokens} tokens)"))
            continue
        first = _common_length(_one_line(answer.file), _one_line(answer.tuned))
        lines.append(_line("file", answer.file, first))
        lines.append(_line("tuned", f"{answer.tuned} ...", first))
        # The positions that are compared are of rows as they stand; an answer goes on from its own
        # tokens.
        place = f"differs from token {answer.differs_at} of {answer.tokens}"
        place = f"({place}: one near tie changes what follows)"
        lines.append(_line("", place))
    return lines


def _line(label: str, text: str, at: int = 0) -> str:
    """One line of the terminal, with the character `at` in it."""
    room = TERMINAL_COLUMNS - len(_LABEL_FORMAT.format(label))
    text = _one_line(text)
    if at > room - _CHARS_BEFORE:
        text = f"... {text[at - _CHARS_BEFORE :]}"
    if len(text) > room:
        text = f"{text[: room - 4]} ..."
    return (_LABEL_FORMAT.format(label) + text).rstrip()


def _common_length(text: str, other: str) -> int:
    """The number of characters at the start that are equal."""
    for number, (char, other_char) in enumerate(zip(text, other, strict=False)):
        if char != other_char:
            return number
    return min(len(text), len(other))


def _one_line(text: str) -> str:
    return " ".join(text.split())
