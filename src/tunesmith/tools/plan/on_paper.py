"""A forecast of a run on machines that need not be here, by the recipe and small files alone.

The model is known by its config.json, the rows by the token cache, by themselves or by the user's
words. `prepare.py` has the same for the machine that trains.
"""

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from tunesmith.config.schema import Model, Run
from tunesmith.data.compare.splits import count_held_out, read_splits
from tunesmith.data.source.open_source import CHARACTERS_PER_TOKEN, count_of_example, is_local
from tunesmith.data.text.select_template import select_template
from tunesmith.data.tokens.token_set import TokenSet
from tunesmith.data.tokens.tokenize import tokenize
from tunesmith.errors import DataError, ModelError, TunesmithError, first_line
from tunesmith.host.files import cache_folder
from tunesmith.host.shell import shell_word
from tunesmith.hub import fetch
from tunesmith.model.measured_spec import model_spec
from tunesmith.model.model_types import Support, read_model_types
from tunesmith.model.safetensors_files import read_model_config
from tunesmith.model.shapes import vision_of_model
from tunesmith.model.shipped import check_quantize, resolve_quantize
from tunesmith.model.spec import ModelSpec
from tunesmith.planning.forecast import Planner, plan_on_paper
from tunesmith.planning.machines import Cluster
from tunesmith.planning.run_plan import fit_to_model, shares_prompts
from tunesmith.planning.workload import Workload, measure_work
from tunesmith.units import ceil_div, count_of

log = logging.getLogger(__name__)

COUNTED_ROWS = 1000  # of a source, whose characters are counted
ROWS_FIX = "give their number: --rows N"


@dataclass(frozen=True)
class StatedRows:
    """The user's statements about the rows of `data.train`; None: nothing is said.

    Attributes:
        count: how many there are, of files that are elsewhere.
        length: tokens of an example.
        is_estimated: `length` is estimated from characters.
    """

    count: int | None = None
    length: int | None = None
    is_estimated: bool = False


class PaperModel(NamedTuple):
    """A model's config.json, and the folder with it and the tokenizer, if any."""

    config: Mapping[str, Any]
    where: str
    folder: Path | None

    @property
    def types(self) -> tuple[str, str]:
        """The model type and that of its text model, which is the same without other parts."""
        model_type = str(self.config["model_type"])
        text_type = (self.config.get("text_config") or {}).get("model_type")
        return model_type, str(text_type or model_type)


def prepare_on_paper(run: Run, cluster: Cluster, rows: StatedRows) -> tuple[Planner, PaperModel]:
    """The planner of a recipe on machines that need not be here, and its model.

    The shapes of models of recipes that ship are in the package: they take no network, no token and
    no license.
    """
    model = _read_model(run.model)
    spec = model_spec(
        model.config, where=model.where, trust_remote_code=run.model.trust_remote_code
    )
    if run.model.vision:
        spec = _with_vision(run, spec, model)
    check_quantize(run.model.quantize, model.config, model.where)
    run = replace(run, model=resolve_quantize(run.model, spec))
    types = read_model_types()
    support = types[spec.model_type].support if spec.model_type in types else Support("packed")
    run = fit_to_model(run, spec, support, where=model.where)
    work = _work_of(run, spec, model.folder, rows, shares=shares_prompts(run, support.recurrent))
    return plan_on_paper(run, spec, cluster, work), model


def _with_vision(run: Run, spec: ModelSpec, model: PaperModel) -> ModelSpec:
    """The spec with the sizes of the vision part; ModelError where nothing here knows of one."""
    if model.folder is None:
        sizes = vision_of_model(model.where)
        if not sizes:
            raise ModelError(
                "the sizes of this model's vision part are not known, if it has one",
                where=model.where,
                why="they are in the package for the models of its recipes for pictures alone",
                fix=f"tunesmith fetch {shell_word(model.where)}; or model.vision=false",
            )
        return replace(
            spec,
            vision_parameters=sizes["vision_parameters"],
            projector_parameters=sizes["projector_parameters"],
            picture_bytes=sizes["picture_bytes"],
            picture_flops=sizes["picture_flops"],
        )
    # With Transformers, which a plan can do without.
    from tunesmith.hub.model_files import read_picture_processor
    from tunesmith.hub.picture_support import add_vision
    from tunesmith.model.load import load_configs
    from tunesmith.model.tokenizer import load_tokenizer

    _, whole = load_configs(model.folder, run.model)
    tokenizer = load_tokenizer(fetch.tokenizer_folder(run.model, model.folder), run.model)
    processor = read_picture_processor(model.folder, tokenizer, run)
    assert whole is not None
    assert processor is not None
    return add_vision(spec, whole, processor)


def _read_model(model: Model) -> PaperModel:
    config = fetch.config_in_package(model)
    if config is not None:
        return PaperModel(config, model.name, None)
    path = fetch.local_model(model)
    if path is not None and path.is_file():
        folder = fetch.fetch_for_tokens(model)
    else:
        folder = fetch.fetch_without_weights(model.name, model.revision)
    return PaperModel(read_model_config(folder), str(folder / "config.json"), folder)


