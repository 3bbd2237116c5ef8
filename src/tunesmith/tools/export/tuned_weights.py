"""Trained weights of a run. Each parameter reads its rows from disk when they are used.

    rows first:last  =  rows of the base  +  scaling * B[first:last] A          in fp32

The rows of the base have the same values as in training: they are rounded to the recipe's dtype. If
the base is quantized to nf4 in training, they are quantized and dequantized. Only the requested
rows are in memory. With an nf4 base, one entire matrix is in memory.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.adapter.expert_lora import expert_updates
from tunesmith.adapter.lora import copy_saved_modules, loras, saved_parameters
from tunesmith.adapter.peft_files import stored_adapter
from tunesmith.answers.load_run import OpenedRun
from tunesmith.build_model import build_unchanged, define_model
from tunesmith.checkpoint.contents import weights_of
from tunesmith.checkpoint.sharded import ShardedTensors, is_sharded
from tunesmith.formats.linear import FrozenLinear, has_codes
from tunesmith.formats.stack import ExpertStack
from tunesmith.formats.stored import StoredTensor
from tunesmith.model.known.dtypes import DTYPES
from tunesmith.model.layers.experts import LORA_SUFFIX
from tunesmith.model.weights.save_tensors import Read, Source
from tunesmith.model.weights.stored_form import in_stored_form
from tunesmith.model.weights.weights import find_stored
from tunesmith.quant.linear_layers import set_bypassed

BAND = 16 << 20  # maximum size of a band of rows in fp32, in bytes


class RowSource(Protocol):
    """Tensor whose rows can be read. The rows of a 1-D tensor are its elements.

    For a scalar, any range of rows gives the scalar.
    """

    @property
    def shape(self) -> torch.Size: ...

    def rows(self, first: int, last: int) -> Tensor:
        """Return the rows [first:last] as a new fp32 tensor on the CPU."""


@dataclass(frozen=True)
class StoredRows:
    """Rows of a tensor in a safetensors file.

    Attributes:
        dtype: the dtype that training computed with.
        shape: the shape in training. If tokens were added, an embedding has more rows than the
            file. Each additional row is the mean of the stored rows.
    """

    stored: StoredTensor
    dtype: torch.dtype
    shape: torch.Size

    def rows(self, first: int, last: int) -> Tensor:
        if not self.shape:
            # A scalar has no rows, so return the scalar.
            return self._rounded(self.stored.read())
        columns = [slice(0, size) for size in self.shape[1:]]
        stored_rows = self.stored.shape[0]
        # Rows after the last stored row belong to added tokens. They are initialized with the mean
        # of the stored rows.
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


class TensorCache:
    """Cache for one tensor: the last tensor that had to be read entirely, not row by row."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: WholeRows | None = None
        self._values = torch.empty(0)

    def values(self, owner: "WholeRows") -> Tensor:
        with self._lock:
            if self._owner is not owner:
                self._values = torch.empty(0)  # free the previous tensor first
                self._values = owner.read()
                self._owner = owner
            return self._values


@dataclass(frozen=True, eq=False)
class WholeRows:
    """Rows of a tensor that can only be read entirely, so one band takes as long as all rows.

    Attributes:
        read: function that reads the entire tensor, in the dtype that training computed with.
        cache: the cache in which the tensor is stored. If several tensors share a cache, only the
            last one is in memory.
    """

    shape: torch.Size
    read: Callable[[], Tensor]
    cache: TensorCache = field(default_factory=TensorCache)

    def rows(self, first: int, last: int) -> Tensor:
        values = self.cache.values(self)
        rows = values[first:last] if values.ndim else values
        return rows.float() if rows.is_floating_point() else rows


@dataclass(frozen=True)
class QuantizedExperts:
    """Stack of experts that is quantized in training, for example to nf4.

    Each read loads the requested experts, quantizes and dequantizes them.

    Attributes:
        layer: the quantized stack on meta, which defines the storage format.
        stored: the unquantized stack in the checkpoint.
    """

    layer: ExpertStack
    stored: StoredTensor

    @property
    def shape(self) -> torch.Size:
        return self.layer.stored_shape

    def rows(self, first: int, last: int) -> Tensor:
        return self.layer.rounded(self.stored, first, last).float()


def _read_quantized(layer: FrozenLinear, stored: Mapping[str, StoredTensor], name: str) -> Tensor:
    """Load the weight of a quantized layer, and return the dequantized weight. `layer` is on meta.

    Args:
        stored: the stored tensors of the layer. The key "" has the weight. If the checkpoint is
            quantized, further keys have the scales.
    """
    try:
        layer.allocate(torch.device("cpu"))
        layer.load(stored, name)
        return layer.dense()
    finally:
        layer.allocate(torch.device("meta"))


