"""Checks of a run with sampled answers, before the weights are read: its prompts and its reward."""

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from modulefinder import ModuleFinder
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from tunesmith.answers.scoring.process import ScorerProcess
from tunesmith.answers.scoring.reward import Reward
from tunesmith.answers.scoring.rows import make_scored_row, own_text, prompted_row
from tunesmith.answers.scoring.scorers import SCORERS, RewardedAnswer, check_scorer_names
from tunesmith.batches.training_data import TrainingData
from tunesmith.config.schema import Run
from tunesmith.errors import DataError, RecipeError, RunError
from tunesmith.host.files import relative_to_cwd
from tunesmith.model.known.model_types import Support
from tunesmith.presentation.data import SHOWN_PLACES
from tunesmith.rows.formats import convert_row
from tunesmith.rows.messages import has_answer
from tunesmith.start.rows import RowFacts
from tunesmith.start.scorer_names import errors_of_reward
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# Answers with which the user's scorers are tried. A scorer may fail for an odd answer.
TRIED_ANSWERS = ("", "The answer is 7.")
# Number of rows whose own answers are scored.
SCORED_ROWS = 64
# Maximum number of rows of a split that the scorers check before the run. A check takes about 2 ms.
CHECKED_ROWS = 2000


def reward_digest(run: Run) -> str:
    """Return the SHA-256 of the scorers: their names, and the content of the user's files.

    Raise UsageError if a file of `method.reward` does not exist.
    """
    digest = hashlib.sha256(repr(run.method.reward_weights).encode())
    with errors_of_reward():
        names = check_scorer_names(run.method.reward)
    for name in names:
        if name in SCORERS:
            digest.update(name.encode())
        else:
            file, _, function = name.rpartition(":")
            digest.update(function.encode() + Path(file).read_bytes())
            for imported in _local_imports(Path(file)):
                digest.update(imported.read_bytes())
    return digest.hexdigest()


def _local_imports(file: Path) -> list[Path]:
    """Return the files in the folder of a scorer that it imports, directly or indirectly.

    The files are parsed and not executed.
    """
    finder = ModuleFinder([str(file.parent)])
    # An error in the syntax is reported when the file is loaded.
    with suppress(SyntaxError, ValueError):
        finder.run_script(str(file))
    # A module of the interpreter itself has no file.
    found = {name: vars(module)["__file__"] for name, module in finder.modules.items()}
    return sorted(Path(path) for name, path in found.items() if path and name != "__main__")


def try_scorers(rows: RowFacts) -> None:
    """Load the user's scorers, and call each with the first row, before the model is read.

    Raises:
        UsageError: a scorer cannot be loaded, or has the form of another tool.
        DataError: a scorer fails for both of TRIED_ANSWERS.
    """
    method = rows.run.method
    source, first = rows.opened.train[0]
    with errors_of_reward():
        own = [name for name in check_scorer_names(method.reward) if name not in SCORERS]
    try:
        where = first.where(0)
        (sample, *_) = convert_row(first[0], source, where=where).samples
    except (DataError, IndexError):
        return  # A bad row, or a source without rows, is reported when the rows are read.
    row = prompted_row(sample, first[0], where)
    if has_answer(sample):
        reference = own_text(sample)
        row = replace(row, reference=reference, raw_reference=reference)
    with errors_of_reward(), ScorerProcess(own, None, method.reward_seconds, math.inf) as process:
        for name in own:
            faults = []
            for text in TRIED_ANSWERS:
                try:
                    process.score(name, [RewardedAnswer(text, text, row)])
                except RunError as fault:
                    faults.append(fault)
            if len(faults) == len(TRIED_ANSWERS):
                raise faults[0]
            for failed in faults:
                log.warning(f"{failed.what} for one of two answers, {failed.why}; it gets 0 there")


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


class OwnRewards(NamedTuple):
    """Rewards of the rows' own answers.

    Attributes:
        values: the reward of each row.
        zeros: file and line of the rows with the reward 0.
    """

    values: list[float]
    zeros: list[str]


def own_rewards(run: Run, data: TrainingData) -> OwnRewards | None:
    """Reward the own answers of the first rows. Return None if no row has an answer.

    Raises:
        DataError: a scorer fails, or cannot score a row.
        UsageError: a scorer cannot be loaded.
    """
    names = check_scorer_names(run.method.reward)
    compared = [name for name in names if name in SCORERS]
    items: list[RewardedAnswer] = []
    # Load the scorers even if there is nothing to score, so that their errors are found now.
    with errors_of_reward(), Reward(run.method, data.template) as reward:
        for tokens in filter(None, (data.train, data.validation)):
            # Own scorers accept all rows.
            for i in range(min(len(tokens), CHECKED_ROWS if compared else SCORED_ROWS)):
                sample = tokens.sample(i, run.data.system)
                row = make_scored_row(data.template, sample, tokens.row(i), tokens.where(i))
                for name in names:
                    reward.check(name, row)
                if row.is_answered and tokens is data.train and len(items) < SCORED_ROWS:
                    raw = row.raw_reference
                    ids = data.template.tokenizer.encode(raw, add_special_tokens=False)
                    items.append(RewardedAnswer(row.reference, raw, row, ids))
        values = reward.of(items)[0].tolist()
    if not items:
        return None
    places = [item.row.where for item in items]
    return OwnRewards(values, [at for at, value in zip(places, values, strict=True) if not value])


def check_reward(run: Run, data: TrainingData) -> None:
    """Raise DataError if all own answers of the rows have the reward 0."""
    own = own_rewards(run, data)
    if own is None or any(own.values):
        return
    raise DataError(
        f"the reward of the rows' own answers is 0 in all of the first {len(own.values)} rows",
        where="method.reward",
        why="a model that answers perfectly would get no reward",
        fix="correct the scorer, or choose a scorer that fits the rows",
    )


def reward_lines(own: OwnRewards | None) -> Iterator[str]:
    """Yield lines about the rewards of the rows' own answers."""
    if own is None:
        yield "rewards: the rows have no own answers that could be scored"
        return
    yield (
        f"rewards: the own answers of the first {count_of(len(own.values), 'row')} have the mean "
        f"reward {fmean(own.values):.3f}"
    )
    if own.zeros:
        places = ", ".join(map(relative_to_cwd, own.zeros[:SHOWN_PLACES]))
        yield f"warning: {count_of(len(own.zeros), 'own answer')} with the reward 0, first {places}"
