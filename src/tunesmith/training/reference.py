"""Log-probabilities of the base model, which methods such as DPO need as a reference in full
fine-tuning.

A second copy of all weights for the reference would double the memory of the model. Instead, the
log-probability of each answer is computed once before training. The values are cached next to the
tokens. The cache file depends on the weights, the rows and the dtype.

KTO also needs log-probabilities of mismatched pairs: each prompt of a step with the answer of
another row of the step. The seed determines these pairs, so their values are computed for all steps
in advance, in the batch layout of each step. If the run is made longer, all steps are computed
again.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from tunesmith.batches.loader import Loader
from tunesmith.batches.mismatched import mismatched_of_all
from tunesmith.batches.training_data import TrainingData
from tunesmith.config.schema import Run
from tunesmith.distributed.activity import COMPILING_S, STUCK_AFTER_S
from tunesmith.distributed.ranks import Ranks
from tunesmith.host.files import cache_folder, write_atomically
from tunesmith.methods import METHODS
from tunesmith.methods.pairs import answer_logprobs
from tunesmith.parallel.mesh import Mesh, all_reduce_together
from tunesmith.parallel.shard import reshard
from tunesmith.run_dir import Phase
from tunesmith.tokens.token_set import TokenSet
from tunesmith.train_model import TrainModel, evaluating
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# Version of the cache. Increase it if the same inputs give other values or the file format changes.
CACHE_VERSION = 3


@dataclass
class _Scores:
    """Values of one cache file: log-probabilities of the answers in a data split (training or
    validation), or of its mismatched pairs.

    Attributes:
        sizes: number of rows in each part of `values`. The mismatched pairs of training rows have
            one part per step. All other values have only one part.
        answers: number of columns, which is the number of sequences per example.
        file: the cache file. None if the values are not cached.
        values: fp64 [rows of all parts, answers]. None if they are not measured yet.
    """

    tokens: TokenSet
    is_mismatched: bool
    sizes: list[int]
    answers: int
    file: Path | None
    values: np.ndarray | None = None

    def set_in_tokens(self) -> None:
        """Store the values in the token set, so that batches contain them."""
        if not self.is_mismatched:
            # If there are no values yet, store zeros, so that batches already have a reference.
            shape = (self.sizes[0], self.answers)
            self.tokens.reference = np.zeros(shape) if self.values is None else self.values
        elif self.values is not None:
            ends = np.cumsum(self.sizes)
            self.tokens.mismatched_reference = np.split(self.values, ends[:-1])

    def read(self) -> None:
        """Read the values if the file has enough of them. The file may have more, from a longer
        run.
        """
        if self.file is None or not self.file.is_file():
            return
        content = self.file.read_bytes()
        size = len(content) - hashlib.sha256().digest_size
        digest = hashlib.sha256(content[:size]).digest()
        if digest != content[size:]:
            log.warning(
                "the cached log-probabilities in %s are damaged and will be recomputed", self.file
            )
            return
        values = np.load(BytesIO(content), allow_pickle=False)
        count = sum(self.sizes)
        if len(values) >= count:
            self.values = values[:count]


class BaseReference:
    """Log-probabilities of a run's answers under the base model. They are read from the cache or
    computed once.

    Attributes:
        is_complete: whether all values are known on all ranks. The token sets then contain them.
    """

    def __init__(self, run: Run, data: TrainingData, model_hash: str | None, ranks: Ranks) -> None:
        self.run = run
        self.data = data
        self.model_hash = model_hash  # None for random weights, whose values are not cached
        self.ranks = ranks
        splits = [data.train]
        if data.validation is not None:
            splits.append(data.validation)
        self.scores = [self._scores(tokens, is_mismatched=False) for tokens in splits]
        if METHODS[run.method.name].needs_mismatched:
            self.scores += [self._scores(tokens, is_mismatched=True) for tokens in splits]
        for scores in self.scores:
            scores.read()
        is_known = [scores.values is not None for scores in self.scores]
        is_known_by_rank = ranks.all_gather_object(is_known)
        for i, scores in enumerate(self.scores):
            # If the cache of one rank lacks the values, all ranks must measure them together.
            if not all(on_rank[i] for on_rank in is_known_by_rank):
                scores.values = None
            scores.set_in_tokens()

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
            # Values with shared prompts have another cache file, because sharing changes the
            # rounding of sums.
            settings["shares_prompts"] = True
        sizes = [len(tokens)]
        if is_mismatched and tokens is self.data.train:
            schedule = self.data.schedule
            steps = schedule.steps(self.run.train.duration)
            assert steps is not None  # config/check.py rejects a time limit as duration
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
        """Measure the missing values with the current weights, and write them to the cache. This is
        a collective call.

        Args:
            loader: determines the batch layout, and the mismatched pairs of each step.
        """
        missing = [scores for scores in self.scores if scores.values is None]
        count = 0
        for scores in missing:
            count += scores.answers * sum(scores.sizes)
        log.info(
            f"reference: computing the log-probabilities of {count_of(count, 'answer')} under the "
            "base model, once before training"
        )
        self.ranks.heartbeat.phase(Phase.REFERENCE, STUCK_AFTER_S + COMPILING_S)
        with evaluating(root):
            for scores in missing:
                scores.values = self._measure(root, scores, loader, mesh)
                if scores.file is not None and self.ranks.local_rank == 0:
                    _write(scores.file, scores.values)
                scores.set_in_tokens()
        reshard(root)
        self.ranks.heartbeat.phase(Phase.LOADING)

    def _measure(self, root: TrainModel, scores: _Scores, loader: Loader, mesh: Mesh) -> np.ndarray:
        """Compute the log-probabilities of one cache file. Each data rank computes a part of the
        batches.
        """
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
                answers = root(batch.to(device), answer_logprobs)
                logprobs = answers.logprobs.cpu().numpy()
                values[places] = logprobs.reshape(len(places), scores.answers)
                self.ranks.heartbeat.progress()
            parts.append(values)
        # Each value is computed on one rank and is 0 on the other ranks, so the sum over the ranks
        # is the value.
        total = torch.from_numpy(np.concatenate(parts))
        total = total.to(device)
        all_reduce_together([total], mesh.data_group)
        return total.cpu().numpy()


def _write(path: Path, values: np.ndarray) -> None:
    """Write the values and their checksum to a file. If this fails, log a warning."""
    buffer = BytesIO()
    np.save(buffer, values, allow_pickle=False)
    content = buffer.getvalue()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content + hashlib.sha256(content).digest())
    except OSError as error:
        log.warning(
            "the log-probabilities of the reference model cannot be cached in %s: %s",
            path,
            error.strerror,
        )
