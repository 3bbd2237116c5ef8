"""Preparation of a forecast for a run on any machine. Only the recipe and small files are read.

The sizes of the model come from its config.json. The number and length of the rows come from the
token cache, from the data files, or from the user. `start/plan.py` prepares the plan of a run
on the machine that trains.
"""

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.config.schema import Model, Run
from tunesmith.errors import DataError, ModelError, TunesmithError, first_line
from tunesmith.host.files import cache_folder
from tunesmith.host.shell import shell_word
from tunesmith.hub import fetch
from tunesmith.model.arch.shapes import vision_of_model
from tunesmith.model.arch.spec import ModelSpec
from tunesmith.model.known.model_types import Support, read_model_types
from tunesmith.model.measuring.measured_spec import model_spec
from tunesmith.model.weights.safetensors_files import read_model_config
from tunesmith.model.weights.shipped import check_quantize, resolve_quantize
from tunesmith.planning.forecast import Planner, plan_on_paper
from tunesmith.planning.machines import Cluster
from tunesmith.planning.run_plan import fit_to_model, shares_prompts
from tunesmith.planning.workload import Workload, measure_work
from tunesmith.rows.compare.splits import count_held_out, open_sources, read_splits
from tunesmith.rows.source.open_source import CHARACTERS_PER_TOKEN, count_of_example, is_local
from tunesmith.start.model import ModelFacts
from tunesmith.tokens.text.select_template import select_template
from tunesmith.tokens.token_set import TokenSet
from tunesmith.tokens.tokenize import tokenize, too_long_of
from tunesmith.units import ceil_div

log = logging.getLogger(__name__)

# Maximum number of rows per source whose characters are counted.
COUNTED_ROWS = 1000


@dataclass(frozen=True)
class StatedRows:
    """Number and length of the rows of `data.train`, as stated by the user. None means not stated.

    Attributes:
        count: the number of rows, if the files are not on this machine.
        length: the number of tokens per example.
        is_estimated: whether `length` is estimated from characters.
    """

    count: int | None = None
    length: int | None = None
    is_estimated: bool = False


class PaperModel(NamedTuple):
    """The config of a model.

    Attributes:
        config: the content of config.json.
        where: the path of config.json, or the name of the model.
        folder: the folder with config.json and the tokenizer. None if the config is part of the
            package.
    """

    config: Mapping[str, Any]
    where: str
    folder: Path | None

    @property
    def types(self) -> tuple[str, str]:
        """Model type, and the type of the model's text part. For text models both are equal."""
        model_type = str(self.config["model_type"])
        text_type = (self.config.get("text_config") or {}).get("model_type")
        return model_type, str(text_type or model_type)


def prepare_on_paper(
    run: Run, cluster: Cluster, rows: StatedRows, known: ModelFacts | None = None
) -> tuple[Planner, PaperModel]:
    """Return the planner of a recipe for a cluster, and the config of the recipe's model.

    If the recipe is shipped with tunesmith, the model's config is in the package, so that no
    network, token or license is needed.

    Args:
        rows: number and length of the rows, as stated by the user.
        known: facts that were found when the recipe was created. None if there are none.
    """
    model = _read_config(run.model)
    if known is not None:
        spec = known.spec
        support = known.support
    else:
        spec = model_spec(
            model.config, where=model.where, trust_remote_code=run.model.trust_remote_code
        )
        if run.model.vision:
            spec = _with_vision(run, spec, model)
        types = read_model_types()
        # If the model type has not been tested, assume that it supports packed documents.
        support = types[spec.model_type].support if spec.model_type in types else Support("packed")
    check_quantize(run.model.quantize, model.config, model.where)
    run = replace(run, model=resolve_quantize(run.model, spec.quantized))
    run = fit_to_model(run, spec, support, where=model.where)
    shares = shares_prompts(run, support.recurrent)
    work = _find_workload(run, spec, model.folder, rows, known, shares=shares)
    return plan_on_paper(run, spec, cluster, work), model


def _with_vision(run: Run, spec: ModelSpec, model: PaperModel) -> ModelSpec:
    """Return the spec with the sizes of the vision encoder added.

    Raise ModelError if these sizes are unknown because the model is not downloaded.
    """
    if model.folder is None:
        sizes: Mapping[str, Any] = vision_of_model(model.where)
        if not sizes:
            raise ModelError(
                "the size of the model's vision encoder is unknown",
                where=model.where,
                why="the model is not downloaded, and tunesmith knows this size in advance only "
                "for the models of its vision recipes",
                fix=f"run `tunesmith fetch {shell_word(model.where)}`, or set model.vision=false",
            )
        return replace(spec, **sizes)
    # Import inside the function: Transformers is slow to import, and other plans do not need it.
    from tunesmith.hub.model_files import read_picture_processor
    from tunesmith.hub.picture_support import add_vision
    from tunesmith.model.arch.load import load_configs
    from tunesmith.model.arch.tokenizer import load_tokenizer

    _, full_config = load_configs(model.folder, run.model)
    tokenizer = load_tokenizer(fetch.tokenizer_folder(run.model, model.folder), run.model)
    processor = read_picture_processor(model.folder, tokenizer, run)
    assert full_config is not None
    assert processor is not None
    return add_vision(spec, full_config, processor)


def _read_config(model: Model) -> PaperModel:
    config = fetch.config_in_package(model)
    if config is not None:
        return PaperModel(config, model.name, None)
    fetch.local_model(model)  # raises an error for a path that is no model folder
    folder = fetch.fetch_without_weights(model.name, model.revision)
    return PaperModel(read_model_config(folder), str(folder / "config.json"), folder)


