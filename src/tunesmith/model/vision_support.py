"""The measurement of whether a vision-language model trains on packed rows with pictures.

On its twin, as in `support`, with a row of three documents, of two pictures, of none and of one:
its logits and gradients must be those of each document alone under Transformers' own forward. And
other pictures in the first document must leave the others as they are, to the bit.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from tunesmith.model import attention
from tunesmith.model.chunked import prepare_chunked_attention
from tunesmith.model.decoder import find_decoder, find_projector
from tunesmith.model.documents import use_documents
from tunesmith.model.load import one_line
from tunesmith.model.model_types import BothWays, Support
from tunesmith.model.support import (
    TwinOutput,
    differentiate,
    logits_of,
    measure_twin,
    packed_documents,
    ready_twin,
)
from tunesmith.model.vision import (
    add_features_by_place,
    mark_pictures,
    see,
    set_text_attention,
)


class PictureRow(NamedTuple):
    """A packed row of documents with pictures, for a twin.

    Attributes:
        ids: int64 [n], PICTURE_ID where a picture's features go.
        positions: int64 [1, n] or [3, 1, n].
        lengths: tokens of each document.
        spans: the first place of each picture's tokens, and the one after its last.
        pictures: inputs of all pictures.
        alone: those of each document's.
    """

    ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    pictures: Mapping[str, Tensor]
    alone: tuple[Mapping[str, Tensor], ...]


def measure_pictures(whole: PretrainedConfig, row: PictureRow) -> Support:
    """Measure how a vision-language model trains; ModelError where no twin can be built of it."""
    with ready_twin(whole) as twin:
        support = measure_twin(twin)
        if support.state != "packed":
            return replace(support, state="refused")
        return _measure_row(twin, row, support)


def _measure_row(twin: PreTrainedModel, row: PictureRow, support: Support) -> Support:
    """Support of a twin whose documents without pictures share rows."""
    found = []
    # It may be trained too: its gradients are compared with the rest.
    for name in find_projector(twin):
        twin.get_submodule(name).requires_grad_(True)
    try:
        set_text_attention(twin, "eager")
        expected = _run_documents(twin, row)
        set_text_attention(twin, attention.register())
        add_features_by_place(twin)
        for both_ways in get_args(BothWays):
            packed = _run_row(twin, row, row.pictures, both_ways)
            errors = packed.errors(expected)
            if errors.are_rounding():
                apart = _keeps_pictures_apart(twin, row, packed.logits, both_ways)
                why = f"{support.why}, with pictures too"
                if not apart:
                    support = replace(support, state="refused")
                    why = "a picture changes the logits of other documents"
                return replace(support, why=why, errors=errors, both_ways=both_ways)
            found.append(errors)
    # Code of 90 model types.
    except Exception as error:
        return Support("refused", f"its twin does not run with pictures: {one_line(error)}")
    errors = min(found, key=lambda errors: errors.logits)
    why = "packed documents with pictures give different results than single ones"
    return Support("refused", f"{why}: {errors.describe()}", errors=errors)


def _run_documents(twin: PreTrainedModel, row: PictureRow) -> TwinOutput:
    """Each document by itself, as Transformers computes it from ids and pixels."""
    logits = []
    for ids, pictures in zip(row.ids.split(row.lengths), row.alone, strict=True):
        marks: dict[str, Any] = mark_pictures(twin, ids[None])
        output = twin(input_ids=ids[None], use_cache=False, **pictures, **marks)
        logits.append(output.logits[0])
    return differentiate(twin, torch.cat(logits), row.ids)


def _run_row(
    twin: PreTrainedModel, row: PictureRow, pictures: Mapping[str, Tensor], both_ways: BothWays
) -> TwinOutput:
    """The row, with these pictures, under this engine's attention, as `TrainModel` does."""
    documents = packed_documents(row.lengths, prepare_chunked_attention(twin))
    documents = replace(documents, both_ways=both_ways)
    documents.set_pictures(row.spans)
    with use_documents(documents):
        output = find_decoder(twin)(
            input_ids=row.ids[None],
            position_ids=row.positions,
            use_cache=False,
            documents=documents,
            mm_encoder_outputs={"image": see(twin, pictures, trains=True)},
        )
        return differentiate(twin, logits_of(twin, output.last_hidden_state[0]), row.ids)


def _keeps_pictures_apart(
    twin: PreTrainedModel, row: PictureRow, logits: Tensor, both_ways: BothWays
) -> bool:
    """Check that other pictures in the first document reach its own logits and no others."""
    others = dict(row.pictures)
    for name, tensor in row.pictures.items():
        if tensor.is_floating_point():
            # The same values in another order, in the pictures of the first document.
            others[name] = tensor.clone()
            others[name][: len(row.alone[0][name])] = tensor[: len(row.alone[0][name])].flip(-1)
    changed = _run_row(twin, row, others, both_ways).logits
    rest = row.lengths[0]
    is_changed = not torch.equal(changed[:rest], logits[:rest])
    return is_changed and torch.equal(changed[rest:], logits[rest:])
