"""Measurement of how tunesmith can train a model, using a tiny model of the same type.

Two documents in one packed row must give the same logits and gradients as each document alone with
Transformers' own attention. Layers that pass information from one document to the next are detected
by this test; they then run on one document per row. If packed rows still differ, padded rows are
tested. If these differ as well, the model is refused with the measured differences.
"""

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError, errors_at
from tunesmith.host.files import measure_once
from tunesmith.model.arch.load import build_on_meta
from tunesmith.model.arch.spec import one_line
from tunesmith.model.arch.text_config import has_own_class, text_part
from tunesmith.model.known.architectures import ARCHITECTURES, families_text
from tunesmith.model.known.decoder import (
    drop_other_parts,
    find_decoder,
    find_head,
    find_layers,
    has_vision_language_class,
    head_fits,
)
from tunesmith.model.known.model_types import TUNED_SUPPORT, Errors, Support
from tunesmith.model.layers import attention
from tunesmith.model.layers.chunked import prepare_chunked_attention
from tunesmith.model.layers.documents import Documents, use_documents
from tunesmith.model.layers.recurrent import run_by_document
from tunesmith.model.layers.vision import set_text_attention
from tunesmith.model.measuring.measured_spec import without_labels
from tunesmith.model.measuring.tiny_model import FIRST_SPECIAL_ID, VOCAB, build_tiny_model
from tunesmith.model.weights.names import assign_names, name_in_entire_model
from tunesmith.model.weights.safetensors_files import Config, Entry

SUPPORT_CACHE_VERSION = 9  # increase it if the measurement changes
# Number of tokens of each of the two documents. The numbers are larger than the tiny model's
# windows and chunks, and differ from all widths of the tiny model.
DOCUMENT_LENGTHS = (13, 22)
# Limit for the change of a module's output, relative to its largest value. A larger change means
# that the output contains information from the other document.
LEAK_TOLERANCE = 1e-5
# Arguments of a model's forward that text uses. Others belong to pictures, audio or an encoder.
TEXT_INPUTS = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "use_cache",
    "kwargs",
}
# Smallest random token id. Lower ids have a meaning in some configs: padding, begin, end.
FIRST_ID = 3
# Module name -> slices of its inputs and its outputs that belong to the second document.
Seen = dict[str, tuple[list[Tensor], list[Tensor]]]


@dataclass
class TinyModelOutput:
    """The output of a tiny model: the logits of all tokens, and the gradients of their loss."""

    logits: Tensor  # fp32 [n, vocabulary]
    gradients: dict[str, Tensor]

    def errors(self, expected: "TinyModelOutput") -> Errors:
        largest_gradient = max(map(_largest, expected.gradients.values()))
        worst = 0.0
        for name, gradient in expected.gradients.items():
            # Divide by at least a thousandth of the largest gradient, because a gradient can
            # consist of zeros.
            scale = max(_largest(gradient), 1e-3 * largest_gradient)
            difference = _difference(self.gradients[name], gradient)
            worst = max(worst, difference / scale)
        difference = _difference(self.logits, expected.logits)
        return Errors(difference / _largest(expected.logits), worst)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def _difference(one: Tensor, other: Tensor) -> float:
    """Return the largest difference, or infinity if a value is NaN."""
    difference = _largest(one - other)
    # Convert NaN to infinity, because Python's `max` can ignore NaN.
    if math.isnan(difference):
        return math.inf
    return difference


def find_support(
    config: PretrainedConfig,
    model: Model,
    *,
    where: str,
    full_config: PretrainedConfig | None = None,
) -> Support:
    """Return how tunesmith trains a model with this config.

    Earlier measurements are read from the disk. Models whose repository contains code are measured
    each time, because that code may change. Raise ModelError with the measured differences if the
    model is refused.

    Args:
        where: the name of the config in error messages.
        full_config: the config of the entire model if `config` is the text part of a multimodal
        model.
    """
    text_config = config.get_text_config()
    runs_own_code = model.trust_remote_code and "auto_map" in vars(config)
    measured = text_config
    with errors_at(where):
        if full_config is not None and has_own_class(text_config):
            support = _measure_cached("own class", full_config, measure_own_class)
            _check_not_refused(support, full_config, where)
        elif full_config is not None:
            measured = full_config
        if text_config.model_type in ARCHITECTURES:
            return TUNED_SUPPORT
        if runs_own_code:
            support = measure_support(text_config, trust_remote_code=True)
        else:
            support = _measure_cached("support", measured, measure_support)
    _check_not_refused(support, measured, where)
    return support