def _cached_tokens(run: Run, folder: Path) -> TokenSet | None:
    """Return the tokens of the training rows from the token cache, or None if they are not cached.

    No rows are downloaded.
    """
    cache = cache_folder("tokens")
    if not cache.exists():
        return None
    for source in run.data.train:
        if not is_local(source.source) and not fetch.repo_cache(source.source, "dataset").exists():
            return None

    # Import inside the function: Transformers is slow to import, and other plans do not need it.
    from tunesmith.hub.model_files import read_picture_processor
    from tunesmith.model.arch.tokenizer import eos_ids, load_tokenizer

    # Ignore errors, because a plan is possible without the tokens. They only make it more exact.
    with suppress(TunesmithError, LookupError):
        tokenizer = load_tokenizer(fetch.tokenizer_folder(run.model, folder), run.model)
        pictures = read_picture_processor(folder, tokenizer, run)
        template = select_template(run.data, tokenizer, eos_ids(folder, tokenizer), pictures)
        template.samples_answers = run.samples_answers
        rows, _ = read_splits(run.data, run.train.seed, only_cached=True)
        return tokenize(rows, run.data, template, cache=cache, what="train", only_cached=True)
    return None


def _find_workload(
    run: Run,
    spec: ModelSpec,
    folder: Path | None,
    rows: StatedRows,
    known: ModelFacts | None,
    *,
    shares: bool,
) -> Workload:
    """Determine the workload of a run: the number of its examples and their lengths.

    The values come from the token cache, from the user, or from the data files on this machine.
    Unknown lengths are assumed to fill `data.seq_len`.

    Args:
        folder: the folder with the tokenizer, or None.
        rows: number and length of the rows, as stated by the user.
        known: see `prepare_on_paper`.
        shares: the value of `TokenSet.shares_prompts`.
    """
    length = rows.length
    is_estimated = rows.is_estimated
    if folder is not None and not length:
        tokens = _cached_tokens(run, folder)
        if tokens is not None:
            if rows.count is None:
                tokens.shares_prompts = shares
                return measure_work(run, spec, tokens)
            length = round(tokens.lengths.mean())
    counted = 0
    # Count the rows in the files on this machine, unless number and length are already known.
    if rows.count is None or not length:
        counted, estimate = _count_rows(run, known, is_needed=rows.count is None)
        if not length:
            length = estimate
            is_estimated = bool(estimate)
    held_out = 0
    if rows.count is not None:
        # The user's number includes the rows that are held out, so subtract these rows.
        if run.data.hold_out is not None:
            held_out = count_held_out(run.data.hold_out, rows.count)
        counted = rows.count - held_out
    parts = 1
    if length and all(too_long_of(source, run.data) == "split" for source in run.data.train):
        parts = max(1, ceil_div(length - 1, run.data.seq_len - 1))
    work = measure_work(run, spec, None, ceil_div(length or 0, parts), rows=counted * parts)
    source = work.source._replace(
        is_estimated=is_estimated, is_stated=rows.count is not None, held_out=held_out * parts
    )
    return work._replace(source=source)


def _count_rows(run: Run, known: ModelFacts | None, *, is_needed: bool) -> tuple[int, int]:
    """Count the training rows of a run, and estimate the mean number of tokens per row.

    The number of tokens is estimated from the number of characters. If a source is not a local
    file, its rows are counted only if its split states a number, such as `train[:512]`. Unknown
    numbers are 0.

    Args:
        known: see `prepare_on_paper`.
        is_needed: log a warning if a file cannot be read.
    """
    if not all(is_local(source.source) for source in run.data.train):
        return _rows_of_splits(run), 0
    count = 0
    lengths = []
    try:
        data = replace(run.data, validation=())
        opened = open_sources(data, known.rows.opened if known else None)
        sources, _ = read_splits(data, run.train.seed, opened, only_cached=True)
        for source, rows in sources:
            count += len(rows)
            for number in range(0, len(rows), ceil_div(len(rows), COUNTED_ROWS)):
                # Skip a row that cannot be read. `train` reports it later.
                with suppress(DataError):
                    lengths.append(count_of_example(rows[number], source))
    # Continue after an error, because a plan is possible without the rows. They only make it more
    # exact.
    except (TunesmithError, LookupError, OSError) as error:
        if is_needed:
            what = first_line(error)
            if isinstance(error, TunesmithError):
                what = f"{error.what}: {error.where}; {error.fix}"
            log.warning(
                f"the rows of data.train were not counted ({what}); to plan without "
                f"them, give the number of rows with --rows N"
            )
        return 0, 0
    return count, ceil_div(sum(lengths), max(1, len(lengths)) * CHARACTERS_PER_TOKEN)


def _rows_of_splits(run: Run) -> int:
    """Return the number of training rows that splits such as `train[:512]` select.

    Return 0 if the split of a source does not state a number of rows.
    """
    count = 0
    for source in run.data.train:
        match = re.fullmatch(r"\w+\[(\d*):(\d+)\]", source.split or "")
        # Also return 0 if the source has a weight or if rows are held out, because the number of
        # training rows then differs from the size of the split.
        if match is None or source.weight != 1 or run.data.hold_out:
            return 0
        rows = int(match[2]) - int(match[1] or 0)
        count += min(rows, source.max_examples or rows)
    return max(0, count)
