"""Loading of weights from safetensors files into a model's memory, one tensor at a time.

Peak memory is the model plus one slice. A tensor is read directly into its target if the target is
on the CPU and has the stored dtype. Otherwise it is read through a buffer. The pages are dropped
from the page cache immediately, because with unified memory the page cache uses the GPU's memory.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import ModelError
from tunesmith.formats.as_shipped import not_finite
from tunesmith.formats.registry import shipped_format
from tunesmith.formats.stored import SLICE, Region, StoredTensor, whole_slices
from tunesmith.host.memory import drop_pages, open_uncached
from tunesmith.model.names import Pieces, StoredGroups, assign_names
from tunesmith.model.safetensors_files import Entry, read_header, read_into
from tunesmith.model.shipped_entries import CodedEntry, StoredEntry, read_entries
from tunesmith.units import count_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # only for type checking: the import is slow

STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,  # scales that are powers of two
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Dtypes whose values can be NaN or infinite.
CHECKED_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FP8_CODES = "F8_E4M3"  # read as bytes; 127 and 255 are NaN, and there is no infinity
MAX_READ_WEIGHTS = 1 << 20  # maximum weights that are dequantized to fp32 at once
SCALES = "_scales"  # suffix of a parameter that holds the scales of another parameter


class FileTensor(StoredTensor):
    """A stored tensor that is one entry of a safetensors file.

    If no file is passed or the file is closed, each read opens the file. `check` records the values
    that are read.
    """

    def __init__(
        self, entry: Entry, file: BufferedReader | None = None, check: "FiniteCheck | None" = None
    ) -> None:
        self._entry = entry
        self._file = file
        self._check = check
        self.name = entry.name
        self.shape = torch.Size(entry.shape)
        if entry.dtype == FP8_CODES:
            self.dtype = torch.uint8
        else:
            self.dtype = STORED[entry.dtype]

    def with_shape(self, shape: torch.Size) -> "FileTensor":
        """Return a tensor of another shape with the same elements in the same order."""
        return FileTensor(replace(self._entry, shape=tuple(shape)), self._file, self._check)

    def into(self, target: Tensor, begin: int = 0) -> None:
        if self._file is None or self._file.closed:
            with open_uncached(self._entry.file) as file:
                type(self)(self._entry, file, self._check).into(target, begin)
            return
        # The target is contiguous, so a range of the file corresponds to a range of its memory.
        flat = target.view(-1)
        itemsize = self.dtype.itemsize
        # If device and dtype are equal, read directly into the tensor's memory.
        if target.device.type == "cpu" and target.dtype == self.dtype:
            self._read(flat, begin * itemsize)
        else:
            # Otherwise read through a buffer of at most SLICE bytes and convert its values.
            size = min(len(flat), SLICE // itemsize)
            buffer = torch.empty(size, dtype=self.dtype)
            for start in range(0, len(flat), max(1, size)):
                piece = buffer[: len(flat) - start]
                self._read(piece, (begin + start) * itemsize)
                flat[start : start + len(piece)].copy_(piece)
        # Drop the pages from the page cache, which uses the GPU's memory on machines with unified
        # memory.
        drop_pages(self._file.fileno(), self._entry.start, self._entry.size)
        if self._check is not None and len(flat):
            probe = self._probe(flat)
            if probe is not None:
                self._check.note(self._entry, probe)

    def _probe(self, flat: Tensor) -> Tensor | None:
        """Return an fp64 scalar that is finite only if all values are finite.

        The scalar is on the device of the values.

        Return None if the dtype has no NaN and no infinity.
        """
        if self._entry.dtype == FP8_CODES:
            has_positive_nan = flat.view(torch.int8).max() == 127
            has_negative_nan = flat.view(torch.uint8).max() == 255
            return torch.where(has_positive_nan | has_negative_nan, math.nan, 0.0).double()
        if self.dtype not in CHECKED_DTYPES:
            return None
        low, high = torch.aminmax(flat)
        return low.double() + high.double()

    def _fill(self, local: Tensor, slices: tuple[slice, ...]) -> None:
        if not slices:
            self.into(local)
            return
        first = slices[0].start
        columns = slices[1:]
        row_shape = self.shape[1:]
        # `local` can have additional rows for new tokens. `_read_parameter` fills them.
        last = min(slices[0].stop, self.shape[0])
        local = local[: max(last - first, 0)]
        # Entire rows are contiguous in the file. Parts of rows are read as bands and sliced in
        # memory.
        if columns == whole_slices(row_shape):
            self.into(local, first * math.prod(row_shape))
            return
        for start, band in self.bands(first, last):
            offset = start - first
            local_band = local[offset : offset + len(band)]
            local_band.copy_(band[(slice(None), *columns)])

    def _read(self, flat: Tensor, offset: int) -> None:
        if flat.numel():
            assert self._file is not None  # `into` opens the file
            # View the memory as bytes, because numpy has no bf16.
            memory = flat.view(torch.uint8).numpy().data
            read_into(self._file, self._entry, memory, offset)


class FiniteCheck:
    """Detection of NaN and infinity in the values that are read, with only one synchronization."""

    def __init__(self) -> None:
        self._probes: dict[torch.device, list[tuple[Entry, Tensor]]] = {}

    def note(self, entry: Entry, probe: Tensor) -> None:
        """Record a scalar that is finite only if the values of the entry are finite."""
        self._probes.setdefault(probe.device, []).append((entry, probe))

    def require_finite(self) -> None:
        """Raise ModelError if a tensor has a value that is not finite.

        This waits for the devices.
        """
        for probes in self._probes.values():
            numbers = torch.stack([probe for _, probe in probes]).cpu()
            for i in (~numbers.isfinite()).nonzero().flatten().tolist():
                entry, _ = probes[i]
                raise ModelError(
                    f"{entry.name} has values that are not finite",
                    where=entry.file,
                    why="NaN or infinity in a weight makes every loss NaN: the file is damaged, or "
                    "the model was broken when it was saved",
                    fix="restore the file from a copy, or fetch the model again: "
                    "tunesmith fetch MODEL",
                )


class TensorOfParts(StoredTensor):
    """A tensor that is assembled from several stored tensors by `_fill`."""

    def __init__(self, entry: Pieces | CodedEntry) -> None:
        self.name = entry.name
        self.shape = torch.Size(entry.shape)
        self.dtype = STORED[entry.dtype]

    def into(self, target: Tensor, begin: int = 0) -> None:
        """Read entire rows into `target`, like `StoredTensor.into`."""
        row_shape = self.shape[1:]
        width = math.prod(row_shape)
        first = begin // width
        rows = slice(first, first + target.numel() // width)
        self._fill(target.view(-1, *row_shape), (rows, *whole_slices(row_shape)))


class JoinedTensor(TensorOfParts):
    """A tensor of the model that is stored in several pieces.

    Only one piece is in memory at a time, or only SLICE bytes of a piece if it is converted.
    """

    def __init__(
        self,
        pieces: Pieces,
        files: Mapping[Path, BufferedReader],
        check: FiniteCheck | None = None,
    ) -> None:
        super().__init__(pieces)
        self._pieces = []
        for piece in pieces.pieces:
            self._pieces.append((piece, stored_tensor(piece.entry, files, check)))

    def pieces(self, rows: slice) -> Iterator[tuple[Region, StoredTensor]]:
        for piece, stored in self._pieces:
            region = piece.region[0]
            if region.start < rows.stop and rows.start < region.stop:
                yield piece.region, stored

    def _fill(self, local: Tensor, slices: tuple[slice, ...]) -> None:
        for piece, stored in self._pieces:
            in_local = []
            in_piece = []
            # Compute the overlap of the piece and the local slice, as positions in both of them.
            for local_slice, region in zip(slices, piece.region, strict=True):
                start = max(local_slice.start, region.start)
                stop = min(local_slice.stop, region.stop)
                in_local.append(slice(start - local_slice.start, stop - local_slice.start))
                in_piece.append(slice(start - region.start, stop - region.start))
            # Skip the piece if there is no overlap.
            if any(span.stop <= span.start for span in in_local):
                continue
            target = local[tuple(in_local)]
            # A piece of a stack is stored without the first dimension.
            if piece.stacked:
                target = target.squeeze(0)
                in_piece = in_piece[1:]
            # The target is contiguous and takes the entire piece, so read the piece without a
            # buffer.
            if target.shape == stored.shape and target.is_contiguous():
                stored.into(target)
            else:
                target.copy_(stored[tuple(in_piece)])


class DecodedTensor(TensorOfParts):
    """A quantized weight that is dequantized to fp32 in pieces while it is read."""

    def __init__(
        self,
        entry: CodedEntry,
        files: Mapping[Path, BufferedReader],
        check: FiniteCheck | None = None,
    ) -> None:
        super().__init__(entry)
        self.shipped = shipped_format(entry.form)
        self.format_name = self.shipped.name
        first, *others = entry.codes
        self.codes = [stored_tensor(first, files, check)]
        self.codes += [stored_tensor(part, files) for part in others]
        self._scale: StoredTensor | None = None
        if entry.scale is not None:
            self._scale = stored_tensor(entry.scale, files)

    @cached_property
    def scale(self) -> Tensor | None:
        """Scale of the entire weight. Raise ModelError if a value is not finite."""
        if self._scale is None:
            return None
        return self.shipped.read_scale(self._scale, self.name)

    def check_rows(self, codes: Sequence[Tensor], more: str = "") -> None:
        """Raise ModelError if a stored scale of these rows is NaN."""
        if self.shipped.has_nan_scale(codes):
            where = self.codes[-1].name
            if more:
                where = self.name
            raise not_finite(self.name, where, more)

    def _fill(self, local: Tensor, slices: tuple[slice, ...]) -> None:
        if len(slices) == 2:
            self._fill_matrix(local, *slices)
            return
        experts, rows, columns = slices
        if self.shipped.is_output_major:
            # The codes of an expert are [out, in], but its dequantized weight is [in, out].
            local = local.mT
            rows, columns = columns, rows
        last = min(experts.stop, self.shape[0])
        for expert in range(experts.start, last):
            self._fill_matrix(local[expert - experts.start], rows, columns, expert)

    def _fill_matrix(
        self, local: Tensor, rows: slice, columns: slice, expert: int | None = None
    ) -> None:
        """Read a region of a matrix and dequantize it, MAX_READ_WEIGHTS weights at a time."""
        more = ""
        codes_shape = self.codes[0].shape
        stored_rows = codes_shape[0]
        scale = self.scale
        if expert is not None:
            more = f": that of expert {expert}"
            stored_rows = codes_shape[1]
            if scale is not None:
                scale = scale[expert]
        last = min(rows.stop, stored_rows)
        step = max(1, MAX_READ_WEIGHTS // self.shape[1])
        for first in range(rows.start, last, step):
            end = min(first + step, last)
            band = slice(first, end)
            codes = [_rows_of(stored, band, expert) for stored in self.codes]
            self.check_rows(codes, more)
            values = self.shipped.decode_rows(codes, scale, first)
            local_band = local[first - rows.start : end - rows.start]
            local_band.copy_(values[:, columns])


def _rows_of(stored: StoredTensor, rows: slice, expert: int | None) -> Tensor:
    """Return rows of a matrix, or of one expert's matrix in a stack."""
    if expert is None:
        return stored[(rows, *whole_slices(stored.shape[1:]))]
    expert_rows = stored[(slice(expert, expert + 1), rows, *whole_slices(stored.shape[2:]))]
    return expert_rows[0]


