"""Log-probabilities of a model before its full fine-tuning, for methods that compare with it.

A second copy of all weights would double what the model needs, so each answer is scored once, by
the engine that trains, and the numbers are kept beside the tokens: a file for these weights, these
rows and this dtype. Another base or other rows make another file.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from tunesmith.config.schema import Run
from tunesmith.data.batch import collate
from tunesmith.data.pack import best_fit_decreasing
from tunesmith.data.prepare import TrainingData
from tunesmith.data.tokens import TokenSet
from tunesmith.distributed.activity import COMPILING_S, STUCK_AFTER_S
from tunesmith.distributed.ranks import Ranks
from tunesmith.host.files import cache_folder, write_atomically
from tunesmith.methods.answers import answer_logprobs
from tunesmith.methods.base import TrainModel
from tunesmith.parallel.mesh import Mesh, all_reduce_together
from tunesmith.parallel.shard import reshard
from tunesmith.planning.run_plan import MicroBatchLayout
from tunesmith.units import ceil_div, count_of

log = logging.getLogger(__name__)

# Raise it when the same weights and rows would give other numbers.
VERSION = 1


class BaseReference:
    """What the base says of the answers of a run: read from the cache, or measured once.

    Attributes:
        is_known: on all ranks; the training and validation rows then have the numbers.
    """

    def __init__(self, run: Run, data: TrainingData, model_hash: str | None, ranks: Ranks) -> None:
        self.run = run
        self.model_hash = model_hash  # None: random weights, whose numbers are not kept
        self.ranks = ranks
        self.splits = [data.train, *([data.validation] if data.validation is not None else [])]
        for tokens in self.splits:
            tokens.reference = None
            if model_hash is not None:
                tokens.reference = _read(self._file(tokens), tokens)
        is_known = all(tokens.reference is not None for tokens in self.splits)
        self.is_known = all(ranks.all_gather_object(is_known))
        for tokens in self.splits:
            # Numbers to measure memory with, before the model has weights.
            if tokens.reference is None:
                tokens.reference = np.zeros(_shape(tokens))

    def _file(self, tokens: TokenSet) -> Path:
        """Where the numbers of these rows under these weights are kept."""
        made_of = {
            "version": VERSION,
            "rows": tokens.counts.digest,
            "model": self.model_hash,
            "dtype": self.run.model.dtype,
            "attention": self.run.model.attention,
        }
        name = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        return cache_folder("tokens", "reference", f"{name}.npy")

    def measure(self, root: TrainModel, layout: MicroBatchLayout, pad_id: int, mesh: Mesh) -> None:
        """Score all answers with the model as it is, and keep the numbers; a collective call."""
        answers = sum(len(tokens) * _shape(tokens)[1] for tokens in self.splits)
        log.info(f"reference: the base scores {count_of(answers, 'answer')} once, before training")
        heartbeat = self.ranks.heartbeat
        heartbeat.phase("reference", STUCK_AFTER_S + COMPILING_S)
        for tokens in self.splits:
            tokens.reference = _measure(
                root,
                tokens,
                layout,
                pad_id=pad_id,
                row_tokens=self.run.row_tokens,
                mesh=mesh,
                measured=heartbeat.progress,
            )
            if self.model_hash is not None and self.ranks.local_rank == 0:
                _write(self._file(tokens), tokens.reference)
        heartbeat.phase("loading the model")
        self.is_known = True


def _read(path: Path, tokens: TokenSet) -> np.ndarray | None:
    """fp64 [examples, sequences of one]; None where the file is not there or is damaged."""
    try:
        values: np.ndarray = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        log.warning("%s is damaged, and its numbers are made again (%s)", path, error)
        return None
    is_whole = values.shape == _shape(tokens) and bool(np.all(np.isfinite(values)))
    return values if is_whole else None


def _write(path: Path, values: np.ndarray) -> None:
    """Keep the numbers; a cache that cannot be written costs a warning."""
    buffer = BytesIO()
    np.save(buffer, values, allow_pickle=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())
    except OSError as error:
        log.warning("the reference's numbers are not kept: %s (%s)", path, error.strerror)


@torch.no_grad()
def _measure(
    root: TrainModel,
    tokens: TokenSet,
    layout: MicroBatchLayout,
    *,
    pad_id: int,
    row_tokens: int,
    mesh: Mesh,
    measured: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Score every answer with the model as it is; a collective call of the ranks of `mesh`.

    The data ranks take the rows in turn. `measured` is called after each.

    Returns:
        fp64 [examples, sequences of one].
    """
    values = np.zeros(_shape(tokens))
    room = layout.pad_to or max(row_tokens, int(tokens.lengths.max(initial=0)))
    rows = best_fit_decreasing(tokens.lengths, room)
    ranks = mesh.shape.data
    device = root.model.device
    is_training = root.training
    root.eval()
    for first in range(0, len(rows), ranks):
        mine = first + mesh.data_rank
        examples = rows[mine] if mine < len(rows) else []
        length = layout.pad_to or max(1, int(tokens.lengths[examples].sum()))
        length = ceil_div(length, mesh.shape.tensor) * mesh.shape.tensor
        row = [tokens[i]._replace(reference=()) for i in examples]
        batch = collate([row], length=length, pad_id=pad_id, bound=layout.bound)
        logprobs = root(batch.to(device), answer_logprobs).logprobs
        values[examples] = logprobs.cpu().numpy().reshape(len(examples), values.shape[1])
        measured()
    root.train(is_training)
    reshard(root)
    # Each row is one rank's, and 0 on the others.
    total = torch.from_numpy(values).to(device)
    all_reduce_together([total], mesh.data_group)
    return total.cpu().numpy()


def _shape(tokens: TokenSet) -> tuple[int, int]:
    return len(tokens), 2 if tokens.has_pairs else 1
