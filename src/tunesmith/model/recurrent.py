"""Recurrent layers of a packed batch: one row a document.

A layer that carries a state along the row (Mamba, gated delta rule, short convolutions) would carry
it from document to document. Padding on the right cannot reach what is to its left, so such a layer
run on one row a document, padded to a common length, computes each document as if it were alone.
That holds for all of them and for every kernel; those that take the edges of documents themselves
differ in what they take, and several of Transformers' layers hand the edges on to half of their
kernels only.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.errors import ModelError
from tunesmith.model.documents import Documents, Group, current_documents
from tunesmith.model.fused import add_mixin


def run_by_document(model: nn.Module, class_names: Collection[str]) -> None:
    """Let all modules of these classes run on one row a document where documents are packed.

    ModelError where the model has none of a class.
    """
    absent = set(class_names)
    for module in model.modules():
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


class ByDocument(nn.Module):
    """A layer that runs on one row a document where the context names documents.

    In eval mode without documents (generation) it is the forward of Transformers' class.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        documents = kwargs.pop("documents", None)
        if documents is None:
            documents = current_documents()
        if documents is None and self.training:
            raise ModelError(
                f"{type(self).__name__} trains on unmarked documents",
                why="its state would pass from one document to the next",
                fix="compute forward and backward inside `TrainModel.step_context`",
            )
        if documents is None:
            return super().forward(*args, **kwargs)
        return _run_on_rows(super().forward, documents, args, kwargs)


@torch.compiler.disable  # shapes follow the documents and change with every batch
def _run_on_rows(
    forward: Any, documents: Documents, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if len(documents.edges) == 2:
        return forward(*args, **kwargs)
    outputs = []
    for group in documents.rows:
        row_args = _select_rows(args, documents, group)
        row_kwargs = _select_rows(kwargs, documents, group)
        outputs.append(forward(*row_args, **row_kwargs))
    return _join_rows(outputs, documents)


def _select_rows(value: Any, documents: Documents, group: Group) -> Any:
    """Every tensor [1, n, ...] in an argument as [documents, length, ...] of a group."""
    if isinstance(value, tuple | list):
        return type(value)(_select_rows(part, documents, group) for part in value)
    if isinstance(value, dict):
        return {name: _select_rows(part, documents, group) for name, part in value.items()}
    n = documents.edges[-1]
    if not isinstance(value, Tensor) or value.dim() < 2 or n not in value.shape:
        return value
    if value.shape[:2] != (1, n):
        raise ModelError(
            f"a recurrent layer takes an argument of shape {list(value.shape)}",
            why=f"its documents can be told apart in [1, {n}, ...] only",
            fix="set model.attention: eager and data.pack: false",
        )
    row = value.squeeze(0)
    if group.places is None or group.tokens is None:
        return row[group.start : group.start + group.length].unsqueeze(0)
    padded = row.new_zeros(group.count * group.length, *row.shape[1:])
    padded = padded.index_copy(0, group.places, row.index_select(0, group.tokens))
    return padded.unflatten(0, (group.count, group.length))


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
    for group, output in zip(documents.rows, outputs, strict=True):
        if output.shape[:2] != (group.count, group.length):
            return None
        tokens = output.flatten(0, 1)
        if group.places is not None:
            tokens = tokens.index_select(0, group.places)
        parts.append(tokens)
    return torch.cat(parts).index_select(0, documents.places_in_rows).unsqueeze(0)
