"""A recipe made by looking at the rows and the model: `tunesmith train --model X --data FILE`.

What is not a default is written with its reason, beside the run, to be edited and run again.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.config.dump import differences, to_yaml
from tunesmith.config.layers import merge_layers, override_layer
from tunesmith.config.load import checked, load_recipe
from tunesmith.config.paths import DATA_SUFFIXES, resolve_paths
from tunesmith.config.schema import Run, Source
from tunesmith.config.shipped import schema_line
from tunesmith.config.tree import Node
from tunesmith.config.typed import build_run
from tunesmith.data.contract import MOST_CUT
from tunesmith.data.detect import detect
from tunesmith.data.source import Rows, is_local, open_splits, read_rows
from tunesmith.data.splits import count_held_out
from tunesmith.data.template import select_template
from tunesmith.data.tokens import tokenize
from tunesmith.errors import DataError, RecipeError
from tunesmith.host.files import from_here, write_atomically
from tunesmith.host.shell import shell_command, shell_path
from tunesmith.hub import fetch
from tunesmith.hub.model_files import read_model_files
from tunesmith.model.spec import ModelSpec
from tunesmith.model.tokenizer import eos_ids
from tunesmith.units import Length, Share, Size

LOOK = 2000  # rows whose tokens are counted, spread over the file
# With fewer rows none are held out; more make a validation longer, hardly more exact
FEW_ROWS, MOST_HELD = (
    20,
    500,
)
SEQ_LEN, SEQ_LEN_STEP = 2048, 256
# Epochs as OpenAI's fine-tuning chooses them: three, fewer of many rows, more of few ("Data preparation and analysis for
# chat model fine-tuning", cookbook.openai.com). Of few rows more are seen here: a new adapter needs steps, not only rows.
EPOCHS, MOST_EPOCHS, FEWEST_SEEN, MOST_SEEN = 3, 10, 500, 25_000
STEPS = 100  # a smaller batch where it takes that to make so many steps
INTERVALS = (10, 25, 50, 100, 200, 500)  # steps between validations: about five in a run
# Full fine-tuning's rate at width 2000, how many times that is for LoRA, and how it falls with the width: Thinking
# Machines, "LoRA Without Regret" (2025), fitted on Llama models; no more than small models take.
FULL_RATE, LORA_RATE, WIDTH, WIDTH_EXPONENT, MOST_RATE = 5e-5, 10, 2000, 0.781, 1e-3


@dataclass(frozen=True)
class MadeRecipe:
    """A recipe that was made, the file that keeps it, its text, and a line on what was found in the data."""

    run: Run
    path: Path
    text: str
    found: str

    @property
    def name(self) -> str:
        """The file's path as a user in the working directory writes it."""
        return shell_path(from_here(self.path))

    def check_file(self) -> None:
        """Raise RecipeError if the file is there and says something else: it may have been edited."""
        if self.path.exists() and (changes := differences(load_recipe(self.path), self.run)):
            what = f"{self.name} is there, and is not what this command makes"
            why = "it was edited, or the command or the data is another; it is not overwritten"
            fix = f"train it as it stands: tunesmith train {self.name}; or begin another: output_dir=runs/NAME"
            raise RecipeError(what, where="\n         ".join(map(str, changes)), why=why, fix=fix)

    def write_file(self) -> None:
        """Write the file, unless it is there; can be called after each step."""
        if not self.path.exists():
            write_atomically(self.path, self.text)


