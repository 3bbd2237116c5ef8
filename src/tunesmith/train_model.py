"""Base classes for training: `TrainModel` is the trained model, and `Method` is how it is trained.

`TrainModel` contains the decoder, the output layer and the loss in one module. All operations on
parameters run inside its forward, because a sharded model gathers its weights there. A direct call
of the decoder or the output layer would find only shards of the weights. The forward calls the
method (for example `methods/sft.py`). A method returns the sum of the losses and the number by
which the sum is divided. It also chooses the batches and the validation of a run. The training loop
is in another module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.batches.batch import IGNORE, Batch
from tunesmith.batches.loader import GlobalBatch, Loader
from tunesmith.batches.training_data import TrainingData
from tunesmith.config.schema import MethodConfig, Run
from tunesmith.distributed.ranks import Ranks
from tunesmith.distributed.vocab_parallel import compute_with_head
from tunesmith.errors import ModelError, RunError
from tunesmith.hub.model_files import ModelFiles
from tunesmith.loss import (
    LossAndGradFn,
    chunked_cross_entropy,
    loss_and_grad,
    token_cross_entropy,
    token_logprobs,
)
from tunesmith.model.known.decoder import find_decoder, find_head, find_layers, trained_projector
from tunesmith.model.known.model_types import BidirectionalPictures
from tunesmith.model.layers import attention
from tunesmith.model.layers.chunked import prepare_chunked_attention
from tunesmith.model.layers.documents import (
    Documents,
    RepeatedTokens,
    current_documents,
    use_documents,
)
from tunesmith.model.layers.packed_attention import spans_if_chosen
from tunesmith.model.layers.recurrent import run_by_document
from tunesmith.model.layers.slots import Slots
from tunesmith.model.layers.vision import (
    add_features_by_place,
    add_zero_gradients,
    picture_features,
    set_text_attention,
)


class MethodOutput(NamedTuple):
    """Sums that a method computes over one micro batch of this rank."""

    loss: Tensor  # 0-d, fp32 or fp64; the sum, not the mean
    # Number of tokens or examples in this micro batch. The summed loss of the global batch is
    # divided by the sum of these numbers.
    denominator: int
    # Sums of the method's metrics, 0-d and detached. They are divided by the same number as the
    # loss.
    metrics: Mapping[str, Tensor] = {}


class StepTotals(NamedTuple):
    """Totals over an optimizer step or over all held-out rows. Each micro batch's loss uses them.

    Attributes:
        examples: number of examples on all ranks.
        chosen_tokens: number of supervised tokens of chosen answers on all ranks.
        mismatched: batches of this data rank in which each prompt is paired with the answer of
            another row. Empty if the method does not set `needs_mismatched`.
        kl: 0-d, the KL estimate that the method computes from `mismatched`. None if it needs none.
    """

    examples: int
    chosen_tokens: int = 0
    mismatched: Sequence[Batch] = ()
    kl: Tensor | None = None


class StopRequests(Protocol):
    """The requests to stop a run, as a method sees them."""

    def is_due(self) -> bool:
        """Return whether all ranks have agreed to stop."""

    def agree(self) -> None:
        """Agree with the other ranks whether to stop. This is a collective call."""

    def cancels_sampling(self) -> bool:
        """Return whether this rank must draw no more tokens."""

    def cancels_validation(self) -> bool:
        """Return whether this rank must end its validation."""


class TrainingSession(Protocol):
    """A running training, as a method sees it.

    Attributes:
        run: the recipe, adapted to the model and the machine.
        total_steps: optimizer steps of the entire run, or None if a time limit ends it.
    """

    run: Run
    files: ModelFiles
    data: TrainingData
    model: TrainModel
    total_steps: int | None
    ranks: Ranks

    @property
    def device(self) -> torch.device:
        """The device of this rank."""

    @property
    def share(self) -> tuple[int, int]:
        """The number of this data rank, and the number of data ranks."""

    def loader(self, start_step: int) -> Loader:
        """Return a loader of global batches that begins with a step."""

    def held_out_loss(self, stop: StopRequests) -> ValidationResult | None:
        """Return the mean loss over the held-out rows, or None if a stop interrupted it."""


class ValidationResult(NamedTuple):
    """Result of a validation: mean loss and metrics over held-out rows.

    Attributes:
        loss: mean loss.
        denominator: the number by which the sum of the losses was divided.
        metrics: metrics of the method, with the names of a step's record.
    """

    loss: float
    denominator: int
    metrics: dict[str, float]


class Method(ABC):
    """Base class of the training methods. A method computes the loss and declares what it needs.

    Attributes:
        metrics: names of the sums in `MethodOutput.metrics`, in order.
        needs_mismatched: whether the loss needs batches in which each prompt is paired with the
            answer of another row.
        validates_first: whether the first validation runs before the first step.
    """

    metrics: Sequence[str] = ()
    needs_mismatched = False
    validates_first = False

    def __init__(self, config: MethodConfig) -> None:
        self.config = config

    @abstractmethod
    def denominator(self, batch: Batch | GlobalBatch) -> int:
        """Return the number by which the loss sum over a micro batch or a global batch is divided.

        The number is computed from the batch's counts `supervised` or `examples`, which are known
        on the host. The number of a global batch is the sum over its micro batches on all ranks.
        """

    def begin_step(
        self, model: TrainModel, totals: StepTotals, add_up: Callable[[Tensor], object]
    ) -> StepTotals:
        """Compute values over the global batch that the losses of its micro batches need. This is a
        collective call.

        Args:
            add_up: sums a tensor over the data ranks, in place.
        """
        return totals

    @abstractmethod
    def __call__(
        self, model: TrainModel, batch: Batch, totals: StepTotals | None = None
    ) -> MethodOutput:
        """Compute the sums of loss and metrics over one micro batch, and its denominator.

        Args:
            totals: totals over the step to which the micro batch belongs. If None, the micro batch
                is treated as an entire step.
        """

    def finish(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Convert the means of the metrics over a step to the metrics of the step's record."""
        return dict(metrics)

    def find_fault(self, metrics: Mapping[str, float]) -> RunError | None:
        """Return an error if the metrics of a step's record show that the run is not valid."""
        return None

    def find_model_fault(self, model: TrainModel) -> ModelError | None:
        """Return an error if the method cannot train the model."""
        return None

    def largest_batch(self, run: Run, loader: Loader) -> Batch:
        """Return the micro batch of the first step that needs most memory, for a memory trial."""
        return next(loader.largest_first(0))

    def batches(
        self,
        session: TrainingSession,
        start_step: int,
        stop: StopRequests,
        ends: Callable[[], bool],
    ) -> AbstractContextManager[Iterable[GlobalBatch]]:
        """Return the global batches of a run, from step `start_step` (from 0).

        Args:
            stop: the requests to stop, for a method that computes for long before a batch.
            ends: returns whether no more batches are needed. It is a collective call.
        """
        return session.loader(start_step)

    def validate(self, session: TrainingSession, stop: StopRequests) -> ValidationResult | None:
        """Validate the model on the held-out rows, by default by the loss.

        Return None if a stop interrupted the validation. This is a collective call.
        """
        return session.held_out_loss(stop)