def _cached_tokens(run: Run, folder: Path) -> TokenSet | None:
    """The tokens of a run, if the token cache has them; no rows are downloaded."""

    cache = cache_folder("tokens")
    if not cache.exists():
        return None
    for source in run.data.train:
        if not is_local(source.source) and not fetch.repo_cache(source.source, "dataset").exists():
            return None

    # With Transformers, which a plan can do without.
    from tunesmith.hub.model_files import read_picture_processor
    from tunesmith.model.tokenizer import eos_ids, load_tokenizer

    # A plan goes on without the tokens: they make it more exact.
    with suppress(TunesmithError, LookupError):
        tokenizer = load_tokenizer(fetch.tokenizer_folder(run.model, folder), run.model)
        pictures = read_picture_processor(folder, tokenizer, run)
        template = select_template(run.data, tokenizer, eos_ids(folder, tokenizer), pictures)
        rows, _ = read_splits(run.data, run.train.seed, only_cached=True)
        return tokenize(rows, run.data, template, cache=cache, what="train", only_cached=True)
    return None


def _work_of(
    run: Run, spec: ModelSpec, folder: Path | None, rows: StatedRows, *, shares: bool
) -> Workload:
    """Find what the recipe trains on: by the token cache, by its rows if here, or assumed.

    Args:
        folder: has the tokenizer.
        shares: as `TokenSet.shares_prompts`.
    """
    length = rows.length
    is_estimated = rows.is_estimated
    if folder is not None and not length:
        tokens = _cached_tokens(run, folder)
        if tokens is not None and rows.count is None:
            tokens.shares_prompts = shares
            return measure_work(run, spec, tokens)
        if tokens is not None:
            length = round(tokens.lengths.mean())
    counted = 0
    if rows.count is None or not length:
        counted, estimate = _count_rows(run, is_needed=rows.count is None)
        is_estimated = is_estimated or bool(estimate and not length)
        length = length or estimate
    held_out = 0
    if rows.count is not None:
        if run.data.hold_out is not None:
            held_out = count_held_out(run.data.hold_out, rows.count)
        counted = rows.count - held_out
    parts = _parts_of_row(run, length or 1)
    source = count_of((counted + held_out) * parts, "row") if counted else "unknown"
    if rows.count is not None:
        source += " (--rows)"
    if held_out:
        source += f", {held_out * parts:,} of them held out"
    if length:
        length = ceil_div(length, parts)
        source += f", about {min(length, run.row_tokens):,} tokens each"
    else:
        source += f", assumed to fill data.seq_len, {run.row_tokens:,} tokens each"
    if is_estimated:
        left_out = "a chat template and pictures" if run.model.vision else "a chat template"
        source += f" (estimated from characters, without {left_out})"
    source += ", all counted as supervised"
    return measure_work(run, spec, None, length or None, rows=counted * parts, source=source)


def _parts_of_row(run: Run, length: int) -> int:
    """Examples that a row of so many tokens makes: long texts are split."""
    are_texts = all(source.format == "text" for source in run.data.train)
    if not are_texts or run.data.too_long != "auto":
        return 1
    return max(1, ceil_div(length - 1, run.data.seq_len - 1))


def _count_rows(run: Run, *, is_needed: bool) -> tuple[int, int]:
    """Count the training rows of a run, and estimate the mean tokens of a row from the characters
    of its columns. If a source is not a local file, count the rows that the splits name. Return
    zeros for unknown numbers, with a warning if a file is needed and cannot be read.
    """
    if not all(is_local(source.source) for source in run.data.train):
        return _rows_of_splits(run), 0
    count = 0
    lengths = []
    try:
        data = replace(run.data, validation=())
        sources, _ = read_splits(data, run.train.seed, only_cached=True)
        for source, rows in sources:
            count += len(rows)
            for number in range(0, len(rows), ceil_div(len(rows), COUNTED_ROWS)):
                # One that cannot be read is named by `train`.
                with suppress(DataError):
                    lengths.append(count_of_example(rows[number], source))
    # A plan goes on without the rows: they make it more exact.
    except (TunesmithError, LookupError, OSError) as error:
        if is_needed:
            what = first_line(error)
            if isinstance(error, TunesmithError):
                what = f"{error.what}: {error.where}; {error.fix}"
            log.warning(f"the rows of data.train are not counted: {what}; or {ROWS_FIX}")
        return 0, 0
    return count, ceil_div(sum(lengths), max(1, len(lengths)) * CHARACTERS_PER_TOKEN)


def _rows_of_splits(run: Run) -> int:
    """Training rows that splits such as `train[:512]` name; 0 if one has no count."""
    count = 0
    for source in run.data.train:
        match = re.fullmatch(r"\w+\[(\d*):(\d+)\]", source.split or "")
        if match is None or source.weight != 1 or run.data.hold_out:
            return 0
        rows = int(match[2]) - int(match[1] or 0)
        count += min(rows, source.max_examples or rows)
    return max(0, count)