def make_recipe(
    model: str, data: str, overrides: Mapping[str, Any] | Sequence[str] = ()
) -> MadeRecipe:
    """Look at the rows of a file or Hub data set, and make a recipe that trains a model on them.

    Args:
        model: as in `model.name`.
        data: as in `data.train.source`; format and columns are found by looking, unless `overrides` give them.
        overrides: as for `load_recipe`; they are written into the recipe, and what is chosen here follows them.

    Raises:
        UsageError: something is wrong or ambiguous; the fix says what to give.
    """
    layer = override_layer(overrides)
    given = {key for key, _ in layer.places()}
    chosen: dict[str, Any] = {
        "model.name": model,
        "adapter.rank": 16,
        "adapter.alpha": 32,  # both are dropped where `adapter.kind: none` is asked for
        "data.train.source": data,
        "output_dir": f"runs/{_short_name(data)}-{_short_name(model)}",
    }
    # Its rules are checked when the format is known
    asked = build_run(resolve_paths(_over(chosen, layer)))
    if twice := {"model.name", "data.train.source"} & given or (
        len(asked.data.train) != 1 and {"data.train"}
    ):
        what, fix = (
            f"{min(twice)} is given beside --model and --data",
            "give only those, or write a recipe",
        )
        raise RecipeError(what, where=f"{layer.where}: {min(twice)}", fix=fix)
    source = _with_split(asked.data.train[0])
    rows = read_rows(source)
    layout = detect(rows, source, any_format="data.train.format" not in given)
    renamed = {name: column for name, column in layout.columns.items() if name != column}
    source = replace(source, format=layout.format, columns=renamed)  # type: ignore[arg-type]
    found = (
        f"{Path(data).name if is_local(data) else data}: {len(rows):,} rows, {layout.describe()}"
    )
    hold_out = asked.data.hold_out
    if "data.hold_out" not in given and not asked.data.validation and len(rows) >= FEW_ROWS:
        hold_out = (
            Share(5.0, "%") if len(rows) * 0.05 <= MOST_HELD else Share(MOST_HELD, "examples")
        )
    count = count_held_out(hold_out, len(rows)) if hold_out else 0
    spec, lengths = _look_at_tokens(asked, source, rows)
    limit = spec.position_limit or spec.context

    why = {"data.train": found}
    chosen |= {"data.train.split": source.split} if source.split else {}
    chosen |= {"data.train.format": layout.format} | (
        {"data.train.columns": renamed} if renamed else {}
    )
    if hold_out:
        chosen["data.hold_out"] = str(hold_out)
        why["data.hold_out"] = (
            f"{count:,} of {len(rows):,} rows, drawn by the seed, to measure val_loss on"
        )
    elif not asked.data.validation:
        why["data.train"] += "; too few to hold some out"
    chosen["data.seq_len"], why["data.seq_len"] = _choose_seq_len(lengths, limit)
    too_long = float(np.mean(lengths > chosen["data.seq_len"]))
    if too_long > MOST_CUT and "data.seq_len" not in given:
        chosen["data.too_long"] = "drop"
        shown = f"{too_long:.0%} of the rows looked at are longer than the {limit:,} tokens that the model takes"
        why["data.too_long"] = f"{shown}; cut there, their answers would have no end"
    _choose_steps(chosen, why, asked, given, len(rows) - count)
    lora = asked.adapter.kind == "lora"
    rate = FULL_RATE * (LORA_RATE if lora else 1) * (WIDTH / spec.hidden) ** WIDTH_EXPONENT
    chosen["train.learning_rate"] = min(MOST_RATE, float(f"{rate:.0e}"))
    method = (
        "LoRA takes about ten times the rate of full fine-tuning"
        if lora
        else "a tenth of what LoRA takes"
    )
    why["train.learning_rate"] = f"{method}, and wide models less than narrow ones"

    tree = _over(chosen | {"output_dir": chosen.pop("output_dir")}, layer)
    run = checked(tree)
    path = Path(f"{run.output_dir}.yaml")
    why |= {key: "given on the command line" for key in why if key in given and key != "data.train"}
    words = (
        [f"{key}={value}" for key, value in overrides.items()]
        if isinstance(overrides, Mapping)
        else overrides
    )
    command = shell_command(["tunesmith", "train", "--model", model, "--data", data, *words])
    head = "".join(
        f"{line}\n" for line in (schema_line(), *(f"# {line}" for line in command.splitlines()))
    )
    return MadeRecipe(
        run, path, head + to_yaml(resolve_paths(tree, beside=path.parent).plain(), why), found
    )


def _over(chosen: Mapping[str, Any], layer: Node) -> Node:
    return merge_layers(override_layer(chosen), layer, lambda line: None)


