"""A recipe from a look at the rows and the model: `tunesmith train --model X --data FILE`.

What is not a default is written with its reason, beside the run, to be edited and run again.
"""

import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np

from tunesmith.adapter.peft_files import read_adapter
from tunesmith.checkpoint.start_adapter import find_adapter
from tunesmith.config.dump import differences, to_yaml
from tunesmith.config.layers import override_words
from tunesmith.config.load import checked, load_recipe
from tunesmith.config.paths import resolve_paths
from tunesmith.config.schema import MIN_KTO_BATCH, Adapter, Run
from tunesmith.config.shipped import schema_line
from tunesmith.data.compare.splits import count_held_out
from tunesmith.data.source.open_source import (
    CHARACTERS_PER_TOKEN,
    Rows,
    count_characters,
    count_of_example,
)
from tunesmith.data.text.select_template import select_template
from tunesmith.data.tokens.contract import MOST_CUT
from tunesmith.data.tokens.tokenize import tokenize
from tunesmith.errors import DataError, MachineError, RecipeError
from tunesmith.host import demo_model
from tunesmith.host.files import from_here, write_atomically
from tunesmith.host.shell import shell_command, shell_path
from tunesmith.hub import fetch
from tunesmith.hub.model_files import read_model_files
from tunesmith.metrics.intervals import MIN_DIFFERING
from tunesmith.model.measured_spec import model_spec
from tunesmith.model.model_types import read_model_types
from tunesmith.model.spec import ModelSpec
from tunesmith.model.tokenizer import eos_ids
from tunesmith.run_dir import read_recipe
from tunesmith.training.early_checks import RowsLook, look_at_rows, over
from tunesmith.units import Length, Share, Size, ceil_div, count_of

log = logging.getLogger(__name__)

EXAMINED_ROWS = 2000  # rows whose tokens are counted, spread over the file
EXAMINED_CHARACTERS = 1 << 24  # of them, about: documents are long
MIN_ROWS_TO_HOLD_OUT = 20  # with fewer none are held out
# Of so many rows enough are held out that their loss tells when to stop. Of fewer they are worth
# more in training, but MIN_DIFFERING: with less, no comparison of two models row by row has an
# interval, whatever they answer.
ENOUGH_ROWS = 50
TELLING_ROWS = 10  # held-out rows
MOST_HELD_OUT = 500  # more rows make a validation longer, hardly more exact
PATIENCE = 3  # validations without a better one
SEQ_LEN = 2048
SEQ_LEN_STEP = 256
# Epochs as OpenAI's fine-tuning chooses them: three, fewer of many rows, more of few ("Data
# preparation and analysis for chat model fine-tuning", cookbook.openai.com). Of few rows more are
# seen here: a new adapter needs steps, not only rows.
EPOCHS = 3
# Of preferences one, as in Tulu 3 (arXiv:2411.15124) and the examples of TRL.
PREFERENCE_EPOCHS = 1
MOST_EPOCHS = 10
MIN_SEEN_EXAMPLES = 500  # examples
MAX_SEEN_EXAMPLES = 25_000  # examples
WANTED_STEPS = 100  # a smaller batch where it takes that to make so many steps
# Steps between validations: some five in a run, or ten of a few rows, which take no time. Five at
# least: the noise of a curve takes as many, see `report`. Each has a checkpoint, which takes longer
# than a step of a small model: the shortest intervals are for runs that have no five with longer.
INTERVALS = (5, 10, 25, 50, 100, 200, 500)
SHORT_INTERVALS = (1, 2, 3, 4, 5)
VALIDATIONS = 5
MORE_VALIDATIONS = 10
FEW_HELD_OUT = 100
# Full fine-tuning's rate at width 2000, how many times that is for LoRA, and the exponents with
# which it falls with the width: Thinking Machines, "LoRA Without Regret" (2025) and `get_lr` of
# their cookbook, fitted on Llama and on Qwen models; no more than small models take.
FULL_RATE = 5e-5
LORA_RATE = 10
FITTED_WIDTH = 2000
WIDTH_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
MOST_RATE = 1e-3
# Of other families there is no fit. QLoRA took ten times this rate for LoRA on 7B and 13B models
# (arXiv:2305.14314). Of DeepSeek, gpt-oss, Kimi and Nemotron the cookbook's best rates are 1e-4 to
# 1e-3; where it has the losses (sft_sweep.md), 2e-4 is within 1 % of the best.
CAUTIOUS_FULL_RATE = 2e-5
# The method that learns from rows of a format, and why; of those that do the one that needs no
# second model of the user's choice.
METHODS_OF_FORMATS = {
    "preference": ("dpo", "the rows are pairs of a chosen and a rejected answer"),
    "feedback": ("kto", "the rows are answers labeled good or bad"),
}
# A method with a reference model takes a tenth of the rate of supervised fine-tuning: TRL's
# defaults are 2e-5 and 1e-6, and its guides give LoRA ten times as much in both cases.
PREFERENCE_RATE = 0.1
# The lower end of what docs/choosing.md tries around the fit. The fit is for new adapters, whose B
# is zero: these need a high rate to begin with, a trained one does not.
CONTINUED_RATE = 0.5


