"""Preparation of a recipe's data for training: template, tokens, contract and schedule.

The commands `train` and `data` both call `prepare_data`.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tunesmith.batches.pixels import PixelReader
from tunesmith.batches.schedule import BatchSchedule
from tunesmith.batches.training_data import TrainingData
from tunesmith.config.schema import Data, Run
from tunesmith.errors import DataError, TunesmithError, first_line
from tunesmith.host.files import cache_folder
from tunesmith.rows.compare.row_checks import check_across
from tunesmith.rows.compare.splits import OpenedRows, read_checked_splits, read_splits
from tunesmith.run_dir import with_earlier_runs
from tunesmith.tokens.contract import CutAnswers, check_tokens
from tunesmith.tokens.text.select_template import select_template
from tunesmith.tokens.text.template import Template
from tunesmith.tokens.token_set import (
    Repeats,
    SourceTokens,
    TokenSet,
    find_repeats,
)
from tunesmith.tokens.tokenize import tokenize, tokenize_sides
from tunesmith.units import count_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tunesmith.tokens.text.placeholders import PictureProcessor


def prepare_data(
    run: Run,
    tokenizer: "PreTrainedTokenizerBase",
    eos_ids: Collection[int],
    vocab_size: int,
    *,
    opened: OpenedRows | None = None,
    cache: Path | None = None,
    strict: bool = True,
    cut_answers: CutAnswers = "refuse",
    position_limit: int | None = None,
    shares_prompts: bool = False,
    pictures: "PictureProcessor | None" = None,
) -> TrainingData:
    """Read, tokenize and check the rows of a recipe.

    Args:
        eos_ids: ids that end a turn, from the model's generation config.
        vocab_size: number of rows of the model's embedding.
        opened: the rows of the recipe's sources. If None, the sources are opened.
        cache: folder of the token cache. If None, the folder `tokens` in tunesmith's cache folder.
        strict: whether a broken token contract raises DataError. If False, the caller must check
            `contracts`.
        cut_answers: what happens if many training rows have a truncated answer, see `check_tokens`.
            `data.allow_cut_answers` overrides this argument.
        position_limit: maximum sequence length of the model, or None if it has no limit.
        shares_prompts: see `TokenSet`.
        pictures: see `Template`.

    Raises:
        DataError: a source or a row is invalid, or the contract is broken.
    """
    data = run.data
    cache = cache or cache_folder("tokens")
    template = select_template(data, tokenizer, eos_ids, pictures)
    template.samples_answers = run.samples_answers
    splits = read_checked_splits(data, run.train.seed, opened)
    across = check_across(splits.validation, splits.train) if data.validation else []
    sides = {"train": splits.train}
    if splits.validation:
        sides["validation"] = splits.validation
    token_sets = tokenize_sides(sides, data, template, cache=cache)
    if pictures is not None:
        reader = PixelReader(pictures)
        for tokens in token_sets.values():
            tokens.pictures = reader.of
    train = token_sets["train"]
    validation = token_sets.get("validation")
    validation_digest = None
    if data.allow_cut_answers or run.samples_answers:
        # Sampled answers replace those of the rows.
        cut_answers = "accept"
    checked = [("train", train, cut_answers)]
    if validation is not None:
        validation_digest = validation.counts.digest
        if run.validate.max_examples is not None:
            validation = validation.first(run.validate.max_examples)
        # The model does not learn from validation rows, so a warning about truncated answers is
        # enough.
        for_validation: CutAnswers = "accept" if cut_answers == "accept" else "warn"
        checked.append(("validation", validation, for_validation))
    contracts = []
    for split, tokens, cut in checked:
        contract = check_tokens(
            tokens,
            template,
            vocab_size=vocab_size,
            split=split,
            cut_answers=cut,
            position_limit=position_limit,
        )
        contracts.append(contract)
        tokens.shares_prompts = shares_prompts
    if strict:
        for contract in contracts:
            contract.raise_if_broken()
        _check_labels(train)
    overlap = find_repeats(validation, train) if validation is not None else Repeats()
    return TrainingData(
        run=run,
        train=train,
        validation=validation,
        template=template,
        schedule=_make_schedule(run, train),
        contracts=tuple(contracts),
        duplicates=find_repeats(train),
        overlap=overlap,
        splits=splits,
        across=tuple(map(tuple, across)),
        validation_digest=validation_digest,
        position_limit=position_limit,
    )


def find_trained_rows(
    tokens: TokenSet, trained: Run, data: Data, template: Template
) -> tuple[Repeats | None, str]:
    """Find the examples of `tokens` on which a run, or a run that it continues, was trained.

    For pairs, only the chosen answers are compared.

    Return the found examples, and the reason why some training rows are unknown, such as a deleted
    file. The reason is empty if all rows are known. If there is a reason and no example was found,
    the first value is None.

    Args:
        trained: the recipe of the run.
        data: settings for the tokenization. They must be the settings with which `tokens` was made.
    """
    parts: list[SourceTokens] = []
    runs, fault = with_earlier_runs(trained)
    for run in runs:
        try:
            rows, _ = read_splits(replace(run.data, validation=()), run.train.seed)
            parts += tokenize(
                rows, data, template, cache=cache_folder("tokens"), what="train"
            ).parts
        except TunesmithError as error:
            fault = f"{error.what} ({error.where})" if error.where else error.what
        except OSError as error:
            fault = first_line(error)
    seen = find_repeats(tokens, TokenSet(parts), chosen=True) if parts else Repeats()
    if fault and not seen.count:
        return None, fault
    return seen, fault


def _check_labels(train: TokenSet) -> None:
    """Raise DataError if all answers have the same label. KTO requires good and bad answers."""
    labels = {label for part in train.parts for label in np.unique(part.arrays.labels).tolist()}
    if labels in ({0}, {1}):
        kind = "good" if labels == {1} else "bad"
        raise DataError(
            f"every answer has the label {kind}; the data has {count_of(len(train), 'answer')}",
            where=train.counts.source,
            why="kto needs both good and bad answers",
            fix="add answers with the other label; or train on good answers only with method: sft",
        )


def _make_schedule(run: Run, train: TokenSet) -> BatchSchedule:
    """Build the batch schedule of a run. Raise DataError if an epoch has no examples."""
    schedule = BatchSchedule(run, train)
    if len(train) and schedule.steps_per_epoch(0) == 0:
        weights = ", ".join(str(source.weight) for source in run.data.train)
        raise DataError(
            f"{count_of(len(train), 'example')} with weights {weights} give an epoch no examples",
            where="data.train",
            fix="raise the weights (data.train.weight)",
        )
    return schedule