def _with_split(source: Source) -> Source:
    """The source with `train` as its split where it has several and none is named."""
    splits = (
        [] if source.split is not None or is_local(source.source) else list(open_splits(source))
    )
    if len(splits) < 2:
        return source
    if "train" not in splits:
        what, why = (
            f"{source.source} has no split named train",
            f"its splits are {', '.join(splits)}",
        )
        raise DataError(what, where=source.source, why=why, fix=f"name one: --split {splits[0]}")
    return replace(source, split="train")


def _look_at_tokens(run: Run, source: Source, rows: Rows) -> tuple[ModelSpec, np.ndarray]:
    """The model's spec, and how many tokens each of some rows becomes, spread over all."""
    files = read_model_files(fetch.fetch_for_tokens(run.model), run.model)
    data = replace(
        run.data, train=(source,), seq_len=sys.maxsize, too_long="truncate", train_on="all"
    )
    template = select_template(data, files.tokenizer, eos_ids(files.folder, files.tokenizer))
    spans = [range(n, n + 1) for n in sorted({n * len(rows) // LOOK for n in range(LOOK)})]
    rows = rows.take(spans) if len(rows) > LOOK else rows
    return files.spec, tokenize(
        [(source, rows)], data, template, files.tokenizer, cache=None, what="a sample"
    ).lengths


def _choose_seq_len(lengths: np.ndarray, context: int) -> tuple[int, str]:
    """Room for the longest example, or where that is above SEQ_LEN for 99 % of them; and why."""
    longest, most = int(lengths.max()), int(np.quantile(lengths, 0.99, method="higher"))
    looked_at = f"the {len(lengths):,} rows looked at"
    if longest <= SEQ_LEN:
        wanted, why = longest, f"the longest of {looked_at} has {longest:,} tokens"
    else:
        wanted, why = (
            max(SEQ_LEN, most),
            f"99 % of {looked_at} have up to {most:,} tokens, the longest {longest:,}",
        )
    return min(context, -(-wanted // SEQ_LEN_STEP) * SEQ_LEN_STEP), why


def _choose_steps(
    chosen: dict[str, Any], why: dict[str, str], asked: Run, given: set[str], examples: int
) -> None:
    """Add epochs, the global batch and the intervals for so many examples; what is given stands, and counts."""
    epochs = min(MOST_EPOCHS, max(EPOCHS, -(-FEWEST_SEEN // examples)))
    if examples * EPOCHS > MOST_SEEN:
        epochs = max(1, MOST_SEEN // examples)
    duration = asked.train.duration if "train.duration" in given else Length(epochs, "epochs")
    seen = examples * duration.amount if duration.unit == "epochs" else examples * epochs
    batch = asked.train.global_batch
    if "train.global_batch" not in given:
        batch = Size(next((b for b in (64, 32, 16, 8, 4, 2) if b * STEPS <= seen), 1), "examples")
    chosen |= {"train.duration": str(duration), "train.global_batch": str(batch)}
    why["train.duration"] = f"{examples:,} examples; of fewer each is seen more often, of many once"
    steps = int(duration.amount) if duration.unit == "steps" else None
    if duration.unit == "epochs" and batch.unit == "examples":
        steps = round(-(-examples // batch.amount) * duration.amount)
        why["train.global_batch"] = (
            f"{steps:,} optimizer steps; few rows take small batches, to make {STEPS} or more"
        )
    if steps is not None:
        every = f"{max((n for n in INTERVALS if n * 5 <= steps), default=INTERVALS[0])} steps"
        chosen |= {"validate.every": every, "checkpoint.every": every}


def _short_name(name: str) -> str:
    """`HuggingFaceTB/SmolLM2-135M-Instruct` -> `smollm2-135m-instruct`, `data/My FAQ.csv` -> `my-faq`."""
    path = Path(name.rstrip("/"))
    stem = path.stem if path.suffix.lower() in (*DATA_SUFFIXES, ".gguf") else path.name
    return re.sub(r"[^a-z0-9._]+", "-", stem.lower()).strip("-.") or "data"