def _measure_cached(
    question: str, config: PretrainedConfig, measure: Callable[[PretrainedConfig], Support]
) -> Support:
    # Remove labels from the cache key, so that configs with the same layers share a measurement.
    sizes = without_labels(config.to_dict())
    key = [SUPPORT_CACHE_VERSION, version("transformers"), version("torch"), question, sizes]
    return measure_once("support", key, lambda: measure(config), Support)


def _check_not_refused(support: Support, config: PretrainedConfig, where: str) -> None:
    if support.state == "refused":
        raise ModelError(
            f"{config.model_type} is not supported",
            where=where,
            why=support.why,
            fix=f"use a supported type, such as {families_text()}; `tunesmith models` lists all",
        )


def measure_support(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Support:
    """Measure how tunesmith trains a model of this config. This takes a second or two on a CPU.

    Args:
        config: the config of a text model or of an entire vision-language model.

    Raises:
        ModelError: if `ready_tiny` cannot build a tiny model.
    """
    with ready_tiny(config, trust_remote_code=trust_remote_code) as tiny:
        return measure_tiny(tiny, texts_only=True)


def measure_own_class(full_config: PretrainedConfig) -> Support:
    """Measure whether the text model's own class gives the same logits as the entire model's class.

    If so, only the text model is built. Raise ModelError if `ready_tiny` cannot build a tiny model.
    """
    with ready_tiny(full_config) as tiny:
        ids = _random_ids(tiny)
        config = text_part(tiny.config)
        text = build_on_meta(
            config, Model(name=config.model_type, dtype="fp32"), full_config=tiny.config
        )
        unread = _describe_unread(tiny, text)
        if unread:
            return Support("refused", unread)
        weights = dict(tiny.named_parameters(remove_duplicate=False))
        own_names = dict(text.named_parameters(remove_duplicate=False))
        state = {name: weights[name_in_entire_model(text, name)] for name in own_names}
        # Use strict=False, because `state` has no buffers. The buffers of `text` already have their
        # values.
        text.load_state_dict(state, strict=False, assign=True)
        try:
            with torch.no_grad():
                expected = tiny(input_ids=ids[None], use_cache=False).logits
                logits = text.eval()(input_ids=ids[None], use_cache=False).logits
        # The code of 110 model types can raise any exception.
        except Exception as error:
            # In Transformers 5.24, Llama 4 fails on text without pictures, but only after its text
            # model has computed the logits. That text model has the same class as `text`, so the
            # logits are equal.
            if any(type(part) is type(text) for part in tiny.modules()):
                return Support("packed")
            return _does_not_run(tiny, error)
        errors = Errors(_difference(logits, expected) / _largest(expected), 0.0)
        if errors.are_rounding():
            return Support("packed", errors=errors)
        why = f"{type(tiny).__name__} computes other logits than {type(text).__name__}"
        return Support("refused", f"{why}, by {errors.logits:.1e} of the largest", errors=errors)


@contextmanager
def ready_tiny(
    config: PretrainedConfig, *, trust_remote_code: bool = False
) -> Iterator[PreTrainedModel]:
    """Yield a tiny model of this config for a measurement, with one thread and gradients enabled.

    Raise ModelError if no tiny model can be built from the config.
    """
    threads = torch.get_num_threads()
    # Use one thread, so that the summation order does not depend on the machine.
    torch.set_num_threads(1)
    try:
        tiny = build_tiny_model(config, trust_remote_code=trust_remote_code)
        with torch.enable_grad():
            yield tiny
    finally:
        torch.set_num_threads(threads)


def measure_tiny(tiny: PreTrainedModel, *, texts_only: bool = False) -> Support:
    """Measure whether and how tunesmith can train the tiny model on text.

    Args:
        texts_only: whether to remove the parts of a vision-language model that are not needed for
            text, as in a run without pictures.
    """
    ids = _random_ids(tiny)
    try:
        with LinearCalls(tiny) as linears:
            # Reference result: all other layouts are compared with it.
            alone = _run_alone(tiny, ids)
        has_head = head_fits(tiny, find_head(tiny))
    except Exception as error:
        return _does_not_run(tiny, error)
    if not has_head:
        return Support("refused", "its logits are not those of its last linear layer")
    if looks_ahead(tiny, ids):
        return Support("refused", "a token's logits depend on later tokens: not causal")
    unused = linears.unused(alone.gradients)
    if unused:
        return Support("refused", f"text tokens never reach {unused}: it attends to an encoder")
    dead_targets = linears.dead_targets()
    if texts_only and has_vision_language_class(tiny):
        drop_other_parts(tiny)
        unread = _describe_unread(tiny, tiny)
        if unread:
            return Support("refused", unread)
    try:
        # Padded rows are the fallback if packed rows fail.
        padded = _run_padded(tiny, ids).errors(alone)
        fault = ""
    except Exception as error:
        padded = Errors(math.inf, math.inf)
        fault = one_line(error)
    packs_eager = _packs_eager(tiny, ids, alone)
    why = ""
    try:
        # Prepare the layers for packed rows, before `find_recurrent` runs the tiny model on a
        # packed row.
        chunk_size = prepare_chunked_attention(tiny)
        set_text_attention(tiny, attention.register())
        recurrent = find_recurrent(tiny, ids)
        bypassed = find_bypassed(tiny, recurrent, ids)
        dead_targets = tuple(dict.fromkeys((*dead_targets, *bypassed)))
        run_by_document(tiny, recurrent)
        errors = _run_packed(tiny, ids, chunk_size).errors(alone)
        if errors.are_rounding():
            why = (
                f"documents share rows; {', '.join(recurrent)} run on one row per document"
                if recurrent
                else "documents share rows"
            )
            return Support("packed", why, recurrent, dead_targets, packs_eager, errors)
        why = errors.describe()
    except Exception as error:
        why = _describe(error)
    # Packed rows failed for the reason in `why`.
    if padded.are_rounding():
        return Support(
            "padded",
            "one document per row: packed documents give different results than single ones "
            f"({why})",
            dead_targets=dead_targets,
            errors=padded,
        )
    return Support(
        "refused",
        "a document padded on the right gives different results than without padding: "
        f"{fault or padded.describe()}",
        errors=None if fault else padded,
    )


def _describe_unread(entire: PreTrainedModel, text: PreTrainedModel) -> str:
    """Return why the text model cannot be read from the entire model's checkpoint, or "" if it can.

    The checkpoint is assumed to have the form in which Transformers writes it.
    """
    file = Path("model.safetensors")
    entries = [
        Entry(name, "F32", tuple(tensor.shape), file, 0, 4 * tensor.numel())
        for name, tensor in revert_weight_conversion(entire, entire.state_dict()).items()
    ]
    try:
        assign_names(text, {file: entries}, dict(text.named_parameters()).keys())
    except ModelError as error:
        return f"its checkpoints are stored in an unsupported form: {error.why}"
    return ""


def _random_ids(tiny: PreTrainedModel) -> Tensor:
    # In a vision-language model, the largest ids are placeholders, for example of pictures.
    end = FIRST_SPECIAL_ID if has_vision_language_class(tiny) else VOCAB
    generator = torch.Generator().manual_seed(0)
    return torch.randint(FIRST_ID, end, (sum(DOCUMENT_LENGTHS),), generator=generator)


def _with_other_ids(ids: Tensor, changed: slice) -> Tensor:
    """Return a copy of the ids in which each id in `changed` is replaced by the next id."""
    others = ids.clone()
    others[changed] = (ids[changed] - FIRST_ID + 1) % (VOCAB - FIRST_ID) + FIRST_ID
    return others


def _does_not_run(tiny: PreTrainedModel, error: Exception) -> Support:
    """Return a refusal for a model whose forward fails on text. It names the missing inputs."""
    known = inspect.signature(tiny.forward).parameters.keys() - TEXT_INPUTS
    missing = sorted(name for name in known if re.search(rf"\b{name}\b", str(error)))
    if missing:
        return Support(
            "refused", f"it does not support text alone: its forward requires {', '.join(missing)}"
        )
    return Support("refused", f"a tiny model of this type does not run: {_describe(error)}")


def _describe(error: Exception) -> str:
    """Return the message of the error. For our own errors, omit the reason and the fix."""
    if isinstance(error, ModelError):
        return error.what
    return one_line(error)


def _run_alone(tiny: PreTrainedModel, ids: Tensor) -> TinyModelOutput:
    """Run each document separately with Transformers' own forward."""
    outputs = []
    for document in ids.split(DOCUMENT_LENGTHS):
        positions = torch.arange(len(document))[None]
        output = tiny(input_ids=document[None], position_ids=positions, use_cache=False)
        logits = output.logits[0]
        if len(logits) != len(document):
            raise ModelError(f"it returns {len(logits)} logits for {len(document)} tokens")
        outputs.append(logits)
    return differentiate(tiny, torch.cat(outputs), ids)


@torch.no_grad()
def looks_ahead(tiny: PreTrainedModel, ids: Tensor) -> bool:
    """Return whether the last token of a document changes the logits of earlier tokens."""
    others = _with_other_ids(ids, slice(len(ids) - 1, None))
    logits = tiny(input_ids=ids[None], use_cache=False).logits
    other_logits = tiny(input_ids=others[None], use_cache=False).logits
    return not _is_same(logits[0, :-1], other_logits[0, :-1])


def _run_padded(tiny: PreTrainedModel, ids: Tensor) -> TinyModelOutput:
    """Run one document per row, padded on the right and without a mask, as `TrainModel` does."""
    rows = pad_sequence(ids.split(DOCUMENT_LENGTHS), batch_first=True)
    documents, longest = rows.shape
    hidden = _hidden(tiny, rows, torch.arange(longest).expand(documents, -1))
    tokens = [row[:length] for row, length in zip(hidden, DOCUMENT_LENGTHS, strict=True)]
    # Select the logits of the real tokens in the order of the packed row.
    return differentiate(tiny, logits_of(tiny, torch.cat(tokens)), ids)


def _packs_eager(tiny: PreTrainedModel, ids: Tensor, alone: TinyModelOutput) -> bool:
    """Return whether packed rows are correct if only the positions separate the documents.

    Some models, for example GPT-OSS, do not use the positions to build their mask.
    """
    try:
        hidden = _hidden(tiny, ids[None], _positions())
        packed = differentiate(tiny, logits_of(tiny, hidden[0]), ids)
    except Exception:  # the code of 140 model types can raise any exception
        return False
    return packed.errors(alone).are_rounding()


def _run_packed(tiny: PreTrainedModel, ids: Tensor, chunk_size: int | None) -> TinyModelOutput:
    """Run all documents in one row with tunesmith's attention, as `TrainModel` does."""
    documents = packed_documents(DOCUMENT_LENGTHS, chunk_size)
    with use_documents(documents):
        hidden = _hidden(tiny, ids[None], _positions(), documents=documents)
        return differentiate(tiny, logits_of(tiny, hidden[0]), ids)


def packed_documents(lengths: tuple[int, ...], chunk_size: int | None) -> Documents:
    """Return `Documents` for a packed row with documents of these lengths."""
    edges = [0, *accumulate(lengths)]
    documents = Documents(torch.tensor(edges, dtype=torch.int32), max(lengths), "batched_matmul")
    documents.set_edges(edges)
    if chunk_size is None:
        return documents
    return documents.with_chunks(chunk_size)


def _positions() -> Tensor:
    """Return the position of each token in its document: int64 [1, n]."""
    return torch.cat([torch.arange(length) for length in DOCUMENT_LENGTHS])[None]


def _hidden(tiny: PreTrainedModel, ids: Tensor, positions: Tensor, **options: Documents) -> Tensor:
    decoder = find_decoder(tiny)
    output = decoder(input_ids=ids, position_ids=positions, use_cache=False, **options)
    hidden: Tensor = output.last_hidden_state
    return hidden


def _packed_hidden(tiny: PreTrainedModel, ids: Tensor) -> Tensor:
    """Run the packed row of both documents with tunesmith's attention."""
    documents = packed_documents(DOCUMENT_LENGTHS, None)
    with use_documents(documents):
        return _hidden(tiny, ids[None], _positions(), documents=documents)


def logits_of(tiny: PreTrainedModel, hidden: Tensor) -> Tensor:
    head = tiny.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(tiny).__name__} has no head apart from its decoder")
    return find_head(tiny).logits(head(hidden))