def stored_tensor(
    entry: StoredEntry | Pieces,
    files: Mapping[Path, BufferedReader] | None = None,
    check: FiniteCheck | None = None,
) -> StoredTensor:
    """Return the stored tensor of an entry. It is read from `files` if they are open.

    Args:
        check: receives the floating-point values and fp8 codes that are read.
    """
    files = files or {}
    if isinstance(entry, Pieces):
        return JoinedTensor(entry, files, check)
    if isinstance(entry, CodedEntry):
        return DecodedTensor(entry, files, check)
    return FileTensor(entry, files.get(entry.file), check)


@contextmanager
def stored_tensors(file: Path) -> Iterator[dict[str, FileTensor]]:
    """Yield the tensors of a safetensors file by name. They can be read inside the `with` block.

    Raise ModelError if the file is damaged.
    """
    entries = read_header(file)
    unreadable = []
    for entry in entries:
        if entry.dtype not in STORED:
            unreadable.append(f"{entry.name} ({entry.dtype})")
    if unreadable:
        what = name_tensors(unreadable, "of an unsupported dtype")
        raise ModelError(what, where=file)
    with open_uncached(file) as opened:
        yield {entry.name: FileTensor(entry, opened) for entry in entries}


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
    for name, tensor in _stored_state(model).items():
        # Do not read a tensor that a hook fills. The key of the hook is the name of the tensor, of
        # the parameter whose scales the tensor holds, or of the quantized module with the tensor.
        owners = (name, name.removesuffix(SCALES), name.rpartition(".")[0])
        if hooks.keys().isdisjoint(owners) and not skip(name):
            targets[name] = tensor
    headers = read_entries(folder)
    groups = _assign_entries(model, headers, targets, hooks, grow_from, str(folder))

    # Sort by file and position, so that disks read sequentially.
    def place(name: str) -> tuple[Path, int]:
        entry = groups[name][""]
        return entry.file, entry.start

    finite = FiniteCheck()
    with torch.no_grad(), ExitStack() as stack:
        files = {path: stack.enter_context(open_uncached(path)) for path in headers}
        plain = sorted(groups.keys() - hooks.keys(), key=place)
        # Hooks run last. They may be collective calls, so all ranks run them in the same order.
        for name in (*plain, *hooks):
            check = None
            # Check parameters only: a stored buffer, for example a mask, may contain infinity.
            if name in hooks or isinstance(targets[name], nn.Parameter):
                check = finite
            stored = {}
            for suffix, entry in groups[name].items():
                stored[suffix] = stored_tensor(entry, files, check)
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
    targets = {}
    for name, tensor in _stored_state(model).items():
        if name not in quantized:
            targets[name] = tensor
    groups = _assign_entries(
        model, read_entries(folder), targets, dict.fromkeys(quantized), grow_from, str(folder)
    )
    stored = {}
    for name, group in groups.items():
        stored[name] = {suffix: stored_tensor(entry) for suffix, entry in group.items()}
    return stored