@dataclass(frozen=True)
class NewRecipe:
    """A recipe made by `make_recipe`, and the file for it.

    Attributes:
        text: of the file.
        about_data: a line for the user.
        mean_length: tokens of a row on average.
        is_estimated: it is from the characters of rows.
    """

    run: Run
    path: Path
    text: str
    about_data: str
    mean_length: int
    is_estimated: bool

    @property
    def name(self) -> str:
        """The file's path as a user in the working directory writes it."""
        return shell_path(from_here(self.path))

    def check_file(self) -> None:
        """Raise RecipeError if the file exists and differs: it may have been edited."""
        changes = differences(load_recipe(self.path), self.run) if self.path.exists() else []
        if changes:
            raise RecipeError(
                f"{self.name} already exists and differs from the recipe that this command writes",
                where="\n         ".join(map(str, changes)),
                why="it was edited, or the data has changed; it is not overwritten",
                fix=f"train the existing recipe: tunesmith train {self.name}; "
                "or start another run: output_dir=runs/NAME",
            )

    def write_file(self) -> None:
        """Write the file, unless it is there; can be called after each step.

        MachineError where it cannot be written.
        """
        if self.path.exists():
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, self.text)
        except OSError as error:
            what = f"the recipe cannot be written: {error.strerror}"
            fix = "choose another place: output_dir=runs/my-run"
            raise MachineError(what, where=str(self.path), fix=fix) from error


def make_recipe(
    model: str,
    data: str,
    overrides: Mapping[str, object] | Sequence[str] = (),
    *,
    on_paper: bool = False,
    row_count: int | None = None,
    ranks: int = 1,
    look: RowsLook | None = None,
) -> NewRecipe:
    """Look at the rows of a file or Hub data set, and make a recipe that trains a model on them.

    Args:
        model: as in `model.name`; `demo` is the small model of the demo.
        data: as in `data.train.source`; format and columns are detected, unless `overrides`
            give them.
        overrides: as for `load_recipe`; they are written into the recipe, and what is chosen here
            follows them.
        on_paper: for a plan: a well-known model of which nothing is on this machine is not
            looked up at the Hub. The rows' tokens are then estimated from their characters.
        row_count: how many rows there will be, if these are a sample.
        ranks: that will train, as far as is known: a step has an example for each.
        look: what `look_at_rows` has found for the same arguments; None: it is called.

    Raises:
        UsageError: something is wrong or ambiguous; the fix says what to give.
    """
    look = look or look_at_rows(model, data, overrides)
    row_count = row_count or len(look.rows)
    choices = _Choices(look)
    if model == demo_model.DEMO_NAME:
        choices.why["model.name"] = (
            "the demo's file in this Python environment: a recipe names files and Hub ids alone, "
            "so on another machine run the command above there"
        )
    choices.choose_adapter()
    choices.choose_method()
    examined = _examine(look.draft, look.rows, on_paper=on_paper)
    parts = choices.choose_seq_len(examined)
    held_out = choices.choose_hold_out(row_count, parts)
    if examined.is_padded and "data.pack" not in choices.override_keys:
        reason = f"{examined.spec.model_type} cannot keep packed examples apart"
        choices.choose("data.pack", False, reason)
    steps = choices.choose_steps(round(row_count * parts) - held_out, ranks)
    choices.choose_validations(steps, held_out)
    choices.choose_rate(examined.spec)

    tree = over({**choices.values, "output_dir": look.chosen["output_dir"]}, look.layer)
    run = checked(tree)
    for key in choices.override_keys & choices.why.keys() - {"data.train"}:
        choices.why[key] = "set on the command line"
    command = ["tunesmith", "train", "--model", model, "--data", data, *override_words(overrides)]
    head = [schema_line(), *(f"# {line}" for line in shell_command(command).splitlines())]
    body = to_yaml(resolve_paths(tree, beside=look.path.parent).plain(), choices.why)
    return NewRecipe(
        run,
        look.path,
        "\n".join([*head, body]),
        look.about_data,
        examined.mean_length,
        examined.is_estimated,
    )


