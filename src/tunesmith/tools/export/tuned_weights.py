"""The weights that a run has trained, parameter by parameter, read from the disk at their use.

    rows first:last  =  rows of the base  +  scaling * B[first:last] A          in fp32

The base's values are those that training computed with: rounded to the recipe's dtype, and for nf4
quantized and dequantized. Nothing is in memory but what a caller uses; of a base in nf4, one
matrix.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.adapter.expert_lora import expert_updates
from tunesmith.adapter.lora import copy_saved_modules, loras, saved_parameters
from tunesmith.adapter.peft_files import stored_adapter
from tunesmith.build_model import build_unchanged, define_model
from tunesmith.checkpoint.contents import weights_of
from tunesmith.checkpoint.sharded import ShardedTensors, is_sharded
from tunesmith.formats.linear import FrozenLinear, has_codes
from tunesmith.formats.stack import ExpertStack
from tunesmith.inference.load_run import OpenedRun
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.experts import LORA_SUFFIX
from tunesmith.model.weights import StoredTensor, find_stored
from tunesmith.quant.linear_layers import set_bypassed

BAND = 16 << 20  # bytes of a band in fp32


class RowSource(Protocol):
    """A tensor whose rows can be read: of one dimension, its elements; of none, itself."""

    @property
    def shape(self) -> torch.Size: ...

    def rows(self, first: int, last: int) -> Tensor:
        """The rows from `first` to before `last`: fp32, on the CPU, a new tensor."""


@dataclass(frozen=True)
class StoredRows:
    """A tensor of a safetensors file.

    Attributes:
        dtype: that training computed with.
        shape: it may have more rows than are stored, for added tokens: the mean of the others.
    """

    stored: StoredTensor
    dtype: torch.dtype
    shape: torch.Size

    def rows(self, first: int, last: int) -> Tensor:
        if not self.shape:
            # A scalar has no rows.
            return self._rounded(self.stored.read())
        columns = [slice(0, size) for size in self.shape[1:]]
        stored_rows = self.stored.shape[0]
        # Rows beyond the stored ones are those of added tokens, which begin as the mean.
        end = max(first, min(last, stored_rows))
        part = self._rounded(self.stored[(slice(first, end), *columns)])
        if last <= stored_rows:
            return part
        added = self._mean.expand(last - max(first, stored_rows), *self.shape[1:])
        return torch.cat([part, added])

    def _rounded(self, values: Tensor) -> Tensor:
        return values.to(self.dtype).float() if values.is_floating_point() else values

    @cached_property
    def _mean(self) -> Tensor:
        sums = [band.sum(dim=0, dtype=torch.float32) for _, band in self.stored.bands()]
        return self._rounded(torch.stack(sums).sum(dim=0) / self.stored.shape[0])


class LastRead:
    """The one tensor that is in memory whole, of those of a model that cannot be read in bands."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: WholeRows | None = None
        self._values = torch.empty(0)

    def values(self, owner: "WholeRows") -> Tensor:
        with self._lock:
            if self._owner is not owner:
                self._values = torch.empty(0)
                self._values = owner.read()
                self._owner = owner
            return self._values


@dataclass(frozen=True, eq=False)
class WholeRows:
    """A tensor that is read as a whole: the first band of it takes as long as all.

    Attributes:
        read: all of it, in the dtype that training computed with.
    """

    shape: torch.Size
    read: Callable[[], Tensor]
    last_read: LastRead

    def rows(self, first: int, last: int) -> Tensor:
        values = self.last_read.values(self)
        rows = values[first:last] if values.ndim else values
        return rows.float() if rows.is_floating_point() else rows


@dataclass(frozen=True)
class QuantizedExperts:
    """A stack of experts in nf4, dequantized a few experts at a time.

    Attributes:
        layer: on meta; it says how the stack is quantized.
        stored: the dense stack.
    """

    layer: ExpertStack
    stored: StoredTensor

    @property
    def shape(self) -> torch.Size:
        return self.layer.stored_shape

    def rows(self, first: int, last: int) -> Tensor:
        return self.layer.rounded(self.stored, first, last).float()


def _read_quantized(layer: FrozenLinear, stored: Mapping[str, StoredTensor], name: str) -> Tensor:
    """The weight of a quantized layer on meta, dequantized.

    stored: the weight under "", and its scales where the checkpoint is quantized already.
    """
    try:
        layer.allocate(torch.device("cpu"))
        layer.load(stored, name)
        return layer.dense()
    finally:
        layer.allocate(torch.device("meta"))