def _read_sharded(tensors: ShardedTensors, name: str, dtype: torch.dtype) -> Tensor:
    """Read an entire tensor from a checkpoint that several ranks saved."""
    values = tensors.read(name)
    return values.to(dtype) if values.is_floating_point() else values


@dataclass(frozen=True)
class LoraUpdate:
    """Update that an adapter adds to a weight: scaling * B A.

    Attributes:
        lora_A: fp32 [rank, in_features], read from the file when it is used.
        lora_B: fp32 [out_features, rank], read from the file when it is used.
    """

    lora_A: StoredTensor
    lora_B: StoredTensor
    scaling: float

    def rows(self, first: int, last: int) -> Tensor:
        """Return rows [first:last] of the update: fp32 [last - first, in_features]."""
        rank = self.lora_B.shape[1]
        lora_B = self.lora_B[(slice(first, last), slice(0, rank))]
        return self.scaling * (lora_B.float() @ self.lora_A.read().float())


@dataclass(frozen=True)
class ExpertsUpdate:
    """Update that an adapter adds to a stack of experts. A row of the stack is one expert.

    Attributes:
        lora_A, lora_B: in the shapes of `ExpertsLora`, read from the file when they are used.
        experts: number of experts in the stack.
        is_transposed: as in `ExpertsLora`: whether B A is the transpose of the stored weight.
    """

    lora_A: StoredTensor
    lora_B: StoredTensor
    scaling: float
    experts: int
    is_transposed: bool

    def rows(self, first: int, last: int) -> Tensor:
        """Return the update of the experts [first:last]: fp32, in the layout of the stack."""
        rank = self.lora_A.shape[0] // self.experts
        width = self.lora_A.shape[1]
        lora_A = self.lora_A[(slice(first * rank, last * rank), slice(0, width))]
        lora_A = lora_A.float().unflatten(0, (last - first, rank))
        # The last dimension of lora_B is the expert. The data of one expert is not contiguous in
        # the file, so read the entire tensor.
        lora_B = self.lora_B.read().permute(2, 0, 1)
        update = self.scaling * (lora_B[first:last].float() @ lora_A)
        return update.mT if self.is_transposed else update


@dataclass(frozen=True)
class TunedWeight:
    """Trained value of a parameter, or of a buffer that the checkpoint stores.

    Attributes:
        base: the value before training; None after full fine-tuning, because the run does not
            contain the base model.
        source: the trained weight if the entire weight was trained, otherwise `base`.
        update: the update that the adapter adds to `source`; None if there is no update.
    """

    base: RowSource | None
    source: RowSource
    update: LoraUpdate | ExpertsUpdate | None = None

    @property
    def shape(self) -> torch.Size:
        return self.source.shape

    def rows(self, first: int, last: int) -> Tensor:
        """Return the trained rows [first:last]: fp32, on the CPU."""
        rows = self.source.rows(first, last)
        return rows + self.update.rows(first, last) if self.update else rows

    def bands(self) -> Iterator[slice]:
        """Yield slices of at most BAND bytes that together cover all rows."""
        return row_bands(self.shape)


