"""The checks of a start that need its files alone, before torch is imported: that takes seconds.

recipe and rows -> output_dir -> an earlier run in it -> model -> first rows

The start itself repeats all of it, on every rank. What takes a tokenizer or the model's code is
told there.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.checkpoint.claim import claim_run_dir
from tunesmith.checkpoint.replicate import copies_in
from tunesmith.checkpoint.resume import finished_step
from tunesmith.checkpoint.start_adapter import find_local_adapter
from tunesmith.config.layers import merge_layers, override_layer
from tunesmith.config.paths import DATA_SUFFIXES, inputs_of, resolve_paths
from tunesmith.config.schema import Run, Source
from tunesmith.config.tree import Node
from tunesmith.config.typed import build_run
from tunesmith.data.rows.bad_rows import error_of_sources, find_bad_rows
from tunesmith.data.rows.detect import Detected, detect
from tunesmith.data.source.folders import check_local
from tunesmith.data.source.open_source import Rows, is_local, open_splits, read_rows
from tunesmith.errors import CheckpointError, DataError, RecipeError
from tunesmith.host import demo_model
from tunesmith.host.shell import shell_word
from tunesmith.hub import fetch
from tunesmith.training.result import Result, warn_of_changed_rows
from tunesmith.units import count_of

log = logging.getLogger(__name__)

# Maximum size of a file whose rows are checked here too; a larger one takes seconds.
MAX_EARLY_BYTES = 4 << 20


def check_start(run: Run, *, resumes: bool) -> Result | None:
    """Find what a start of `run` in one process comes to, as far as its files tell.

    A UsageError that it would raise, the Result of a finished run, or None: it has to be tried.

    Args:
        resumes: whether an earlier run in `output_dir` goes on; it is not moved aside.
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
    _check_rows(run)
    return None


def _check_rows(run: Run) -> None:
    """DataError where a local source cannot be read, or rows of small files; it lists the bad rows
    of all of these."""
    refused = []
    for source in (*run.data.train, *run.data.validation):
        if not is_local(source.source):
            continue
        path = Path(source.source).expanduser()
        check_local(path, source.name)
        # A row that `leave_out` leaves out is no fault.
        if not path.is_file() or path.stat().st_size > MAX_EARLY_BYTES or run.data.leave_out:
            continue
        bad = find_bad_rows(read_rows(source), source, run.data.system)
        if bad and (run.data.bad_rows == "error" or bad.count == bad.rows):
            refused.append(bad)
    if refused:
        raise error_of_sources(refused)


@dataclass(frozen=True)
class RowsLook:
    """The overrides of `--model X --data FILE`, and what the rows show.

    Attributes:
        layer: the overrides.
        chosen: values of a recipe by their keys, below those of `layer`.
        draft: the recipe so far, whose rules are not checked; it has one source of rows.
        about_data: a line for the user.
    """

    layer: Node
    chosen: dict[str, object]
    draft: Run
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
    name = model
    if model == demo_model.DEMO_NAME:
        log.info(f"model: the demo's: {demo_model.DEMO_DESCRIPTION}")
        name = str(demo_model.demo_model())
    chosen: dict[str, object] = {
        "model.name": name,
        "adapter.rank": 16,
        "adapter.alpha": 32,  # both are dropped where an override has `adapter.kind: none`
        "data.train.source": data,
        "output_dir": f"runs/{short_name(data)}-{short_name(model)}",
    }
    override_keys = {key for key, _ in layer.places()}
    # Its rules are checked once the recipe is whole.
    draft = build_run(resolve_paths(over(chosen, layer)))
    _check_no_duplicate(draft, override_keys, layer)
    source = _with_split(draft.data.train[0])
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
    # The columns whose names are not the format's own.
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
    shown = Path(data).name if is_local(data) else data
    facts = [count_of(len(rows), "row"), rows.layout, layout.describe()]
    about_data = f"{shown}: {', '.join(filter(None, facts))}"
    return RowsLook(layer, chosen, draft, rows, layout, about_data)


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
    # A file's name alone may tell its split, for example that of a team called dev.
    others = [f"{name} ({len(splits[name]):,})" for name in splits if name != "train"]
    log.info(f"{source.source}: split train; rows not trained on: {', '.join(others)}")
    return replace(source, split="train")


def short_name(name: str) -> str:
    """`HuggingFaceTB/SmolLM2-135M-Instruct` -> `smollm2-135m-instruct`, `data/My FAQ.csv` ->
    `my-faq`.
    """
    path = Path(name.rstrip("/"))
    stem = path.stem if path.suffix.lower() in (*DATA_SUFFIXES, ".gguf") else path.name
    return re.sub(r"[^a-z0-9._]+", "-", stem.lower()).strip("-.") or "data"
