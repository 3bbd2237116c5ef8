"""The measurement, on a model's twin, of whether and how this engine trains the model.

Two documents in one packed row must come out as each of them alone under Transformers' own
attention, in logits and in every gradient. Layers that carry something from one document to the
next are named by it, and run on one row a document. Where that does not hold, padded rows are
tried; where that fails too, the model is refused with the figures.
"""

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from tunesmith.config.schema import Model
from tunesmith.errors import ModelError, errors_at
from tunesmith.host.files import measure_once
from tunesmith.model import attention
from tunesmith.model.architectures import ARCHITECTURES, families_text
from tunesmith.model.chunked import prepare_chunked_attention
from tunesmith.model.decoder import (
    drop_other_parts,
    find_decoder,
    find_head,
    find_layers,
    head_fits,
    is_whole,
)
from tunesmith.model.documents import Documents, use_documents
from tunesmith.model.load import build_on_meta, one_line
from tunesmith.model.measured_spec import NO_SIZES
from tunesmith.model.model_types import Errors, Support
from tunesmith.model.names import assign_names, has_own_class, name_in_whole, text_part
from tunesmith.model.recurrent import run_by_document
from tunesmith.model.safetensors_files import Entry
from tunesmith.model.twin import FIRST_SPECIAL_ID, VOCAB, build_twin
from tunesmith.model.vision import set_text_attention

SUPPORT_CACHE_VERSION = 8  # of the cached files; what is measured, and how, counts
# Tokens of the documents: longer than the twin's windows and chunks, and no width of the twin.
DOCUMENT_LENGTHS = (13, 22)
# Of a module's output: what reaches it from the other document.
LEAK_TOLERANCE = 1e-5
# Inputs of a forward that every text has.
TEXT_INPUTS = {
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "use_cache",
    "kwargs",
}
# Ids below have a meaning in some configs: padding, begin, end.
FIRST_ID = 3
# Name of a module -> what the second document is on its way in and out.
Seen = dict[str, tuple[list[Tensor], list[Tensor]]]

TUNED_SUPPORT = Support(
    "tuned", "this engine's own forwards, held to Transformers' by tests", packs_eager=True
)


