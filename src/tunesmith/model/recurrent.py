"""Recurrent layers of a packed batch: all documents in one call of their kernels, or one row a
document.

A layer that carries a state along the row (Mamba, gated delta rule, short convolutions) would carry
it from document to document. Padding on the right cannot reach what is to its left, so such a layer
run on one row a document, padded to a common length, computes each document as if it were alone.
That holds for all of them and for every kernel. Some kernels take the edges of documents
themselves, which saves the padding; `recurrent_kernels.py` finds out which layers hand them on.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.model.documents import Documents, Spaced, current_documents
from tunesmith.model.fused import add_mixin


@dataclass(frozen=True)
class PackedCall:
    """The keywords that call a layer on a row of documents so that its kernels keep them apart.

    Attributes:
        edges: the keyword by which its forward hands `cu_seqlens` on to its scan.
        seq_idx: its forward takes the number of each token's document too, for its convolution.
        gap: empty places after each document, for a convolution that takes no `seq_idx`: it has
            reached the end of them before the next document begins.
    """

    edges: str
    seq_idx: bool = True
    gap: int = 0

    def keywords(self, spaced: Spaced) -> dict[str, Tensor]:
        """Return what the layer's forward is handed beside its own arguments."""
        # With the edges on the host FLA need not ask the device for them.
        keywords = {self.edges: spaced.edges, "cu_seqlens_cpu": spaced.edges_on_host}
        if self.seq_idx:
            keywords["seq_idx"] = spaced.seq_idx
        return keywords


def run_by_document(model: nn.Module, class_names: Collection[str]) -> None:
    """Let all modules of these classes run on one row a document where documents are packed.

    ModelError where the model has none of a class.
    """
    absent = set(class_names)
    for module in model.modules():
        # By any base: an adapter or a mixin may have inserted a class before Transformers' own.
        names = {base.__name__ for base in type(module).__mro__}
        if not names.isdisjoint(class_names):
            absent -= names
            if not isinstance(module, ByDocument):
                add_mixin(module, ByDocument)
    if absent:
        raise ModelError(
            f"{type(model).__name__} has no module of class {', '.join(sorted(absent))}",
            why="the recurrent layers of the model were measured on another one",
        )


def use_packed_calls(model: nn.Module, calls: Mapping[str, PackedCall | None]) -> None:
    """Let the layers of these classes take all documents in one call, None: run on one row a
    document; `run_by_document` first.
    """
    for module in model.modules():
        if not isinstance(module, ByDocument):
            continue
        # The first base that was tried: mixins come before it in the order.
        for base in type(module).__mro__:
            if base.__name__ in calls:
                module.packed_call = calls[base.__name__]


class ByDocument(nn.Module):
    """A layer that keeps the documents apart that the context names: by its kernels where it has a
    `packed_call`, else on one row a document.

    In eval mode without documents (generation) it is the forward of Transformers' class.
    """

    packed_call: PackedCall | None = None

    def forward(self, *args: object, **kwargs: object) -> object:
        documents = kwargs.pop("documents", None)
        if documents is None:
            documents = current_documents()
        if documents is None and self.training:
            raise ModelError(
                f"{type(self).__name__} was called without document boundaries",
                why="its state would leak from one document to the next",
                fix="compute forward and backward inside `TrainModel.step_context`",
            )
        if documents is None:
            return super().forward(*args, **kwargs)
        return _run_apart(super().forward, self.packed_call, documents, args, kwargs)


@torch.compiler.disable  # shapes follow the documents and change with every batch
def _run_apart(
    forward: Callable[..., object],
    call: PackedCall | None,
    documents: Documents,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> object:
    # One document: nothing to keep apart.
    if len(documents.edges) == 2:
        return forward(*args, **kwargs)
    if call is not None:
        return _run_in_one_call(forward, call, documents, args, kwargs)
    outputs = []
    for group in documents.rows:
        row_args = _change_tokens(args, documents, group.rows_of)
        row_kwargs = _change_tokens(kwargs, documents, group.rows_of)
        outputs.append(forward(*row_args, **row_kwargs))
    return _join_rows(outputs, documents)


def _run_in_one_call(
    forward: Callable[..., object],
    call: PackedCall,
    documents: Documents,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> object:
    spaced = documents.spaced(call.gap)
    if call.gap == 0:
        return forward(*args, **kwargs, **call.keywords(spaced))

    def open_gaps(row: Tensor) -> Tensor:
        # [size, ...]: every document followed by `gap` rows of zeros.
        with_gaps = row.new_zeros(spaced.size, *row.shape[1:])
        return with_gaps.index_copy(0, spaced.places, row).unsqueeze(0)

    args = _change_tokens(args, documents, open_gaps)
    kwargs = _change_tokens(kwargs, documents, open_gaps)
    return _close_gaps(forward(*args, **kwargs, **call.keywords(spaced)), spaced)


def _close_gaps(output: Any, spaced: Spaced) -> Any:
    """The tokens of an output [1, size, ...] as [1, n, ...]; None for what is not of each token."""
    if isinstance(output, tuple | list):
        return type(output)(_close_gaps(part, spaced) for part in output)
    if output is None or output.shape[:2] != (1, spaced.size):
        return None
    return output.index_select(1, spaced.places)


def _change_tokens(value: Any, documents: Documents, change: Callable[[Tensor], Tensor]) -> Any:
    """An argument with `change` of every tensor [1, n, ...] in it, which is called on its row
    [n, ...].
    """
    if isinstance(value, tuple | list):
        return type(value)(_change_tokens(part, documents, change) for part in value)
    if isinstance(value, dict):
        return {name: _change_tokens(part, documents, change) for name, part in value.items()}
    # By sizes alone: an argument of n tokens counts as one of each token.
    n = documents.edges[-1]
    if not isinstance(value, Tensor) or value.dim() < 2 or n not in value.shape:
        return value
    if value.shape[:2] != (1, n):
        raise ModelError(
            f"a recurrent layer takes an argument of shape {list(value.shape)}",
            why=f"documents can only be separated in [1, {n}, ...]",
            fix="set model.attention: eager and data.pack: false",
        )
    return change(value.squeeze(0))


def _join_rows(outputs: list[Any], documents: Documents) -> Any:
    """The outputs of all groups, [documents, length, ...] each, as [1, n, ...].

    None for what is not of each token: the state after the last one (MiniMax), which only
    generation reads.
    """
    first = outputs[0]
    if isinstance(first, tuple | list):
        return type(first)(
            _join_rows(list(parts), documents) for parts in zip(*outputs, strict=True)
        )
    if first is None:
        return None
    parts = []
    # Not one value a token: a state, which the caller does not need.
    for group, output in zip(documents.rows, outputs, strict=True):
        if output.shape[:2] != (group.count, group.length):
            return None
        tokens = output.flatten(0, 1)
        # Without the padding, in the order of `group.tokens`.
        if group.places is not None:
            tokens = tokens.index_select(0, group.places)
        parts.append(tokens)
    # [n, ...] in the order of the groups, then that of the block.
    return torch.cat(parts).index_select(0, documents.places_in_rows).unsqueeze(0)
