"""Recurrent layers of a packed batch: one row a document.

A layer that carries a state along the row (Mamba, gated delta rule, short convolutions) would carry
it from document to document. Padding on the right cannot reach what is to its left, so such a layer
run on one row a document, padded to a common length, computes each document as if it were alone.
That holds for all of them and for every kernel.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from tunesmith.errors import ModelError
from tunesmith.model.documents import Documents, current_documents
from tunesmith.model.fused import add_mixin


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


class ByDocument(nn.Module):
    """A layer that keeps the documents apart that the context names: on one row a document.

    In eval mode without documents (generation) it is the forward of Transformers' class.
    """

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
        return _run_apart(super().forward, documents, args, kwargs)


@torch.compiler.disable  # shapes follow the documents and change with every batch
def _run_apart(
    forward: Callable[..., object],
    documents: Documents,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> object:
    # One document: nothing to keep apart.
    if len(documents.edges) == 2:
        return forward(*args, **kwargs)
    outputs = []
    for group in documents.rows:
        row_args, row_kwargs = _change_tokens((args, kwargs), documents, group.rows_of)
        outputs.append(forward(*row_args, **row_kwargs))
    return _join_rows(outputs, documents)


def _change_tokens(values: Any, documents: Documents, change: Callable[[Tensor], Tensor]) -> Any:
    """Arguments with `change` of every tensor [1, n, ...] in them, which is called on its row
    [n, ...].
    """
    n = documents.edges[-1]

    def change_row(tensor: Tensor) -> Tensor:
        # By sizes alone: an argument of n tokens counts as one of each token.
        if tensor.dim() < 2 or n not in tensor.shape:
            return tensor
        if tensor.shape[:2] != (1, n):
            raise ModelError(
                f"a recurrent layer takes an argument of shape {list(tensor.shape)}",
                why=f"documents can only be separated in [1, {n}, ...]",
                fix="set model.attention: eager and data.pack: false",
            )
        return change(tensor.squeeze(0))

    return tree_map_only(Tensor, change_row, values)


def _join_rows(outputs: list[Any], documents: Documents) -> Any:
    """The outputs of all groups, [documents, length, ...] each, as [1, n, ...].

    None for what is not of each token: the state after the last one (MiniMax), which only
    generation reads.
    """

    def join(*parts: Tensor | None) -> Tensor | None:
        tokens = []
        for group, part in zip(documents.rows, parts, strict=True):
            # Not one value a token: a state, which the caller does not need.
            if part is None or part.shape[:2] != (group.count, group.length):
                return None
            flat = part.flatten(0, 1)
            # Without the padding, in the order of `group.tokens`.
            tokens.append(flat if group.places is None else flat.index_select(0, group.places))
        # [n, ...] in the order of the groups, then that of the block.
        return torch.cat(tokens).index_select(0, documents.places_in_rows).unsqueeze(0)

    return tree_map(join, *outputs)