@dataclass
class TwinOutput:
    """The output of a twin: logits of all tokens, and the gradient of their loss."""

    logits: Tensor  # fp32 [n, vocabulary]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def errors(self, expected: "TwinOutput") -> Errors:
        largest_gradient = max(
            float(gradient.abs().max()) for gradient in expected.gradients.values()
        )
        worst = 0.0
        for name, gradient in expected.gradients.items():
            # A gradient that is zero everywhere has no scale of its own: a thousandth of the
            # largest.
            scale = max(float(gradient.abs().max()), 1e-3 * largest_gradient)
            worst = max(worst, _difference(self.gradients[name], gradient) / scale)
        scale = float(expected.logits.abs().max())
        return Errors(_difference(self.logits, expected.logits) / scale, worst)


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference; infinite where a value is not a number."""
    difference = float((one - other).abs().max())
    # `max` would pass over a NaN.
    if math.isnan(difference):
        return math.inf
    return difference


def find_support(
    config: PretrainedConfig, model: Model, *, where: str, whole: PretrainedConfig | None = None
) -> Support:
    """Find how a model trains, from its config, which errors call `where`.

    whole: of the entire model that `config` is the text part of.

    What was measured before is read from the disk; the code of a repository, which may change, is
    measured each time. ModelError for a model that is refused, with the figures.
    """
    text_config = config.get_text_config()
    runs_own_code = model.trust_remote_code and "auto_map" in vars(config)
    measured = text_config
    with errors_at(where):
        if whole is not None and has_own_class(text_config):
            support = _measure_cached("own class", whole, measure_own_class)
            _check_not_refused(support, whole, where)
        elif whole is not None:
            measured = whole
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
    sizes = config.to_dict()
    # What does not change the layers: configs that differ in it alone share a measurement.
    for key_without_effect in NO_SIZES:
        sizes.pop(key_without_effect, None)
    key = [SUPPORT_CACHE_VERSION, version("transformers"), version("torch"), question, sizes]
    return measure_once("support", key, lambda: measure(config), Support)


def _check_not_refused(support: Support, config: PretrainedConfig, where: str) -> None:
    if support.state == "refused":
        raise ModelError(
            f"{config.model_type} is not supported",
            where=where,
            why=support.why,
            fix=f"tunesmith models lists the supported types, such as {families_text()}",
        )


def measure_support(config: PretrainedConfig, *, trust_remote_code: bool = False) -> Support:
    """Measure how a model of this config trains, in a second or two, on the CPU.

    `config` is that of a text model, or of a vision-language model in whole. ModelError as
    `ready_twin`.
    """
    with ready_twin(config, trust_remote_code=trust_remote_code) as twin:
        return measure_twin(twin, texts_only=True)


def measure_own_class(whole: PretrainedConfig) -> Support:
    """Measure whether the text model's own class in Transformers computes what the class of the
    entire model does of texts: only the text model is then built.

    ModelError as `ready_twin`.
    """
    with ready_twin(whole) as twin:
        ids = _random_ids(twin)
        config = text_part(twin.config)
        text = build_on_meta(config, Model(name=config.model_type, dtype="fp32"), whole=twin.config)
        unread = _describe_unread(twin, text)
        if unread:
            return Support("refused", unread)
        weights = dict(twin.named_parameters(remove_duplicate=False))
        own_names = dict(text.named_parameters(remove_duplicate=False))
        state = {name: weights[name_in_whole(text, name)] for name in own_names}
        # Not strict: the buffers of a model on meta are real.
        text.load_state_dict(state, strict=False, assign=True)
        try:
            with torch.no_grad():
                expected = twin(input_ids=ids[None], use_cache=False).logits
                logits = text.eval()(input_ids=ids[None], use_cache=False).logits
        # Code of 110 model types.
        except Exception as error:
            # Llama 4 of Transformers 5.24 fails on texts without pictures, after its text model,
            # which is of the same class, has computed the logits.
            if any(type(part) is type(text) for part in twin.modules()):
                return Support("packed")
            return _does_not_run(twin, error)
        errors = Errors(_difference(logits, expected) / float(expected.abs().max()), 0.0)
        if errors.are_rounding():
            return Support("packed", errors=errors)
        why = f"{type(twin).__name__} computes other logits than {type(text).__name__}"
        return Support("refused", f"{why}, by {errors.logits:.1e} of the largest", errors=errors)


@contextmanager
def ready_twin(
    config: PretrainedConfig, *, trust_remote_code: bool = False
) -> Iterator[PreTrainedModel]:
    """The twin of a model, to be measured in the block, on one thread and with gradients.

    ModelError where no twin can be built of its config.
    """
    threads = torch.get_num_threads()
    # Sums of a thread's share in one order, wherever this runs.
    torch.set_num_threads(1)
    try:
        twin = build_twin(config, trust_remote_code=trust_remote_code)
        with torch.enable_grad():
            yield twin
    finally:
        torch.set_num_threads(threads)


def measure_twin(twin: PreTrainedModel, *, texts_only: bool = False) -> Support:
    """Measure how a twin trains on texts.

    texts_only: train an entire model without its other parts. Those of the twin are removed.
    """
    ids = _random_ids(twin)
    try:
        with LinearCalls(twin) as linears:
            # What all other ways are compared with.
            alone = _run_alone(twin, ids)
        has_head = twin.get_output_embeddings() is not None and head_fits(twin, find_head(twin))
    except Exception as error:
        return _does_not_run(twin, error)
    if not has_head:
        return Support("refused", "its logits are not those of its last linear layer")
    if looks_ahead(twin, ids):
        return Support("refused", "a token's logits depend on later tokens: not causal")
    unused = linears.unused(alone.gradients)
    if unused:
        return Support("refused", f"text tokens never reach {unused}: it attends to an encoder")
    dead_targets = linears.dead_targets()
    if texts_only and is_whole(twin):
        drop_other_parts(twin)
        unread = _describe_unread(twin, twin)
        if unread:
            return Support("refused", unread)
    try:
        # Rows of documents that are padded on the right: the fallback when packing fails.
        padded = _run_padded(twin, ids).errors(alone)
        fault = ""
    except Exception as error:
        padded = Errors(math.inf, math.inf)
        fault = one_line(error)
    packs_eager = _packs_eager(twin, ids, alone)
    why = ""
    try:
        # Before the first packed run, which puts its rules on the layers.
        chunk_size = prepare_chunked_attention(twin)
        set_text_attention(twin, attention.register())
        recurrent = find_recurrent(twin, ids)
        bypassed = find_bypassed(twin, recurrent, ids)
        dead_targets = tuple(dict.fromkeys((*dead_targets, *bypassed)))
        run_by_document(twin, recurrent)
        errors = _run_packed(twin, ids, chunk_size).errors(alone)
        if errors.are_rounding():
            why = "documents share rows"
            if recurrent:
                why = f"documents share rows; {', '.join(recurrent)} run on one row a document"
            return Support("packed", why, recurrent, dead_targets, packs_eager, errors)
        why = errors.describe()
    except Exception as error:
        why = error.what if isinstance(error, ModelError) else one_line(error)
    # Packed rows failed; `why` says how.
    if padded.are_rounding():
        return Support(
            "padded",
            f"one document a row: packed documents give different results than single ones ({why})",
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
    """Return why the text model cannot be read from a checkpoint of the entire model, in the form
    in which Transformers writes it; an empty string if it can.
    """
    file = Path("model.safetensors")
    entries = []
    for name, tensor in revert_weight_conversion(entire, entire.state_dict()).items():
        entries.append(Entry(name, "F32", tuple(tensor.shape), file, 0, 4 * tensor.numel()))
    try:
        assign_names(text, {file: entries}, dict(text.named_parameters()).keys())
    except ModelError as error:
        return f"its checkpoints are stored in a form that is not read: {error.why}"
    return ""


def _random_ids(twin: PreTrainedModel) -> Tensor:
    # An entire model has placeholders of pictures among its ids.
    end = FIRST_SPECIAL_ID if is_whole(twin) else VOCAB
    generator = torch.Generator().manual_seed(0)
    return torch.randint(FIRST_ID, end, (sum(DOCUMENT_LENGTHS),), generator=generator)


def _with_other_ids(ids: Tensor, changed: slice) -> Tensor:
    """Return the ids with others in this place: the next one in a circle."""
    others = ids.clone()
    others[changed] = (ids[changed] - FIRST_ID + 1) % (VOCAB - FIRST_ID) + FIRST_ID
    return others


def _does_not_run(twin: PreTrainedModel, error: Exception) -> Support:
    """Refuse a model whose forward fails on texts; name the inputs that the error asks for."""
    known = inspect.signature(twin.forward).parameters.keys() - TEXT_INPUTS
    missing = sorted(name for name in known if re.search(rf"\b{name}\b", str(error)))
    if missing:
        why = f"it takes no text alone: its forward asks for {', '.join(missing)}"
        return Support("refused", why)
    why = error.what if isinstance(error, ModelError) else one_line(error)
    return Support("refused", f"its twin does not run: {why}")


def _run_alone(twin: PreTrainedModel, ids: Tensor) -> TwinOutput:
    """Each document by itself, as Transformers computes it."""
    outputs = []
    for document in ids.split(DOCUMENT_LENGTHS):
        positions = torch.arange(len(document))[None]
        output = twin(input_ids=document[None], position_ids=positions, use_cache=False)
        if len(output.logits[0]) != len(document):
            raise ModelError(f"of {len(document)} tokens it gives {len(output.logits[0])} logits")
        outputs.append(output.logits[0])
    return differentiate(twin, torch.cat(outputs), ids)


@torch.no_grad()
def looks_ahead(twin: PreTrainedModel, ids: Tensor) -> bool:
    """Check whether the last token of a document reaches those before it."""
    others = _with_other_ids(ids, slice(len(ids) - 1, None))
    logits, other_logits = (
        twin(input_ids=row[None], use_cache=False).logits[0, :-1] for row in (ids, others)
    )
    return not _is_same(logits, other_logits)


def _run_padded(twin: PreTrainedModel, ids: Tensor) -> TwinOutput:
    """One document a row, padded on the right, without a mask, as `TrainModel` does."""
    longest = max(DOCUMENT_LENGTHS)
    rows = [
        F.pad(document, (0, longest - len(document))) for document in ids.split(DOCUMENT_LENGTHS)
    ]
    positions = torch.arange(longest).expand(len(DOCUMENT_LENGTHS), -1)
    hidden = _hidden(twin, torch.stack(rows), positions)
    # Logits of the tokens alone, in the order of the packed row.
    tokens = [row[:length] for row, length in zip(hidden, DOCUMENT_LENGTHS, strict=True)]
    return differentiate(twin, logits_of(twin, torch.cat(tokens)), ids)


def _packs_eager(twin: PreTrainedModel, ids: Tensor, alone: TwinOutput) -> bool:
    """Check whether packed documents are each alone where positions alone tell them apart.

    Not every model hands those to its mask (GPT-OSS).
    """
    try:
        hidden = _hidden(twin, ids[None], _positions())
        packed = differentiate(twin, logits_of(twin, hidden[0]), ids)
    except Exception:  # code of 140 model types
        return False
    return packed.errors(alone).are_rounding()


def _run_packed(twin: PreTrainedModel, ids: Tensor, chunk_size: int | None = None) -> TwinOutput:
    """All documents in one row, under this engine's attention, as `TrainModel` does."""
    documents = packed_documents(DOCUMENT_LENGTHS, chunk_size)
    with use_documents(documents):
        hidden = _hidden(twin, ids[None], _positions(), documents=documents)
        return differentiate(twin, logits_of(twin, hidden[0]), ids)


