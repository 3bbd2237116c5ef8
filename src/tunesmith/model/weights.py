"""Load weights from safetensors files into a model's memory, tensor by tensor.

Peak memory is the model and one slice: a tensor whose target is on the CPU in the stored dtype is read straight into
it, any other goes through a buffer. The pages that were read are dropped at once from the page cache, which on a
machine with unified memory is the GPU's memory too.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from tunesmith.errors import ModelError
from tunesmith.host_memory import drop_pages, open_uncached
from tunesmith.model.safetensors_files import Entry, read_header, read_headers, read_into
from tunesmith.private import local_slices
from tunesmith.sharded import local_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # slow, and a plan needs none

STORED = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SLICE = 16 << 20  # bytes read at a time where a tensor is not read straight into its target


class StoredTensor:
    """A tensor of the checkpoint, not yet read: what a hook of `load_weights` gets. Shape and dtype as stored."""

    def __init__(self, entry: Entry, file: BufferedReader) -> None:
        self._entry, self._file = entry, file
        self.name, self.shape = entry.name, torch.Size(entry.shape)
        self.dtype = STORED[entry.dtype]

    def read(self) -> torch.Tensor:
        """The whole tensor, on the CPU, in its stored dtype."""
        return self[tuple(slice(0, size) for size in self.shape)]

    def into(self, target: torch.Tensor, begin: int = 0) -> None:
        """Read into `target` (contiguous) from element `begin` on, converting to its dtype and device."""
        flat, item = target.view(-1), self.dtype.itemsize
        if target.device.type == "cpu" and target.dtype == self.dtype:
            self._read(flat, begin * item)
        else:
            buffer = torch.empty(min(len(flat), SLICE // item), dtype=self.dtype)
            for start in range(0, len(flat), max(1, len(buffer))):
                piece = buffer[: len(flat) - start]
                self._read(piece, (begin + start) * item)
                flat[start : start + len(piece)].copy_(piece)
        drop_pages(self._file.fileno(), self._entry.start, self._entry.size)

    def into_part(self, target: torch.Tensor) -> None:
        """Read what this rank holds of `target`, which may be a DTensor and have more rows than are stored."""
        self._fill(local_part(target), local_slices(target))

    def __getitem__(self, slices: tuple[slice, ...]) -> torch.Tensor:
        """That part, on the CPU, in its stored dtype; nothing else is read. A slice of each dimension has both ends.

        After `load_weights` the file is opened again for it.
        """
        if self._file.closed:
            with open_uncached(self._entry.file) as file:
                return StoredTensor(self._entry, file)[slices]
        part = torch.empty([cut.stop - cut.start for cut in slices], dtype=self.dtype)
        self._fill(part, slices)
        return part

    def _fill(self, local: torch.Tensor, slices: tuple[slice, ...]) -> None:
        if not slices:
            self.into(local)
            return
        rows, *columns = slices
        first, last = rows.start, min(rows.stop, self.shape[0])
        local = local[: max(last - first, 0)]
        if all(part == slice(0, size) for part, size in zip(columns, self.shape[1:], strict=True)):
            self.into(local, first * math.prod(self.shape[1:]))
            return
        for start, band in self.bands(first, last):
            local[start - first : start - first + len(band)].copy_(band[(slice(None), *columns)])

    def bands(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows from `first` to before `last`, about SLICE bytes at a time: the index of the first one, and the rows."""
        last, width = self.shape[0] if last is None else last, math.prod(self.shape[1:])
        step = max(1, SLICE // max(1, width * self.dtype.itemsize))
        for start in range(first, last, step):
            band = torch.empty(min(step, last - start), *self.shape[1:], dtype=self.dtype)
            self.into(band, start * width)
            yield start, band

    def _read(self, flat: torch.Tensor, offset: int) -> None:
        if flat.numel():
            read_into(self._file, self._entry, flat.view(torch.uint8).numpy().data, offset)


@contextmanager
def stored_tensors(file: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of a safetensors file by their names, to be read in the block; ModelError where it is damaged."""
    entries = read_header(file)
    if wrong := [f"{entry.name} ({entry.dtype})" for entry in entries if entry.dtype not in STORED]:
        raise ModelError(f"{len(wrong)} tensors have a type that cannot be read: {wrong[0]}", where=str(file))
    with open_uncached(file) as opened:
        yield {entry.name: StoredTensor(entry, opened) for entry in entries}


# Takes what a checkpoint holds of a parameter, by suffix; a weight that was drawn is a plain tensor.
Hook = Callable[[Mapping[str, StoredTensor | torch.Tensor]], None]


def load_weights(
    model: "PreTrainedModel",
    folder: Path,
    *,
    skip: Callable[[str], bool] = lambda name: False,
    convert: Mapping[str, Hook] | None = None,
    grow_from: int | None = None,
) -> None:
    """Load a materialised model's parameters from a folder's safetensors files.

    Args:
        model: every parameter has its memory.
        skip: names of parameters that the checkpoint does not hold (an adapter's own).
        convert: parameter name -> hook that takes the stored tensor under "" and its companions (a stored
            `weight.absmax` belongs to `weight`) under their suffixes, in place of a plain read. They run in their own order,
            as they may be collective and each node's files may be split otherwise.
        grow_from: embedding and head may have so many rows in the checkpoint and more in the model, where tokens were
            added; the further rows become the mean of the stored ones. None: as many in both.

    ModelError where tensors are missing, unexpected or of another shape (it lists a few), or a file is damaged.
    """
    hooks = dict(convert or {})
    targets = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not skip(n) and n not in hooks}
    persistent = model.state_dict(keep_vars=True).keys()
    targets |= {n: b for n, b in model.named_buffers() if n in persistent and not skip(n)}
    headers = read_headers(folder)
    groups: dict[str, dict[str, Entry]] = {}  # the entries of each parameter, by suffix
    wanted, unexpected = {*targets, *hooks}, []
    for entry in (entry for entries in headers.values() for entry in entries):
        name, suffix = _target_name(entry.name, wanted, hooks)
        if name:
            groups.setdefault(name, {})[suffix] = entry
        elif not entry.name.endswith("rotary_emb.inv_freq"):  # old Llama checkpoints hold the frequencies
            unexpected.append(entry.name)
    _drop_tied_copies(groups, targets, str(folder))
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    growing = {id(p): grow_from for end in ends if end is not None for p in end.parameters(recurse=False)}
    _check_complete(groups, targets, hooks, unexpected, growing, str(folder))
    with torch.no_grad(), ExitStack() as stack:
        files = {path: stack.enter_context(open_uncached(path)) for path in headers}
        plain = sorted(groups.keys() - hooks.keys(), key=lambda n: (groups[n][""].file, groups[n][""].start))
        for name in (*plain, *hooks):
            stored = {suffix: StoredTensor(entry, files[entry.file]) for suffix, entry in groups[name].items()}
            if name in hooks:
                hooks[name](stored)
            else:
                _read_parameter(stored[""], targets[name])


def _read_parameter(stored: StoredTensor, target: torch.Tensor) -> None:
    """Read a tensor into its parameter; further rows of an embedding or head become the mean of the stored ones.

    An untrained row then neither dominates the softmax nor is out of distribution (Hewitt, 2021, "Initializing new word
    embeddings for pretrained language models"); without noise it is the same on every machine.
    """
    stored.into_part(target)
    if target.shape != stored.shape:
        (rows, *rest), known = local_slices(target), stored.shape[0]
        new = local_part(target)[max(known - rows.start, 0) :]
        if len(new):
            total = torch.stack([band.sum(dim=0, dtype=torch.float32) for _, band in stored.bands()]).sum(dim=0)
            new.copy_((total / known)[tuple(rest)])


def copy_whole(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy a whole tensor into its parameter, of which this rank may hold a part only."""
    if isinstance(target, DTensor):
        target, whole = target.to_local(), whole[local_slices(target)]
    target.copy_(whole)


def _target_name(stored: str, wanted: set[str], hooks: Mapping[str, Hook]) -> tuple[str, str]:
    """The model's name for a stored tensor, and the companion suffix; ("", "") when it has no place.

    A checkpoint saved from the backbone alone lacks the prefix `model.`; one saved from a wrapper has it twice.
    """
    for name in (stored, f"model.{stored}", stored.removeprefix("model.")):
        if name in wanted:
            return name, ""
        for cut in range(len(name)):
            if name[cut] == "." and name[:cut] in hooks:
                return name[:cut], name[cut + 1 :]
    return "", ""


def _drop_tied_copies(groups: dict[str, dict[str, Entry]], targets: Mapping[str, torch.Tensor], where: str) -> None:
    """Of names that share a parameter keep one; when the checkpoint holds two, they must be equal."""
    first: dict[int, str] = {}
    for name in sorted(groups.keys() & targets.keys()):
        kept = first.setdefault(id(targets[name]), name)
        if kept != name:
            if not _equal(groups[kept][""], groups[name][""]):
                fix = "set tie_word_embeddings: false in config.json"
                raise ModelError(f"{kept} and {name} differ, but the config ties them", where=where, fix=fix)
            del groups[name]


def _equal(a: Entry, b: Entry) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.dtype not in STORED:
        return True  # `_check_complete` refuses the one that stays
    with open_uncached(a.file) as fa, open_uncached(b.file) as fb:
        pairs = zip(StoredTensor(a, fa).bands(), StoredTensor(b, fb).bands(), strict=True)
        return all(torch.equal(left, right) for (_, left), (_, right) in pairs)


def _check_complete(
    groups: dict[str, dict[str, Entry]],
    targets: Mapping[str, torch.Tensor],
    hooks: Mapping[str, Hook],
    unexpected: list[str],
    growing: Mapping[int, int | None],
    where: str,
) -> None:
    """Raise ModelError unless the checkpoint holds every tensor of the model, in its shape, and no other.

    `growing`: id of each parameter with one row per token -> the rows that it may have in the checkpoint, if it has fewer.
    """
    covered = {id(targets[name]) for name in groups if name in targets}
    missing = [name for name in targets if name not in groups and id(targets[name]) not in covered]
    missing += [name for name in hooks if "" not in groups.get(name, {})]
    shapes = []
    for name in sorted(groups.keys() & targets.keys()):
        stored, shape = groups[name][""].shape, tuple(targets[name].shape)
        grows = stored[:1] == (growing.get(id(targets[name])),) and stored[1:] == shape[1:] and shape > stored
        if shape != stored and not grows:
            file = groups[name][""].file.name
            shapes.append(f"{name}: {list(stored)} in {file}, {list(shape)} in the model that config.json describes")
    unreadable = [e.name for group in groups.values() for e in group.values() if e.dtype not in STORED]
    for what, names in (
        ("tensors are missing", sorted(missing)),
        ("tensors belong nowhere in this model", unexpected),
        ("tensors have another shape", shapes),
        ("tensors have a type that cannot be read", unreadable),
    ):
        if names:
            listed = f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
            prequantised = any("bitsandbytes__" in name for name in names)
            fix = "set model.quantize: nf4" if prequantised else "fetch the model again, or correct config.json"
            why = "the weights and config.json do not describe the same model"
            raise ModelError(listed, where=where, why=why, fix=fix)
