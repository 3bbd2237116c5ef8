"""Check that llama.cpp reads prompts as a run's tokenizer does, and answers as the tuned model.

The logits to compare with are computed while the weights are read (`streamed_model.py`), so that
the check holds no whole model either.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tunesmith.errors import CheckpointError
from tunesmith.tools.export.gguf.llama_cpp import CHECK_CONTEXT_TOKENS, LlamaCpp
from tunesmith.tools.export.merge_check import Difference, compare_logits, probe_prompts
from tunesmith.tools.export.streamed_model import decoder_layers, streamed_logits
from tunesmith.tools.export.tuned_weights import TunedModel
from tunesmith.units import count_of

log = logging.getLogger(__name__)

MAX_PROMPTS = 20  # whose ids are compared
# Of a prompt, where next tokens are compared: each takes a request for the whole vocabulary.
POSITIONS_PER_PROMPT = 4
KL_SHARE = 0.1  # of what the training changed
FILE_KL_FLOOR_NATS = 1e-3  # more than f16 and bf16 files differ by from the model in fp32
# The same most likely token, of the positions: with less, greedy answers soon part.
LEAST_AGREEMENT = 0.75
# The median KL over positions of a file that computes the tuned model is at most 1e-5 in f16,
# 1.1e-4 in bf16 and 1.4e-3 in q8_0. Another computation, such as a router without its norm, gives
# 6e-4 or more. With fewer bits rounding gives as much.
MEDIAN_KL_NATS = {"f32": 1e-4, "f16": 1e-4, "bf16": 3e-4, "q8_0": 5e-3}
# The mean also shows a mistake at few positions, such as those beyond a window of attention.
MEAN_KL_NATS = {"f32": 5e-4, "f16": 5e-4, "bf16": 1e-3, "q8_0": 2e-2}
# Rounding makes a router choose another expert where two scores are nearly equal. At such a
# position the KL reaches 5e-2.
MEAN_KL_NATS_OF_ROUTED = {"f32": 1e-2, "f16": 1e-2, "bf16": 2e-2, "q8_0": 1e-1}
# Prompts are joined to exceed a window of attention up to this size. A longer prompt takes minutes
# on a CPU.
MAX_WINDOW_TOKENS = 1024
TOKENS_BEYOND_WINDOW = 64


@dataclass(frozen=True)
class FileCheck:
    """The comparison of a GGUF file with the tuned model.

    Attributes:
        prompts: texts that llama.cpp gave the tokenizer's ids for.
        tuned: the file against the tuned model in fp32, in log probabilities.
        base: the base against the tuned model; None of a model that was not trained, or where the
            base is not at hand.
        positions: where next tokens were compared.
    """

    prompts: int
    tuned: Difference
    base: Difference | None
    positions: int

    @property
    def is_near(self) -> bool:
        """Tell whether the file mostly writes the same tokens, and its KL is small beside what
        training changed.
        """
        if self.tuned.agreement < LEAST_AGREEMENT:
            return False
        if self.base is None:
            return True
        return self.tuned.mean_kl <= max(KL_SHARE * self.base.mean_kl, FILE_KL_FLOOR_NATS)


def require_same_model(check: FileCheck, quant: str, rejected: Path, *, is_routed: bool) -> None:
    """CheckpointError unless a file of llama.cpp's converter computes the tuned model.

    is_routed: the model has routers, which choose experts.
    """
    means = MEAN_KL_NATS_OF_ROUTED if is_routed else MEAN_KL_NATS
    is_rounded = quant not in MEDIAN_KL_NATS
    if check.is_near and (
        is_rounded
        or (check.tuned.median_kl <= MEDIAN_KL_NATS[quant] and check.tuned.mean_kl <= means[quant])
    ):
        return
    fix = "serve the Transformers folder: tunesmith merge RUN"
    if is_rounded:
        fix = f"--quant f16 tells which of the two it is; if that is not good either, {fix}"
    raise CheckpointError(
        "the verdict on the file is: not good",
        where=str(rejected),
        why=f"KL against the tuned model: mean {check.tuned.mean_kl:.2g}, median "
        f"{check.tuned.median_kl:.2g} nats; the same next token at {check.tuned.agreement:.0%} of "
        f"{check.positions} positions: "
        + ("it is rounded to too few bits, or " if is_rounded else "")
        + "llama.cpp computes this configuration in another way",
        fix=fix,
    )


def check_file(
    file: Path,
    tuned: TunedModel,
    base: TunedModel | None,
    *,
    base_file: Path | None = None,
    beyond_window: bool = False,
    device: torch.device,
    threads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FileCheck:
    """Open the file in llama.cpp, and compare it with the tuned model.

    Args:
        base: the model that has the values before training.
        base_file: the GGUF file that `file` is an adapter for.
        beyond_window: one prompt is longer than the window of the model's sliding attention.
        progress: gets the parts that are done, and all of them.

    CheckpointError where it does not open, or reads a text as other tokens: it would answer, and
    wrongly.
    """
    prompts, places = _prompts_and_places(tuned, beyond_window=beyond_window)
    # The weights of the tuned model and of the base are read once each, a layer at a time.
    layers = len(decoder_layers(tuned.model)) * (1 if base is None else 2)
    log.info(
        f"check: llama.cpp answers {count_of(len(prompts), 'prompt')}, and {layers} layers are "
        "computed in fp32 to compare with (--no-check skips this)"
    )
    advance = _count_parts(layers + sum(map(len, places)), progress)
    compute = partial(streamed_logits, dtype=torch.float32, device=device, on_layer=advance)
    with LlamaCpp(
        base_file or file,
        file if base_file else None,
        threads=threads,
        # The server needs room for a token after the longest prompt.
        context=max(CHECK_CONTEXT_TOKENS, *(len(prompt) + 1 for prompt in prompts)),
    ) as server:
        texts = _check_ids(server, tuned)
        base_logits = None
        if base is not None:
            base_logits = compute(base, prompts, values="base", places=places)
        expected = compute(tuned, prompts, values="adapter", places=places)
        compared, served = _served_logits(server, prompts, places, expected, advance)
    return FileCheck(
        len(texts),
        compare_logits(compared, served),
        None if base_logits is None else compare_logits(expected, base_logits),
        len(served),
    )


def _prompts_and_places(
    tuned: TunedModel, *, beyond_window: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the prompts whose next tokens are compared, and the positions in each.

    With `beyond_window` one prompt is longer than the window of the model's sliding attention. It
    is made of the run's rows.
    """
    prompts, _ = probe_prompts(tuned)
    places = [_places(len(prompt)) for prompt in prompts]
    config = tuned.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    window = window or getattr(config, "attention_chunk_size", None) or 0
    # llama.cpp refuses prompts that are longer than the model's context.
    length = min(window + TOKENS_BEYOND_WINDOW, tuned.files.spec.context - 1)
    if beyond_window and max(map(len, prompts)) <= window <= min(MAX_WINDOW_TOKENS, length - 1):
        rows, _ = probe_prompts(tuned, rows=MAX_PROMPTS, tokens=CHECK_CONTEXT_TOKENS)
        ids = itertools.chain.from_iterable(itertools.cycle(rows))
        prompts.append(list(itertools.islice(ids, length)))
        places.append([len(prompts[-1]) - 1])
    return prompts, places


