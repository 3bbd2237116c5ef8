"""Creation of a recipe from rows and a model, for `tunesmith train --model X --data FILE`.

The recipe's file contains the values that differ from the defaults, with their reasons. The file is
next to the run directory, so that the user can edit it and start another run with it.
"""

import logging
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from tunesmith.checkpoint.start_adapter import find_adapter
from tunesmith.config.dump import differences, to_yaml
from tunesmith.config.layers import Overrides, override_words
from tunesmith.config.load import checked, load_recipe
from tunesmith.config.methods import METHOD_FACTS, METHOD_OF_FORMAT
from tunesmith.config.paths import relative_paths
from tunesmith.config.schema import Adapter, Run
from tunesmith.config.shipped import schema_line
from tunesmith.errors import DataError, MachineError, RecipeError
from tunesmith.host import demo_model
from tunesmith.host.files import relative_to_cwd, write_atomically
from tunesmith.host.shell import shell_command, shell_path
from tunesmith.hub import fetch
from tunesmith.metrics.intervals import MIN_DIFFERING
from tunesmith.model.arch.spec import ModelSpec
from tunesmith.model.arch.tokenizer import eos_ids
from tunesmith.model.known.model_types import read_model_types
from tunesmith.model.measuring.measured_spec import model_spec
from tunesmith.rows.compare.splits import count_held_out
from tunesmith.rows.source.open_source import (
    CHARACTERS_PER_TOKEN,
    Rows,
    count_characters,
    count_of_example,
)
from tunesmith.run_dir import read_recipe
from tunesmith.start.draft import Draft, apply_overrides, draft_recipe
from tunesmith.start.model import ModelFacts, read_model
from tunesmith.tokens.contract import MAX_TRUNCATED_SHARE
from tunesmith.tokens.text.select_template import select_template
from tunesmith.tokens.tokenize import tokenize
from tunesmith.units import Length, Share, Size, ceil_div, count_of

log = logging.getLogger(__name__)

MAX_COUNTED_ROWS = 2000  # maximum number of rows whose tokens are counted
MIN_EXAMINED_ROWS = 20  # minimum number of rows whose tokens are counted
EXAMINED_CHARACTERS = 1 << 24  # approximate maximum number of characters in the counted rows
MIN_ROWS_TO_HOLD_OUT = 20  # minimum number of rows to hold any out for validation
# If there are at least ROWS_FOR_VALIDATION examples, hold out at least MIN_VALIDATION_ROWS of them,
# so that their loss shows when to stop. If there are fewer examples, hold out only MIN_DIFFERING,
# because the rows are more useful for training. MIN_DIFFERING rows are the minimum to compute a
# confidence interval for the difference of two models.
ROWS_FOR_VALIDATION = 50
MIN_VALIDATION_ROWS = 10  # minimum number of held-out examples, see above
MAX_VALIDATION_ROWS = 500  # with more rows, a validation takes longer but is hardly more exact
PATIENCE = 3  # validations without improvement before the run stops
SEQ_LEN = 2048
SEQ_LEN_STEP = 256
# Number of epochs, as in OpenAI's fine-tuning: three, fewer for many rows, more for few ("Data
# preparation and analysis for chat model fine-tuning", cookbook.openai.com). If there are few rows,
# this rule uses more epochs than OpenAI's, because a new adapter needs a minimum number of steps.
EPOCHS = 3
# One epoch for preference rows, as in Tulu 3 (arXiv:2411.15124) and TRL's examples.
PREFERENCE_EPOCHS = 1
MAX_EPOCHS = 10
MIN_SEEN_EXAMPLES = 500  # minimum number of examples in all epochs together
MAX_SEEN_EXAMPLES = 25_000  # maximum number of examples in all epochs together
MIN_STEPS = 100  # the batch is made smaller to reach this number of steps
# Possible numbers of steps between validations. A run gets about five validations, because `report`
# needs five points to estimate the noise of a curve, or about ten if there are few held-out rows.
# SHORT_INTERVALS are only used for short runs: each validation also saves a checkpoint, and for a
# small model this takes longer than a step.
INTERVALS = (5, 10, 25, 50, 100, 200, 500)
SHORT_INTERVALS = (1, 2, 3, 4, 5)
VALIDATIONS = 5
MORE_VALIDATIONS = 10
FEW_HELD_OUT = 100
# Learning rate of full fine-tuning at hidden size 2000, factor for LoRA, and exponents with which
# the rate falls with the hidden size. Source: Thinking Machines, "LoRA Without Regret" (2025) and
# `get_lr` of their cookbook, fitted on Llama and Qwen models. The rate is limited to
# MAX_LEARNING_RATE.
FULL_RATE = 5e-5
LORA_RATE = 10
FITTED_WIDTH = 2000
WIDTH_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
MAX_LEARNING_RATE = 1e-3
# Rate of full fine-tuning for model families to which the formula above was not fitted. For LoRA it
# is multiplied by ten, which gives 2e-4, the rate that QLoRA used for 7B and 13B models
# (arXiv:2305.14314). The cookbook's best LoRA rates for DeepSeek, gpt-oss, Kimi and Nemotron are
# 1e-4 to 1e-3. In the runs for which the cookbook gives losses (sft_sweep.md), the loss with 2e-4
# is within 1 % of the best loss.
CAUTIOUS_FULL_RATE = 2e-5
# Training method for each row format, with the reason for the choice. If several methods can use a
# format, the table contains one that needs no second model from the user.
METHODS_OF_FORMATS = {
    f.own_format: (name, f.reason) for name, f in METHOD_FACTS.items() if f.reason
}
# Factor for the learning rate of preference methods and of reinforcement learning, relative to
# supervised fine-tuning. TRL's defaults are 2e-5 for supervised fine-tuning and 1e-6 for DPO and
# GRPO. For LoRA, TRL's guides multiply these rates by ten.
PREFERENCE_RATE = 0.1
# Factor for the learning rate of an adapter that is trained further. docs/choosing.md recommends to
# try a range of rates, and this is the lower end of it. A new adapter needs a higher rate at first,
# because its matrix B is zero.
CONTINUED_RATE = 0.5


