"""The root of what is trained, and what a method is.

`TrainModel` holds backbone, head and loss in one module. Everything that touches a parameter
happens inside its forward: a sharded model gathers its weights in the root's forward, so a backbone
or head called from outside finds shards. A method (`sft.py`) is called by the root. It returns a
loss sum and what to divide it by, and owns no loop.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.config.schema import MethodConfig
from tunesmith.data.batches.batch import IGNORE, Batch
from tunesmith.data.batches.loader import GlobalBatch
from tunesmith.distributed.vocab_parallel import compute_with_head
from tunesmith.errors import ModelError
from tunesmith.loss import (
    LossAndGradFn,
    chunked_cross_entropy,
    loss_and_grad,
    token_cross_entropy,
    token_logprobs,
)
from tunesmith.model import attention
from tunesmith.model.chunked import prepare_chunked_attention
from tunesmith.model.decoder import find_decoder, find_head, find_layers, trained_projector
from tunesmith.model.documents import (
    Documents,
    RepeatedTokens,
    current_documents,
    use_documents,
)
from tunesmith.model.model_types import BothWays
from tunesmith.model.packed_attention import spans_if_chosen
from tunesmith.model.recurrent import run_by_document
from tunesmith.model.vision import (
    add_features_by_place,
    see,
    set_text_attention,
    with_unused,
)
from tunesmith.quant.linear_layers import parameter_count

Value = TypeVar("Value")


class MethodOutput(NamedTuple):
    """The sums that a method makes of one micro batch, local to the rank."""

    loss: Tensor  # 0-d, fp32 or fp64; the sum, not the mean
    # This micro batch's part of what the loss of the global batch is divided by.
    denominator: int
    # Sums by name, 0-d and detached, divided by the same denominator.
    metrics: Mapping[str, Tensor] = {}


class StepTotals(NamedTuple):
    """The totals that the losses of an optimizer step share, or those of all held-out rows.

    Attributes:
        examples: on all ranks.
        chosen_tokens: supervised tokens of the chosen answers, on all ranks.
        mismatched: prompts with answers of other rows, of this data rank; for methods that
            `needs_mismatched`.
        kl: 0-d, what such a method measured on them.
    """

    examples: int
    chosen_tokens: int = 0
    mismatched: Sequence[Batch] = ()
    kl: Tensor | None = None


class Method(ABC):
    """The loss, and what it needs.

    Attributes:
        metrics: names of the method's own sums in MethodOutput, in their order.
        needs_reference: it compares with the model that training began from.
        needs_mismatched: it needs prompts with answers of other rows.
    """

    metrics: Sequence[str] = ()
    needs_reference = False
    needs_mismatched = False

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    @abstractmethod
    def denominator(self, batch: Batch | GlobalBatch) -> int:
        """Return what the loss sum over a micro batch or a whole global batch is divided by.

        It comes from the counts on the host, `supervised` and `examples`, and is additive over
        micro batches and ranks.
        """

    def begin_step(
        self, model: "TrainModel", totals: StepTotals, add_up: Callable[[Tensor], object]
    ) -> StepTotals:
        """Measure what the first loss needs of a whole global batch; a collective call.

        add_up: sums a tensor over the data ranks, in place.
        """
        return totals

    @abstractmethod
    def __call__(
        self, model: "TrainModel", batch: Batch, totals: StepTotals | None = None
    ) -> MethodOutput:
        """Loss sum and metrics of one micro batch, with `denominator(batch)`.

        totals: of the step that it belongs to; None takes the micro batch for a whole one.
        """

    def finish(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return what a record shows, from the means of a step."""
        return dict(metrics)


class OfExamples(Method):
    """A method whose loss is a mean over examples."""

    def denominator(self, batch: Batch | GlobalBatch) -> int:
        return batch.examples

    def cross_entropy(self, chosen: Tensor, batch: Batch, totals: StepTotals | None) -> Tensor:
        """The mean cross-entropy of a chosen token, times the examples that the loss is divided by.

        chosen: [pairs], log-probabilities of the chosen answers.
        """
        if totals is not None:
            scale = totals.examples / max(1, totals.chosen_tokens)
        else:
            scale = batch.examples / max(1, batch.chosen_tokens)
        return -chosen.sum() * scale