class _Examined(NamedTuple):
    """The facts that a recipe is chosen by.

    Attributes:
        is_padded: whether the model cannot keep packed examples apart.
        lengths: int64 [n], tokens of the longest sequence of each of some rows, spread over all.
        mean_length: tokens of a row on average.
        is_estimated: all of them are, from characters.
    """

    spec: ModelSpec
    is_padded: bool
    lengths: np.ndarray
    mean_length: int
    is_estimated: bool = False


def _examine(run: Run, rows: Rows, *, on_paper: bool) -> _Examined:
    """Look at the model and at some rows; `on_paper` as for `make_recipe`."""
    # Evenly spaced rows: files are often sorted.
    few = _characters(_spread(rows, MIN_ROWS_TO_HOLD_OUT), count_characters)
    characters = sum(few) / max(1, len(few))
    rows = _spread(
        rows,
        min(
            EXAMINED_ROWS, max(MIN_ROWS_TO_HOLD_OUT, int(EXAMINED_CHARACTERS / max(1, characters)))
        ),
    )
    config = fetch.config_in_package(run.model) if on_paper else None
    if config is not None:
        return _examine_on_paper(run, config, rows)
    folder = fetch.fetch_for_tokens(run.model)
    files = read_model_files(folder, run.model, image_max_pixels=run.data.image_max_pixels)
    # Nothing is cut where lengths are looked at. Rows that cannot be rendered are listed when all
    # of them are tokenized, not these alone.
    data = replace(
        run.data,
        seq_len=sys.maxsize,
        too_long="truncate",
        train_on="all",
        bad_rows="skip",
    )
    ends = eos_ids(files.folder, files.tokenizer)
    template = select_template(data, files.tokenizer, ends, files.pictures)
    tokens = tokenize([(run.data.train[0], rows)], data, template, cache=None, what="a sample")
    is_padded = files.support.state == "padded"
    mean_length = round(tokens.lengths.mean())
    return _Examined(files.spec, is_padded, tokens.longest_sequences, mean_length)


def _spread(rows: Rows, count: int) -> Rows:
    """At most so many of some rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    numbers = sorted({n * len(rows) // count for n in range(count)})
    return rows.take(numbers)


def _characters(rows: Rows, count: Callable[[object], int]) -> list[int]:
    """The `count` of each row that can be read; the others are named with all rows."""
    counts = []
    for number in range(len(rows)):
        with suppress(DataError):
            counts.append(count(rows[number]))
    return counts


def _examine_on_paper(run: Run, config: Mapping[str, object], rows: Rows) -> _Examined:
    """The same by the model's config.json and the characters of the rows, without a tokenizer."""
    spec = model_spec(config, where=run.model.name)
    model_type = read_model_types().get(spec.model_type)
    is_padded = model_type is not None and model_type.support.state == "padded"
    characters = _characters(rows, count_characters)
    lengths = np.array([max(1, ceil_div(n, CHARACTERS_PER_TOKEN)) for n in characters])
    mean = fmean(_characters(rows, partial(count_of_example, source=run.data.train[0])))
    mean_length = max(1, round(mean / CHARACTERS_PER_TOKEN))
    return _Examined(spec, is_padded, lengths, mean_length, is_estimated=True)