@dataclass(frozen=True)
class NewRecipe:
    """A recipe that `make_recipe` created, with methods to write it to a file.

    Attributes:
        text: the content of the file.
        mean_length: mean number of tokens per row.
        facts: the facts of rows and model. None if `mean_length` is estimated from the number of
            characters in the rows.
    """

    run: Run
    path: Path
    text: str
    mean_length: int
    facts: ModelFacts | None

    @property
    def name(self) -> str:
        """Path of the file, relative to the working directory and quoted for a shell."""
        return shell_path(relative_to_cwd(self.path))

    def check_file(self) -> None:
        """Raise RecipeError if the file has another recipe, because the user may have edited it."""
        changes = differences(load_recipe(self.path), self.run) if self.path.exists() else []
        if changes:
            raise RecipeError(
                f"{self.name} already exists and differs from the recipe that this command writes",
                where="\n         ".join(map(str, changes)),
                why="the recipe was edited, or the data has changed; an existing recipe is not "
                "overwritten",
                fix=f"train the existing recipe with `tunesmith train {self.name}`; "
                "or start another run with output_dir=runs/NAME",
            )

    def write_file(self) -> None:
        """Write the file if it does not exist. It is safe to call this several times.

        Raise MachineError if the file cannot be written.
        """
        if self.path.exists():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, self.text)
        except OSError as error:
            raise MachineError(
                f"the recipe cannot be written: {error.strerror}",
                where=self.path,
                fix="choose another folder with output_dir=runs/my-run",
            ) from error