def packed_documents(lengths: tuple[int, ...], chunk_size: int | None) -> Documents:
    """Documents of these lengths, one after another."""
    edges = [0, *accumulate(lengths)]
    documents = Documents(torch.tensor(edges, dtype=torch.int32), max(lengths), "products")
    documents.set_edges(edges)
    if chunk_size is None:
        return documents
    return documents.with_chunks(chunk_size)


def _positions() -> Tensor:
    """Positions in each document: int64 [1, n]."""
    return torch.cat([torch.arange(length) for length in DOCUMENT_LENGTHS])[None]


def _hidden(twin: PreTrainedModel, ids: Tensor, positions: Tensor, **options: Documents) -> Tensor:
    decoder = find_decoder(twin)
    output = decoder(input_ids=ids, position_ids=positions, use_cache=False, **options)
    hidden: Tensor = output.last_hidden_state
    return hidden


def logits_of(twin: PreTrainedModel, hidden: Tensor) -> Tensor:
    head = twin.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(twin).__name__} has no head apart from its decoder")
    return find_head(twin).logits(head(hidden))


def differentiate(twin: PreTrainedModel, logits: Tensor, ids: Tensor) -> TwinOutput:
    """Logits [n, vocabulary] and the gradients of a loss of all of them."""
    twin.zero_grad()
    # A label for each logit, the last one's too: a loss that every logit takes part in.
    targets = ids.roll(-1)
    F.cross_entropy(logits, targets, reduction="sum").backward()
    gradients = {}
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            missing = parameter.grad is None
            gradients[name] = torch.zeros_like(parameter) if missing else parameter.grad.clone()
    return TwinOutput(logits.detach(), gradients)


