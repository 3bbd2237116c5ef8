"""Checks at the start of a run that only read files. They run before torch is imported, because
that import takes seconds.

Order of the checks: recipe and rows -> output_dir -> an earlier run in it -> model -> first rows

When the run starts, every rank repeats all of these checks. After that, every rank makes the checks
that need a tokenizer or the model's code.
"""

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.checkpoint.claim import claim_run_dir
from tunesmith.checkpoint.replicate import copies_in
from tunesmith.checkpoint.resume import finished_step
from tunesmith.checkpoint.start_adapter import find_local_adapter
from tunesmith.config.layers import Overrides, merge_layers, override_layer
from tunesmith.config.paths import DATA_SUFFIXES, inputs_of, resolve_paths
from tunesmith.config.row_settings import row_fix
from tunesmith.config.schema import Run, Source
from tunesmith.config.tree import Node
from tunesmith.config.typed import build_run
from tunesmith.data.rows.bad_rows import error_of_sources, find_bad_rows
from tunesmith.data.rows.detect import Detected, detect
from tunesmith.data.source.folders import check_local
from tunesmith.data.source.open_source import Rows, is_local, open_splits, read_rows
from tunesmith.errors import CheckpointError, DataError, RecipeError
from tunesmith.host import demo_model
from tunesmith.hub import fetch
from tunesmith.training.result import Result, warn_of_changed_rows
from tunesmith.units import count_of

log = logging.getLogger(__name__)


# Maximum size of a file whose rows are checked here. The check of a larger file would take seconds.
MAX_EARLY_BYTES = 4 << 20


def check_start(run: Run, *, resumes: bool) -> Result | None:
    """Check the inputs of a run in one process. All checks of this function only read files.

    Return the Result of a finished run, or None if the run has to be started. If a check fails,
    raise the same UsageError as the start of the run.

    Args:
        resumes: whether an earlier run in `output_dir` is resumed. If False, it will be moved to
            another folder.
    """
    out = Path(run.output_dir)
    finished = None
    with claim_run_dir(out, inputs_of(run).values()):
        if resumes:
            # Ignore damaged checkpoints, because the start of the run reports them.
            with suppress(CheckpointError):
                finished = finished_step(run)
    if finished is not None:
        warn_of_changed_rows(run)
        return Result.from_finished_run(out, finished)
    # A resumed run does not need the adapter from which it started, because its checkpoints contain
    # a copy.
    if run.adapter.from_ is not None and not (resumes and copies_in(out)):
        find_local_adapter(run.adapter.from_)
    place = fetch.local_model(run.model)
    if place is not None and place.is_dir():
        fetch.check_folder(place, run.model)
    _check_rows(run)
    return None


def _check_rows(run: Run) -> None:
    """Raise DataError if a local source is not readable, or if small files have bad rows.

    The error lists the bad rows of all small files.
    """
    data = run.data
    refused = []
    for source in (*data.train, *data.validation):
        if not is_local(source.source):
            continue
        path = Path(source.source).expanduser()
        check_local(path, source.name)
        # If `leave_out` is set, bad rows can be excluded from the run and are no error. Therefore
        # do not check the rows here.
        if data.leave_out or not path.is_file() or path.stat().st_size > MAX_EARLY_BYTES:
            continue
        bad = find_bad_rows(read_rows(source), source, data.system)
        if bad and (data.bad_rows == "error" or bad.count == bad.rows):
            refused.append(bad)
    if refused:
        raise error_of_sources(refused)


@dataclass(frozen=True)
class RowsPreview:
    """Result of reading the rows for `train --model X --data FILE`.

    Attributes:
        layer: the overrides of the command line.
        chosen: values that were chosen for recipe keys. `layer` may override them.
        draft: the recipe so far, with exactly one source of rows. The rules of the recipe are not
            checked yet.
        about_data: a line about the rows for the user.
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
        """Path of the recipe's file, next to the run directory."""
        return Path(f"{self.draft.output_dir}.yaml")


def preview_rows(model: str, data: str, overrides: Overrides = ()) -> RowsPreview:
    """Read the rows of a file or Hub data set and detect their format.

    Raises the same errors as `make_recipe`.
    """
    layer = override_layer(overrides)
    name = model
    if model == demo_model.DEMO_NAME:
        log.info(f"model: the demo's: {demo_model.DEMO_DESCRIPTION}")
        name = str(demo_model.demo_model())
    chosen = {
        "model.name": name,
        "adapter.rank": 16,
        "adapter.alpha": 32,  # removed if an override has `adapter.kind: none`
        "data.train.source": data,
        "output_dir": f"runs/{short_name(data)}-{short_name(model)}",
    }
    override_keys = {key for key, _ in layer.places()}
    # `build_run` does not check the rules of the recipe. They are checked when the recipe is
    # complete.
    draft = build_run(resolve_paths(apply_overrides(chosen, layer)))
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
    shown = Path(data).name if is_local(data) else data
    facts = [count_of(len(rows), "row"), rows.layout, layout.describe()]
    return RowsPreview(
        layer, chosen, draft, rows, layout, f"{shown}: {', '.join(filter(None, facts))}"
    )


def _check_no_duplicate(draft: Run, override_keys: set[str], layer: Node) -> None:
    """Raise RecipeError if an override sets the model or the rows, because `--model` and `--data`
    already set them.
    """
    duplicates = {"model.name", "data.train.source"} & override_keys
    if len(draft.data.train) != 1:
        duplicates = duplicates or {"data.train"}
    if duplicates:
        raise RecipeError(
            f"{min(duplicates)} cannot be combined with --model and --data",
            where=f"{layer.where}: {min(duplicates)}",
            fix=f"remove {min(duplicates)} and use only --model and --data, or write a recipe",
        )


def apply_overrides(chosen: Mapping[str, object], layer: Node) -> Node:
    """Merge the overrides over the chosen values."""
    return merge_layers(override_layer(chosen), layer)


def _with_split(source: Source) -> Source:
    """Return the source with split `train` if it has several splits and selects none of them."""
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
            fix=f"choose a split, such as {row_fix(source.source, split=next(iter(splits)))}",
        )
    # Log the splits that are not used, because the split of a file is derived from the file's name,
    # which may be misleading.
    others = [f"{name} ({len(splits[name]):,})" for name in splits if name != "train"]
    log.info(
        f"{source.source}: only the split train is used for training; the unused splits and "
        f"their numbers of rows are: {', '.join(others)}"
    )
    return replace(source, split="train")


def short_name(name: str) -> str:
    """Return a short name for a model or a data set.

    `HuggingFaceTB/SmolLM2-135M-Instruct` -> `smollm2-135m-instruct`, `data/My FAQ.csv` -> `my-faq`
    """
    path = Path(name.rstrip("/"))
    stem = path.stem if path.suffix.lower() in (*DATA_SUFFIXES, ".gguf") else path.name
    return re.sub(r"[^a-z0-9._]+", "-", stem.lower()).strip("-.") or "data"