def _stored_state(model: "PreTrainedModel") -> dict[str, Tensor]:
    """Return the parameters and the persistent buffers of a model.

    A tied tensor is returned under each of its names.
    """
    state = dict(model.named_parameters(remove_duplicate=False))
    # Persistent buffers are those in `state_dict`.
    persistent = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            state[name] = buffer
    return state


def _assign_entries(
    model: "PreTrainedModel",
    headers: Mapping[Path, Sequence[StoredEntry]],
    targets: Mapping[str, Tensor],
    hooks: Mapping[str, object],
    grow_from: int | None,
    where: str,
) -> StoredGroups:
    """Return the stored tensors of `targets` and `hooks`. Tensors of hooks can have companions.

    Tied tensors occur once. Raise ModelError if the checkpoint does not fit the model.
    """
    names = assign_names(model, headers, {*targets, *hooks}, hooks.keys())
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
    growing = {}
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if end is not None:
            # Use the id, because tied parameters have several names.
            for parameter in end.parameters(recurse=False):
                growing[id(parameter)] = grow_from
    _check_complete(groups, targets, hooks, names.unexpected, growing, where)
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
    if a.dtype not in STORED:
        return True  # `_check_complete` rejects the unsupported dtype
    a_bands = stored_tensor(a).bands()
    b_bands = stored_tensor(b).bands()
    bands = zip(a_bands, b_bands, strict=True)
    return all(torch.equal(a_band, b_band) for (_, a_band), (_, b_band) in bands)


