"""Answers to three of the run's own rows side by side: the row's, the tuned model's, the file's.

llama.cpp answers from the file, greedily. The tuned model is not loaded for it: its layers pass
once over prompt and answer together (`check.py`), which says after each token of the file which one
it would write. Up to the first where it would write another, the answer is its own greedy one too;
what it would write behind that is not computed.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from tunesmith.config.schema import Source
from tunesmith.data.rows.samples import Completion, Conversation
from tunesmith.errors import TunesmithError
from tunesmith.inference.decoding import cut_answer
from tunesmith.inference.load_run import OpenedRun
from tunesmith.tools.export.gguf.llama_cpp import CHECK_CONTEXT_TOKENS
from tunesmith.tools.export.merge_check import probe_samples, probe_sources

MAX_QUESTIONS = 3
MAX_QUESTION_ROWS = 50  # read, in search of prompts that are short enough
MAX_ANSWER_TOKENS = 48


@dataclass(frozen=True)
class Question:
    """A prompt that the file is to answer.

    Attributes:
        ids: of the whole prompt.
        text: what the user asks in it.
        reference: the row's own answer.
    """

    ids: list[int]
    text: str
    reference: str


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
    reference: str
    file: str
    tuned: str
    tokens: int
    differs_at: int | None


def questions_of(read: OpenedRun) -> list[Question]:
    """The first held-out or training rows whose prompts are short; empty where there are none."""
    for _, source in probe_sources(read):
        # The data need not be on the machine that exports.
        with suppress(TunesmithError):
            questions = list(islice(_questions(read, source), MAX_QUESTIONS))
            if questions:
                return questions
    return []


def _questions(read: OpenedRun, source: Source) -> Iterator[Question]:
    """The rows of a source that have an answer, and room for the prompt."""
    template = read.template
    for sample, where in probe_samples(read, source, MAX_QUESTION_ROWS):
        if isinstance(sample, Completion):
            text = sample.prompt
        elif isinstance(sample, Conversation) and sample.messages[-1]["role"] == "assistant":
            turns = [turn["content"] for turn in sample.messages if turn["role"] == "user"]
            text = str(turns[-1]) if turns else ""
        else:
            continue
        ids = template.prompt(sample)
        if len(ids) + MAX_ANSWER_TOKENS < CHECK_CONTEXT_TOKENS:
            answer = template.answer(sample, where=where)
            yield Question(ids, text, template.without_special_tokens(answer))


def up_to_end(ids: list[int], read: OpenedRun) -> list[int]:
    """An answer up to the first token that ends it for the run, with that one: llama.cpp knows one
    or two of them."""
    cut = cut_answer(read.files.tokenizer, ids, read.template.end_ids)
    return ids[: len(cut.ids) + 1]


def compare_answers(
    question: Question, answer: list[int], logits: Tensor, read: OpenedRun
) -> SideBySide:
    """Compare the file's answer with the tuned model's.

    Args:
        answer: the ids of the file's answer, its end among them.
        logits: the tuned model's, where they predict `answer`: [tokens, vocabulary].
    """
    ends = read.template.end_ids
    tuned = logits.argmax(-1).tolist()
    differs_at = None
    for number, pair in enumerate(zip(answer, tuned, strict=True), 1):
        # Any token that ends an answer ends it alike.
        if pair[0] != pair[1] and not ends.issuperset(pair):
            differs_at = number
            break
    return SideBySide(
        question.text,
        question.reference,
        cut_answer(read.files.tokenizer, answer, ends).text,
        cut_answer(read.files.tokenizer, tuned[:differs_at], ends).text,
        len(answer),
        differs_at,
    )
