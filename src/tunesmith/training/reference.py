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
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from tunesmith.config.schema import Run
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


@dataclass
class _Scores:
    """Numbers that one file keeps: of a split's answers, or of its prompts with other answers.

    Attributes:
        sizes: rows of each of its parts. All answers are one part; prompts with other answers are
            one part a step, or one of all held-out rows.
        answers: columns: the sequences of an example.
        file: None: they are not cached.
        values: fp64 [rows of all parts, answers]; None: they are to be measured.
    """

    tokens: TokenSet
    is_mismatched: bool
    sizes: list[int]
    answers: int
    file: Path | None
    values: np.ndarray | None = None

    def hand_over(self) -> None:
        """Let batches have the numbers."""
        if not self.is_mismatched:
            # Without weights: numbers to measure memory with.
            shape = (self.sizes[0], self.answers)
            self.tokens.reference = np.zeros(shape) if self.values is None else self.values
        elif self.values is not None:
            ends = np.cumsum(self.sizes)
            self.tokens.mismatched_reference = np.split(self.values, ends[:-1])

    def read(self) -> None:
        """Take the numbers from the file if it has all of them; that of a longer run has more."""
        if self.file is None or not self.file.is_file():
            return
        content = self.file.read_bytes()
        size = len(content) - hashlib.sha256().digest_size
        if hashlib.sha256(content[:size]).digest() != content[size:]:
            log.warning("%s is damaged and will be recomputed", self.file)
            return
        values = np.load(BytesIO(content), allow_pickle=False)
        if len(values) >= sum(self.sizes):
            self.values = values[: sum(self.sizes)]


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
        is_there = ranks.all_gather_object([scores.values is not None for scores in self.scores])
        for scores, *of_ranks in zip(self.scores, *is_there, strict=True):
            if not all(of_ranks):
                scores.values = None
            scores.hand_over()

    @property
    def is_complete(self) -> bool:
        return all(scores.values is not None for scores in self.scores)

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
        return _Scores(tokens, is_mismatched, sizes, 2 if tokens.has_pairs else 1, file)

    def measure(self, root: TrainModel, loader: Loader, mesh: Mesh) -> None:
        """Score what is missing with the model as it is, and keep it; a collective call.

        loader: gives the layout of batches, and what each step compares on.
        """
        missing = [scores for scores in self.scores if scores.values is None]
        answers = sum(scores.answers * sum(scores.sizes) for scores in missing)
        log.info(f"reference: the base scores {count_of(answers, 'answer')} once, before training")
        self.ranks.heartbeat.phase(Phase.REFERENCE, STUCK_AFTER_S + COMPILING_S)
        is_training = root.training
        root.eval()
        for scores in missing:
            scores.values = self._measure(root, scores, loader, mesh)
            if scores.file is not None and self.ranks.local_rank == 0:
                _write(scores.file, scores.values)
            scores.hand_over()
        root.train(is_training)
        reshard(root)
        self.ranks.heartbeat.phase(Phase.LOADING)

    @torch.no_grad()
    def _measure(self, root: TrainModel, scores: _Scores, loader: Loader, mesh: Mesh) -> np.ndarray:
        """Measure the numbers; the data ranks take the batches in turn."""
        device = root.model.device
        parts = []
        for i, size in enumerate(scores.sizes):
            if scores.is_mismatched and scores.tokens is self.data.train:
                batches = loader.mismatched(i)
            else:
                rows = mismatched_of_all(scores.tokens) if scores.is_mismatched else scores.tokens
                batches = loader.layout.batches(rows, self.run.row_tokens)
            values = np.zeros((size, scores.answers))
            for places, batch in batches:
                logprobs = root(batch.to(device), answer_logprobs).logprobs
                values[places] = logprobs.cpu().numpy().reshape(len(places), scores.answers)
                self.ranks.heartbeat.progress()
            parts.append(values)
        # Each row is one rank's, and 0 on the others.
        total = torch.from_numpy(np.concatenate(parts)).to(device)
        all_reduce_together([total], mesh.data_group)
        return total.cpu().numpy()


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