def differentiate(tiny: PreTrainedModel, logits: Tensor, ids: Tensor) -> TinyModelOutput:
    """Return the logits [n, vocabulary] and the gradients of a loss over all logits."""
    tiny.zero_grad()
    # Every logit gets a label, including the last one, so that all logits affect the loss.
    F.cross_entropy(logits, ids.roll(-1), reduction="sum").backward()
    gradients = {}
    for name, parameter in tiny.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad
            gradients[name] = torch.zeros_like(parameter) if gradient is None else gradient.clone()
    return TinyModelOutput(logits.detach(), gradients)


@torch.no_grad()
def find_recurrent(tiny: PreTrainedModel, ids: Tensor) -> tuple[str, ...]:
    """Return the class names of layers that pass information from the first document to the second.

    The model runs twice with different first documents. A recurrent layer gets the same second
    document as its input, but returns a different output. If such modules are nested, only the
    innermost ones are returned.
    """
    others = _with_other_ids(ids, slice(DOCUMENT_LENGTHS[0]))
    first = _record_second_document(tiny, ids)
    second = _record_second_document(tiny, others)
    leaking = []
    for name, (inputs, outputs) in first.items():
        other_inputs, other_outputs = second[name]
        # Skip modules whose inputs or outputs do not contain the second document.
        if not inputs or not outputs or len(inputs) != len(other_inputs):
            continue
        same_input = all(map(_is_same, inputs, other_inputs))
        same_output = all(map(_is_same, outputs, other_outputs))
        # The input of the second document is equal but its output is not: the first document
        # affects it.
        if same_input and not same_output:
            leaking.append(name)
    innermost = [
        name for name in leaking if not any(other.startswith(f"{name}.") for other in leaking)
    ]
    return tuple({type(tiny.get_submodule(name)).__name__: None for name in innermost})


