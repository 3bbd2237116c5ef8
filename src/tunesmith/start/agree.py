"""Checks that all ranks have the same inputs. They run before the first collective operation whose
result would be wrong if the inputs differed.

Different inputs cause no error by themselves. With different learning rates, copies of the model
drift apart. With different bases, the shards of a weight come from two models. With different row
counts, the ranks wait for each other in different collectives forever. The ranks compare values and
digests, a few kilobytes per rank. If they differ, all ranks exit with code 2.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, NoReturn

from tunesmith.checkpoint.start_adapter import adapter_digest
from tunesmith.config.dump import flatten
from tunesmith.config.paths import is_place
from tunesmith.config.schema import Run
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
from tunesmith.model.weights.safetensors_files import ENDS_AND_MIDDLE, read_headers, sampled_digest
from tunesmith.units import count_of

if TYPE_CHECKING:
    from tunesmith.batches.training_data import TrainingData
    from tunesmith.hub.model_files import ModelFiles
    from tunesmith.start.tokens import TokenFacts

NEXT_LINE = "\n         "  # aligns with the text after `  where: `
MAX_NAMES = 4  # maximum number of ranks or nodes that an error lists
# Keys of config.json whose values may differ between ranks, because they do not change the model.
NOT_COMPUTED = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
)
# Facts about the inputs of a rank. A key names an input in an error, and its value is a text that
# the ranks compare.
Facts = dict[str, str]


def check_same_recipe(run: Run, ranks: Ranks) -> None:
    """Check that all ranks have the same software and the same recipe. This is a collective call.

    Raise MachineError if a version differs, and RecipeError if a recipe key differs.
    """
    if ranks.world == 1:
        return
    differences = find_differences(ranks, ranks.all_gather_object(software_versions()))
    if differences:
        what = f"the ranks have different versions of {', '.join(differences)}"
        fix = (
            "install the same versions on every node; `tunesmith doctor --pair HOST` compares the "
            "versions"
        )
        where = lines_by_key(differences)
        end_all_ranks(ranks, MachineError(what, where=where, fix=fix, cause="version"))
    # Skip the keys of paths and Hub ids, because their values may differ between nodes.
    values = {}
    for key, value in flatten(run).items():
        if not is_place(key):
            values[key] = value if isinstance(value, str) else json.dumps(value)
    differences = find_differences(ranks, ranks.all_gather_object(values))
    if differences:
        keys = list(differences)
        what = f"the ranks have different recipes: {', '.join(keys[:MAX_NAMES])}"
        fix = "use the same recipe and the same options on every node"
        if keys[0] in values:
            setting = f"{keys[0]}={values[keys[0]]}"
            fix += f", such as {shell_word(setting)}"
        end_all_ranks(ranks, RecipeError(what, where=lines_by_key(differences), fix=fix))


def software_versions() -> Facts:
    """Return the versions of packages that affect results, and a digest of tunesmith's files."""
    versions = dict(installed_versions())
    # Include numpy, which shuffles the examples, and triton, which compiles kernels.
    for name in ("numpy", "triton"):
        for distribution in metadata.distributions(name=name):
            versions[name] = distribution.version
    import torch  # a launched rank has already imported it

    if torch.cuda.is_available():
        versions["CUDA"] = str(torch.version.cuda)
        versions["NCCL"] = str(torch.cuda.nccl.version())
        versions["cuDNN"] = str(torch.backends.cudnn.version())
    version = versions.get("tunesmith", "")
    versions["tunesmith"] = f"{version} {source_digest()[:8]}".strip()
    return versions


def check_same_inputs(tokens: "TokenFacts", files: "ModelFiles", ranks: Ranks) -> None:
    """Check that all ranks read the same model, tokenizer, template and rows. This is a collective
    call.

    Raise ModelError or DataError if an input differs.
    """
    if ranks.world == 1:
        return
    with ranks.raise_on_all_ranks():
        parts = model_parts(tokens, files) | data_parts(tokens.data)
        # If the weights are drawn at random, the folder has no weights to compare.
        if tokens.model.rows.request.weights == "stored":
            # Compare a digest of the beginning, the middle and the end of each tensor, which takes
            # milliseconds for a 70B model. A difference at another position is not detected. If a
            # model has more than 4,096 tensors, only every n-th tensor is read.
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


def model_parts(tokens: "TokenFacts", files: "ModelFiles") -> Facts:
    """Return facts about the base model's config, the tokenizer, and the adapter to continue."""
    config = files.config.to_dict()
    computed = {key: value for key, value in config.items() if key not in NOT_COMPUTED}
    text = json.dumps(computed, sort_keys=True, default=str)
    support = files.support
    parts = {
        "model.name: config.json": hashlib.sha256(text.encode()).hexdigest(),
        "model.name: how its layers train": ", ".join([support.state, *support.recurrent]),
        "model.tokenizer": tokens.data.template.tokenizer_hash,
    }
    reward_hash = tokens.hashes.get("reward_hash")
    if reward_hash:
        parts["method.reward"] = reward_hash
    adapter = tokens.run.adapter.from_
    if adapter is not None and tokens.start.checkpoint is None:
        parts["adapter.from"] = adapter_digest(adapter)
    return parts


def data_parts(data: "TrainingData") -> Facts:
    """Return facts about the template and the rows. For rows, these are digests of the tokens."""
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


def find_differences(ranks: Ranks, facts_by_rank: Sequence[Facts]) -> Facts:
    """Return the facts that differ between ranks. Each value is a text such as `1e-4 for rank 0 on
    spark-a; 2e-4 for rank 1 on spark-b`.

    Args:
        facts_by_rank: the facts of each rank.
    """
    differences = {}
    for key in dict.fromkeys(itertools.chain.from_iterable(facts_by_rank)):
        holders: dict[str, list[int]] = {}
        for rank, parts in enumerate(facts_by_rank):
            text = parts.get(key, "missing")
            holders.setdefault(text, []).append(rank)
        if len(holders) == 1:
            continue
        sides = []
        for text, group in holders.items():
            names = ", ".join(map(ranks.name, group[:MAX_NAMES]))
            side = f"{text} for {names}"
            more = len(group) - MAX_NAMES
            if more > 0:
                side += f" and {more} more"
            sides.append(side)
        differences[key] = "; ".join(sides)
    return differences


def lines_by_key(differences: Mapping[str, str]) -> str:
    """Format the differences for the argument `where` of an error, one line per key."""
    return NEXT_LINE.join(f"{key}: {text}" for key, text in differences.items())


def end_all_ranks(ranks: Ranks, error: UsageError) -> NoReturn:
    """Raise an error that all ranks have detected. One rank per node prints it."""
    ranks.heartbeat.agreed = error
    if ranks.local_rank == 0:
        raise error
    raise OtherRankError(error.what, exit_code=error.exit_code)