class MeanOverExamples(Method):
    """Base class of methods whose loss is a mean over examples."""

    def denominator(self, batch: Batch | GlobalBatch) -> int:
        return batch.examples

    def cross_entropy(self, chosen: Tensor, batch: Batch, totals: StepTotals | None) -> Tensor:
        """Compute the cross-entropy per token of the chosen answers, multiplied by the number of
        examples.

        The later division of the loss by the number of examples cancels this factor, so that the
        result is a mean over tokens.

        Args:
            chosen: [pairs], log-probabilities of the chosen answers.
        """
        counts = totals or batch
        return -chosen.sum() * (counts.examples / max(1, counts.chosen_tokens))


class TrainModel(nn.Module):
    """A Transformers causal LM together with its loss.

    Args:
        model: the causal LM. Its parameters keep their names, with the prefix `model.`.
        method: the method that computes the loss. None if no loss is computed.
        attention_backend: backend of tunesmith's block-diagonal attention for flattened batches
            (`attention.select_attention_backend`), or "eager" for Transformers' attention on padded
            rows.
        recurrent: class names of layers with a recurrent state along the sequence. These layers
            process each document as a separate row.
        loss_and_grad_fn: computes the loss of a chunk and its gradient.
        bidirectional_pictures: layers in which the tokens of a picture attend to each other in both
            directions.

    Attributes:
        partial_gradients: names of the parameters whose gradients `tensor.reduce_gradients` sums
            over the tensor-parallel ranks.
        reference: returns a context in which the model has its initial weights. None if the method
            needs no reference, or if all reference values were computed before training.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: Method | None = None,
        *,
        attention_backend: str,
        recurrent: Collection[str] = (),
        loss_and_grad_fn: LossAndGradFn = loss_and_grad,
        bidirectional_pictures: BidirectionalPictures = "",
    ) -> None:
        super().__init__()
        self.model = model
        self.method = method
        self.is_recurrent = bool(recurrent)
        self.layers_name = find_layers(model)
        self.logit_rule = find_head(model)
        self.attention_backend = attention_backend
        self.loss_and_grad_fn = loss_and_grad_fn
        self.bidirectional_pictures = bidirectional_pictures
        self.projector = trained_projector(model)
        # The caller sets these attributes after it has sharded the model and loaded the weights.
        self.partial_gradients: frozenset[str] = frozenset()
        self.reference: Callable[[], AbstractContextManager[None]] | None = None
        self.chunk_size = None  # chunk size of layers with chunked attention, in tokens
        if self.packs_rows:
            self.chunk_size = prepare_chunked_attention(model)
            run_by_document(model, recurrent)
        add_features_by_place(model)
        self.use_attention("training")

    def use_attention(self, purpose: Literal["training", "generate"]) -> None:
        """Select the attention for training, or for a call of Transformers' `generate`, which needs
        an attention with padding masks. This is sdpa if possible.

        Models that cap attention scores (Gemma 2) use eager attention in `generate`, because sdpa
        does not support this and Transformers rejects it.
        """
        self.attention = purpose
        name = "eager"
        if purpose == "generate" and self.model._supports_sdpa:
            name = "sdpa"
        elif purpose == "training" and self.packs_rows:
            name = attention.register()
        set_text_attention(self.model, name)

    @contextmanager
    def attention_for(self, purpose: Literal["training", "generate"]) -> Iterator[None]:
        """Select an attention as `use_attention`. The previous one is restored afterwards."""
        previous = self.attention
        self.use_attention(purpose)
        try:
            yield
        finally:
            self.use_attention(previous)

    @property
    def packs_rows(self) -> bool:
        """Return whether documents may share a row.

        Return False for Transformers' attention, because in some models it does not separate the
        documents of a row.
        """
        return self.attention_backend != "eager"

    @property
    def takes_slots(self) -> bool:
        """Return whether attention is the only layer that needs the earlier tokens of an answer, so
        that the keys and values in `Slots` are sufficient to continue it.
        """
        return self.packs_rows and not self.is_recurrent and self.chunk_size is None

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, in order."""
        return list(self.model.get_submodule(self.layers_name).children())

    @property
    def head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        if head is None:
            raise ModelError(
                f"{type(self.model).__name__} has no output layer",
                fix="use a causal language model",
            )
        return head

    def step_context(self, batch: Batch) -> AbstractContextManager[None]:
        """Return a context for forward and backward of a micro batch.

        The backward must run inside the context too: it recomputes layers, and their attention
        needs the documents of the batch.
        """
        return use_documents(self.documents(batch))

    def forward(
        self, batch: Batch, compute: Callable[[TrainModel, Batch], Any] | None = None
    ) -> Any:
        """Return `compute(self, batch)`, the result for this rank.

        If `compute` is None, the method computes its loss sum and denominator. It treats the batch
        as an entire step.
        """
        compute = compute or self.method
        assert compute is not None
        return compute(self, batch)

    def documents(self, batch: Batch, slots: Slots | None = None) -> Documents | None:
        """Return the documents of a batch, or None for padded rows, which use Transformers'
        attention.

        Args:
            slots: keys and values of the answers that the batch begins or continues.
        """
        if not self.packs_rows:
            return None
        repeated = None if batch.whole is None else RepeatedTokens(*batch.whole)
        tokens = batch.input_ids.numel() if repeated is None else len(repeated.places)
        documents = Documents(
            batch.cu_seqlens,
            batch.max_seqlen,
            self.attention_backend,
            repeated=repeated,
            spans=spans_if_chosen(batch.cu_seqlens, tokens, batch.max_seqlen),
            # Set this for text batches too, so that batches with and without pictures share a
            # compiled graph.
            bidirectional_pictures=self.bidirectional_pictures,
            slots=slots,
        )
        documents.set_pictures(batch.spans)
        if batch.edges:
            documents.set_edges(batch.edges)
        documents.set_shared(batch.shared)
        if self.chunk_size is None:
            return documents
        return documents.with_chunks(self.chunk_size)

    def hidden(self, batch: Batch) -> Tensor:
        """Compute the last hidden states, [rows * length, width]. Documents do not affect each
        other.
        """
        ids = batch.input_ids
        positions = batch.position_ids
        options: dict[str, Any] = {}
        if batch.pictures:
            features = picture_features(self.model, batch.pictures, trains=bool(self.projector))
            options["mm_encoder_outputs"] = {"image": features}
        documents = current_documents()
        # Outside `step_context`, for example during validation, the documents of this batch are not
        # set yet. Compare `cu_seqlens` by identity, so that documents of another batch are never
        # used.
        if documents is None or documents.cu_seqlens is not batch.cu_seqlens:
            documents = self.documents(batch)
        if documents is not None:
            # Flatten the batch to one row. Attention and recurrent layers use the documents, and
            # all other layers process each position separately.
            ids = ids.view(1, -1)
            # Position ids with rows and columns of pictures have the shape [3, 1, n].
            positions = positions.view(*positions.shape[:-2], 1, -1)
            options["documents"] = documents
        decoder = find_decoder(self.model)
        # Outside `step_context`, the documents must be set for the decoder. Inside, this sets the
        # documents that are already set.
        with use_documents(documents):
            output = decoder(input_ids=ids, position_ids=positions, use_cache=False, **options)
        hidden: Tensor = output.last_hidden_state.flatten(0, 1)
        return hidden if batch.pictures else add_zero_gradients(self.projector, hidden)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Compute the cross-entropy summed over positions: hidden [n, width], targets [n]."""
        options = self._loss_options()
        return compute_with_head(chunked_cross_entropy, hidden, self.head, targets, **options)

    def logprobs(self, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
        """Compute the log-probability of each target, fp32 (or fp64) [n], with gradient.

        Args:
            hidden: [n, width].
            targets: [n].
            temperature: the logits are divided by it.
        """
        options = self._loss_options()
        # cap(scale * x) / T is cap'(scale / T * x), where cap' caps at c / T.
        options["scale"] /= temperature
        if options["softcap"] is not None:
            options["softcap"] /= temperature
        return compute_with_head(token_logprobs, hidden, self.head, targets, **options)

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of hidden states [n, width], fp32 [n, vocabulary]."""
        return self.logit_rule.logits(self.head(hidden).float())

    def _loss_options(self) -> dict[str, Any]:
        return {
            "softcap": self.logit_rule.softcap,
            "scale": self.logit_rule.scale,
            "loss_and_grad_fn": self.loss_and_grad_fn,
        }

    @torch.no_grad()
    def token_scores(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute the cross-entropy at every labeled position, and whether the label is the top
        token.

        Returns:
            fp32 (or fp64) and bool, [rows, length] each. Positions whose target is IGNORE have 0
            and False.
        """
        # Only labeled positions reach the output layer. `index` [n] refers to the flattened batch.
        index, targets = supervised_positions(batch)
        hidden = self.hidden(batch)[index]
        rule = self.logit_rule
        losses, hits = token_cross_entropy(
            hidden, self.head, targets, softcap=rule.softcap, scale=rule.scale
        )

        def at_positions(values: Tensor) -> Tensor:
            """Write the values to their positions. Positions without a label have 0 or False."""
            scores = values.new_zeros(batch.targets.numel())
            scores[index] = values
            return scores.view_as(batch.targets)

        return at_positions(losses), at_positions(hits)

    def generate(self, **options: Any) -> Tensor:
        """Generate token ids that continue a prompt. `options` are arguments of Transformers'
        `generate`.
        """
        with self.attention_for("generate"):
            return self.model.generate(**options)

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameters with their names in the causal LM. Tied parameters
        occur once.
        """
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                yield name, parameter


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set the model to eval mode, and disable gradients. The mode is restored afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def supervised_positions(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the labeled positions of the flattened batch and their labels, both int64 [n]."""
    flat = batch.targets.flatten()
    # The number of positions is known on the host, so this does not wait for the GPU.
    index = torch.nonzero_static(flat != IGNORE, size=batch.supervised).squeeze(1)
    return index, flat[index]
