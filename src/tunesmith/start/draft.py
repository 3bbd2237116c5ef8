"""Draft of a new recipe for `train --model X --data FILE`: the model, the rows and their format.

The rows are opened here. Like the stage `rows.py`, this module imports neither torch nor
Transformers.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.config.layers import Overrides, merge_layers, override_layer
from tunesmith.config.load import overridden_sources
from tunesmith.config.paths import DATA_SUFFIXES
from tunesmith.config.row_settings import record_overrides, row_fix
from tunesmith.config.schema import Run, Source
from tunesmith.config.typed import build_run
from tunesmith.config.yaml_file import RecipeLayer
from tunesmith.errors import DataError, RecipeError
from tunesmith.host import demo_model
from tunesmith.host.demo_model import DEMO_DESCRIPTION
from tunesmith.rows.compare.splits import OpenedRows
from tunesmith.rows.detect import Detected, detect
from tunesmith.rows.source.open_source import Rows, is_local, open_splits, read_rows
from tunesmith.start.request import Request
from tunesmith.start.rows import RowFacts, open_rows
from tunesmith.units import count_of


@dataclass(frozen=True)
class Draft:
    """A recipe with a model and exactly one source of rows. Its rules are not checked yet.

    Attributes:
        layer: the overrides of the command line.
        chosen: values that were chosen for recipe keys. `layer` may override them.
        unused_splits: number of rows of each split of the source that is not used.
    """

    layer: RecipeLayer
    chosen: Mapping[str, object]
    facts: RowFacts
    layout: Detected
    unused_splits: Mapping[str, int]
    uses_demo_model: bool

    @property
    def run(self) -> Run:
        return self.facts.run

    @property
    def rows(self) -> Rows:
        [(_, rows)] = self.facts.opened.train
        return rows

    @property
    def about_data(self) -> str:
        """The name of the source, the number of its rows and their format, as text."""
        name = self.run.data.train[0].source
        if is_local(name):
            name = Path(name).name
        layout = self.layout.describe(has_scorers=self.run.samples_answers)
        parts = [count_of(len(self.rows), "row"), self.rows.layout, layout]
        return f"{name}: {', '.join(filter(None, parts))}"

    @property
    def override_keys(self) -> set[str]:
        return {*self.layer.positions}

    @property
    def path(self) -> Path:
        """Path of the recipe's file, next to the run directory."""
        return Path(f"{self.run.output_dir}.yaml")


def draft_recipe(model: str, data: str, overrides: Overrides = ()) -> Draft:
    """Read the rows of a file or Hub data set and detect their format.

    Raises the same errors as `make_recipe`.
    """
    layer = override_layer(overrides)
    name = model
    if model == demo_model.DEMO_NAME:
        name = str(demo_model.demo_model())
    chosen: dict[str, object] = {
        "model.name": name,
        "adapter.rank": 16,
        "adapter.alpha": 32,  # removed if an override has `adapter.kind: none`
        "data.train.source": data,
        "output_dir": f"runs/{short_name(data)}-{short_name(model)}",
    }
    override_keys = {*layer.positions}
    # `build_run` does not check the rules of the recipe. They are checked when the recipe is
    # complete.
    draft = build_run(apply_overrides(chosen, layer))
    _check_no_duplicate(draft, override_keys, layer)
    record_overrides(overridden_sources(draft, layer.positions))
    source, unused_splits = _with_split(draft.data.train[0])
    if draft.samples_answers and "data.train.format" not in override_keys:
        source = replace(source, format="prompt")  # rows without an answer are allowed
    rows = read_rows(source)
    if rows.are_documents and not {"data.train.format", "data.train.columns"} & override_keys:
        layout = Detected("text", {"text": "text"})
    else:
        layout = detect(
            rows,
            source,
            any_format="data.train.format" not in override_keys,
            skips_bad_rows=draft.data.bad_rows == "skip",
        )
    # Add a column to the recipe only if its name differs from the name that the format uses.
    source = replace(source, format=layout.format, columns=layout.renamed)
    if source.split:
        chosen["data.train.split"] = source.split
    chosen["data.train.format"] = layout.format
    if source.columns:
        chosen["data.train.columns"] = source.columns
    draft = replace(draft, data=replace(draft.data, train=(source,)))
    if layout.has_pictures and "model.vision" not in override_keys:
        chosen["model.vision"] = True
        draft = replace(draft, model=replace(draft.model, vision=True))
    facts = open_rows(Request(draft), opened=OpenedRows([(source, rows)], []))
    return Draft(layer, chosen, facts, layout, unused_splits, model == demo_model.DEMO_NAME)


def _check_no_duplicate(draft: Run, override_keys: set[str], layer: RecipeLayer) -> None:
    """Raise RecipeError if an override sets the model or the rows, because `--model` and `--data`
    already set them.
    """
    duplicates = {"model.name", "data.train.source"} & override_keys
    if len(draft.data.train) != 1:
        duplicates = duplicates or {"data.train"}
    if duplicates:
        raise RecipeError(
            f"{min(duplicates)} cannot be combined with --model and --data",
            where=f"{layer.where()}: {min(duplicates)}",
            fix=f"remove {min(duplicates)} and use only --model and --data, or write a recipe",
        )


def apply_overrides(chosen: Mapping[str, object], layer: RecipeLayer) -> RecipeLayer:
    """Merge the overrides over the chosen values."""
    return merge_layers(override_layer(chosen), layer)


def _with_split(source: Source) -> tuple[Source, Mapping[str, int]]:
    """Return the source with split `train` if it has several splits and selects none of them.

    The second value is the number of rows of each split that is then not used.
    """
    if source.split is not None or Path(source.source).expanduser().is_file():
        return source, {}
    splits = open_splits(source)
    if len(splits) < 2:
        return source, {}
    if "train" not in splits:
        raise DataError(
            f"{source.source} has no split named train",
            where=source.source,
            why=f"its splits are {', '.join(splits)}",
            fix=f"choose a split, such as {row_fix(source.source, split=next(iter(splits)))}",
        )
    unused = {name: len(rows) for name, rows in splits.items() if name != "train"}
    return replace(source, split="train"), unused


def short_name(name: str) -> str:
    """Return a short name for a model or a data set.

    `HuggingFaceTB/SmolLM2-135M-Instruct` -> `smollm2-135m-instruct`, `data/My FAQ.csv` -> `my-faq`
    """
    path = Path(name.rstrip("/"))
    stem = path.stem if path.suffix.lower() in DATA_SUFFIXES else path.name
    return re.sub(r"[^a-z0-9._]+", "-", stem.lower()).strip("-.") or "data"


def draft_lines(draft: Draft) -> Iterator[str]:
    """Yield lines about the rows of a new recipe, and about the demo model if it is used."""
    if draft.uses_demo_model:
        yield f"model: the demo's: {DEMO_DESCRIPTION}"
    yield draft.about_data
    # The split of a file is derived from the file's name, which may be misleading.
    if draft.unused_splits:
        others = [f"{name} ({rows:,})" for name, rows in draft.unused_splits.items()]
        yield (
            f"{draft.run.data.train[0].source}: only the split train is used for training; the "
            f"unused splits and their numbers of rows are: {', '.join(others)}"
        )
