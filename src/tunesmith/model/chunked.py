"""Chunked attention (Llama 4): layers whose tokens see their own chunk of the document only.

Transformers says it by a mask, which packed rows do without. It is attention over more documents:
each is cut at multiples of the chunk size, counted from its own start. The layers in between have
no rotary embedding; they scale their queries by a function of the position, which Transformers
counts from the start of the row instead of the document.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.model.decoder import find_decoder, find_layers
from tunesmith.model.documents import Documents
from tunesmith.model.fused import add_mixin


def prepare_chunked_attention(causal_lm: PreTrainedModel) -> int | None:
    """Let the layers with chunked attention go by the chunks of packed documents.

    Returns the size of a chunk in tokens; None where the model has no such layers, and is
    unchanged.
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
        if config.attn_temperature_tuning and not has_rotary:  # the key counts the wrong way round
            add_mixin(attention, TunedAttention)
    return int(config.attention_chunk_size)


class ChunkedAttention(nn.Module):
    """An attention layer that sees the chunks of the documents in their place."""

    def forward(self, *args: object, **kwargs: object) -> object:
        documents = kwargs.get("documents")
        if isinstance(documents, Documents):
            kwargs["documents"] = documents.chunks
        return super().forward(*args, **kwargs)


class TunedAttention(nn.Module):
    """An attention layer that scales its queries by their position (Llama4TextAttention)."""

    floor_scale: float
    attn_scale: float

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> object:
        documents = kwargs.get("documents")
        if isinstance(documents, Documents):
            edges = documents.cu_seqlens
            in_row = torch.arange(hidden_states.shape[1], device=edges.device)
            # Of the tokens of documents, which the row may hold once for two of them.
            tokens = in_row if documents.repeated is None else documents.repeated.firsts
            # Each one less the start of its document: the edge before the first that is after it.
            in_document = tokens - edges[torch.searchsorted(edges, tokens, right=True) - 1]
            # Transformers' forward multiplies by the scale of the position in the row.
            kwargs["query_factor"] = self._scale(in_document) / self._scale(in_row)
        return super().forward(hidden_states, *args, **kwargs)

    def _scale(self, positions: Tensor) -> Tensor:
        # floor((p + 1) / floor_scale): 0 for the first positions, where the factor is 1.
        steps = torch.floor((positions.float() + 1) / self.floor_scale)
        return torch.log1p(steps) * self.attn_scale + 1