@torch.no_grad()
def find_recurrent(twin: PreTrainedModel, ids: Tensor) -> tuple[str, ...]:
    """Class names of the layers through which the first document reaches the second.

    With another first document, such a layer gets the same second document and returns another.
    The innermost are named: what holds them does the same.
    """
    documents = packed_documents(DOCUMENT_LENGTHS, None)
    others = _with_other_ids(ids, slice(DOCUMENT_LENGTHS[0]))
    first: Seen = {}
    second: Seen = {}
    with use_documents(documents):
        for row, seen in ((ids, first), (others, second)):
            with _watch_modules(twin, seen):
                _hidden(twin, row[None], _positions(), documents=documents)
    leaking = []
    for name, (inputs, outputs) in first.items():
        other_inputs, other_outputs = second[name]
        # A module that was not seen with the second document says nothing.
        if not inputs or not outputs or len(inputs) != len(other_inputs):
            continue
        same_input = all(map(_is_same, inputs, other_inputs))
        same_output = all(map(_is_same, outputs, other_outputs))
        # Same second document in, another one out: something came from the first.
        if same_input and not same_output:
            leaking.append(name)
    classes = []
    for name in leaking:
        holds_another = any(other.startswith(f"{name}.") for other in leaking)
        if not holds_another:
            classes.append(type(twin.get_submodule(name)).__name__)
    return tuple(dict.fromkeys(classes))


