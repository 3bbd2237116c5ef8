"""Checks of a run with sampled answers, before the weights are read: its prompts and its reward."""

import hashlib
from pathlib import Path

from tunesmith.config.schema import Run
from tunesmith.data.prepare import TrainingData
from tunesmith.errors import DataError, RecipeError
from tunesmith.model.model_types import Support
from tunesmith.scoring.process import ScorerPool
from tunesmith.scoring.rows import make_scored_row
from tunesmith.scoring.scorers import SCORERS, check_scorer_names

# Number of rows whose own answers are scored.
SCORED_ROWS = 64


def reward_digest(run: Run) -> str:
    """Return the SHA-256 of the scorers: their names, and the content of the user's files.

    Raise UsageError if a file of `method.reward` does not exist.
    """
    digest = hashlib.sha256(repr(run.method.reward_weights).encode())
    for name in check_scorer_names(run.method.reward):
        if name in SCORERS:
            digest.update(name.encode())
        else:
            file, _, function = name.rpartition(":")
            digest.update(function.encode() + Path(file).read_bytes())
    return digest.hexdigest()


def check_sampling(run: Run, support: Support) -> None:
    """Raise RecipeError if the training modules of the model cannot sample answers."""
    why = ""
    if support.recurrent:
        why = f"the recurrent layers {', '.join(support.recurrent)} keep no keys and values"
    elif support.state == "padded" or run.model.attention == "eager":
        why = "Transformers' attention on padded rows cannot continue several answers at once"
    if why:
        raise RecipeError(
            "this model cannot be trained with grpo",
            where="method.name",
            why=why,
            fix="use rejection sampling (tunesmith generate --samples --keep), or another model",
        )


def check_prompts(run: Run, data: TrainingData) -> None:
    """Raise DataError if a prompt plus the longest answer does not fit into `data.seq_len`."""
    room = run.data.seq_len - run.method.answer_tokens
    for tokens in filter(None, (data.train, data.validation)):
        for i, example in enumerate(tokens):
            if example.prompt_length > room:
                raise DataError(
                    f"the prompt has {example.prompt_length} tokens, but only {room} fit",
                    where=tokens.where(i),
                    why=f"data.seq_len is {run.data.seq_len}, of which method.answer_tokens="
                    f"{run.method.answer_tokens} are reserved for the answer",
                    fix=f"set data.seq_len={example.prompt_length + run.method.answer_tokens}, or "
                    "a smaller method.answer_tokens",
                )


def check_reward(run: Run, data: TrainingData) -> None:
    """Score the rows' own answers. Rows without an answer are skipped.

    Raises:
        DataError: all own answers have the reward 0, or a scorer cannot score a row.
        RunError: a scorer fails.
    """
    items = []
    for i in range(min(SCORED_ROWS, len(data.train))):
        sample = data.train.sample(i, run.data.system)
        where = data.train.where(i)
        scored = make_scored_row(data.template, sample, data.train.row(i), where)
        if scored is not None:
            items.append((scored.reference, scored))
    if not items:
        return
    names = check_scorer_names(run.method.reward)
    with ScorerPool(names, own_seconds=run.method.reward_seconds) as pool:
        if any(any(pool.scores(name, items)) for name in names):
            return
    raise DataError(
        f"the reward of the rows' own answers is 0 in all of the first {len(items)} rows",
        where="method.reward",
        why="a model that answers perfectly would get no reward",
        fix="correct the scorer, or choose a scorer that fits the rows",
    )
