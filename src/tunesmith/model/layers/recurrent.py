"""Recurrent layers for packed batches: they run on one document per row.

A layer that carries a state along the row (Mamba, gated delta rule, short convolutions) would carry
it from one document into the next. Therefore such a layer runs on one document per row, padded on
the right to a common length. Padding on the right does not affect earlier tokens, so each document
gives the same result as in a separate forward. This works for all recurrent layers and for every
kernel.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from tunesmith.errors import ModelError
from tunesmith.model.layers.documents import Documents, current_documents
from tunesmith.model.layers.fused import add_mixin


def run_by_document(model: nn.Module, class_names: Collection[str]) -> None:
    """Make all modules of these classes run on one document per row if documents are packed.

    Raise ModelError if the model has no module of one of the classes.
    """
    absent = set(class_names)
    for module in model.modules():
        # Compare all base classes: an adapter or mixin may have added a class before Transformers'
        # own.
        names = {base.__name__ for base in type(module).__mro__}
        if not names.isdisjoint(class_names):
            absent -= names
            if not isinstance(module, ByDocument):
                add_mixin(module, ByDocument)
    if absent:
        raise ModelError(
            f"{type(model).__name__} has no module of class {', '.join(sorted(absent))}",
            why="packed documents are separated in modules of these classes, which a small "
            "test model of the same type has",
        )


class ByDocument(nn.Module):
    """A mixin that runs a recurrent layer on one document per row.

    Without documents in eval mode (generation), it calls the forward of Transformers' class.
    """

    def forward(self, *args: object, **kwargs: object) -> object:
        documents = kwargs.pop("documents", None)
        if documents is None:
            documents = current_documents()
        if documents is None and self.training:
            raise ModelError(
                f"{type(self).__name__} was called without document boundaries",
                why="without them, the state of this layer would leak from one packed document to "
                "the next",
                fix="compute forward and backward inside `TrainModel.step_context`",
            )
        if documents is None:
            return super().forward(*args, **kwargs)
        return _run_apart(super().forward, documents, args, kwargs)


@torch.compiler.disable  # shapes depend on the documents of the batch
def _run_apart(
    forward: Callable[..., object],
    documents: Documents,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> object:
    # A single document needs no separation.
    if len(documents.edges) == 2:
        return forward(*args, **kwargs)
    outputs = []
    for group in documents.rows:
        row_args, row_kwargs = _change_tokens((args, kwargs), documents, group.rows_of)
        outputs.append(forward(*row_args, **row_kwargs))
    return _join_rows(outputs, documents)


def _change_tokens(values: Any, documents: Documents, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to each tensor [1, n, ...] in `values`.

    `change` receives the tensor as [n, ...].
    """
    n = documents.edges[-1]

    def change_row(tensor: Tensor) -> Tensor:
        # Recognize tensors of tokens by their shape: a dimension of size n is the token dimension.
        if tensor.dim() < 2 or n not in tensor.shape:
            return tensor
        if tensor.shape[:2] != (1, n):
            raise ModelError(
                f"a recurrent layer takes an argument of shape {list(tensor.shape)}",
                why=f"packed documents can only be separated in a tensor of shape [1, {n}, ...]",
                fix="set model.attention: eager and data.pack: false",
            )
        return change(tensor.squeeze(0))

    return tree_map_only(Tensor, change_row, values)


def _join_rows(outputs: list[Any], documents: Documents) -> Any:
    """Join the outputs of all groups, [documents, length, ...] each, to [1, n, ...].

    Outputs that do not have one value per token become None, for example the state after the last
    token (MiniMax), which only generation reads.
    """

    def join(*parts: Tensor | None) -> Tensor | None:
        tokens = []
        for group, part in zip(documents.rows, parts, strict=True):
            # The tensor has no token dimension: it is a state, which the caller does not use.
            if part is None or part.shape[:2] != (group.count, group.length):
                return None
            group_tokens = part.flatten(0, 1)
            if group.places is not None:
                # Remove the padding. The tokens are then in the order of `group.tokens`.
                group_tokens = group_tokens.index_select(0, group.places)
            tokens.append(group_tokens)
        # Concatenate the groups to [n, ...] and then restore the token order of the block.
        return torch.cat(tokens).index_select(0, documents.places_in_rows).unsqueeze(0)

    return tree_map(join, *outputs)