class TrainModel(nn.Module):
    """A Transformers causal LM together with its loss.

    Args:
        model: the causal LM; its parameters keep their names below `model.`.
        method: what the loss is.
        attention_backend: name of our block-diagonal attention's backend on the flattened batch
            (`attention.select_attention_backend`), or "eager" for Transformers' own on padded rows.
        recurrent: class names of the layers that carry a state along the row, which run on one row
            a document.
        loss_and_grad_fn: the loss of a chunk with its gradient.
        both_ways: layers in which a picture's tokens see those behind them, up to its end.

    Attributes:
        partial_gradients: the names of the parameters for `tensor.reduce_gradients`.
        reference: puts the weights that training began from in place; None where no method asks for
            them, or where all their figures exist before training.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method,
        *,
        attention_backend: str,
        recurrent: Collection[str] = (),
        loss_and_grad_fn: LossAndGradFn = loss_and_grad,
        both_ways: BothWays = "",
    ) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.layers_name = find_layers(model)
        self.logit_rule = find_head(model)
        self.attention_backend = attention_backend
        self.loss_and_grad_fn = loss_and_grad_fn
        self.both_ways = both_ways
        self.projector = trained_projector(model)
        # These two follow once the model is sharded, and has its weights.
        self.partial_gradients: frozenset[str] = frozenset()
        self.reference: Callable[[], AbstractContextManager[None]] | None = None
        self.chunk_size = None  # of layers with chunked attention, in tokens
        if attention_backend != "eager":
            self.chunk_size = prepare_chunked_attention(model)
            run_by_document(model, recurrent)
        add_features_by_place(model)
        self.use_training_attention()

    def use_training_attention(self) -> None:
        """Set the attention of training; generation sets its own and calls this at its end."""
        if self.attention_backend == "eager":
            set_text_attention(self.model, "eager")
        else:
            set_text_attention(self.model, attention.register())

    def use_inference_attention(self) -> None:
        """Set the attention of generation, which takes padding masks: sdpa where it can.

        Where scores are capped (Gemma 2) it is eager: sdpa does not compute that, and Transformers
        refuses it.
        """
        set_text_attention(self.model, "sdpa" if self.model._supports_sdpa else "eager")

    @property
    def packs_rows(self) -> bool:
        """Tell whether documents may share a row; Transformers' own attention does not keep those
        of every model apart.
        """
        return self.attention_backend != "eager"

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in their order."""
        return list(self.model.get_submodule(self.layers_name).children())

    @property
    def head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        if head is None:
            what = f"{type(self.model).__name__} has no output layer"
            raise ModelError(what, fix="use a causal language model")
        return head

    @contextmanager
    def step_context(self, batch: Batch) -> Iterator[None]:
        """A context around forward and backward of a micro batch.

        Layers that recompute run again in the backward, and some of them need to know its documents
        then.
        """
        with use_documents(self._documents(batch)):
            yield

    @overload
    def forward(self, batch: Batch) -> MethodOutput: ...

    @overload
    def forward(self, batch: Batch, compute: Callable[["TrainModel", Batch], Value]) -> Value: ...

    def forward(
        self, batch: Batch, compute: Callable[["TrainModel", Batch], Any] | None = None
    ) -> Any:
        """Return what `compute` makes of this micro batch, local to the rank; None: the method's
        loss sum and its denominator, as of a batch by itself.
        """
        return (compute or self.method)(self, batch)

    def _documents(self, batch: Batch) -> Documents | None:
        """None for padded rows, which Transformers' own attention takes."""
        if self.attention_backend == "eager":
            return None
        repeated = None if batch.whole is None else RepeatedTokens(*batch.whole)
        tokens = batch.input_ids.numel() if repeated is None else len(repeated.places)
        documents = Documents(
            batch.cu_seqlens,
            batch.max_seqlen,
            self.attention_backend,
            repeated=repeated,
            spans=spans_if_chosen(batch.cu_seqlens, tokens, batch.max_seqlen),
            # Also without pictures: rows with and without them share one compiled graph.
            both_ways=self.both_ways,
        )
        documents.set_pictures(batch.spans)
        if batch.edges:
            documents.set_edges(batch.edges)
        if self.chunk_size is None:
            return documents
        return documents.with_chunks(self.chunk_size)

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states, [rows * length, width]; each document is computed as if it were
        alone."""
        ids = batch.input_ids
        positions = batch.position_ids
        options: dict[str, Any] = {}
        if batch.pictures:
            features = see(self.model, batch.pictures, trains=bool(self.projector))
            options["mm_encoder_outputs"] = {"image": features}
        documents = current_documents()
        # Validation, or a forward outside `step_context`: by identity, so that documents of another
        # batch are never used.
        if documents is None or documents.cu_seqlens is not batch.cu_seqlens:
            documents = self._documents(batch)
        if documents is not None:
            # One row: attention and recurrent layers go by the documents, and every other layer
            # works position by position.
            ids = ids.view(1, -1)
            # Those of a model whose positions have rows and columns: [3, 1, n].
            positions = positions.view(*positions.shape[:-2], 1, -1)
            options["documents"] = documents
        decoder = find_decoder(self.model)
        # Again around the decoder alone: inside `step_context` these are the same documents.
        with use_documents(documents):
            output = decoder(input_ids=ids, position_ids=positions, use_cache=False, **options)
        hidden: Tensor = output.last_hidden_state.flatten(0, 1)
        return hidden if batch.pictures else with_unused(self.projector, hidden)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy summed over positions: hidden [n, width], targets [n]."""
        options = self._loss_options()
        return compute_with_head(chunked_cross_entropy, hidden, self.head, targets, **options)

    def logprobs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Log-probability of each target, fp32 (or fp64) [n], with gradient.

        hidden [n, width], targets [n].
        """
        options = self._loss_options()
        return compute_with_head(token_logprobs, hidden, self.head, targets, **options)

    def _loss_options(self) -> dict[str, Any]:
        return {
            "softcap": self.logit_rule.softcap,
            "scale": self.logit_rule.scale,
            "loss_and_grad_fn": self.loss_and_grad_fn,
        }

    @torch.no_grad()
    def token_scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy of every position that has a label, and whether the most likely token is
        that label.

        Returns:
            fp32 (or fp64) and bool, [rows, length] each; 0 and False where the target is IGNORE.
        """
        # Only positions with a label reach the head: index [n] of the flattened batch.
        index, targets = supervised_positions(batch)
        hidden = self.hidden(batch)[index]
        losses, hits = token_cross_entropy(
            hidden,
            self.head,
            targets,
            softcap=self.logit_rule.softcap,
            scale=self.logit_rule.scale,
        )
        # Scattered back: positions without a label keep 0 and False.
        all_losses = losses.new_zeros(batch.targets.numel())
        all_losses[index] = losses
        all_hits = hits.new_zeros(batch.targets.numel())
        all_hits[index] = hits
        return all_losses.view_as(batch.targets), all_hits.view_as(batch.targets)

    def generate(self, **options: Any) -> Tensor:
        """Token ids that the causal LM continues a prompt with; `options` as of Transformers'
        own."""
        return self.model.generate(**options)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameters by their names in the causal LM; tied ones once."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def describe(self) -> str:
        """The model's class, and how much of it is trained."""
        count = parameter_count(self.model)
        trained = sum(parameter.numel() for _, parameter in self.trained_parameters())
        share = f"{trained:,} of {count:,} parameters are trained ({trained / count:.2%})"
        return f"{type(self.model).__name__}, {share}"


def supervised_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Positions in the flattened batch that have a label, int64 [n], and these labels, int64
    [n]."""
    flat = batch.targets.flatten()
    # Their number is there on the host: nothing waits for a GPU.
    index = torch.nonzero_static(flat != IGNORE, size=batch.supervised).squeeze(1)
    return index, flat[index]
