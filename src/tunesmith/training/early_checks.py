"""The checks of a start that need its files alone, before torch is imported: that takes seconds.

recipe and rows -> output_dir -> an earlier run in it -> model -> first rows

The start itself repeats all of it, on every rank. What takes a tokenizer or the model's code is
told there.
"""

import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.checkpoint.claim import claim_run_dir
from tunesmith.checkpoint.replicate import copies_in
from tunesmith.checkpoint.resume import finished_step
from tunesmith.checkpoint.start_adapter import find_local_adapter
from tunesmith.config.layers import merge_layers, override_layer, override_words
from tunesmith.config.paths import DATA_SUFFIXES, inputs_of, resolve_paths
from tunesmith.config.schema import Run, Source
from tunesmith.config.shipped import schema_line
from tunesmith.config.tree import Node
from tunesmith.config.typed import build_run
from tunesmith.data.rows.bad_rows import error_of_sources, find_bad_rows
from tunesmith.data.rows.detect import Detected, detect
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.source.folders import check_local
from tunesmith.data.source.open_source import Rows, is_local, open_splits, read_rows
from tunesmith.errors import CheckpointError, DataError, RecipeError
from tunesmith.host import demo_model
from tunesmith.host.files import from_here
from tunesmith.host.shell import shell_command, shell_path, shell_word
from tunesmith.hub import fetch
from tunesmith.training.result import Result, warn_of_changed_rows
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# Of a file of rows that is opened here too: a larger one takes seconds to open.
MAX_EARLY_BYTES = 16 << 20


def check_start(run: Run, *, resumes: bool, every_row: bool = False) -> Result | None:
    """Find what a start of `run` in one process comes to, as far as its files tell.

    A UsageError that it would raise, the Result of a finished run, or None: it has to be tried.

    Args:
        resumes: whether an earlier run in `output_dir` goes on; it is not moved aside.
        every_row: look at all rows of a file, as the start does later: it will be in a queue.
    """
    finished = None
    with claim_run_dir(Path(run.output_dir), inputs_of(run).values()):
        if resumes:
            # The start says what is wrong with a checkpoint.
            with suppress(CheckpointError):
                finished = finished_step(run)
    if finished is not None:
        warn_of_changed_rows(run)
        return Result.of_finished(Path(run.output_dir), finished)
    # Checkpoints have the adapter that they began with.
    if run.adapter.from_ is not None and not (resumes and copies_in(Path(run.output_dir))):
        find_local_adapter(run.adapter.from_)
    place = fetch.local_model(run.model)
    if place is not None and place.is_dir():
        fetch.check_folder(place, run.model)
    sources = [s for s in (*run.data.train, *run.data.validation) if is_local(s.source)]
    _check_rows(run, sources, every_row)
    return None


def _check_rows(run: Run, sources: Sequence[Source], every_row: bool) -> None:
    """DataError where a local source cannot be read, or its first row, or one of `every_row`; it
    lists the bad rows of all of them."""
    opened = []
    is_first_bad = every_row
    for source in sources:
        path = Path(source.source).expanduser()
        check_local(path, source.name)
        # A row that `leave_out` leaves out is no fault.
        if not path.is_file() or path.stat().st_size > MAX_EARLY_BYTES or run.data.leave_out:
            continue
        rows = read_rows(source)
        opened.append((source, rows))
        try:
            convert_row(rows[0], source, where=rows.where(0), system=run.data.system)
        except DataError:
            is_first_bad = True
    if not is_first_bad:
        return
    refused = []
    for source, rows in opened:
        bad = find_bad_rows(rows, source, run.data.system)
        if bad and (run.data.bad_rows == "error" or bad.is_whole):
            refused.append(bad)
    if refused:
        raise error_of_sources(refused)


@dataclass(frozen=True)
class RowsLook:
    """The words of `--model X --data FILE`, and what the rows show.

    Attributes:
        layer: the overrides.
        head: the first lines of the recipe's file; see `recipe_head`.
        chosen: values of a recipe by their keys, below those of `layer`.
        draft: the recipe so far, whose rules are not checked.
        about_data: a line for the user.
    """

    model: str
    data: str
    layer: Node
    head: list[str]
    chosen: dict[str, object]
    draft: Run
    source: Source
    rows: Rows
    layout: Detected
    about_data: str

    @property
    def override_keys(self) -> set[str]:
        return {key for key, _ in self.layer.places()}

    @property
    def path(self) -> Path:
        """The file of the recipe, beside its run."""
        return Path(f"{self.draft.output_dir}.yaml")


def look_at_rows(
    model: str, data: str, overrides: Mapping[str, object] | Sequence[str] = ()
) -> RowsLook:
    """Read the rows of a file or Hub data set, and detect their format; raises as `make_recipe`."""
    layer = override_layer(overrides)
    chosen: dict[str, object] = {
        "model.name": _model_name(model),
        "adapter.rank": 16,
        "adapter.alpha": 32,  # both are dropped where an override has `adapter.kind: none`
        "data.train.source": data,
    }
    chosen["output_dir"] = f"runs/{short_name(data)}-{short_name(model)}"
    override_keys = {key for key, _ in layer.places()}
    head = recipe_head(model, data, overrides)
    if "output_dir" not in override_keys:
        chosen["output_dir"] = _free_output_dir(str(chosen["output_dir"]), head)
    # Its rules are checked once the recipe is whole.
    draft = build_run(resolve_paths(over(chosen, layer)))
    _check_no_duplicate(draft, override_keys, layer)
    source = _with_split(draft.data.train[0])
    rows = read_rows(source)
    layout = _detect(rows, source, override_keys, skips_bad_rows=draft.data.bad_rows == "skip")
    source = _with_layout(source, layout)
    if source.split:
        chosen["data.train.split"] = source.split
    chosen["data.train.format"] = layout.format
    if source.columns:
        chosen["data.train.columns"] = source.columns
    draft = replace(draft, data=replace(draft.data, train=(source,)))
    if layout.has_pictures and "model.vision" not in override_keys:
        chosen["model.vision"] = True
        draft = replace(draft, model=replace(draft.model, vision=True))
    about_data = _describe_rows(data, rows, layout)
    return RowsLook(model, data, layer, head, chosen, draft, source, rows, layout, about_data)