def _read_sharded(tensors: ShardedTensors, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor of a checkpoint of several ranks."""
    values = tensors.read(name)
    return values.to(dtype) if values.is_floating_point() else values


@dataclass(frozen=True)
class LoraUpdate:
    """The update that an adapter adds to a weight: scaling * B A.

    Attributes:
        lora_A: fp32 [rank, in_features]; lora_B: fp32 [out_features, rank], both not yet read.
    """

    lora_A: StoredTensor
    lora_B: StoredTensor
    scaling: float

    def rows(self, first: int, last: int) -> Tensor:
        """fp32 [last - first, in_features]."""
        rank = self.lora_B.shape[1]
        lora_B = self.lora_B[(slice(first, last), slice(0, rank))]
        return self.scaling * (lora_B.float() @ self.lora_A.read().float())


@dataclass(frozen=True)
class ExpertsUpdate:
    """The update that an adapter adds to a stack of experts, whose rows are experts.

    Attributes:
        lora_A, lora_B: as `ExpertsLora` has them, not yet read.
        experts: of the stack.
        is_transposed: as `ExpertsLora` has it.
    """

    lora_A: StoredTensor
    lora_B: StoredTensor
    scaling: float
    experts: int
    is_transposed: bool

    def rows(self, first: int, last: int) -> Tensor:
        """fp32, in the shape of the stack, of the experts from `first` to before `last`."""
        rank = self.lora_A.shape[0] // self.experts
        width = self.lora_A.shape[1]
        lora_A = self.lora_A[(slice(first * rank, last * rank), slice(0, width))]
        lora_A = lora_A.float().unflatten(0, (last - first, rank))
        # The experts are its last dimension: not in one piece.
        lora_B = self.lora_B.read().permute(2, 0, 1)
        update = self.scaling * (lora_B[first:last].float() @ lora_A)
        return update.mT if self.is_transposed else update


@dataclass(frozen=True)
class TunedWeight:
    """A parameter, or a buffer of the checkpoint, as training left it.

    Attributes:
        base: before training; None where a whole model was trained, whose base is another folder.
        source: `base`, or what was trained in its place.
        update: of the adapter on it.
    """

    base: RowSource | None
    source: RowSource
    update: LoraUpdate | ExpertsUpdate | None = None

    @property
    def shape(self) -> torch.Size:
        return self.source.shape

    def rows(self, first: int, last: int) -> Tensor:
        """The rows from `first` to before `last`: fp32, on the CPU."""
        rows = self.source.rows(first, last)
        return rows + self.update.rows(first, last) if self.update else rows

    def bands(self) -> Iterator[slice]:
        """All rows, some BAND bytes at a time."""
        return row_bands(self.shape)


def row_bands(shape: torch.Size, span: slice | None = None) -> Iterator[slice]:
    """The rows of `span`, or all, some BAND bytes at a time in fp32."""
    span = span or slice(0, shape[0] if shape else 1)
    width = shape[1:].numel()
    step = max(1, BAND // (4 * max(1, width)))
    for first in range(span.start, span.stop, step):
        yield slice(first, min(first + step, span.stop))


@dataclass(frozen=True)
class TunedModel(OpenedRun):
    """A run whose weights stay on the disk until they are used.

    Attributes:
        model: Transformers' own, on meta, in the recipe's dtype and with as many rows in its
            embedding as training had; not tied any more where training changed one of two tied
            matrices.
        weights: by the names of `model`; tied ones once, as the embedding.
    """

    model: PreTrainedModel
    weights: dict[str, TunedWeight]


def open_tuned_model(read: OpenedRun) -> TunedModel:
    """Find where every parameter of a run's model lies.

    ModelError where base, adapter and recipe do not fit each other.
    """
    run, files = read.recipe, read.files
    model = build_unchanged(run, files)
    set_bypassed(model, files.support.dead_targets)
    if is_sharded(files.folder):
        # Parts of several ranks hold the trained model alone: the base is not needed.
        parts = _sharded_rows(model, ShardedTensors(files.folder))
        weights = {name: TunedWeight(None, rows) for name, rows in parts}
        return TunedModel(**vars(read), model=model, weights=weights)
    trained = define_model(run, files)
    rows_of = _stored_rows(model, trained, read)
    if read.location.holds == "full":
        weights = {name: TunedWeight(None, rows) for name, rows in rows_of.items()}
    elif run.adapter.kind == "none":
        weights = {name: TunedWeight(rows, rows) for name, rows in rows_of.items()}
    else:
        copy_saved_modules(trained, run.adapter)
        weights = _adapted_weights(model, trained, read, rows_of)
    return TunedModel(**vars(read), model=model, weights=weights)


def _sharded_rows(
    model: PreTrainedModel, tensors: ShardedTensors
) -> Iterator[tuple[str, RowSource]]:
    """The parameters of a checkpoint of several ranks, by the names of `weights_of`."""
    last_read = LastRead()
    for name, shape in weights_of(model).items():
        read_all = partial(_read_sharded, tensors, name, shape.dtype)
        yield name, WholeRows(shape.shape, read_all, last_read)


def _stored_rows(
    model: PreTrainedModel, trained: nn.Module, read: OpenedRun
) -> dict[str, RowSource]:
    """The parameters of the base, or of a model trained in full, by the names of `weights_of`."""
    run, files = read.recipe, read.files
    frozen = {}
    stacks = {}
    for name, layer in trained.named_modules():
        if isinstance(layer, FrozenLinear) and has_codes(layer):
            frozen[f"{name}.weight"] = layer
        elif isinstance(layer, ExpertStack) and layer.format.rounds:
            stacks[name] = layer
    grow_from = int(files.config.vocab_size) if run.model.added_tokens else None
    stored = find_stored(model, files.folder, quantized=frozen, grow_from=grow_from)
    shapes = weights_of(model)
    tied = tied_names(model)
    last_read = LastRead()
    sources: dict[str, RowSource] = {}
    for stored_name, parts in stored.items():
        name = tied.get(stored_name, stored_name)
        # An nf4 or fp8 base is rounded as it was in training: the adapter was trained on that.
        if name in frozen:
            read_all = partial(_read_quantized, frozen[name], parts, name)
            sources[name] = WholeRows(shapes[name].shape, read_all, last_read)
        elif name in stacks:
            sources[name] = QuantizedExperts(stacks[name], parts[""])
        else:
            sources[name] = StoredRows(parts[""], shapes[name].dtype, shapes[name].shape)
    return sources


def tied_names(model: nn.Module) -> dict[str, str]:
    """Name of a tied parameter -> the name that `weights_of` has for it."""
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first_names[id(parameter)] != name:
            tied[name] = first_names[id(parameter)]
    return tied


@torch.no_grad()
def _adapted_weights(
    model: PreTrainedModel, trained: nn.Module, read: OpenedRun, sources: Mapping[str, RowSource]
) -> dict[str, TunedWeight]:
    """The parameters of `model` with the adapter of `trained`; where that changes one of two tied
    ones, they are no longer tied in `model`.
    """
    folder = read.location.folder
    assert folder is not None  # an adapter has one
    tied = tied_names(model)
    dtype = DTYPES[read.recipe.model.dtype]

    # PEFT also stores a copy of a frozen head or embedding: it is no change.
    def is_base(name: str, stored: StoredTensor) -> bool:
        return _equal(StoredRows(stored, dtype, stored.shape), sources[tied.get(name, name)])

    with stored_adapter(trained, folder, is_base) as stored:
        updates: dict[str, LoraUpdate | ExpertsUpdate] = {}
        for name, layer in loras(trained):
            lora_A, lora_B = stored[f"{name}.lora_A"], stored[f"{name}.lora_B"]
            updates[f"{name}.weight"] = LoraUpdate(lora_A, lora_B, layer.scaling)
        for name, update in expert_updates(trained):
            updates[name] = ExpertsUpdate(
                stored[f"{name}{LORA_SUFFIX}.lora_A"],
                stored[f"{name}{LORA_SUFFIX}.lora_B"],
                update.scaling,
                experts=update.shape[0],
                is_transposed=update.is_transposed,
            )
        replaced = {}
        for module, _, key in saved_parameters(trained):
            name = f"{module}.{key}"
            trained_dtype = trained.get_parameter(name).dtype
            replaced[name] = StoredRows(stored[name], trained_dtype, stored[name].shape)
    names = list(sources)
    changed = {*updates, *replaced}
    for name, first_name in tied.items():
        # A change of one of two tied weights makes them two.
        if name in changed or first_name in changed:
            names.append(name)
            _untie(model, name)
    weights = {}
    for name in names:
        base = sources[tied.get(name, name)]
        weights[name] = TunedWeight(base, replaced.get(name, base), updates.get(name))
    return weights


def _equal(a: RowSource, b: RowSource) -> bool:
    if a.shape != b.shape:
        return False
    for band in row_bands(a.shape):
        if not torch.equal(a.rows(band.start, band.stop), b.rows(band.start, band.stop)):
            return False
    return True


def _untie(model: PreTrainedModel, name: str) -> None:
    """Give a model on meta a parameter of its own in the place of a tied one."""
    module, _, key = name.rpartition(".")
    owner = model.get_submodule(module)
    owner.register_parameter(key, nn.Parameter(owner.get_parameter(key).detach().clone()))
    model.config.tie_word_embeddings = False