def _count_parts(total: int, progress: Callable[[int, int], None]) -> Callable[[], None]:
    """Return a function that counts one more part for `progress`, which gets 0 at first."""
    done = itertools.count()

    def advance() -> None:
        progress(next(done), total)

    advance()
    return advance


def _served_logits(
    server: LlamaCpp,
    prompts: Sequence[list[int]],
    places: Sequence[Sequence[int]],
    expected: Sequence[torch.Tensor],
    advance: Callable[[], None],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The expected log probabilities and the server's, without the positions that it leaves out."""
    compared = []
    served = []
    for prompt, where, reference in zip(prompts, places, expected, strict=True):
        for position, row in zip(where, reference, strict=True):
            # The prompt as ids, so that a fault of the tokenizer does not show here a second time.
            values = server.log_probabilities(prompt[: position + 1], len(row))
            advance()
            if values is not None:
                served.append(values.unsqueeze(0))
                compared.append(row.log_softmax(-1).unsqueeze(0))
    return compared, served


def _places(length: int) -> list[int]:
    """Positions over a prompt of so many tokens, its last among them."""
    # The last position is the one that an answer begins from.
    count = min(POSITIONS_PER_PROMPT, length)
    return [length * (number + 1) // count - 1 for number in range(count)]


def _check_ids(server: LlamaCpp, tuned: TunedModel) -> list[str]:
    tokenizer = tuned.files.tokenizer
    # One token less than the context: the server needs room for the answer.
    prompts, _ = probe_prompts(tuned, rows=MAX_PROMPTS, tokens=CHECK_CONTEXT_TOKENS - 1)
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
