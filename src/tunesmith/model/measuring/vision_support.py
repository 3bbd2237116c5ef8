"""Measurement of whether a vision-language model can be trained on packed rows with pictures.

The test uses a tiny model, as in `support`, and a row of three documents, which contain two
pictures, no picture and one picture. Logits and gradients must equal those of each document alone
with Transformers' own forward. Other pictures in the first document must not change a single bit of
the other documents' logits.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from tunesmith.model.arch.spec import one_line
from tunesmith.model.known.decoder import find_decoder, find_projector
from tunesmith.model.known.model_types import BidirectionalPictures, Support
from tunesmith.model.layers import attention
from tunesmith.model.layers.chunked import prepare_chunked_attention
from tunesmith.model.layers.documents import use_documents
from tunesmith.model.layers.vision import (
    add_features_by_place,
    mark_pictures,
    picture_features,
    set_text_attention,
)
from tunesmith.model.measuring.support import (
    TinyModelOutput,
    differentiate,
    logits_of,
    measure_tiny,
    packed_documents,
    ready_tiny,
)


class PictureRow(NamedTuple):
    """A packed row of documents with pictures, for a tiny model.

    Attributes:
        ids: int64 [n]. PICTURE_ID is the placeholder of a picture's features.
        positions: int64 [1, n] or [3, 1, n].
        lengths: number of tokens of each document.
        spans: for each picture, the index of its first token and the index after its last token.
        pictures: the model's inputs for all pictures.
        alone: for each document, the inputs for only its pictures.
    """

    ids: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    pictures: Mapping[str, Tensor]
    alone: tuple[Mapping[str, Tensor], ...]


def measure_pictures(full_config: PretrainedConfig, row: PictureRow) -> Support:
    """Measure how tunesmith trains a vision-language model.

    Raise ModelError if no tiny model can be built.
    """
    with ready_tiny(full_config) as tiny:
        support = measure_tiny(tiny)
        if support.state != "packed":
            return replace(support, state="refused")
        return _measure_row(tiny, row, support)


def _measure_row(tiny: PreTrainedModel, row: PictureRow, support: Support) -> Support:
    """Measure the row with pictures, after `support` showed that text documents can be packed."""
    found = []
    # Include the projector in the comparison of gradients, because it may also be trained.
    for name in find_projector(tiny):
        tiny.get_submodule(name).requires_grad_(True)
    try:
        set_text_attention(tiny, "eager")
        expected = _run_documents(tiny, row)
        set_text_attention(tiny, attention.register())
        add_features_by_place(tiny)
        for bidirectional_pictures in get_args(BidirectionalPictures):
            packed = _run_row(tiny, row, row.pictures, bidirectional_pictures)
            errors = packed.errors(expected)
            if errors.are_rounding():
                apart = _keeps_pictures_apart(tiny, row, packed.logits, bidirectional_pictures)
                why = f"{support.why}, with pictures too"
                if not apart:
                    support = replace(support, state="refused")
                    why = "a picture changes the logits of other documents"
                return replace(
                    support, why=why, errors=errors, bidirectional_pictures=bidirectional_pictures
                )
            found.append(errors)
    # The code of 90 model types can raise any exception.
    except Exception as error:
        return Support(
            "refused", f"a tiny model of this type does not run with pictures: {one_line(error)}"
        )
    errors = min(found, key=lambda errors: errors.logits)
    why = "packed documents with pictures give different results than single ones"
    return Support("refused", f"{why}: {errors.describe()}", errors=errors)


def _run_documents(tiny: PreTrainedModel, row: PictureRow) -> TinyModelOutput:
    """Run each document separately with Transformers' own forward, from ids and pixels."""
    logits = []
    for document, pictures in zip(row.ids.split(row.lengths), row.alone, strict=True):
        ids = document[None]
        marks: dict[str, Any] = mark_pictures(tiny, ids)
        output = tiny(input_ids=ids, use_cache=False, **pictures, **marks)
        logits.append(output.logits[0])
    return differentiate(tiny, torch.cat(logits), row.ids)


def _run_row(
    tiny: PreTrainedModel,
    row: PictureRow,
    pictures: Mapping[str, Tensor],
    bidirectional_pictures: BidirectionalPictures,
) -> TinyModelOutput:
    """Run the row on these pictures with tunesmith's attention, as `TrainModel` does."""
    documents = packed_documents(row.lengths, prepare_chunked_attention(tiny))
    documents = replace(documents, bidirectional_pictures=bidirectional_pictures)
    documents.set_pictures(row.spans)
    with use_documents(documents):
        output = find_decoder(tiny)(
            input_ids=row.ids[None],
            position_ids=row.positions,
            use_cache=False,
            documents=documents,
            mm_encoder_outputs={"image": picture_features(tiny, pictures, trains=True)},
        )
        return differentiate(tiny, logits_of(tiny, output.last_hidden_state[0]), row.ids)


def _keeps_pictures_apart(
    tiny: PreTrainedModel,
    row: PictureRow,
    logits: Tensor,
    bidirectional_pictures: BidirectionalPictures,
) -> bool:
    """Return whether changed pictures in the first document change only this document's logits."""
    others = dict(row.pictures)
    for name, tensor in row.pictures.items():
        if tensor.is_floating_point():
            # Reverse the values of the pictures in the first document.
            count = len(row.alone[0][name])
            others[name] = tensor.clone()
            others[name][:count] = tensor[:count].flip(-1)
    changed = _run_row(tiny, row, others, bidirectional_pictures).logits
    rest = row.lengths[0]
    if torch.equal(changed[:rest], logits[:rest]):
        return False
    return torch.equal(changed[rest:], logits[rest:])
