"""Loading of weights from safetensors files into a model's memory, one tensor at a time.

Peak memory is the model plus one slice. `stored_tensors` reads the tensors, and `names` finds the
parameter of each tensor.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import ModelError
from tunesmith.formats.stored import StoredTensor
from tunesmith.host.memory import open_uncached
from tunesmith.model.known.dtypes import SAFETENSORS_DTYPES
from tunesmith.model.weights.names import Pieces, StoredGroups, assign_names
from tunesmith.model.weights.shipped_entries import StoredEntry, read_entries
from tunesmith.model.weights.stored_tensors import FiniteCheck, name_tensors, stored_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # only for type checking: the import is slow

SCALES = "_scales"  # suffix of a parameter that holds the scales of another parameter
# Function that fills a parameter. It receives the parameter's stored tensors by suffix, or a random
# tensor.
Hook = Callable[[Mapping[str, StoredTensor | Tensor]], None]


def load_weights(
    model: "PreTrainedModel",
    folder: Path,
    *,
    skip: Callable[[str], bool] = lambda name: False,
    convert: Mapping[str, Hook] | None = None,
    grow_from: int | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> None:
    """Load a materialized model's parameters from a folder's safetensors files.

    Args:
        model: a model whose parameters all have memory.
        skip: returns True for parameters that are not in the checkpoint (those of an adapter).
        convert: parameter name -> hook that replaces the normal read. It receives the stored tensor
            under "" and its companions under their suffixes (a stored `weight.absmax` belongs to
            `weight`). Hooks run in the order of this mapping, because they may be collective and
            the order of the files can differ between nodes.
        grow_from: number of rows that embedding and head may have in the checkpoint if tokens were
            added. The additional rows of the model become the mean of the stored rows. None: the
            numbers must be equal.
        ranks: ranks that load together. An error on one of them is raised on all.

    Raises:
        ModelError: if tensors are missing, unexpected or have another shape, if a file is damaged,
            or if a weight is not finite.
    """
    hooks = dict(convert or {})
    targets = {}
    # The parameters and the persistent buffers. A tied tensor has several names.
    for name, tensor in model.state_dict(keep_vars=True).items():
        # Do not read a tensor that a hook fills. The key of the hook is the name of the tensor, of
        # the parameter whose scales the tensor holds, or of the quantized module with the tensor.
        owners = (name, name.removesuffix(SCALES), name.rpartition(".")[0])
        if hooks.keys().isdisjoint(owners) and not skip(name):
            targets[name] = tensor
    headers = read_entries(folder)
    groups = _assign_entries(model, headers, targets, hooks.keys(), grow_from, str(folder))
    finite = FiniteCheck()
    with torch.no_grad(), ExitStack() as stack:
        files = {path: stack.enter_context(open_uncached(path)) for path in headers}
        # Sort by file and position, so that disks read sequentially.
        plain = sorted(
            groups.keys() - hooks.keys(),
            key=lambda name: (groups[name][""].file, groups[name][""].start),
        )
        # Hooks run last. They may be collective calls, so all ranks run them in the same order.
        for name in (*plain, *hooks):
            # Check parameters only: a stored buffer, for example a mask, may contain infinity.
            is_checked = name in hooks or isinstance(targets[name], nn.Parameter)
            check = finite if is_checked else None
            stored = {
                suffix: stored_tensor(entry, files, check) for suffix, entry in groups[name].items()
            }
            if name in hooks:
                hooks[name](stored)
            else:
                _read_parameter(stored[""], targets[name])
        with ranks.raise_on_all_ranks():
            finite.require_finite()


def find_stored(
    model: "PreTrainedModel",
    folder: Path,
    *,
    quantized: Collection[str],
    grow_from: int | None,
) -> dict[str, dict[str, StoredTensor]]:
    """Return the stored tensors for each tensor of a model. The model may be on meta.

    In the inner mapping, the key "" is the tensor itself, and other keys are the suffixes of its
    companions. Tied tensors occur once. Raise the errors of `load_weights`.

    Args:
        quantized: names of parameters that can have companions.
        grow_from: as in `load_weights`.
    """
    state = model.state_dict(keep_vars=True)
    targets = {name: tensor for name, tensor in state.items() if name not in quantized}
    headers = read_entries(folder)
    groups = _assign_entries(model, headers, targets, quantized, grow_from, str(folder))
    return {
        name: {suffix: stored_tensor(entry) for suffix, entry in group.items()}
        for name, group in groups.items()
    }


def _assign_entries(
    model: "PreTrainedModel",
    headers: Mapping[Path, Sequence[StoredEntry]],
    targets: Mapping[str, Tensor],
    quantized: Collection[str],
    grow_from: int | None,
    where: str,
) -> StoredGroups:
    """Return the stored tensors of `targets` and of the parameters `quantized`.

    Tied tensors occur once. Raise ModelError if the checkpoint does not fit the model.
    """
    names = assign_names(model, headers, {*targets, *quantized}, quantized)
    groups = names.groups
    first_names: dict[int, str] = {}
    # Sort the names, so that the name that is kept for a tied parameter does not depend on the file
    # order.
    for name in sorted(groups.keys() & targets.keys()):
        first_name = first_names.setdefault(id(targets[name]), name)
        if first_name == name:
            continue
        if not _equal(groups[first_name][""], groups[name][""]):
            raise ModelError(
                f"{first_name} and {name} differ, but the config ties them",
                where=where,
                fix="set tie_word_embeddings: false in config.json",
            )
        del groups[name]
    _check_complete(groups, targets, quantized, names.unexpected, where)
    _check_shapes(model, groups, targets, grow_from, where)
    _check_dtypes(groups, where)
    return groups


def _read_parameter(stored: StoredTensor, target: Tensor) -> None:
    """Read a tensor into its parameter. New rows of an embedding become the mean of stored rows.

    With the mean, an untrained row neither dominates the softmax nor is out of distribution
    (Hewitt, 2021, "Initializing new word embeddings for pretrained language models"). No noise is
    added, so that the result is equal on every machine.
    """
    stored.into_part(target)
    if target.shape == stored.shape:
        return
    rows, *columns = local_slices(target)
    stored_rows = stored.shape[0]
    # The new rows of this rank's shard, which follow the stored rows. There may be none.
    new_rows = local_part(target)[max(stored_rows - rows.start, 0) :]
    if len(new_rows):
        # Sum in fp32 and by bands, so that the entire embedding is never in memory.
        sums = [band.sum(dim=0, dtype=torch.float32) for _, band in stored.bands()]
        mean = torch.stack(sums).sum(dim=0) / stored_rows
        new_rows.copy_(mean[tuple(columns)])


def copy_full_tensor(target: Tensor, full: Tensor) -> None:
    """Copy an entire tensor to its parameter, of which this rank may hold only a shard."""
    if isinstance(target, DTensor):
        full = full[local_slices(target)]
    local_part(target).copy_(full)


def _equal(a: StoredEntry | Pieces, b: StoredEntry | Pieces) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if isinstance(a, Pieces) or isinstance(b, Pieces):
        return False  # a tied embedding or head is never stored in pieces
    if a.dtype not in SAFETENSORS_DTYPES:
        return True  # `_check_dtypes` rejects the unsupported dtype
    a_bands = stored_tensor(a).bands()
    b_bands = stored_tensor(b).bands()
    bands = zip(a_bands, b_bands, strict=True)
    return all(torch.equal(a_band, b_band) for (_, a_band), (_, b_band) in bands)


def _check_complete(
    groups: StoredGroups,
    targets: Mapping[str, Tensor],
    quantized: Collection[str],
    unexpected: list[str],
    where: str,
) -> None:
    """Raise ModelError unless the checkpoint has exactly the tensors of the model."""
    # A tied parameter is stored under only one of its names.
    stored = {id(targets[name]) for name in groups.keys() & targets.keys()}
    missing = [name for name, target in targets.items() if id(target) not in stored]
    missing += [name for name in quantized if "" not in groups.get(name, {})]
    _check_no_names(sorted(missing), "missing", where)
    _check_no_names(unexpected, "not part of this model", where)


def _check_shapes(
    model: "PreTrainedModel",
    groups: StoredGroups,
    targets: Mapping[str, Tensor],
    grow_from: int | None,
    where: str,
) -> None:
    """Raise ModelError unless the stored tensors have the shapes of the parameters.

    Embedding and head may have `grow_from` rows in the checkpoint and more rows in the model.
    """
    growing: set[int] = set()
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if end is not None:
            # Use the id, because tied parameters have several names.
            growing.update(map(id, end.parameters(recurse=False)))
    reshaped = []
    for name in sorted(groups.keys() & targets.keys()):
        entry = groups[name][""]
        shape = tuple(targets[name].shape)
        grows = id(targets[name]) in growing and entry.shape == (grow_from, *shape[1:])
        if entry.shape != shape and not (grows and shape > entry.shape):
            reshaped.append(
                f"{name}: {list(entry.shape)} in {entry.file.name}, {list(shape)} in the model "
                "that config.json describes"
            )
    _check_no_names(reshaped, "with a different shape", where)


def _check_dtypes(groups: StoredGroups, where: str) -> None:
    """Raise ModelError if a stored tensor has an unsupported dtype."""
    unreadable = []
    for group in groups.values():
        for stored in group.values():
            entries = (
                [piece.entry for piece in stored.pieces] if isinstance(stored, Pieces) else [stored]
            )
            unreadable += [entry.name for entry in entries if entry.dtype not in SAFETENSORS_DTYPES]
    _check_no_names(unreadable, "of an unsupported dtype", where)


def _check_no_names(names: Sequence[str], problem: str, where: str) -> None:
    """Raise ModelError with the problem and the first names if `names` is not empty."""
    if not names:
        return
    fix = "fetch the model again: tunesmith fetch MODEL; or correct config.json"
    if any("bitsandbytes__" in name for name in names):
        fix = "set model.quantize: nf4"
    raise ModelError(
        name_tensors(names, problem),
        where=where,
        why="the weights and config.json do not describe the same model",
        fix=fix,
    )