@torch.no_grad()
def find_bypassed(
    tiny: PreTrainedModel, class_names: Collection[str], ids: Tensor
) -> tuple[str, ...]:
    """Return the names of linear layers in these classes whose weight is read by other code.

    Mamba's fused kernels read the weight of `out_proj` directly in training, so an adapter on this
    layer would be ignored. If the kernels' package is missing, the layer calls the forward of its
    parts, so gradients do not reveal the problem. Therefore this function detects that the layer's
    code reads the weight, which happens without the package too.
    """
    layers = find_layers(tiny)
    watched = []
    for module in tiny.get_submodule(layers).modules():
        if type(module).__name__ in class_names:
            watched += [part for part in module.modules() if type(part) is nn.Linear]
    if not watched:
        return ()
    for part in watched:
        part.__class__ = _WatchedLinear
    # Use train mode, because the fused kernels run only in training.
    tiny.train()
    try:
        _packed_hidden(tiny, ids)
        names = [
            target_of(name, f"{layers}.")
            for name, module in tiny.named_modules()
            if isinstance(module, _WatchedLinear) and module.is_read
        ]
        return tuple(dict.fromkeys(names))
    finally:
        tiny.eval()
        for part in watched:
            part.__class__ = nn.Linear


class _WatchedLinear(nn.Linear):
    """A linear layer that records whether code other than its forward reads its weight."""

    is_running = False
    is_read = False

    def forward(self, x: Tensor) -> Tensor:
        self.is_running = True
        try:
            return super().forward(x)
        finally:
            self.is_running = False

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        # Parameters are not in the instance's `__dict__`, so Python looks them up with
        # `__getattr__`.
        if name == "weight" and not self.is_running:
            self.is_read = True
        return super().__getattr__(name)


