"""Whether llama.cpp reads a run's prompts as its tokenizer does, and answers as the tuned model.

The logits to compare with are computed while the weights are read (`streamed_model.py`), so that
the check holds no whole model either.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.errors import CheckpointError
from tunesmith.export.gguf.answers import (
    TOKENS,
    SideBySide,
    answer_places,
    compare_answers,
    questions_of,
    up_to_end,
)
from tunesmith.export.gguf.llama_cpp import CONTEXT, LlamaCpp
from tunesmith.export.merge_check import Difference, compare_logits, probe_prompts
from tunesmith.export.streamed_model import Values, streamed_logits
from tunesmith.export.tuned_weights import TunedModel

PROMPTS = 20  # whose ids are compared
# Of a prompt, where next tokens are compared: each takes a request for the whole vocabulary.
POSITIONS = 4
KL_SHARE = 0.1  # of what the training changed
KL_FLOOR = 1e-3  # nats: more than f16 and bf16 files differ by from the model in fp32
# The same most likely token, of the positions: with less, greedy answers soon part.
LEAST_AGREEMENT = 0.75


@dataclass(frozen=True)
class FileCheck:
    """What was compared.

    Attributes:
        prompts: texts that llama.cpp gave the tokenizer's ids for.
        tuned: the file against the tuned model in fp32.
        base: the base against the tuned model; None of a model that was not trained, or where the
            base is not at hand.
        positions: where next tokens were compared.
        answers: to rows of the run, side by side.
    """

    prompts: int
    tuned: Difference
    base: Difference | None
    positions: int
    answers: tuple[SideBySide, ...]

    @property
    def is_near(self) -> bool:
        """Whether the file mostly writes the same tokens, and its KL is small beside what training
        changed.
        """
        if self.tuned.agreement < LEAST_AGREEMENT:
            return False
        if self.base is None:
            return True
        return self.tuned.mean_kl <= max(KL_SHARE * self.base.mean_kl, KL_FLOOR)


def check_file(
    file: Path,
    tuned: TunedModel,
    base: tuple[TunedModel, Values] | None,
    *,
    device: torch.device,
    threads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FileCheck:
    """Open the file in llama.cpp, and compare it with the tuned model.

    Args:
        base: the model before training, and which values of it.
        progress: gets the parts that are done, and all of them.

    CheckpointError where it does not open, or reads a text as other tokens: it would answer, and
    wrongly.
    """
    prompts, _ = probe_prompts(tuned.files)
    places = [_places(len(prompt)) for prompt in prompts]
    questions = questions_of(tuned.files)
    # Answers, passes over the weights of the tuned model and of the base, and positions.
    total = len(questions) + 1 + sum(map(len, places)) + (base is not None)
    parts = itertools.count()

    def advance() -> None:
        progress(next(parts), total)

    advance()
    with LlamaCpp(file, threads=threads) as server:
        texts = _check_ids(server, tuned)
        answers = []
        for question in questions:
            answers.append(up_to_end(server.answer(question.ids, TOKENS), tuned.files))
            advance()
        # Answers and prompts in one pass, which reads every weight once.
        passages = [*prompts]
        passage_places = [*places]
        for question, answer in zip(questions, answers, strict=True):
            passages.append([*question.ids, *answer])
            passage_places.append(answer_places(question, answer))
        expected = _logits(tuned, "adapter", passages, passage_places, device)
        advance()
        compared, served = _served_logits(
            server, prompts, places, expected[: len(prompts)], advance
        )
    side_by_side = []
    for question, answer, logits in zip(questions, answers, expected[len(prompts) :], strict=True):
        side_by_side.append(compare_answers(question, answer, logits, tuned.files))
    against_base = None
    if base is not None:
        base_logits = _logits(*base, prompts, places, device)
        against_base = compare_logits(expected[: len(prompts)], base_logits)
        advance()
    return FileCheck(
        len(texts),
        compare_logits(compared, served),
        against_base,
        len(served),
        tuple(side_by_side),
    )


def _logits(
    model: TunedModel,
    values: Values,
    prompts: Sequence[Sequence[int]],
    places: Sequence[Sequence[int]],
    device: torch.device,
) -> list[torch.Tensor]:
    return streamed_logits(
        model, prompts, values=values, dtype=torch.float32, device=device, places=places
    )


def _served_logits(
    server: LlamaCpp,
    prompts: Sequence[list[int]],
    places: Sequence[Sequence[int]],
    expected: Sequence[torch.Tensor],
    advance: Callable[[], None],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The expected logits and the server's, without the positions that it leaves out."""
    compared = []
    served = []
    for prompt, where, reference in zip(prompts, places, expected, strict=True):
        for position, row in zip(where, reference, strict=True):
            # The prompt as ids, so that a fault of the tokenizer does not show here a second time.
            values = server.log_probabilities(prompt[: position + 1], len(row))
            advance()
            if values is not None:
                served.append(values.unsqueeze(0))
                compared.append(row.unsqueeze(0))
    return compared, served


def _places(length: int) -> list[int]:
    """Positions over a prompt of so many tokens, its last among them."""
    # The last position is the one that an answer begins from.
    count = min(POSITIONS, length)
    return [length * (number + 1) // count - 1 for number in range(count)]


def _check_ids(server: LlamaCpp, tuned: TunedModel) -> list[str]:
    tokenizer = tuned.files.files.tokenizer
    # One token less than the context: the server needs room for the answer.
    prompts, _ = probe_prompts(tuned.files, rows=PROMPTS, tokens=CONTEXT - 1)
    texts = [tokenizer.decode(ids) for ids in prompts]
    for text in texts:
        own_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if server.ids(text, add_special=False) != own_ids:
            raise CheckpointError(
                "llama.cpp tokenizes a text of the run differently",
                where=repr(text[:120]),
                why="the model would get a different prompt than in training",
                fix="serve it in Transformers format: tunesmith merge RUN",
            )
    return texts
