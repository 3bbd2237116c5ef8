"""Chunked attention (Llama 4): tokens attend only to tokens of the same chunk of their document.

Transformers implements it with a mask, but packed rows have no mask. Instead, each document is
split at multiples of the chunk size, counted from the document's start, and each chunk is treated
as a separate document. Layers without chunked attention have no rotary embedding. They scale their
queries by a function of the position. Transformers counts the position from the start of the row,
but this module counts it from the start of the document.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.model.known.decoder import find_decoder, find_layers
from tunesmith.model.layers.documents import Documents
from tunesmith.model.layers.fused import add_mixin


def prepare_chunked_attention(causal_lm: PreTrainedModel) -> int | None:
    """Make the layers with chunked attention use the chunks of packed documents.

    Returns:
        The chunk size in tokens. None if the model has no such layers; the model is then unchanged.
    """
    config = find_decoder(causal_lm).config
    layer_types = config.to_dict().get("layer_types") or ()
    if "chunked_attention" not in layer_types:
        return None
    layers = causal_lm.get_submodule(find_layers(causal_lm)).children()
    for layer_type, has_rotary, layer in zip(
        layer_types, config.no_rope_layers, layers, strict=True
    ):
        attention = layer.get_submodule("self_attn")
        if layer_type == "chunked_attention":
            add_mixin(attention, ChunkedAttention)
        # Despite its name, `no_rope_layers` has 1 for layers with rotary embedding.
        if config.attn_temperature_tuning and not has_rotary:
            add_mixin(attention, TunedAttention)
    return int(config.attention_chunk_size)


class ChunkedAttention(nn.Module):
    """An attention layer whose tokens attend only to tokens of the same chunk."""

    def forward(self, *args: object, **kwargs: object) -> object:
        documents = kwargs.get("documents")
        if isinstance(documents, Documents):
            kwargs["documents"] = documents.chunks
        return super().forward(*args, **kwargs)


class TunedAttention(nn.Module):
    """A `Llama4TextAttention` that scales queries by a function of the position in the document."""

    floor_scale: float
    attn_scale: float

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        documents = kwargs.get("documents")
        if isinstance(documents, Documents):
            edges = documents.cu_seqlens
            in_row = torch.arange(hidden_states.shape[1], device=edges.device)
            # A token that two documents share can be stored once. Use its position in the first of
            # the two documents.
            tokens = documents.repeated.firsts if documents.repeated is not None else in_row
            # Index of the document that contains each token.
            document = torch.searchsorted(edges, tokens, right=True) - 1
            in_document = tokens - edges[document]
            # Transformers' forward uses the scale for the position in the row instead of the
            # position in the document. Multiply the queries by the quotient of both scales.
            kwargs["query_factor"] = self._scale(in_document) / self._scale(in_row)
        return super().forward(hidden_states, *args, **kwargs)

    def _scale(self, positions: Tensor) -> Tensor:
        # If p is small, floor((p + 1) / floor_scale) is 0, so that the scale of position p is 1.
        steps = torch.floor((positions.float() + 1) / self.floor_scale)
        return torch.log1p(steps) * self.attn_scale + 1
