"""The comparison of what all ranks of a run must have alike, before the first collective that a
difference would spoil.

Ranks that differ do not fail by themselves. With another learning rate copies of the model drift
apart, with another base the shards of a weight come from two models, and with other row counts the
ranks wait for ever, each in another collective. What is compared are values and digests, a few
kilobytes a rank. A difference ends all ranks with exit code 2.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import NoReturn

import torch

from tunesmith.checkpoint.resume import Start
from tunesmith.checkpoint.start_adapter import adapter_digest
from tunesmith.config.dump import flatten, leaves
from tunesmith.config.paths import is_place
from tunesmith.config.schema import Run
from tunesmith.data.prepare import TrainingData
from tunesmith.distributed.ranks import Ranks
from tunesmith.errors import (
    DataError,
    MachineError,
    ModelError,
    OtherRankError,
    RecipeError,
    UsageError,
)
from tunesmith.host.packages import installed_versions, source_digest
from tunesmith.host.shell import shell_word
from tunesmith.hub.model_files import ModelFiles
from tunesmith.model.safetensors_files import (
    ENDS_AND_MIDDLE,
    read_headers,
    sampled_digest,
)
from tunesmith.units import count_of

NEXT_LINE = "\n         "  # below `  where: `
MAX_NAMES = 4  # of ranks or nodes that an error lists
# What a copy of config.json may have otherwise while the model is the same.
NOT_COMPUTED = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
)


def check_same_recipe(run: Run, ranks: Ranks) -> None:
    """MachineError where the software of the ranks differs, RecipeError where a key does.

    A collective call.
    """
    if ranks.world == 1:
        return
    differences = find_differences(ranks, ranks.all_gather_object(software_versions()))
    if differences:
        what = f"the ranks have different versions of {', '.join(differences)}"
        fix = "install the same versions on every node; tunesmith doctor --pair HOST compares them"
        where = lines_by_key(differences)
        end_all_ranks(ranks, MachineError(what, where=where, fix=fix, cause="version"))
    # Keys that name a place may differ.
    values = {}
    for key, value in flatten(run).items():
        if not is_place(key):
            values[key] = value if isinstance(value, str) else json.dumps(value)
    differences = find_differences(ranks, ranks.all_gather_object(values))
    if differences:
        key = next(iter(differences))
        what = f"the ranks have different recipes: {', '.join([*differences][:MAX_NAMES])}"
        fix = "use the same recipe and the same options on every node"
        if key in values:
            fix += f", such as {shell_word(f'{key}={values[key]}')}"
        end_all_ranks(ranks, RecipeError(what, where=lines_by_key(differences), fix=fix))


def software_versions() -> dict[str, str]:
    """List what computes and in which version, with a digest of this package's own files."""
    versions = dict(installed_versions())
    for name in ("numpy", "triton"):  # the order of the examples, compiled kernels
        for distribution in metadata.distributions(name=name):
            versions[name] = distribution.version
    if torch.cuda.is_available():
        versions["CUDA"] = str(torch.version.cuda)
        versions["NCCL"] = str(torch.cuda.nccl.version())
        versions["cuDNN"] = str(torch.backends.cudnn.version())
    versions["tunesmith"] = f"{versions.get('tunesmith', '')} {source_digest()[:8]}".strip()
    return versions


def check_same_inputs(
    run: Run,
    start: Start,
    files: ModelFiles,
    data: TrainingData,
    ranks: Ranks,
    *,
    drawn: bool = False,
) -> None:
    """ModelError or DataError where ranks read another base model, adapter, tokenizer, template or
    other rows; a collective call. `drawn`: the weights are drawn, and there are none in
    `files.folder`.
    """
    if ranks.world == 1:
        return
    parts: dict[str, str] = {}
    with ranks.raise_on_all_ranks():
        parts |= model_parts(run, start, files, data)
        parts |= data_parts(data)
        if not drawn:
            # Takes milliseconds for 70B. It misses a change that leaves both ends and the middle of
            # every tensor as they were; of more than 4,096 tensors it looks at every n-th.
            entries = list(itertools.chain.from_iterable(read_headers(files.folder).values()))
            parts["model.name: weights"] = sampled_digest(entries, ENDS_AND_MIDDLE)
    differences = find_differences(ranks, ranks.all_gather_object(parts))
    if not differences:
        return
    keys = dict.fromkeys(key.partition(":")[0] for key in differences)
    what = f"the ranks read different {', '.join(keys)}"
    where = lines_by_key(differences)
    if all(key.startswith("data.") for key in keys):
        fix = "copy the same files of rows and template to every node"
        end_all_ranks(ranks, DataError(what, where=where, fix=fix))
    fix = (
        "copy the model's folder from one node to the others; "
        "for a model on the Hub, pin a commit: model.revision=COMMIT"
    )
    end_all_ranks(ranks, ModelError(what, where=where, fix=fix))


def model_parts(run: Run, start: Start, files: ModelFiles, data: TrainingData) -> dict[str, str]:
    """The base model by its configuration, the tokenizer, and the adapter to begin with."""
    parts = {}
    for key, value in leaves(files.config.to_dict()).items():
        if key.partition(".")[0] not in NOT_COMPUTED:
            parts[f"model.name: {key} of config.json"] = json.dumps(value, default=str)
    parts["model.name: how its layers train"] = ", ".join(
        [files.support.state, *files.support.recurrent]
    )
    parts["model.tokenizer"] = f"{len(files.tokenizer):,} tokens, {data.template.tokenizer_hash}"
    if run.adapter.from_ is not None and start.checkpoint is None:
        parts["adapter.from"] = adapter_digest(run.adapter.from_)
    return parts


def data_parts(data: TrainingData) -> dict[str, str]:
    """Template and rows, these by the digests of their tokens."""
    prompt = f"{data.template.jinja} {sorted(data.template.end_ids)}"
    counts = data.train.counts
    parts = {
        "data.template": hashlib.sha256(prompt.encode()).hexdigest(),
        "data.train": f"{count_of(counts.kept, 'row')}, {counts.digest}",
    }
    if data.validation is not None:
        counts = data.validation.counts
        parts["data.validation"] = f"{count_of(counts.kept, 'row')}, {data.validation_digest}"
    return parts


def find_differences(ranks: Ranks, parts_of_ranks: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Describe how the ranks differ, by key: `1e-4 for rank 0 on spark-a; 2e-4 for rank 1 on ...`.

    `parts_of_ranks` has those of each rank.
    """
    differences = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(parts_of_ranks)):
        holders: dict[str, list[int]] = {}
        for rank, parts in enumerate(parts_of_ranks):
            holders.setdefault(parts.get(key, "not there"), []).append(rank)
        if len(holders) > 1:
            sides = []
            for text, group in holders.items():
                more = f" and {len(group) - MAX_NAMES} more" if len(group) > MAX_NAMES else ""
                sides.append(f"{text} for {', '.join(map(ranks.name, group[:MAX_NAMES]))}{more}")
            differences[key] = "; ".join(sides)
    return differences


def lines_by_key(differences: Mapping[str, str]) -> str:
    """The differences as an error's `where`."""
    return NEXT_LINE.join(f"{key}: {text}" for key, text in differences.items())


def end_all_ranks(ranks: Ranks, error: UsageError) -> NoReturn:
    """Raise an error that all ranks have: one of each node prints it."""
    ranks.heartbeat.agreed = error
    if ranks.local_rank == 0:
        raise error
    raise OtherRankError(error.what, exit_code=error.exit_code)