def recipe_head(
    model: str, data: str, overrides: Mapping[str, object] | Sequence[str]
) -> list[str]:
    """Return the first lines of a recipe's file: its schema, and the command that makes it."""
    words = ["tunesmith", "train", "--model", model, "--data", data, *override_words(overrides)]
    command = shell_command(words)
    return [schema_line(), *(f"# {line}" for line in command.splitlines())]


def _free_output_dir(output_dir: str, head: list[str]) -> str:
    """Return a name for the run's folder. It is `output_dir`, or `output_dir-2` and so on if the
    recipe file of that name is from another command.
    """
    free = output_dir
    number = 1
    while (path := Path(f"{free}.yaml")).exists() and not _is_made_by(path, head):
        number += 1
        free = f"{output_dir}-{number}"
    if number > 1:
        first = shell_path(from_here(Path(f"{output_dir}.yaml")))
        log.info(
            f"output_dir: {free}, because another command wrote {first} "
            f"(to change keys of that recipe: tunesmith train {first} KEY=VALUE)"
        )
    return free


def _is_made_by(path: Path, head: list[str]) -> bool:
    """Return whether a recipe's file begins with this head; the order of the words and the
    spelling of paths may differ."""
    with suppress(OSError, ValueError):
        lines = path.read_text(encoding="utf-8").splitlines()[: len(head)]
        return _words_of(lines) == _words_of(head)
    return False


def _words_of(head: list[str]) -> list[str]:
    words = shlex.split("\n".join(line.removeprefix("# ") for line in head[1:]))
    return sorted(os.path.abspath(word) for word in words)


def _detect(
    rows: Rows, source: Source, override_keys: set[str], *, skips_bad_rows: bool
) -> Detected:
    """The layout of some rows; of texts in files it is known."""
    if rows.are_documents and not {"data.train.format", "data.train.columns"} & override_keys:
        return Detected("text", {"text": "text"})
    return detect(
        rows,
        source,
        any_format="data.train.format" not in override_keys,
        skips_bad_rows=skips_bad_rows,
    )


def _model_name(model: str) -> str:
    """Return the `model.name` of a model that the command line names."""
    if model != demo_model.DEMO_NAME:
        return model
    log.info(f"model: the demo's: {demo_model.DEMO_DESCRIPTION}")
    return str(demo_model.demo_model())


def _describe_rows(data: str, rows: Rows, layout: Detected) -> str:
    """A line for the user: how many rows a source has, and their layout."""
    name = Path(data).name if is_local(data) else data
    count = count_of(len(rows), "row")
    if rows.layout:
        count += f", {rows.layout}"
    return f"{name}: {count}, {layout.describe()}"


def _check_no_duplicate(draft: Run, override_keys: set[str], layer: Node) -> None:
    """RecipeError where an override names the model or the rows a second time."""
    duplicates = {"model.name", "data.train.source"} & override_keys
    if len(draft.data.train) != 1:
        duplicates = duplicates or {"data.train"}
    if duplicates:
        raise RecipeError(
            f"{min(duplicates)} cannot be combined with --model and --data",
            where=f"{layer.where}: {min(duplicates)}",
            fix="use only those, or write a recipe",
        )


def over(chosen: Mapping[str, object], layer: Node) -> Node:
    """The layer of overrides over what is chosen."""
    return merge_layers(override_layer(chosen), layer)


def _with_split(source: Source) -> Source:
    """The source with `train` as its split where it has several and none is named."""
    if source.split is not None or Path(source.source).expanduser().is_file():
        return source
    splits = open_splits(source)
    if len(splits) < 2:
        return source
    if "train" not in splits:
        raise DataError(
            f"{source.source} has no split named train",
            where=source.source,
            why=f"its splits are {', '.join(splits)}",
            fix=f"choose one: --split {shell_word(next(iter(splits)))}",
        )
    # A file's name alone may tell its split: of a team called dev, say.
    others = []
    for name, table in splits.items():
        if name != "train":
            others.append(f"{name} ({count_of(len(table), 'row')})")
    log.info(f"{source.source}: split train; not trained on: {', '.join(others)}")
    return replace(source, split="train")


def _with_layout(source: Source, layout: Detected) -> Source:
    """The source with its format, and the columns whose names are not the format's own."""
    return replace(source, format=layout.format, columns=layout.renamed)


def short_name(name: str) -> str:
    """`HuggingFaceTB/SmolLM2-135M-Instruct` -> `smollm2-135m-instruct`, `data/My FAQ.csv` ->
    `my-faq`.
    """
    path = Path(name.rstrip("/"))
    stem = path.stem if path.suffix.lower() in (*DATA_SUFFIXES, ".gguf") else path.name
    return re.sub(r"[^a-z0-9._]+", "-", stem.lower()).strip("-.") or "data"
