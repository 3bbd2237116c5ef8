"""Comparison of a GGUF file in llama.cpp with the tuned model: token ids of prompts, and logits.

The tuned model's logits are computed by `streamed_model.py`, which reads each weight only when it
is used. Therefore the entire model is never in memory.
"""

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from tunesmith.errors import CheckpointError
from tunesmith.tools.export.gguf.families import SERVE_FOLDER
from tunesmith.tools.export.gguf.llama_cpp import CHECK_CONTEXT_TOKENS, LlamaCpp
from tunesmith.tools.export.gguf.write import Progress
from tunesmith.tools.export.merge_check import Difference, compare_logits, probe_prompts
from tunesmith.tools.export.streamed_model import decoder_layers, streamed_logits
from tunesmith.tools.export.tuned_weights import TunedModel
from tunesmith.units import count_of

log = logging.getLogger(__name__)

MAX_PROMPTS = 20  # maximum number of prompts whose token ids are compared
# Maximum number of positions per prompt at which the logits are compared. Each position needs a
# request that returns the entire vocabulary.
POSITIONS_PER_PROMPT = 4
# Maximum KL between file and tuned model, as a fraction of the KL between base and tuned model.
KL_SHARE = 0.1
# A KL up to this value is always accepted. Correct f16 and bf16 files have a smaller KL.
FILE_KL_FLOOR_NATS = 1e-3
# Minimum fraction of positions at which file and tuned model have the same most likely token. With
# a smaller fraction, greedy answers soon differ.
MIN_AGREEMENT = 0.75
# Maximum median KL over the positions, by quantization. Measured: a correct file has at most 1e-5
# in f16, 1.1e-4 in bf16 and 1.4e-3 in q8_0. A wrong computation, such as a router without its norm,
# gives 6e-4 or more. Types with fewer bits than q8_0 have no limit, because their rounding errors
# alone give such values.
MEDIAN_KL_NATS = {"f32": 1e-4, "f16": 1e-4, "bf16": 3e-4, "q8_0": 5e-3}
# Maximum mean KL. The mean also detects an error at only a few positions, such as the positions
# after the end of an attention window.
MEAN_KL_NATS = {"f32": 5e-4, "f16": 5e-4, "bf16": 1e-3, "q8_0": 2e-2}
# Maximum mean KL of a mixture of experts. If two router scores are nearly equal, rounding makes the
# router choose another expert. The KL of such a position reaches 5e-2.
ROUTED_MEAN_KL_NATS = {"f32": 1e-2, "f16": 1e-2, "bf16": 2e-2, "q8_0": 1e-1}
# Maximum size of a sliding attention window that is checked with a prompt longer than the window.
# For larger windows, this prompt would take minutes on a CPU.
MAX_WINDOW_TOKENS = 1024
TOKENS_BEYOND_WINDOW = 64


@dataclass(frozen=True)
class FileCheck:
    """Comparison of a GGUF file with the tuned model.

    Attributes:
        prompts: number of texts for which llama.cpp and the tokenizer give the same token ids.
        tuned: difference between the log probabilities of the tuned model in fp32 and of the file.
        base: difference between the log probabilities of the tuned model and of the base model;
            None if the model was not trained, or if the base model is missing.
        positions: number of positions at which the next token was compared.
    """

    prompts: int
    tuned: Difference
    base: Difference | None
    positions: int

    @property
    def is_near(self) -> bool:
        """Return whether the file and the tuned model mostly predict the same tokens.

        The KL divergence between the two must also be small compared with the effect of the
        training.
        """
        if self.tuned.agreement < MIN_AGREEMENT:
            return False
        if self.base is None:
            return True
        return self.tuned.mean_kl <= max(KL_SHARE * self.base.mean_kl, FILE_KL_FLOOR_NATS)


def require_same_model(check: FileCheck, quant: str, rejected: Path, *, is_routed: bool) -> None:
    """Raise CheckpointError if the outputs of a converted file differ from the tuned model's.

    This check is for files of llama.cpp's converter, which may implement the model differently.

    Args:
        rejected: path of the rejected file, for the error message.
        is_routed: whether the model is a mixture of experts.
    """
    means = ROUTED_MEAN_KL_NATS if is_routed else MEAN_KL_NATS
    # Types with few bits have no limit, because rounding to few bits also changes the outputs.
    has_few_bits = quant not in MEDIAN_KL_NATS
    if check.is_near and (
        has_few_bits
        or (check.tuned.median_kl <= MEDIAN_KL_NATS[quant] and check.tuned.mean_kl <= means[quant])
    ):
        return
    fix = SERVE_FOLDER
    if has_few_bits:
        fix = f"use --quant f16 to find out the cause; if that file differs too, {fix}"
    raise CheckpointError(
        "the GGUF file differs too much from the tuned model",
        where=rejected,
        why=f"the KL divergence from the tuned model is {check.tuned.mean_kl:.2g} nats (median "
        f"{check.tuned.median_kl:.2g}), and at {check.tuned.agreement:.0%} of "
        f"{check.positions} positions both models predict the same next token; "
        + ("the weights are rounded to too few bits, or " if has_few_bits else "")
        + "llama.cpp implements this type of model differently",
        fix=fix,
    )


