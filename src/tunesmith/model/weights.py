"""Load weights from safetensors files into a model's memory, tensor by tensor.

Peak memory is the model and one slice: a tensor whose target is on the CPU in the stored dtype is
read straight into it, any other goes through a buffer. The pages that were read are dropped at once
from the page cache, which on a machine with unified memory is the GPU's memory too.
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
from torch.distributed.tensor import DTensor

from tunesmith.distributed.ranks import ONE_PROCESS, Ranks
from tunesmith.distributed.torch_private import local_slices
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.errors import ModelError
from tunesmith.formats.as_shipped import not_finite
from tunesmith.formats.base import Format
from tunesmith.formats.registry import shipped_format
from tunesmith.host.memory import drop_pages, open_uncached
from tunesmith.model.names import Piece, Pieces, StoredGroups, assign_names
from tunesmith.model.safetensors_files import Entry, read_header, read_into
from tunesmith.model.shipped_entries import CodedEntry, StoredEntry, read_entries
from tunesmith.units import count_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # slow, and a plan needs none

STORED = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,  # scales: a power of two each
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
FP8_CODES = "F8_E4M3"  # read as bytes: 127 and 255 are NaN, and infinity has no code
MAX_READ_WEIGHTS = 1 << 20  # weights decoded at a time: they are in fp32 then
SLICE = 16 << 20  # bytes read at a time where a tensor is not read straight into its target
SCALES = "_scales"  # ends the name of a parameter that has the scales of the one before it


class StoredTensor:
    """A tensor of the checkpoint, not yet read: what a hook of `load_weights` gets.

    Shape and dtype as stored. Without an open file, or once that is closed, each read opens it.
    What is read is noted in `check`.

    Attributes:
        format: of a weight in codes; None: it is dense.
        codes: of a weight in codes, what is stored of its rows; scale: of all of it.
    """

    format: Format | None = None
    codes: Sequence["StoredTensor"] = ()

    def __init__(
        self, entry: Entry, file: BufferedReader | None = None, check: "FiniteCheck | None" = None
    ) -> None:
        self._entry = entry
        self._file = file
        self._check = check
        self.name = entry.name
        self.shape = torch.Size(entry.shape)
        self.dtype = torch.uint8 if entry.dtype == FP8_CODES else STORED[entry.dtype]

    def with_shape(self, shape: torch.Size) -> "StoredTensor":
        """The same elements in the same order, in another shape."""
        return StoredTensor(replace(self._entry, shape=tuple(shape)), self._file, self._check)

    @property
    def scale(self) -> torch.Tensor | None:
        return None

    def read(self) -> torch.Tensor:
        """The whole tensor, on the CPU, in its stored dtype."""
        return self[tuple(slice(0, size) for size in self.shape)]

    def into(self, target: torch.Tensor, begin: int = 0) -> None:
        """Read into `target` (contiguous) from element `begin` on, converting to its dtype and
        device.
        """
        if self._file is None or self._file.closed:
            with open_uncached(self._entry.file) as file:
                type(self)(self._entry, file, self._check).into(target, begin)
            return
        # Contiguous, as the argument says: one run of the file goes to one run of memory.
        flat = target.view(-1)
        itemsize = self.dtype.itemsize
        # Same device and dtype: read straight into the tensor's memory.
        if target.device.type == "cpu" and target.dtype == self.dtype:
            self._read(flat, begin * itemsize)
        else:
            # A buffer of at most SLICE bytes, or of what is read; converted on its way.
            buffer = torch.empty(min(len(flat), SLICE // itemsize), dtype=self.dtype)
            for start in range(0, len(flat), max(1, len(buffer))):
                piece = buffer[: len(flat) - start]
                self._read(piece, (begin + start) * itemsize)
                flat[start : start + len(piece)].copy_(piece)
        # What was read would stay in the page cache, which unified memory has for the GPU too.
        drop_pages(self._file.fileno(), self._entry.start, self._entry.size)
        if self._check is not None and len(flat):
            probe = self._probe(flat)
            if probe is not None:
                self._check.note(self._entry, probe)

    def _probe(self, flat: torch.Tensor) -> torch.Tensor | None:
        """Return a number, fp64 on the device of these values, that is finite only if all of them
        are. Return None for values that always are.
        """
        if self._entry.dtype == FP8_CODES:
            has_nan = (flat.view(torch.int8).max() == 127) | (flat.view(torch.uint8).max() == 255)
            return torch.where(has_nan, math.nan, 0.0).double()
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            return None
        low, high = torch.aminmax(flat)
        return low.double() + high.double()

    def pieces(self, rows: slice) -> Iterator[tuple[Piece, "StoredTensor"]]:
        """The pieces of a tensor that have some of these rows; none of one that is whole."""
        return iter(())

    def check_rows(self, codes: Sequence[torch.Tensor], more: str = "") -> None:
        """ModelError where a scale of some rows, as they are stored, is no number."""

    def into_part(self, target: torch.Tensor) -> None:
        """Read what this rank holds of `target`, which may be a DTensor and have more rows than are
        stored.
        """
        self._fill(local_part(target), local_slices(target))

    def __getitem__(self, slices: tuple[slice, ...]) -> torch.Tensor:
        """Read that part, on the CPU, in its stored dtype; nothing else is read.

        A slice of each dimension has both ends.
        """
        part = torch.empty([span.stop - span.start for span in slices], dtype=self.dtype)
        self._fill(part, slices)
        return part

    def _fill(self, local: torch.Tensor, slices: tuple[slice, ...]) -> None:
        if not slices:
            self.into(local)
            return
        rows, *columns = slices
        first = rows.start
        # `local` may have more rows than are stored: new tokens, filled by `_read_parameter`.
        last = min(rows.stop, self.shape[0])
        local = local[: max(last - first, 0)]
        # Whole rows are one run of the file; parts of rows are read as bands, and cut in memory.
        if columns == [slice(0, size) for size in self.shape[1:]]:
            self.into(local, first * math.prod(self.shape[1:]))
            return
        for start, band in self.bands(first, last):
            local_band = local[start - first : start - first + len(band)]
            local_band.copy_(band[(slice(None), *columns)])

    def bands(self, first: int = 0, last: int | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """The rows from `first` to before `last`, about SLICE bytes at a time.

        Yields the index of a band's first row, and its rows.
        """
        if last is None:
            last = self.shape[0]
        width = math.prod(self.shape[1:])
        # At least one row, however wide.
        step = max(1, SLICE // max(1, width * self.dtype.itemsize))
        for start in range(first, last, step):
            band = torch.empty(min(step, last - start), *self.shape[1:], dtype=self.dtype)
            self.into(band, start * width)
            yield start, band

    def _read(self, flat: torch.Tensor, offset: int) -> None:
        if flat.numel():
            assert self._file is not None  # `into` opens it
            # Bytes, whatever the dtype: numpy has no bf16.
            read_into(self._file, self._entry, flat.view(torch.uint8).numpy().data, offset)


class FiniteCheck:
    """Finds NaN and infinity in what is read, without waiting for the device that it goes to."""

    def __init__(self) -> None:
        self._probes: dict[torch.device, list[tuple[Entry, torch.Tensor]]] = {}

    def note(self, entry: Entry, probe: torch.Tensor) -> None:
        """Keep the number that tells of values that were read."""
        self._probes.setdefault(probe.device, []).append((entry, probe))

    def require_finite(self) -> None:
        """ModelError for a tensor with another value; the only wait for the devices."""
        for probes in self._probes.values():
            numbers = torch.stack([probe for _, probe in probes]).cpu()
            for i in (~numbers.isfinite()).nonzero().flatten().tolist():
                entry, _ = probes[i]
                raise ModelError(
                    f"{entry.name} has values that are not finite",
                    where=str(entry.file),
                    why="NaN or infinity in a weight makes every loss NaN: the file is damaged, or "
                    "the model was broken when it was saved",
                    fix="restore the file from a copy, or fetch the model again: "
                    "tunesmith fetch MODEL",
                )


class TensorOfParts(StoredTensor):
    """A tensor that is made of several stored ones, by `_fill`."""

    def into(self, target: torch.Tensor, begin: int = 0) -> None:
        """Read whole rows as `StoredTensor.into` does."""
        width = math.prod(self.shape[1:])
        first = begin // width
        rows = slice(first, first + target.numel() // width)
        columns = (slice(0, size) for size in self.shape[1:])
        self._fill(target.view(-1, *self.shape[1:]), (rows, *columns))


class JoinedTensor(TensorOfParts):
    """A tensor of the model that is stored in pieces, read as one; in memory there is a piece of
    it, or SLICE bytes of one that is read into a tensor of another type.
    """

    def __init__(
        self,
        pieces: Pieces,
        files: Mapping[Path, BufferedReader],
        check: FiniteCheck | None = None,
    ) -> None:
        self.name = pieces.name
        self.shape = torch.Size(pieces.shape)
        self.dtype = STORED[pieces.dtype]
        self._pieces = []
        for piece in pieces.pieces:
            self._pieces.append((piece, stored_tensor(piece.entry, files, check)))

    def pieces(self, rows: slice) -> Iterator[tuple[Piece, StoredTensor]]:
        """The pieces that have some of these rows, with what is stored of each."""
        for piece, stored in self._pieces:
            region = piece.region[0]
            if region.start < rows.stop and rows.start < region.stop:
                yield piece, stored

    def _fill(self, local: torch.Tensor, slices: tuple[slice, ...]) -> None:
        for piece, stored in self.pieces(slices[0]):
            in_local = []
            in_piece = []
            # Where a piece's region and the local slice overlap, counted from each of their starts.
            for local_slice, region in zip(slices, piece.region, strict=True):
                start = max(local_slice.start, region.start)
                stop = min(local_slice.stop, region.stop)
                in_local.append(slice(start - local_slice.start, stop - local_slice.start))
                in_piece.append(slice(start - region.start, stop - region.start))
            # No overlap: nothing of this piece is read.
            if any(span.stop <= span.start for span in in_local):
                continue
            target = local[tuple(in_local)]
            # A piece of a stack is stored without the stack's dimension.
            if piece.stacked:
                target = target.squeeze(0)
                in_piece = in_piece[1:]
            # All of it, in one run: without a buffer.
            if target.shape == stored.shape and target.is_contiguous():
                stored.into(target)
            else:
                target.copy_(stored[tuple(in_piece)])


class DecodedTensor(TensorOfParts):
    """A weight that is stored as codes and scales, read dense: fp32 values that are codes times
    scales, a piece at a time.
    """

    def __init__(
        self,
        entry: CodedEntry,
        files: Mapping[Path, BufferedReader],
        check: FiniteCheck | None = None,
    ) -> None:
        self.name = entry.name
        self.shape = torch.Size(entry.shape)
        self.dtype = STORED[entry.dtype]
        self.shipped = shipped_format(entry.form)
        self.format = self.shipped
        first, *others = entry.codes
        self.codes = [stored_tensor(first, files, check)]
        self.codes += [stored_tensor(part, files) for part in others]
        self._scale = None if entry.scale is None else stored_tensor(entry.scale, files)

    @cached_property
    def scale(self) -> torch.Tensor | None:
        """Read the scale of the whole weight; ModelError where one is no finite number."""
        if self._scale is None:
            return None
        return self.shipped.read_scale(self._scale, self.name)

    def check_rows(self, codes: Sequence[torch.Tensor], more: str = "") -> None:
        """ModelError where a scale of some rows, as they are stored, is no number."""
        if self.shipped.has_nan_scale(codes):
            raise not_finite(self.name, self.name if more else self.codes[-1].name, more)

    def _fill(self, local: torch.Tensor, slices: tuple[slice, ...]) -> None:
        if len(slices) == 2:
            self._fill_matrix(local, *slices)
            return
        experts, rows, columns = slices
        if self.shipped.is_output_major:
            # The codes of an expert are [out, in], and its dense weight is [in, out].
            local, rows, columns = local.mT, columns, rows
        for expert in range(experts.start, min(experts.stop, self.shape[0])):
            self._fill_matrix(local[expert - experts.start], rows, columns, expert)

    def _fill_matrix(
        self, local: torch.Tensor, rows: slice, columns: slice, expert: int | None = None
    ) -> None:
        """Read rows and columns of a matrix, a piece at a time."""
        more = "" if expert is None else f": that of expert {expert}"
        last = min(rows.stop, self.codes[0].shape[0 if expert is None else 1])
        step = max(1, MAX_READ_WEIGHTS // self.shape[1])
        scale = self.scale
        if scale is not None and expert is not None:
            scale = scale[expert]
        for first in range(rows.start, last, step):
            end = min(first + step, last)
            codes = [_rows_of(stored, slice(first, end), expert) for stored in self.codes]
            self.check_rows(codes, more)
            values = self.shipped.decode_rows(codes, scale, first)
            local[first - rows.start : end - rows.start].copy_(values[:, columns])


def _rows_of(stored: StoredTensor, rows: slice, expert: int | None) -> torch.Tensor:
    """Rows of a matrix, or of an expert's in a stack."""
    if expert is None:
        return stored[(rows, *(slice(0, size) for size in stored.shape[1:]))]
    others = (slice(0, size) for size in stored.shape[2:])
    return stored[(slice(expert, expert + 1), rows, *others)][0]


