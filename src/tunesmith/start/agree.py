"""Checks that all ranks have the same inputs. They run before the first collective operation whose
result would be wrong if the inputs differed.

Different inputs cause no error by themselves. With different learning rates, copies of the model
drift apart. With different bases, the shards of a weight come from two models. With different row
counts, the ranks wait for each other in different collectives forever. The ranks compare one digest
per group of values, such as a section of the recipe. If a digest differs, all ranks exit with code
2.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping
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
from tunesmith.model.weights.safetensors_files import ENDS_AND_MIDDLE, read_headers, sampled_digest

if TYPE_CHECKING:
    from tunesmith.batches.training_data import TrainingData
    from tunesmith.hub.model_files import ModelFiles
    from tunesmith.start.tokens import TokenFacts

NEXT_LINE = "\n         "  # aligns with the text after `  where: `
MAX_NAMES = 4  # maximum number of ranks that an error lists
# Keys of config.json whose values may differ between ranks, because they do not change the model.
NOT_COMPUTED = (
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
)
# Groups of values, by the name of the group in an error.
Groups = Mapping[str, object]


def check_same_recipe(run: Run, ranks: Ranks) -> None:
    """Check that all ranks have the same software and the same recipe. This is a collective call.

    Raise MachineError if a version differs, and RecipeError if a recipe key differs.
    """
    if ranks.world == 1:
        return
    differences = find_differences(ranks, {"versions": software_versions()})
    if differences:
        what = "the ranks have different versions of packages"
        fix = "install the same versions on every node; `tunesmith doctor --pair HOST` shows them"
        where = NEXT_LINE.join(differences)
        end_all_ranks(ranks, MachineError(what, where=where, fix=fix, cause="version"))
    sections: dict[str, dict[str, object]] = {}
    # Skip the keys of paths and Hub ids, because their values may differ between nodes.
    for key, value in flatten(run).items():
        if not is_place(key):
            sections.setdefault(key.partition(".")[0], {})[key] = value
    differences = find_differences(ranks, sections)
    if differences:
        what = "the ranks have different recipes"
        fix = "use the same recipe and the same options on every node"
        end_all_ranks(ranks, RecipeError(what, where=NEXT_LINE.join(differences), fix=fix))


def software_versions() -> dict[str, str]:
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
        groups = {**model_groups(tokens, files), **data_groups(tokens.data)}
    differences = find_differences(ranks, groups)
    if not differences:
        return
    what = "the ranks read different inputs"
    where = NEXT_LINE.join(differences)
    if all(line.startswith("data.") for line in differences):
        fix = "copy the same files of rows and template to every node"
        end_all_ranks(ranks, DataError(what, where=where, fix=fix))
    fix = (
        "copy the model's folder from one node to the others; "
        "for a model on the Hub, pin a commit: model.revision=COMMIT"
    )
    end_all_ranks(ranks, ModelError(what, where=where, fix=fix))


def model_groups(tokens: "TokenFacts", files: "ModelFiles") -> Groups:
    """Return the base model, the tokenizer, the reward and the adapter to continue."""
    config = files.config.to_dict()
    computed = {key: value for key, value in config.items() if key not in NOT_COMPUTED}
    weights = None
    # If the weights are drawn at random, the folder has no weights to compare.
    if tokens.model.rows.request.weights == "stored":
        # Compare a digest of the beginning, the middle and the end of each tensor, which takes
        # milliseconds for a 70B model. A difference at another position is not detected. If a
        # model has more than 4,096 tensors, only every n-th tensor is read.
        entries = list(itertools.chain.from_iterable(read_headers(files.folder).values()))
        weights = sampled_digest(entries, ENDS_AND_MIDDLE)
    adapter = tokens.run.adapter.from_
    is_new = tokens.start.checkpoint is None
    return {
        "model.name": (computed, files.support.state, files.support.recurrent, weights),
        "model.tokenizer": tokens.data.template.tokenizer_hash,
        "method.reward": tokens.hashes.get("reward_hash"),
        "adapter.from": adapter_digest(adapter) if adapter is not None and is_new else None,
    }


def data_groups(data: "TrainingData") -> Groups:
    """Return the template and the rows. The rows are compared by their tokens."""
    validation = data.validation
    return {
        "data.template": (data.template.jinja, sorted(data.template.end_ids)),
        "data.train": (data.train.counts.kept, data.train.counts.digest),
        "data.validation": validation and (validation.counts.kept, data.validation_digest),
    }


def find_differences(ranks: Ranks, groups: Groups) -> list[str]:
    """Compare a digest of each group on all ranks, and return a line for each group that differs.
    This is a collective call.

    A line is such as `train: 3f1c02ab for rank 0 on spark-a; 9d0e71c4 for rank 1 on spark-b`.

    Args:
        groups: the values of each group. All ranks have the same groups.
    """
    digests = {}
    for name, values in groups.items():
        text = json.dumps(values, sort_keys=True, default=str)
        digests[name] = hashlib.sha256(text.encode()).hexdigest()[:8]
    by_rank = ranks.all_gather_object(digests)
    lines = []
    for name in groups:
        holders: dict[str, list[int]] = {}
        for rank, found in enumerate(by_rank):
            holders.setdefault(found[name], []).append(rank)
        if len(holders) > 1:
            sides = []
            for digest, group in holders.items():
                more = f" and {len(group) - MAX_NAMES} more" if len(group) > MAX_NAMES else ""
                names = ", ".join(map(ranks.name, group[:MAX_NAMES]))
                sides.append(f"{digest} for {names}{more}")
            lines.append(f"{name}: {'; '.join(sides)}")
    return lines


def end_all_ranks(ranks: Ranks, error: UsageError) -> NoReturn:
    """Raise an error that all ranks have detected. One rank per node prints it."""
    ranks.heartbeat.agreed = error
    if ranks.local_rank == 0:
        raise error
    raise OtherRankError(error.what, exit_code=error.exit_code)