def make_recipe(
    model: str,
    data: str,
    overrides: Overrides = (),
    *,
    on_paper: bool = False,
    row_count: int | None = None,
    ranks: int = 1,
    draft: Draft | None = None,
) -> NewRecipe:
    """Examine the rows of a file or Hub data set, and create a recipe that trains a model on them.

    Args:
        model: a value of `model.name`. `demo` is the small model of the demo.
        data: a value of `data.train.source`. Format and columns are detected, unless `overrides`
            sets them.
        overrides: see `load_recipe`. They are written into the recipe, and the values of all other
            keys are chosen to match them.
        on_paper: whether the recipe is only for a plan. If True, well-known models are not
            requested from the Hub, and the number of tokens is estimated from the number of
            characters.
        row_count: the final number of rows, if the given rows are a sample.
        ranks: expected number of ranks, because each rank needs an example per step.
        draft: result of `draft_recipe` for the same arguments. If None, `make_recipe` calls
            `draft_recipe`.

    Raises:
        UsageError: an input is wrong or ambiguous. The error says which key to set.
    """
    draft = draft or draft_recipe(model, data, overrides)
    row_count = row_count or len(draft.rows)
    choices = _Choices(draft)
    if model == demo_model.DEMO_NAME:
        choices.why["model.name"] = (
            "the folder of the model demo on this machine, because a recipe contains only "
            "folders and Hub ids; to train on another machine, run the command above there"
        )
    choices.choose_adapter()
    choices.choose_method()
    examined = _examine(draft, on_paper=on_paper)
    parts = choices.choose_seq_len(examined)
    held_out = choices.choose_hold_out(row_count, parts)
    if examined.is_padded and "data.pack" not in choices.override_keys:
        choices.choose(
            "data.pack", False, f"{examined.spec.model_type} cannot separate packed examples"
        )
    steps = choices.choose_steps(round(row_count * parts) - held_out, ranks)
    choices.choose_validations(steps, held_out)
    choices.choose_rate(examined.spec)

    layer = apply_overrides(
        {**choices.values, "output_dir": draft.chosen["output_dir"]}, draft.layer
    )
    run = checked(layer)
    for key in choices.override_keys & choices.why.keys() - {"data.train"}:
        choices.why[key] = "set on the command line"
    command = ["tunesmith", "train", "--model", model, "--data", data, *override_words(overrides)]
    comment = f"# {shell_command(command)}"
    body = to_yaml(relative_paths(layer.values, draft.path.parent), choices.why)
    return NewRecipe(
        run,
        draft.path,
        "\n".join([schema_line(), comment, body]),
        examined.mean_length,
        examined.facts,
    )


class _Examined(NamedTuple):
    """Facts about model and rows from which the recipe's values are chosen.

    Attributes:
        is_padded: whether each example gets its own padded row, because the model cannot separate
            packed examples.
        lengths: int64 [n], number of tokens of the longest sequence in each of n rows, which are
            evenly spaced in the file.
        mean_length: mean number of tokens per row.
        facts: the facts of the model. None if all lengths are estimated from characters.
    """

    spec: ModelSpec
    is_padded: bool
    lengths: np.ndarray
    mean_length: int
    facts: ModelFacts | None = None


def _examine(draft: Draft, *, on_paper: bool) -> _Examined:
    """Examine the model and a sample of the rows. `on_paper`: see `make_recipe`."""
    run = draft.run
    rows = draft.rows
    # Use evenly spaced rows, because files are often sorted.
    few = _characters(_spread(rows, MIN_EXAMINED_ROWS), count_characters)
    characters = sum(few) / max(1, len(few))
    count = int(EXAMINED_CHARACTERS / max(1, characters))
    count = max(MIN_EXAMINED_ROWS, count)
    rows = _spread(rows, min(MAX_COUNTED_ROWS, count))
    config = fetch.config_in_package(run.model) if on_paper else None
    if config is not None:
        return _examine_on_paper(run, config, rows)
    facts = read_model(draft.facts, is_draft=True)
    # Do not truncate the rows, because their full lengths are needed. Skip bad rows, because the
    # later tokenization of all rows reports them.
    data = replace(
        run.data,
        seq_len=sys.maxsize,
        too_long="truncate",
        train_on="all",
        bad_rows="skip",
    )
    tokenizer = facts.tokenizer
    template = select_template(data, tokenizer, eos_ids(facts.folder, tokenizer), facts.pictures)
    template.samples_answers = run.samples_answers
    tokens = tokenize([(run.data.train[0], rows)], data, template, cache=None, what="a sample")
    is_padded = facts.support.state == "padded"
    mean_length = round(tokens.lengths.mean())
    return _Examined(facts.spec, is_padded, tokens.longest_sequences, mean_length, facts)