class _Choices:
    """The values of a new recipe, with the reasons for those that are no defaults.

    Attributes:
        values: by key; those of the command line are laid over them.
        why: by key.
        draft: the recipe as far as the command line and the rows say.
        override_keys: what the command line sets.
    """

    def __init__(self, look: RowsLook) -> None:
        self.values = {key: value for key, value in look.chosen.items() if key != "output_dir"}
        self.why = {"data.train": look.about_data}
        self.draft = look.draft
        self.override_keys = look.override_keys
        self.row_format = look.layout.format
        if look.layout.has_pictures:
            self.why["model.vision"] = "the rows have pictures"

    def choose(self, key: str, value: object, why: str) -> None:
        self.values[key] = value
        self.why[key] = why

    def choose_adapter(self) -> None:
        """Add the shape of the adapter that is continued: the recipe's own has to be the same."""
        name = self.draft.adapter.from_
        if name is None or not Path(name).is_dir():
            return  # one on the Hub is not asked for here
        self.why["adapter.rank"] = "as the adapter that training continues from"
        folder = find_adapter(name)
        adapter = read_adapter(folder)
        usual = Adapter()
        # PEFT's file has the names that a run's `all-linear` stood for.
        of_run = read_recipe(folder.parent).value.get("adapter") or {}
        if of_run.get("target") == usual.target:
            adapter = replace(adapter, target=usual.target)
        self.values |= {"adapter.rank": adapter.rank, "adapter.alpha": adapter.alpha}
        for field in ("target", "rslora", "modules_to_save"):
            value = vars(adapter)[field]
            if value != vars(usual)[field]:
                self.values[f"adapter.{field}"] = [*value] if isinstance(value, tuple) else value

    def choose_method(self) -> None:
        """Add the method that learns from rows of this format, unless an override names one."""
        if self.row_format not in METHODS_OF_FORMATS or "method.name" in self.override_keys:
            return
        self.choose("method.name", *METHODS_OF_FORMATS[self.row_format])

    def choose_seq_len(self, examined: _Examined) -> float:
        """Add a length that the longest example fits; if it is above SEQ_LEN, that 99 % of them
        fit.

        Text that is longer is split. Returns how many examples a row makes on average.
        """
        lengths = examined.lengths
        data = self.draft.data
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
            # "higher": the length of a row that is there, not one between two.
            most = int(np.quantile(lengths, 0.99, method="higher"))
            seq_len = max(SEQ_LEN, most)
            reason = f"99 % of {looked_at} have up to {most:,} tokens, the longest {longest:,}"
        seq_len = min(context, ceil_div(seq_len, SEQ_LEN_STEP) * SEQ_LEN_STEP)
        self.choose("data.seq_len", seq_len, reason)
        too_long = float(np.mean(lengths > seq_len))
        if is_split:
            # Each part but the first begins with a token of the one before.
            if is_set:
                seq_len = data.seq_len
            return float(np.ceil((lengths - 1) / (seq_len - 1)).mean())
        if too_long > MOST_CUT and not is_set:
            self.choose(
                "data.too_long",
                "drop",
                f"{too_long:.0%} of the rows examined are longer than the {context:,} tokens that "
                "the model supports; truncated, their answers would have no end",
            )
        return 1.0

    def choose_hold_out(self, rows: int, parts: float) -> int:
        """Add how many of the rows are held out for validation; returns how many examples these
        make.

        parts: examples that a row makes on average; a long document makes many.
        """
        data = self.draft.data
        hold_out = data.hold_out
        is_open = "data.hold_out" not in self.override_keys and not data.validation
        if is_open and rows >= MIN_ROWS_TO_HOLD_OUT:
            hold_out = Share(5.0, "%")
            fewest = TELLING_ROWS if rows * parts >= ENOUGH_ROWS else MIN_DIFFERING
            fewest = math.ceil(fewest / parts)
            most = max(1, int(MOST_HELD_OUT / parts))
            if not fewest <= rows * 0.05 <= most:
                hold_out = Share(min(max(rows * 0.05, fewest), most), "examples")
        if not hold_out:
            if is_open:
                self.why["data.train"] += "; too few to hold any out for validation"
                log.info(
                    f"val_loss is not measured: {count_of(rows, 'row')}, and a validation split "
                    f"needs {MIN_ROWS_TO_HOLD_OUT} or more"
                )
            return 0
        count = count_held_out(hold_out, rows)
        reason = f"{count:,} of {count_of(rows, 'row')}, chosen by the seed, to compute val_loss"
        self.choose("data.hold_out", str(hold_out), reason)
        return round(count * parts)

    def choose_steps(self, examples: int, ranks: int) -> int | None:
        """Add epochs and the global batch for so many examples; overrides stand, and count.

        Returns the optimizer steps that this makes; None where unknown.
        """
        train = self.draft.train
        epochs = PREFERENCE_EPOCHS if self.row_format in METHODS_OF_FORMATS else EPOCHS
        if examples * epochs > MAX_SEEN_EXAMPLES:
            epochs = max(1, MAX_SEEN_EXAMPLES // examples)
        elif self.draft.adapter.from_ is None:  # a new adapter needs steps
            epochs = min(MOST_EPOCHS, max(epochs, ceil_div(MIN_SEEN_EXAMPLES, examples)))
        duration = train.duration
        if "train.duration" not in self.override_keys:
            duration = Length(epochs, "epochs")
        examples_seen = examples * (duration.amount if duration.unit == "epochs" else epochs)
        batch = train.global_batch
        if "train.global_batch" not in self.override_keys:
            # The largest batch that still makes WANTED_STEPS steps.
            sizes = [
                size for size in (64, 32, 16, 8, 4, 2, 1) if size * WANTED_STEPS <= examples_seen
            ]
            # Ranks of one tensor-parallel group share an example.
            tensor = self.draft.parallel.tensor
            of_ranks = min(examples, ranks if tensor == "auto" else ranks // tensor)
            fewest = MIN_KTO_BATCH if self.row_format == "feedback" else 1
            batch = Size(max([*sizes, fewest, of_ranks]), "examples")
        reason = (
            f"{count_of(examples, 'example')}; small data sets get more epochs, large ones fewer"
        )
        self.choose("train.duration", str(duration), reason)
        self.values["train.global_batch"] = str(batch)
        if duration.unit == "epochs" and batch.unit == "examples":
            steps = round(ceil_div(examples, batch.amount) * duration.amount)
            reason = (
                f"{steps:,} optimizer steps; "
                f"small data sets get small batches, for {WANTED_STEPS} steps or more"
            )
            self.why["train.global_batch"] = reason
            return steps
        if duration.unit == "steps":
            return int(duration.amount)
        return None  # of a run by the clock or by tokens

    def choose_validations(self, steps: int | None, held_out: int) -> None:
        """Add how often the held-out rows are measured, and when their loss ends the run.

        Each validation has its checkpoint, so that the best one stays.
        """
        if steps is not None:
            validations = MORE_VALIDATIONS if held_out <= FEW_HELD_OUT else VALIDATIONS
            intervals = [interval for interval in INTERVALS if interval * validations <= steps]
            if not intervals:
                intervals = [n for n in SHORT_INTERVALS if n * VALIDATIONS <= steps]
            every = f"{max(intervals, default=SHORT_INTERVALS[0])} steps"
            self.values |= {"validate.every": every, "checkpoint.every": every}
        if held_out >= TELLING_ROWS:
            reason = (
                f"stops the run after {PATIENCE} validations without improvement; final/ holds the "
                "best one's weights (checkpoint.final)"
            )
            self.choose("validate.patience", PATIENCE, reason)

    def choose_rate(self, spec: ModelSpec) -> None:
        """Add the learning rate for a model of this family and width, and for what is trained."""
        kind = self.draft.adapter.kind
        rate = default_learning_rate(kind, spec.model_type, spec.hidden)
        if _width_exponent(spec.model_type) is None:
            reason = (
                f"there is no rule for {spec.model_type} models: a cautious rate; try twice and "
                "half of it, see docs/choosing.md"
            )
        else:
            reason = f"from the model's family, {spec.model_type}, and hidden size, {spec.hidden:,}"
        if kind == "lora":
            reason += "; LoRA takes about ten times the rate of full fine-tuning"
        if self.row_format in METHODS_OF_FORMATS:
            rate = _two_digits(rate * PREFERENCE_RATE)
            reason += "; preference training uses a tenth of it"
        elif self.draft.adapter.from_ is not None:
            rate = continued_rate(rate)
            reason += (
                "; half of that for an adapter that is already trained, which a higher rate would "
                "undo"
            )
        self.choose("train.learning_rate", rate, reason)


def continued_rate(rate: float) -> float:
    """The learning rate of an adapter that was trained before, from that of a new one."""
    return _two_digits(rate * CONTINUED_RATE)


def _two_digits(rate: float) -> float:
    return float(f"{rate:.1e}")


def default_learning_rate(adapter_kind: str, model_type: str, hidden: int) -> float:
    """The peak learning rate for a model of this type and hidden size, to two significant digits.

    docs/choosing.md tabulates it, and a test compares the two.
    """
    exponent = _width_exponent(model_type)
    if exponent is None:
        rate = CAUTIOUS_FULL_RATE
    else:
        rate = FULL_RATE * (FITTED_WIDTH / hidden) ** exponent
    if adapter_kind == "lora":
        rate *= LORA_RATE
    return min(MOST_RATE, _two_digits(rate))


def _width_exponent(model_type: str) -> float | None:
    """Look up how the best rate of a family falls with the width; None where nobody has fitted it.

    The cookbook goes by the name: Qwen's mixtures have Qwen's rule. Llama 4 came after Llama's fit.
    """
    return WIDTH_EXPONENTS.get("qwen" if model_type.startswith("qwen") else model_type)