def stored_tensor(
    entry: StoredEntry | Pieces,
    files: Mapping[Path, BufferedReader] | None = None,
    check: FiniteCheck | None = None,
) -> StoredTensor:
    """Return what is stored of a parameter, to be read from those of its files that are open.

    `check` gets what is read of floating-point values and of FP8 codes.
    """
    files = files or {}
    if isinstance(entry, Pieces):
        return JoinedTensor(entry, files, check)
    if isinstance(entry, CodedEntry):
        return DecodedTensor(entry, files, check)
    return StoredTensor(entry, files.get(entry.file), check)


@contextmanager
def stored_tensors(file: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors of a safetensors file by their names, to be read in the block; ModelError where
    it is damaged.
    """
    entries = read_header(file)
    unreadable = [f"{entry.name} ({entry.dtype})" for entry in entries if entry.dtype not in STORED]
    if unreadable:
        what = f"{count_of(len(unreadable), 'tensor')} of an unsupported dtype: {unreadable[0]}"
        raise ModelError(what, where=str(file))
    with open_uncached(file) as opened:
        yield {entry.name: StoredTensor(entry, opened) for entry in entries}


# Takes what a checkpoint holds of a parameter, by suffix; a weight that was drawn is a plain
# tensor.
Hook = Callable[[Mapping[str, StoredTensor | torch.Tensor]], None]


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
        model: every parameter has its memory.
        skip: names of parameters that the checkpoint does not hold (an adapter's own).
        convert: parameter name -> hook that takes the stored tensor under "" and its companions (a
            stored `weight.absmax` belongs to `weight`) under their suffixes, in place of a plain
            read. They run in their own order, as they may be collective and each node's files may
            be split otherwise.
        grow_from: embedding and head may have so many rows in the checkpoint and more in the model,
            where tokens were added; the further rows become the mean of the stored ones. None: as
            many in both.
        ranks: those that load together: an error in what one of them reads is raised on all.

    ModelError where tensors are missing, unexpected or of another shape (it lists a few), a file
    is damaged, or a weight is not finite.
    """
    hooks = dict(convert or {})
    targets = {}
    for name, tensor in _stored_state(model).items():
        # A hook takes its parameter with its scales, or all of a module in a parameter's place.
        owners = (name, name.removesuffix(SCALES), name.rpartition(".")[0])
        is_hooked = any(owner in hooks for owner in owners)
        if not is_hooked and not skip(name):
            targets[name] = tensor
    headers = read_entries(folder)
    groups = _assign_entries(model, headers, targets, hooks, grow_from, str(folder))

    # In the order of the files and of their bytes, so that disks read forward.
    def place(name: str) -> tuple[Path, int]:
        entry = groups[name][""]
        return entry.file, entry.start

    finite = FiniteCheck()
    with torch.no_grad(), ExitStack() as stack:
        files = {path: stack.enter_context(open_uncached(path)) for path in headers}
        # Hooks last, in their own order: see `convert`.
        for name in (*sorted(groups.keys() - hooks.keys(), key=place), *hooks):
            # A mask that is stored may have infinity in it.
            is_weight = name in hooks or isinstance(targets[name], torch.nn.Parameter)
            stored = {}
            for suffix, entry in groups[name].items():
                stored[suffix] = stored_tensor(entry, files, finite if is_weight else None)
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
    quantized: Collection[str] = (),
    grow_from: int | None = None,
) -> dict[str, dict[str, StoredTensor]]:
    """Find what a folder's safetensors files hold of each tensor of a model, which may be on meta.

    A tensor itself goes under "", the companions that those of `quantized` may have under their
    suffixes; tied ones are there once. `grow_from` and ModelError as in `load_weights`.
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


def _stored_state(model: "PreTrainedModel") -> dict[str, torch.Tensor]:
    """The parameters of a model and the buffers that its checkpoints hold; tied ones by each of
    their names.
    """
    state = dict(model.named_parameters(remove_duplicate=False))
    # Buffers that a checkpoint holds: those that `state_dict` names.
    persistent = model.state_dict(keep_vars=True).keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            state[name] = buffer
    return state


def _assign_entries(
    model: "PreTrainedModel",
    headers: Mapping[Path, Sequence[StoredEntry]],
    targets: Mapping[str, torch.Tensor],
    hooks: Mapping[str, object],
    grow_from: int | None,
    where: str,
) -> StoredGroups:
    """Which stored tensors are those of `targets` and, with their companions, of `hooks`.

    Tied ones are there once. ModelError where what is stored is not this model.
    """
    names = assign_names(model, headers, {*targets, *hooks}, hooks.keys())
    groups = names.groups
    drop_tied_copies(groups, targets, where)
    growing: dict[int, int | None] = {}
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if end is not None:
            # By identity: tied parameters have several names.
            for parameter in end.parameters(recurse=False):
                growing[id(parameter)] = grow_from
    _check_complete(groups, targets, hooks, names.unexpected, growing, where)
    return groups


def _read_parameter(stored: StoredTensor, target: torch.Tensor) -> None:
    """Read a tensor into its parameter; further rows of an embedding or head become the mean of the
    stored ones.

    An untrained row then neither dominates the softmax nor is out of distribution (Hewitt, 2021,
    "Initializing new word embeddings for pretrained language models"); without noise it is the same
    on every machine.
    """
    stored.into_part(target)
    if target.shape == stored.shape:
        return
    rows, *columns = local_slices(target)
    stored_rows = stored.shape[0]
    # Of this rank's rows those past the stored ones; a rank may have none.
    new_rows = local_part(target)[max(stored_rows - rows.start, 0) :]
    if len(new_rows):
        # In fp32 and band by band: the embedding is never whole in memory.
        sums = [band.sum(dim=0, dtype=torch.float32) for _, band in stored.bands()]
        mean = torch.stack(sums).sum(dim=0) / stored_rows
        new_rows.copy_(mean[tuple(columns)])


def copy_whole(target: torch.Tensor, whole: torch.Tensor) -> None:
    """Copy a whole tensor into its parameter, of which this rank may hold a part only."""
    if isinstance(target, DTensor):
        whole = whole[local_slices(target)]
    local_part(target).copy_(whole)


def drop_tied_copies(
    groups: StoredGroups,
    targets: Mapping[str, torch.Tensor],
    where: str,
) -> None:
    """Leave one of the names that share a parameter; two in a checkpoint must be equal."""
    first_names: dict[int, str] = {}
    for name in sorted(groups.keys() & targets.keys()):
        # Sorted, so that the name that stays is the same wherever it is decided.
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


def _equal(a: StoredEntry | Pieces, b: StoredEntry | Pieces) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if isinstance(a, Pieces) or isinstance(b, Pieces):
        return False  # an embedding and a head are single tensors
    if a.dtype not in STORED:
        return True  # `_check_complete` refuses the one that stays
    bands = zip(stored_tensor(a).bands(), stored_tensor(b).bands(), strict=True)
    return all(torch.equal(a_band, b_band) for (_, a_band), (_, b_band) in bands)


def _check_complete(
    groups: StoredGroups,
    targets: Mapping[str, torch.Tensor],
    hooks: Mapping[str, object],
    unexpected: list[str],
    growing: Mapping[int, int | None],
    where: str,
) -> None:
    """Raise ModelError unless the checkpoint holds every tensor of the model, in its shape, and no
    other.

    `growing`: id of each parameter with one row per token -> the rows that it may have in the
    checkpoint, if it has fewer.
    """
    covered = {id(targets[name]) for name in groups if name in targets}
    missing = []
    for name, target in targets.items():
        # A tied parameter is there under one of its names.
        if name not in groups and id(target) not in covered:
            missing.append(name)
    missing += [name for name in hooks if "" not in groups.get(name, {})]
    _check_no_names(sorted(missing), "missing", where)
    _check_no_names(unexpected, "not part of this model", where)

    reshaped = []
    for name in sorted(groups.keys() & targets.keys()):
        entry = groups[name][""]
        shape = tuple(targets[name].shape)
        first_rows = growing.get(id(targets[name]))
        # More rows in the model, and as many stored as the tokenizer had before.
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
            entries = (
                [piece.entry for piece in stored.pieces] if isinstance(stored, Pieces) else [stored]
            )
            unreadable += [entry.name for entry in entries if entry.dtype not in STORED]
    _check_no_names(unreadable, "of an unsupported dtype", where)


def _check_no_names(names: Sequence[str], problem: str, where: str) -> None:
    """ModelError that says the problem and some of the names, if there are any."""
    if not names:
        return
    shown = ", ".join(names[:3])
    if len(names) > 3:
        shown += ", ..."
    fix = "fetch the model again, or correct config.json"
    if any("bitsandbytes__" in name for name in names):
        fix = "set model.quantize: nf4"
    raise ModelError(
        f"{count_of(len(names), 'tensor')} {problem}: {shown}",
        where=where,
        why="the weights and config.json do not describe the same model",
        fix=fix,
    )
