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
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from typing import NamedTuple, NoReturn

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
DIGEST_CHARACTERS = 12  # characters of a digest that an error shows
# What a copy of config.json may have otherwise while the model is the same.
NOT_COMPUTED = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
)


class Compared(NamedTuple):
    """One thing that must be alike. An empty `digest`: this rank has nothing to compare it by."""

    digest: str
    text: str  # as an error shows it


NOT_THERE = Compared("not there", "not there")


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
    values = recipe_values(run)
    differences = find_differences(ranks, ranks.all_gather_object(values))
    if differences:
        key = next(iter(differences))
        what = f"the ranks have different recipes: {', '.join([*differences][:MAX_NAMES])}"
        fix = "use the same recipe and the same options on every node"
        if key in values:
            fix += f", such as {shell_word(f'{key}={values[key].text}')}"
        end_all_ranks(ranks, RecipeError(what, where=lines_by_key(differences), fix=fix))


def recipe_values(run: Run) -> dict[str, Compared]:
    """The keys of a recipe that must be alike, and their values; those that name a place are left
    out.
    """
    values = {}
    for key, value in flatten(run).items():
        if not is_place(key):
            text = value if isinstance(value, str) else json.dumps(value)
            values[key] = Compared(text, text)
    return values


def software_versions() -> dict[str, Compared]:
    """List what computes and in which version, with a digest of this package's own files."""
    versions = dict(installed_versions())
    for name in ("numpy", "triton"):  # the order of the examples, compiled kernels
        for distribution in metadata.distributions(name=name):
            versions[name] = distribution.version
    if torch.cuda.is_available():
        versions["CUDA"] = str(torch.version.cuda)
        versions["NCCL"] = str(torch.cuda.nccl.version())
        versions["cuDNN"] = str(torch.backends.cudnn.version())
    number = f"{versions.get('tunesmith', '')} {source_digest()[:8]}".strip()
    versions["tunesmith"] = number
    return {name: Compared(version, version) for name, version in versions.items()}


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
    with ranks.raise_on_all_ranks():
        parts = model_parts(run, start, files, data) | data_parts(data)
        if not drawn:
            parts |= weight_parts(files)
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


def model_parts(
    run: Run, start: Start, files: ModelFiles, data: TrainingData
) -> dict[str, Compared]:
    """The base model by its configuration, the tokenizer, and the adapter to begin with."""
    parts = {}
    for key, value in leaves(files.config.to_dict()).items():
        if key.partition(".")[0] not in NOT_COMPUTED:
            text = json.dumps(value, default=str)
            parts[f"model.name: {key} of config.json"] = Compared(text, text)
    support = files.support
    text = ", ".join([support.state, *support.recurrent])
    parts["model.name: how its layers train"] = Compared(text, text)
    digest = data.template.tokenizer_hash
    parts["model.tokenizer"] = Compared(
        digest, f"{len(files.tokenizer):,} tokens ({digest[:DIGEST_CHARACTERS]})"
    )
    if run.adapter.from_ is not None and start.checkpoint is None:
        digest = adapter_digest(run.adapter.from_)
        parts["adapter.from"] = Compared(
            digest, f"{run.adapter.from_} ({digest[:DIGEST_CHARACTERS]})"
        )
    return parts


def weight_parts(files: ModelFiles) -> dict[str, Compared]:
    """The base's weights by their `sampled_digest`, which takes milliseconds for 70B.

    It misses a change that leaves both ends and the middle of every tensor as they were; of more
    than 4,096 tensors it looks at every n-th.
    """
    entries = list(itertools.chain.from_iterable(read_headers(files.folder).values()))
    digest = sampled_digest(entries, ENDS_AND_MIDDLE)
    return {
        "model.name: weights": Compared(
            digest, f"{files.model.name} ({digest[:DIGEST_CHARACTERS]})"
        )
    }


def data_parts(data: TrainingData) -> dict[str, Compared]:
    """Template and rows, these by the digests of their tokens."""
    template = data.template
    prompt = f"{template.jinja} {sorted(template.end_ids)}"
    digest = hashlib.sha256(prompt.encode()).hexdigest()
    counts = data.train.counts
    parts = {
        "data.template": Compared(digest, f"{template.name} ({digest[:DIGEST_CHARACTERS]})"),
        "data.train": Compared(
            counts.digest, f"{count_of(counts.kept, 'row')} ({counts.digest[:DIGEST_CHARACTERS]})"
        ),
    }
    if data.validation is not None:
        digest = f"{data.validation_digest} {data.validation.counts.digest}"
        parts["data.validation"] = Compared(
            digest,
            f"{count_of(data.validation.counts.kept, 'row')} ({digest[:DIGEST_CHARACTERS]})",
        )
    return parts


def find_differences(
    ranks: Ranks, parts_of_ranks: Sequence[Mapping[str, Compared]]
) -> dict[str, str]:
    """Describe how the ranks differ, by key: `1e-4 on node-a, 2e-4 on node-b`.

    `parts_of_ranks` has those of each rank.
    """
    differences = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(parts_of_ranks)):
        parts = [of_rank.get(key, NOT_THERE) for of_rank in parts_of_ranks]
        if not all(part.digest for part in parts):
            continue
        holders: dict[str, list[int]] = {}
        for rank, part in enumerate(parts):
            holders.setdefault(part.digest, []).append(rank)
        if len(holders) > 1:
            sides = [
                f"{parts[group[0]].text} on {name_places(ranks, group)}"
                for group in holders.values()
            ]
            differences[key] = ", ".join(sides)
    return differences


def name_places(ranks: Ranks, group: Collection[int]) -> str:
    """Some ranks in words: the names of their nodes where all ranks of these are among them."""
    hosts = dict.fromkeys(ranks.hosts[rank] for rank in group)
    whole = all(rank in group for rank, host in enumerate(ranks.hosts) if host in hosts)
    names = [*hosts] if whole else [ranks.name(rank) for rank in group]
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more


def lines_by_key(differences: Mapping[str, str]) -> str:
    """The differences as an error's `where`."""
    return NEXT_LINE.join(f"{key}: {text}" for key, text in differences.items())


def end_all_ranks(ranks: Ranks, error: UsageError) -> NoReturn:
    """Raise an error that all ranks have: one of each node prints it."""
    ranks.heartbeat.agreed = error
    if ranks.local_rank == 0:
        raise error
    raise OtherRankError(error.what, exit_code=error.exit_code)