def row_bands(shape: torch.Size, span: slice | None = None) -> Iterator[slice]:
    """Yield slices of at most BAND bytes in fp32 that cover the rows of `span`, or all rows."""
    span = span or slice(0, shape[0] if shape else 1)
    width = shape[1:].numel()
    step = max(1, BAND // (4 * max(1, width)))
    for first in range(span.start, span.stop, step):
        yield slice(first, min(first + step, span.stop))


@dataclass(frozen=True)
class TunedModel(OpenedRun):
    """Opened run with its trained model, whose weights are read from disk when they are used.

    Attributes:
        model: the Transformers model on meta, in the recipe's dtype and with the embedding rows of
            training. If training changed only one of two tied matrices, they are untied here.
        weights: the weights by the parameter names of `model`. Tied weights occur once, under the
            name of the embedding.
    """

    model: PreTrainedModel
    weights: dict[str, TunedWeight]


def stored_sources(tuned: TunedModel, dtype: torch.dtype) -> tuple[dict[str, Source], Read]:
    """Return the trained tensors in the form in which the base model's files store them.

    Also return the function that reads their rows, see `save_tensors`. The tensors are on meta:
    the parameters in `dtype`, the buffers in their own dtype.
    """
    tensors = {}
    weights = {}
    parameters = dict(tuned.model.named_parameters())
    for name, tensor in weights_of(tuned.model).items():
        tensors[name] = tensor.to("meta", dtype if name in parameters else tensor.dtype)
        weights[id(tensors[name])] = tuned.weights[name]

    def read(tensor: Tensor, rows: slice) -> Iterator[Tensor]:
        weight = weights[id(tensor)]
        for band in row_bands(tensor.shape, rows):
            yield weight.rows(band.start, band.stop)

    return in_stored_form(tuned.model, tensors), read


def open_tuned_model(read: OpenedRun) -> TunedModel:
    """Locate every parameter of a run's model in its files, without reading the weights.

    Raise ModelError if base, adapter and recipe do not match each other.
    """
    run, files = read.recipe, read.files
    model = build_unchanged(run, files)
    set_bypassed(model, files.support.dead_targets)
    if is_sharded(files.folder):
        # The shards of several ranks hold the entire trained model, so the base is not needed.
        tensors = ShardedTensors(files.folder)
        cache = TensorCache()
        weights = {}
        for name, tensor in weights_of(model).items():
            read_all = partial(_read_sharded, tensors, name, tensor.dtype)
            weights[name] = TunedWeight(None, WholeRows(tensor.shape, read_all, cache))
        return TunedModel(**vars(read), model=model, weights=weights)
    trained = define_model(run, files)
    sources = _stored_rows(model, trained, read)
    if read.location.holds == "full":
        weights = {name: TunedWeight(None, rows) for name, rows in sources.items()}
    elif run.adapter.kind == "none":
        weights = {name: TunedWeight(rows, rows) for name, rows in sources.items()}
    else:
        copy_saved_modules(trained, run.adapter)
        weights = _adapted_weights(model, trained, read, sources)
    return TunedModel(**vars(read), model=model, weights=weights)


def _stored_rows(
    model: PreTrainedModel, trained: nn.Module, read: OpenedRun
) -> dict[str, RowSource]:
    """Return a `RowSource` for each parameter in the model files. Keys are names of `weights_of`.

    The files contain the base model, or a fully fine-tuned model.
    """
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
    cache = TensorCache()
    sources: dict[str, RowSource] = {}
    for stored_name, parts in stored.items():
        name = tied.get(stored_name, stored_name)
        # Quantize and dequantize an nf4 or fp8 base as training did, because the adapter was
        # trained with the rounded weights.
        if name in frozen:
            read_all = partial(_read_quantized, frozen[name], parts, name)
            sources[name] = WholeRows(shapes[name].shape, read_all, cache)
        elif name in stacks:
            sources[name] = QuantizedExperts(stacks[name], parts[""])
        else:
            sources[name] = StoredRows(parts[""], shapes[name].dtype, shapes[name].shape)
    return sources


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return a dict from the second name of each tied parameter to its first name.

    `weights_of` lists a tied parameter only under its first name.
    """
    first_names = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first_name = first_names[id(parameter)]
        if first_name != name:
            tied[name] = first_name
    return tied


@torch.no_grad()
def _adapted_weights(
    model: PreTrainedModel, trained: nn.Module, read: OpenedRun, sources: Mapping[str, RowSource]
) -> dict[str, TunedWeight]:
    """Return the weights of `model` before and after training.

    If the adapter changes one of two tied parameters, untie the two parameters in `model`.

    Args:
        trained: the model with the adapter.
        sources: the result of `_stored_rows`.
    """
    folder = read.location.folder
    assert folder is not None  # an adapter always has a folder
    tied = tied_names(model)
    dtype = DTYPES[read.recipe.model.dtype]

    # PEFT can also store a copy of a frozen head or embedding. If the copy equals the base, it is
    # not a trained weight.
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
    bases = dict(sources)
    changed = {*updates, *replaced}
    for name, first_name in tied.items():
        # If the adapter changes one of two tied weights, their values differ after training, so
        # untie them.
        if name in changed or first_name in changed:
            bases[name] = sources[first_name]
            _untie(model, name)
    return {
        name: TunedWeight(base, replaced.get(name, base), updates.get(name))
        for name, base in bases.items()
    }


def _equal(a: RowSource, b: RowSource) -> bool:
    return a.shape == b.shape and all(
        torch.equal(a.rows(band.start, band.stop), b.rows(band.start, band.stop))
        for band in row_bands(a.shape)
    )


def _untie(model: PreTrainedModel, name: str) -> None:
    """Replace the tied parameter `name` of a model on meta by a separate copy."""
    module, _, key = name.rpartition(".")
    owner = model.get_submodule(module)
    owner.register_parameter(key, nn.Parameter(owner.get_parameter(key).detach().clone()))
    model.config.tie_word_embeddings = False