def _is_same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    return _difference(one, other) <= LEAK_TOLERANCE * max(_largest(one), 1e-6)


def _record_second_document(tiny: PreTrainedModel, ids: Tensor) -> Seen:
    """Run the packed row, and return the inputs and outputs of each module in the layers.

    They contain only the slices of the second document.
    """
    seen: Seen = {}

    def slices(values: Iterable[object]) -> list[Tensor]:
        tensors = []
        for value in values:
            if isinstance(value, tuple | list):
                tensors += slices(value)
            elif (
                isinstance(value, Tensor)
                and value.is_floating_point()
                # Only tensors [1, tokens of both documents, ...] have a token dimension.
                and value.shape[:2] == (1, len(ids))
            ):
                # Clone the slice, because later layers may write to the tensor.
                tensors.append(value[:, DOCUMENT_LENGTHS[0] :].clone())
        return tensors

    def note(
        name: str, _module: nn.Module, args: tuple[object, ...], kwargs: Config, output: object
    ) -> None:
        seen[name] = (slices((*args, *kwargs.values())), slices((output,)))

    layers = find_layers(tiny)
    with ExitStack() as hooks:
        for name, module in tiny.get_submodule(layers).named_modules(prefix=layers):
            hook = module.register_forward_hook(partial(note, name), with_kwargs=True)
            hooks.callback(hook.remove)
        _packed_hidden(tiny, ids)
    return seen


