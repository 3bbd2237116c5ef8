"""Log-probabilities of a model before its full fine-tuning, for methods that compare with it.

A second copy of all weights would double what the model needs, so each answer is scored once, by
the engine that trains, and the numbers are cached beside the tokens: a file for these weights,
these rows and this dtype. Another base or other rows make another file.

KTO also compares on prompts with the answers of other rows of a step. Which these are follows from
the seed, so those of all steps are scored too, in the layout of the step. A run that gets longer
scores those of its new steps.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from tunesmith.config.schema import Run
from tunesmith.data.batches.batch import Batch
from tunesmith.data.batches.loader import Loader
from tunesmith.data.batches.mismatched import mismatched_of_all
from tunesmith.data.prepare import TrainingData
from tunesmith.data.tokens.token_set import TokenSet
from tunesmith.distributed.activity import COMPILING_S, STUCK_AFTER_S
from tunesmith.distributed.ranks import Ranks
from tunesmith.host.files import cache_folder, write_atomically
from tunesmith.methods import METHODS
from tunesmith.methods.answers import answer_logprobs
from tunesmith.methods.base import TrainModel
from tunesmith.parallel.mesh import Mesh, all_reduce_together
from tunesmith.parallel.shard import reshard
from tunesmith.run_dir import Phase
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# Raise it when the same weights and rows would give other numbers, or a file has another form.
CACHE_VERSION = 3
_DAMAGED = "%s is damaged and will be recomputed (%s)"


@dataclass
class _Scores:
    """Numbers that one file keeps: of a split's answers, or of its prompts with other answers.

    Attributes:
        sizes: rows of each of its arrays: one of all answers; of prompts with other answers one a
            step, or one of all held-out rows.
        answers: columns: the sequences of an example.
        file: None: they are not cached.
        arrays: fp64 [size, answers] each; the first ones, as many as are computed.
    """

    tokens: TokenSet
    is_mismatched: bool
    sizes: list[int]
    answers: int
    file: Path | None
    arrays: list[np.ndarray]

    @property
    def missing(self) -> range:
        return range(len(self.arrays), len(self.sizes))

    def hand_over(self) -> None:
        """Let batches have the numbers."""
        if self.is_mismatched:
            self.tokens.mismatched_reference = self.arrays
        elif self.arrays:
            [self.tokens.reference] = self.arrays
        else:
            # Numbers to measure memory with, before the model has weights.
            self.tokens.reference = np.zeros((self.sizes[0], self.answers))

    def read(self) -> None:
        """Take from the file as many arrays as it has whole."""
        values = _read(self.file, self.answers) if self.file is not None else None
        if values is None:
            return
        ends = np.cumsum(self.sizes)
        ends = ends[ends <= len(values)]
        self.arrays = np.split(values[: ends[-1]], ends[:-1]) if len(ends) else []


class BaseReference:
    """The base's numbers of the answers of a run: read from the cache, or measured once.

    Attributes:
        is_complete: on all ranks; the training and validation rows then have the numbers.
    """

    def __init__(self, run: Run, data: TrainingData, model_hash: str | None, ranks: Ranks) -> None:
        self.run = run
        self.data = data
        self.model_hash = model_hash  # None: random weights, whose numbers are not cached
        self.ranks = ranks
        splits = [data.train, *([data.validation] if data.validation is not None else [])]
        self.scores = [self._scores(tokens, is_mismatched=False) for tokens in splits]
        if METHODS[run.method.name].needs_mismatched:
            self.scores += [self._scores(tokens, is_mismatched=True) for tokens in splits]
        for scores in self.scores:
            scores.read()
        # What one rank misses, all measure.
        counts = ranks.all_gather_object([len(scores.arrays) for scores in self.scores])
        for scores, *count_of_rank in zip(self.scores, *counts, strict=True):
            del scores.arrays[min(count_of_rank) :]
            scores.hand_over()

    @property
    def is_complete(self) -> bool:
        return not any(scores.missing for scores in self.scores)

    def _scores(self, tokens: TokenSet, *, is_mismatched: bool) -> _Scores:
        settings = {
            "version": CACHE_VERSION,
            "rows": tokens.counts.digest,
            "model": self.model_hash,
            "dtype": self.run.model.dtype,
            "attention": self.run.model.attention,
        }
        if tokens.shares_prompts:
            # Other rows, and so other sums.
            settings["shares_prompts"] = True
        sizes = [len(tokens)]
        if is_mismatched and tokens is self.data.train:
            schedule = self.data.schedule
            steps = schedule.steps(self.run.train.duration)
            assert steps is not None  # config/check.py refuses a duration by the clock
            sizes = [len(schedule.examples(step)) for step in range(steps)]
            settings["mismatched"] = schedule.digest()
        elif is_mismatched:
            settings["mismatched"] = "all"
        file = None
        if self.model_hash is not None:
            name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
            file = cache_folder("tokens", "reference", f"{name}.npy")
        return _Scores(tokens, is_mismatched, sizes, 2 if tokens.has_pairs else 1, file, [])

    def measure(self, root: TrainModel, loader: Loader, mesh: Mesh) -> None:
        """Score what is missing with the model as it is, and keep it; a collective call.

        loader: gives the layout of batches, and what each step compares on.
        """
        answers = 0
        for scores in self.scores:
            answers += scores.answers * sum(scores.sizes[i] for i in scores.missing)
        log.info(f"reference: the base scores {count_of(answers, 'answer')} once, before training")
        self.ranks.heartbeat.phase(Phase.REFERENCE, STUCK_AFTER_S + COMPILING_S)
        is_training = root.training
        root.eval()
        for scores in self.scores:
            if scores.missing:
                scores.arrays += self._measure(root, scores, loader, mesh)
                if scores.file is not None and self.ranks.local_rank == 0:
                    _write(scores.file, np.concatenate(scores.arrays))
            scores.hand_over()
        root.train(is_training)
        reshard(root)
        self.ranks.heartbeat.phase(Phase.LOADING)

    @torch.no_grad()
    def _measure(
        self, root: TrainModel, scores: _Scores, loader: Loader, mesh: Mesh
    ) -> list[np.ndarray]:
        """The missing arrays; the data ranks take the batches in turn."""
        device = root.model.device
        measured = []
        for i in scores.missing:
            values = np.zeros((scores.sizes[i], scores.answers))
            for rows, batch in self._batches(scores, i, loader):
                logprobs = root(batch.to(device), answer_logprobs).logprobs
                values[rows] = logprobs.cpu().numpy().reshape(len(rows), scores.answers)
                self.ranks.heartbeat.progress()
            measured.append(values)
        # Each row is one rank's, and 0 on the others.
        total = torch.from_numpy(np.concatenate(measured)).to(device)
        all_reduce_together([total], mesh.data_group)
        ends = np.cumsum([len(values) for values in measured])
        return np.split(total.cpu().numpy(), ends[:-1])

    def _batches(
        self, scores: _Scores, i: int, loader: Loader
    ) -> Iterator[tuple[list[int], Batch]]:
        """This rank's batches of the array `i`, each with the rows of the array that it fills."""
        room = self.run.row_tokens
        if not scores.is_mismatched:
            return loader.layout.batches(scores.tokens, room)
        if scores.tokens is self.data.train:
            return loader.mismatched(i)
        return loader.layout.batches(mismatched_of_all(scores.tokens), room)


def _read(path: Path, answers: int) -> np.ndarray | None:
    """fp64 [examples, answers]; None where the file is not there or is damaged."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning(_DAMAGED, path, error.strerror)
        return None
    size = len(content) - hashlib.sha256().digest_size
    if hashlib.sha256(content[:size]).digest() != content[size:]:
        log.warning(_DAMAGED, path, "its checksum differs")
        return None
    values: np.ndarray = np.load(BytesIO(content), allow_pickle=False)
    is_whole = values.shape[1:] == (answers,) and bool(np.all(np.isfinite(values)))
    return values if is_whole else None


def _write(path: Path, values: np.ndarray) -> None:
    """Keep the numbers, and their checksum behind them; a cache that cannot be written costs a
    warning."""
    buffer = BytesIO()
    np.save(buffer, values, allow_pickle=False)
    content = buffer.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content + hashlib.sha256(content).digest())
    except OSError as error:
        log.warning(
            "the reference's log-probabilities cannot be cached: %s (%s)", path, error.strerror
        )
