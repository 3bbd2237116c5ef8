"""The root of what is trained: backbone, head and loss in one module.

Everything that touches a parameter happens inside `TrainModel.forward`: a sharded model gathers its weights in the
root's forward, so calling the backbone or the head from outside would find them cut. A method (`sft.py`) is a function
that the root calls; it returns a loss sum and a count and owns no loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.data.batch import IGNORE, Batch
from tunesmith.errors import ModelError
from tunesmith.loss import Score, chunked_cross_entropy, loss_and_grad, token_cross_entropy
from tunesmith.model import attention
from tunesmith.model.documents import Documents


class Method(Protocol):
    """What the loss is."""

    def __call__(self, model: TrainModel, batch: Batch) -> tuple[Tensor, int]:
        """Loss sum (0-d, fp32 or fp64) over the batch's supervised positions, and how many these are."""


class TrainModel(nn.Module):
    """A Transformers causal LM together with its loss.

    Args:
        model: the causal LM; its parameters keep their names below `model.`.
        method: what the loss is.
        layers: name of the module that holds the decoder layers.
        softcap: soft cap of the logits (Gemma 2), or None.
        logit_scale: factor on the logits.
        door: the way of our block-diagonal attention on the flattened batch (`attention.choose`), or "eager" for
            Transformers' own on padded rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        *,
        layers: str,
        door: str,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.layers_name = layers
        self.score: Score = loss_and_grad
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.door = door
        self.use_training_attention()

    def use_training_attention(self) -> None:
        """Take the attention of training; generation sets "sdpa" and calls this when it is done."""
        self.model.set_attn_implementation("eager" if self.door == "eager" else attention.register())

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in their order."""
        return list(self.model.get_submodule(self.layers_name).children())

    @property
    def head(self) -> nn.Module:
        head = self.model.get_output_embeddings()
        if head is None:
            raise ModelError(f"{type(self.model).__name__} has no output layer", fix="take a causal language model")
        return head

    def forward(self, batch: Batch) -> tuple[Tensor, int]:
        """Loss sum of this micro batch (0-d, fp32 or fp64, local to the rank) and the number of positions in it."""
        return self.method(self, batch)

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states, [rows * length, width]; each document is computed as if it were alone."""
        ids, positions, options = batch.input_ids, batch.position_ids, {}
        if self.door != "eager":
            # One row: every layer but attention works position by position, and attention goes by the documents.
            ids, positions = ids.view(1, -1), positions.view(1, -1)
            options["documents"] = Documents(batch.cu_seqlens, batch.max_seqlen, self.door)
        output = self.model.base_model(input_ids=ids, position_ids=positions, use_cache=False, **options)
        hidden: Tensor = output.last_hidden_state.flatten(0, 1)
        return hidden

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy summed over the positions of hidden [n, width] and targets [n]."""
        return chunked_cross_entropy(
            hidden, self.head, targets, softcap=self.softcap, scale=self.logit_scale, score=self.score
        )

    def token_losses(self, batch: Batch) -> Tensor:
        """Cross-entropy of every position: fp32 (or fp64) [rows, length], 0 where the target is IGNORE; no gradient."""
        return self.token_scores(batch)[0]

    @torch.no_grad()
    def token_scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every position, and whether its likeliest token is the target.

        Returns:
            fp32 (or fp64) and bool, [rows, length] each; 0 and False where the target is IGNORE.
        """
        index, targets = supervised(batch)
        hidden = self.hidden(batch)[index]
        losses, hits = token_cross_entropy(hidden, self.head, targets, softcap=self.softcap, scale=self.logit_scale)
        every_loss, every_hit = losses.new_zeros(batch.targets.numel()), hits.new_zeros(batch.targets.numel())
        every_loss[index], every_hit[index] = losses, hits
        return every_loss.view_as(batch.targets), every_hit.view_as(batch.targets)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, by its name in the causal LM; tied parameters once."""
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def describe(self) -> str:
        """One line: the model, and how much of it is trained."""
        count = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for _, p in self.trained_parameters())
        return (
            f"model: {type(self.model).__name__}, {trained:,} of {count:,} parameters trained ({trained / count:.2%})"
        )


def supervised(batch: Batch) -> tuple[Tensor, Tensor]:
    """Places in the flattened batch that have a label, int64 [n], and these labels, int64 [n].

    The number is known on the host, so a GPU is not waited for.
    """
    flat = batch.targets.flatten()
    index = torch.nonzero_static(flat != IGNORE, size=batch.supervised).squeeze(1)
    return index, flat[index]