def check_file(
    file: Path,
    tuned: TunedModel,
    base: TunedModel | None,
    *,
    beyond_window: bool = False,
    device: torch.device,
    threads: int,
    progress: Progress = lambda done, total: None,
) -> FileCheck:
    """Open a GGUF file in llama.cpp, and compare it with the tuned model.

    Args:
        base: the model before training.
        beyond_window: add a prompt that is longer than the model's sliding attention window.
        progress: function that is called with the number of finished steps and the number of all
            steps.

    Raise CheckpointError if llama.cpp cannot open the file. Also raise it if llama.cpp tokenizes a
    text differently, because the model would then give wrong answers without an error.
    """
    prompts, positions = _prompts_and_positions(tuned, beyond_window=beyond_window)
    # Number of layers to compute in the tuned model and in the base model, for the progress.
    layers = len(decoder_layers(tuned.model)) * (1 if base is None else 2)
    log.info(
        f"checking the GGUF file: llama.cpp's answers to {count_of(len(prompts), 'prompt')} are "
        f"compared with those of the tuned model in fp32 ({layers:,} layers to compute); "
        "--no-check skips the check"
    )
    total = layers + sum(map(len, positions))
    done = itertools.count()

    def advance() -> None:
        progress(next(done), total)

    advance()  # reports 0 steps
    compute = partial(streamed_logits, dtype=torch.float32, device=device, on_layer=advance)
    with LlamaCpp(
        file,
        threads=threads,
        # The context must hold one token more than the longest prompt.
        context=max(CHECK_CONTEXT_TOKENS, *(len(prompt) + 1 for prompt in prompts)),
    ) as server:
        checked = _check_ids(server, tuned)
        base_logits = None
        if base is not None:
            base_logits = compute(base, prompts, values="base", positions=positions)
        expected = compute(tuned, prompts, values="adapter", positions=positions)
        compared, served = _served_logits(server, prompts, positions, expected, advance)
    return FileCheck(
        checked,
        compare_logits(compared, served),
        None if base_logits is None else compare_logits(expected, base_logits),
        len(served),
    )


def _prompts_and_positions(
    tuned: TunedModel, *, beyond_window: bool
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the prompts for the comparison of logits, and the compared positions of each prompt.

    If `beyond_window` is set, one prompt is longer than the model's sliding attention window. This
    prompt is joined from several rows of the run.
    """
    prompts, _ = probe_prompts(tuned)
    positions = [_spaced_positions(len(prompt)) for prompt in prompts]
    config = tuned.model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    window = window or getattr(config, "attention_chunk_size", None) or 0
    # llama.cpp refuses prompts that are longer than the model's context.
    length = min(window + TOKENS_BEYOND_WINDOW, tuned.files.spec.context - 1)
    if beyond_window and max(map(len, prompts)) <= window <= min(MAX_WINDOW_TOKENS, length - 1):
        rows, _ = probe_prompts(tuned, rows=MAX_PROMPTS, tokens=CHECK_CONTEXT_TOKENS)
        ids = itertools.chain.from_iterable(itertools.cycle(rows))
        prompts.append(list(itertools.islice(ids, length)))
        positions.append([len(prompts[-1]) - 1])
    return prompts, positions


def _served_logits(
    server: LlamaCpp,
    prompts: Sequence[list[int]],
    positions: Sequence[Sequence[int]],
    expected: Sequence[torch.Tensor],
    advance: Callable[[], None],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the log probabilities of the model and of the server for the same positions.

    `expected` has the logits of the model. Positions for which the server returns no values are
    left out.
    """
    compared = []
    served = []
    for prompt, in_prompt, logits in zip(prompts, positions, expected, strict=True):
        for position, row in zip(in_prompt, logits, strict=True):
            # Send token ids instead of text, so that the result does not depend on the tokenizer.
            values = server.log_probabilities(prompt[: position + 1], len(row))
            advance()
            if values is not None:
                served.append(values.unsqueeze(0))
                compared.append(row.log_softmax(-1).unsqueeze(0))
    return compared, served


def _spaced_positions(length: int) -> list[int]:
    """Return evenly spaced positions of a prompt of `length` tokens, including the last token."""
    count = min(POSITIONS_PER_PROMPT, length)
    return [length * (number + 1) // count - 1 for number in range(count)]


def _check_ids(server: LlamaCpp, tuned: TunedModel) -> int:
    """Return the number of texts for which llama.cpp and the tokenizer give the same token ids.

    Raise CheckpointError if the token ids of a text differ.
    """
    # A prompt must be one token shorter than the context, because the server generates one more
    # token.
    prompts, _ = probe_prompts(tuned, rows=MAX_PROMPTS, tokens=CHECK_CONTEXT_TOKENS - 1)
    for ids in prompts:
        text = tuned.tokenizer.decode(ids)
        own_ids = tuned.tokenizer(text, add_special_tokens=False)["input_ids"]
        if server.ids(text, add_special=False) != own_ids:
            raise CheckpointError(
                "llama.cpp and the run's tokenizer give different tokens for the same text",
                where=repr(text[:120]),
                why="the model would see other tokens than in training",
                fix=SERVE_FOLDER,
            )
    return len(prompts)