def _check_complete(
    groups: StoredGroups,
    targets: Mapping[str, Tensor],
    hooks: Mapping[str, object],
    unexpected: list[str],
    growing: Mapping[int, int | None],
    where: str,
) -> None:
    """Raise ModelError unless the checkpoint has exactly the tensors of the model, in their shapes.

    Args:
        growing: maps the id of a parameter with one row per token to the number of rows that the
            checkpoint may have instead.
    """
    in_both = sorted(groups.keys() & targets.keys())
    covered = {id(targets[name]) for name in in_both}
    missing = []
    for name, target in targets.items():
        # A tied parameter is stored under only one of its names.
        if name not in groups and id(target) not in covered:
            missing.append(name)
    for name in hooks:
        if "" not in groups.get(name, {}):
            missing.append(name)
    _check_no_names(sorted(missing), "missing", where)
    _check_no_names(unexpected, "not part of this model", where)

    reshaped = []
    for name in in_both:
        entry = groups[name][""]
        shape = tuple(targets[name].shape)
        first_rows = growing.get(id(targets[name]))
        # The model has additional rows for added tokens, and the checkpoint has the rows of the
        # original tokenizer.
        grows = entry.shape == (first_rows, *shape[1:]) and shape > entry.shape
        if entry.shape != shape and not grows:
            reshaped.append(
                f"{name}: {list(entry.shape)} in {entry.file.name}, {list(shape)} in the model "
                "that config.json describes"
            )
    _check_no_names(reshaped, "with a different shape", where)

    unreadable = []
    for group in groups.values():
        for stored in group.values():
            entries = [stored]
            if isinstance(stored, Pieces):
                entries = [piece.entry for piece in stored.pieces]
            unreadable += [entry.name for entry in entries if entry.dtype not in STORED]
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


def name_tensors(names: Sequence[str], problem: str) -> str:
    """Return text for the user: the number of tensors with the problem, and the first names."""
    shown = ", ".join(names[:3])
    if len(names) > 3:
        shown += ", ..."
    return f"{count_of(len(names), 'tensor')} {problem}: {shown}"