@torch.no_grad()
def find_bypassed(
    twin: PreTrainedModel, class_names: Collection[str], ids: Tensor
) -> tuple[str, ...]:
    """Names, within a layer, of the linear layers whose weight these classes hand to a kernel.

    The fused kernels of Mamba multiply with `out_proj` themselves, in training alone: an adapter on
    it is not computed. Where their package is missing, the layer falls back to the forwards of its
    parts, so that gradients do not show it; the weight is read all the same.
    """
    layers = find_layers(twin)
    watched = []
    for module in twin.get_submodule(layers).modules():
        if type(module).__name__ in class_names:
            watched += [part for part in module.modules() if type(part) is nn.Linear]
    if not watched:
        return ()
    for part in watched:
        part.__class__ = _WatchedLinear
    documents = packed_documents(DOCUMENT_LENGTHS, None)
    # In training: the fused kernels, which read weights past the forward, run only there.
    twin.train()
    try:
        with use_documents(documents):
            _hidden(twin, ids[None], _positions(), documents=documents)
        names = []
        for name, module in twin.named_modules():
            if isinstance(module, _WatchedLinear) and module.is_read:
                names.append(target_of(name, f"{layers}."))
        return tuple(dict.fromkeys(names))
    finally:
        twin.eval()
        for part in watched:
            part.__class__ = nn.Linear


class _WatchedLinear(nn.Linear):
    """A linear layer that notes whether other code reads its weight."""

    is_running = False
    is_read = False

    def forward(self, x: Tensor) -> Tensor:
        self.is_running = True
        try:
            return super().forward(x)
        finally:
            self.is_running = False

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        # `nn.Module` finds parameters by `__getattr__`: they are in no instance's `__dict__`.
        if name == "weight" and not self.is_running:
            self.is_read = True
        return super().__getattr__(name)


def _is_same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    largest = float(one.abs().max())
    return _difference(one, other) <= LEAK_TOLERANCE * max(largest, 1e-6)


@contextmanager
def _watch_modules(twin: PreTrainedModel, seen: Seen) -> Iterator[None]:
    """Note of each module below a layer what the second document is on its way in and out."""

    def second_document(values: Iterable[object]) -> list[Tensor]:
        tensors = []
        for value in values:
            if isinstance(value, tuple | list):
                tensors += second_document(value)
            elif (
                isinstance(value, Tensor)
                and value.is_floating_point()
                # [1, tokens of both documents, ...]: what goes by position in the row.
                and value.shape[:2] == (1, sum(DOCUMENT_LENGTHS))
            ):
                # A clone: later layers may write into it.
                tensors.append(value[:, DOCUMENT_LENGTHS[0] :].clone())
        return tensors

    def watch(name: str, module: nn.Module) -> None:
        def note(
            _module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
        ) -> None:
            inputs = second_document((*args, *kwargs.values()))
            seen[name] = (inputs, second_document((output,)))

        hooks.callback(module.register_forward_hook(note, with_kwargs=True).remove)

    layers = find_layers(twin)
    with ExitStack() as hooks:
        for name, module in twin.get_submodule(layers).named_modules(prefix=layers):
            watch(name, module)
        yield


class LinearCalls(ExitStack):
    """Which linear layers of a model's decoder layers pass a gradient on through their forward.

    Inside its block they are watched.
    """

    def __init__(self, twin: PreTrainedModel) -> None:
        super().__init__()
        prefix = f"{find_layers(twin)}."
        # Each by its name within its layer, which all layers share.
        self.targets: dict[str, str] = {}
        self.called: set[str] = set()
        self.alive: set[str] = set()
        for name, module in twin.named_modules():
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
                # Called when the output's gradient is there: none means that nothing used the
                # product.
                output.register_hook(note_gradient)

        return note

    def unused(self, gradients: dict[str, Tensor]) -> str:
        """A layer that attends to another model, which is not there; "" where there is none."""
        for name, target in self.targets.items():
            weight = gradients.get(f"{name}.weight")
            is_idle = name not in self.called and weight is not None and not bool(weight.any())
            if is_idle and ("encoder_attn" in name or "crossattention" in name):
                return target
        return ""

    def dead_targets(self) -> tuple[str, ...]:
        """Names, within a layer, of those that pass none on in any layer: their weight is read
        past the forward (Mamba's dt_proj), or they only select (an indexer).
        """
        targets = dict.fromkeys(self.targets.values())
        return tuple(target for target in targets if target not in self.alive)


def target_of(name: str, prefix: str) -> str:
    """A module's name within its layer, without numbers: "mixer.dt_proj", "mlp.experts.w1"."""
    parts = name.removeprefix(prefix).split(".")
    return ".".join(part for part in parts if not part.isdigit())