def _spread(rows: Rows, count: int) -> Rows:
    """Return at most `count` rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    numbers = sorted({n * len(rows) // count for n in range(count)})
    return rows.take(numbers)


def _characters(rows: Rows, count: Callable[[object], int]) -> list[int]:
    """Apply `count` to each readable row. Skip unreadable rows, because they are reported later."""
    counts = []
    for number in range(len(rows)):
        with suppress(DataError):
            counts.append(count(rows[number]))
    return counts


def _examine_on_paper(run: Run, config: Mapping[str, object], rows: Rows) -> _Examined:
    """Estimate what `_examine` measures, from the model's config.json and the characters of the
    rows.
    """
    spec = model_spec(config, where=run.model.name)
    model_type = read_model_types().get(spec.model_type)
    is_padded = model_type is not None and model_type.support.state == "padded"
    lengths = []
    characters = _characters(rows, count_characters)
    for count in characters:
        tokens = ceil_div(count, CHARACTERS_PER_TOKEN)
        lengths.append(max(1, tokens))
    count_example = partial(count_of_example, source=run.data.train[0])
    example_characters = _characters(rows, count_example)
    mean_length = round(fmean(example_characters) / CHARACTERS_PER_TOKEN)
    mean_length = max(1, mean_length)
    return _Examined(spec, is_padded, np.array(lengths), mean_length)


class _Choices:
    """Chooses the values of a new recipe, and stores the reasons for values that are not defaults.

    Attributes:
        values: the chosen values. Values of the command line override them.
        why: the reason of each value. The keys are recipe keys.
        run: the recipe with the values of the command line and the rows.
        override_keys: keys that the command line sets.
    """

    def __init__(self, draft: Draft) -> None:
        self.values = {key: value for key, value in draft.chosen.items() if key != "output_dir"}
        self.why = {"data.train": draft.about_data}
        self.run = draft.run
        self.override_keys = draft.override_keys
        self.row_format = draft.layout.format
        self.samples_answers = draft.run.samples_answers
        if draft.layout.has_pictures:
            self.why["model.vision"] = "the rows have pictures"

    def choose(self, key: str, value: object, why: str) -> None:
        self.values[key] = value
        self.why[key] = why

    def choose_adapter(self) -> None:
        """Set rank, alpha and target layers in the recipe to the values of the adapter that is
        trained further, because they must be equal.
        """
        name = self.run.adapter.from_
        if name is None or not Path(name).is_dir():
            return  # an adapter on the Hub is not downloaded only for this choice
        self.why["adapter.rank"] = "the rank of the adapter that is trained further"
        folder = find_adapter(name)
        from tunesmith.adapter.peft_files import read_adapter  # imports torch

        adapter = read_adapter(folder)
        usual = Adapter()
        # PEFT's adapter config lists single layers even if the run's recipe had `all-linear`. Write
        # `all-linear` into the new recipe in this case.
        saved_adapter = read_recipe(folder.parent).value.get("adapter") or {}
        if saved_adapter.get("target") == usual.target:
            adapter = replace(adapter, target=usual.target)
        self.values |= {"adapter.rank": adapter.rank, "adapter.alpha": adapter.alpha}
        for field in ("target", "rslora", "modules_to_save"):
            value = vars(adapter)[field]
            if value == vars(usual)[field]:
                continue
            if isinstance(value, tuple):
                value = list(value)
            self.values[f"adapter.{field}"] = value

    def choose_method(self) -> None:
        """Choose the method for this row format, unless an override sets it."""
        if self.row_format not in METHODS_OF_FORMATS or "method.name" in self.override_keys:
            return
        self.choose("method.name", *METHODS_OF_FORMATS[self.row_format])

    def choose_seq_len(self, examined: _Examined) -> float:
        """Choose seq_len so that the longest example fits.

        If the longest example has more than SEQ_LEN tokens, choose seq_len so that 99 % of the
        examples fit. For plain texts choose SEQ_LEN, because longer texts are split. A prompt whose
        answers are sampled needs `method.answer_tokens` more tokens.

        Returns:
            The mean number of examples per row. It is more than 1 if texts are split.
        """
        sampled = self.run.method.answer_tokens if self.samples_answers else 0
        lengths = examined.lengths + sampled
        data = self.run.data
        is_set = "data.seq_len" in self.override_keys
        is_split = self.row_format == "text" and data.too_long == "auto"
        context = examined.spec.position_limit or examined.spec.context
        longest = int(lengths.max())
        looked_at = f"the {count_of(len(lengths), 'row')} examined"
        if longest <= SEQ_LEN:
            seq_len = longest
            reason = f"the longest of {looked_at} has {longest:,} tokens"
        elif is_split:
            seq_len = SEQ_LEN
            reason = f"longer texts are split; the longest of {looked_at} has {longest:,} tokens"
        else:
            # With "higher", the result is the length of one of the rows, not an interpolated value.
            common = int(np.quantile(lengths, 0.99, method="higher"))
            seq_len = max(SEQ_LEN, common)
            reason = f"99 % of {looked_at} have up to {common:,} tokens, the longest {longest:,}"
        if sampled:
            reason += f", with method.answer_tokens={sampled} for the answer"
        seq_len = min(context, ceil_div(seq_len, SEQ_LEN_STEP) * SEQ_LEN_STEP)
        self.choose("data.seq_len", seq_len, reason)
        too_long = float(np.mean(lengths > seq_len))
        if is_split:
            # The parts of a split text overlap by one token, because each part after the first
            # begins with the last token of the previous part.
            if is_set:
                seq_len = data.seq_len
            return max(1.0, float(np.ceil((lengths - 1) / (seq_len - 1)).mean()))
        if too_long > MAX_TRUNCATED_SHARE and not is_set:
            self.choose(
                "data.too_long",
                "drop",
                f"{too_long:.0%} of the rows examined are longer than the {context:,} tokens that "
                "the model supports; if they were truncated, the ends of their answers would be "
                "missing",
            )
        return 1.0

    def choose_hold_out(self, rows: int, parts: float) -> int:
        """Choose how many rows are held out for validation. Return the number of examples in these
        rows.

        Args:
            parts: mean number of examples per row. A long document is split into many examples.
        """
        data = self.run.data
        hold_out = data.hold_out
        is_open = "data.hold_out" not in self.override_keys and not data.validation
        if is_open and rows >= MIN_ROWS_TO_HOLD_OUT:
            hold_out = Share(5.0, "%")
            min_rows = MIN_VALIDATION_ROWS if rows * parts >= ROWS_FOR_VALIDATION else MIN_DIFFERING
            min_rows = math.ceil(min_rows / parts)
            max_rows = max(1, int(MAX_VALIDATION_ROWS / parts))
            wanted = rows * 0.05
            if not min_rows <= wanted <= max_rows:
                wanted = max(wanted, min_rows)
                hold_out = Share(min(wanted, max_rows), "examples")
        if not hold_out:
            if is_open:
                self.why["data.train"] += "; too few rows for a validation split"
                log.info(
                    f"val_loss is not measured: a validation split needs {MIN_ROWS_TO_HOLD_OUT} "
                    f"rows or more, and the data has {count_of(rows, 'row')}"
                )
            return 0
        count = count_held_out(hold_out, rows)
        self.choose(
            "data.hold_out",
            str(hold_out),
            f"{count:,} of {count_of(rows, 'row')}, chosen by the seed, to compute val_loss",
        )
        return round(count * parts)

    def choose_steps(self, examples: int, ranks: int) -> int | None:
        """Choose the number of epochs and the global batch, unless an override sets them.

        Return the number of optimizer steps, or None if it is unknown.
        """
        train = self.run.train
        epochs = PREFERENCE_EPOCHS if self.row_format in METHODS_OF_FORMATS else EPOCHS
        if examples * epochs > MAX_SEEN_EXAMPLES:
            epochs = max(1, MAX_SEEN_EXAMPLES // examples)
        elif self.run.adapter.from_ is None:  # a new adapter needs a minimum number of steps
            epochs = min(MAX_EPOCHS, max(epochs, ceil_div(MIN_SEEN_EXAMPLES, examples)))
        duration = train.duration
        if "train.duration" not in self.override_keys:
            duration = Length(epochs, "epochs")
        examples_seen = examples * (duration.amount if duration.unit == "epochs" else epochs)
        batch = train.global_batch
        if "train.global_batch" not in self.override_keys:
            # The largest batch size that gives at least MIN_STEPS steps.
            sizes = [size for size in (64, 32, 16, 8, 4, 2, 1) if size * MIN_STEPS <= examples_seen]
            # The ranks of a tensor-parallel group process the same example.
            tensor = self.run.parallel.tensor
            min_examples = min(examples, ranks if tensor == "auto" else ranks // tensor)
            method = METHOD_OF_FORMAT.get(self.row_format, self.run.method.name)
            min_batch = METHOD_FACTS[method].min_batch
            batch = Size(max([*sizes, min_batch, min_examples]), "examples")
        reason = (
            f"{count_of(examples, 'example')}; small data sets get more epochs, large ones fewer"
        )
        self.choose("train.duration", str(duration), reason)
        self.values["train.global_batch"] = str(batch)
        if duration.unit == "epochs" and batch.unit == "examples":
            steps = round(ceil_div(examples, batch.amount) * duration.amount)
            reason = (
                f"{steps:,} optimizer steps; "
                f"small data sets get small batches, for {MIN_STEPS} steps or more"
            )
            self.why["train.global_batch"] = reason
            return steps
        if duration.unit == "steps":
            return int(duration.amount)
        return None  # the duration is a time or a number of tokens

    def choose_validations(self, steps: int | None, held_out: int) -> None:
        """Choose the interval between validations and the patience of early stopping.

        Checkpoints get the same interval, so that the weights of the best validation are saved.
        """
        if steps is not None:
            validations = MORE_VALIDATIONS if held_out <= FEW_HELD_OUT else VALIDATIONS
            intervals = [interval for interval in INTERVALS if interval * validations <= steps]
            if not intervals:
                # A run with so few steps gets fewer validations, because each saves a checkpoint.
                intervals = [n for n in SHORT_INTERVALS if n * VALIDATIONS <= steps]
            every = f"{max(intervals, default=SHORT_INTERVALS[0])} steps"
            self.values |= {"validate.every": every, "checkpoint.every": every}
        # The reward of reinforcement learning can stay the same for many steps before it rises.
        if held_out >= MIN_VALIDATION_ROWS and not self.samples_answers:
            self.choose(
                "validate.patience",
                PATIENCE,
                f"stops the run after {PATIENCE} validations without improvement; final/ holds the "
                "weights of the best validation (checkpoint.final)",
            )

    def choose_rate(self, spec: ModelSpec) -> None:
        """Choose the learning rate from the model's family, its hidden size, and the kind of
        training.
        """
        kind = self.run.adapter.kind
        rate = default_learning_rate(kind, spec.model_type, spec.hidden)
        if _width_exponent(spec.model_type) is None:
            reason = (
                f"a cautious rate, because there is no rule for {spec.model_type} models; try "
                "twice and half of this rate, see docs/choosing.md"
            )
        else:
            reason = f"from the model's family, {spec.model_type}, and hidden size, {spec.hidden:,}"
        if kind == "lora":
            reason += "; LoRA takes about ten times the rate of full fine-tuning"
        if self.row_format in METHODS_OF_FORMATS:
            rate = _two_digits(rate * PREFERENCE_RATE)
            reason += "; preference training uses a tenth of the usual rate"
        elif self.samples_answers:
            rate = _two_digits(rate * PREFERENCE_RATE)
            reason += "; reinforcement learning uses a tenth of the usual rate"
            self.choose("train.schedule", "constant", "the reward can still rise in the last steps")
        elif self.run.adapter.from_ is not None:
            rate = _two_digits(rate * CONTINUED_RATE)
            reason += (
                "; half of the usual rate, because a higher rate would undo the training of the "
                "adapter that is trained further"
            )
        self.choose("train.learning_rate", rate, reason)


def _two_digits(rate: float) -> float:
    return float(f"{rate:.1e}")


def default_learning_rate(adapter_kind: str, model_type: str, hidden: int) -> float:
    """Return the peak learning rate for a model type and hidden size, to two significant digits.

    docs/choosing.md contains the same values in a table. A test compares them.
    """
    exponent = _width_exponent(model_type)
    if exponent is None:
        rate = CAUTIOUS_FULL_RATE
    else:
        rate = FULL_RATE * (FITTED_WIDTH / hidden) ** exponent
    if adapter_kind == "lora":
        rate *= LORA_RATE
    return min(MAX_LEARNING_RATE, _two_digits(rate))


def _width_exponent(model_type: str) -> float | None:
    """Return the exponent with which the best learning rate falls with the hidden size. Return None
    if it is unknown for this model type.

    As in Thinking Machines' cookbook, the model's name determines the exponent, so Qwen's mixtures
    of experts have the same exponent as Qwen's dense models. Llama 4 has no exponent, because it is
    newer than the models that the cookbook was fitted to.
    """
    return WIDTH_EXPONENTS.get("qwen" if model_type.startswith("qwen") else model_type)