class LinearCalls(ExitStack):
    """A context that records which linear layers are called and which pass on a gradient."""

    def __init__(self, tiny: PreTrainedModel) -> None:
        super().__init__()
        prefix = f"{find_layers(tiny)}."
        # Full name of a linear layer -> its name within the decoder layer, without indices.
        self.targets: dict[str, str] = {}
        self.called: set[str] = set()
        self.alive: set[str] = set()
        for name, module in tiny.named_modules():
            if isinstance(module, nn.Linear) and name.startswith(prefix):
                self.targets[name] = target_of(name, prefix)
                self.callback(module.register_forward_hook(self._note(name)).remove)

    def _note(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def note_gradient(gradient: Tensor) -> None:
            if bool(gradient.any()):
                self.alive.add(self.targets[name])

        def note(_module: nn.Module, _args: object, output: object) -> None:
            self.called.add(name)
            if isinstance(output, Tensor) and output.requires_grad:
                # The hook is called when the output's gradient is computed. If nothing uses the
                # output, it is not called.
                output.register_hook(note_gradient)

        return note

    def unused(self, gradients: dict[str, Tensor]) -> str:
        """Return the name of a linear layer in cross-attention to an encoder that text never uses.

        Return "" if there is none.
        """
        for name, target in self.targets.items():
            weight = gradients.get(f"{name}.weight")
            if name in self.called or weight is None or bool(weight.any()):
                continue
            if "encoder_attn" in name or "crossattention" in name:
                return target
        return ""

    def dead_targets(self) -> tuple[str, ...]:
        """Return the names of linear layers whose output has no gradient in any decoder layer.

        Either other code reads their weight (Mamba's dt_proj), or they only select tokens (an
        indexer).
        """
        targets = dict.fromkeys(self.targets.values())
        return tuple(target for target in targets if target not in self.alive)


def target_of(name: str, prefix: str) -> str:
    """Return a module's name within its layer, without indices, for example "mlp.experts.w1"."""
    parts = name.removeprefix(prefix).split(".")
    return ".".join(part for part in parts if not part.isdigit())
