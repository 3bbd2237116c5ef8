"""Forward pass of a model that may be larger than the memory. Each weight is read when it is used.

The model is built from Transformers' modules on the meta device, without weights. A linear layer
reads its weight in bands of rows, and the embedding reads only the rows of its tokens. The other
weights of a decoder layer (norms, stacks of experts) are read before the layer computes, and
dropped afterwards. All prompts are in one batch, so that every weight is read once.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tunesmith.adapter.expert_lora import attach_to_stack
from tunesmith.model.known.decoder import find_layers
from tunesmith.model.layers.experts import LORA_SUFFIX, find_experts
from tunesmith.model.layers.vision import set_text_attention
from tunesmith.quant.experts import use_grouped_experts
from tunesmith.quant.linear_layers import is_plain_linear
from tunesmith.quant.llama4_experts import choose_top_k
from tunesmith.tools.export.tuned_weights import (
    ExpertsUpdate,
    LoraUpdate,
    StoredRows,
    TunedModel,
    TunedWeight,
    tied_names,
)

# Values of the weights in the forward pass. "base": the weights before training. "adapter": the
# frozen weights, with the adapter as a separate computation, as in training. "merged": the sum of
# the frozen weights and the adapter.
Values = Literal["base", "adapter", "merged"]


@dataclass(frozen=True)
class _WeightReader:
    """Reader of a model's weights for one forward pass. It converts them to a dtype and a device.

    Attributes:
        weights: the weights by parameter name. A tied weight occurs under both of its names.
    """

    weights: Mapping[str, TunedWeight]
    values: Values
    dtype: torch.dtype
    device: torch.device

    def rows(self, weight: TunedWeight, first: int, last: int) -> Tensor:
        if self.values == "merged":
            rows = weight.rows(first, last)
        else:
            source = weight.base if self.values == "base" else weight.source
            assert source is not None  # `base` is None only after full fine-tuning
            rows = source.rows(first, last)
        return rows.to(self.device, self.dtype if rows.is_floating_point() else rows.dtype)

    def whole(self, weight: TunedWeight) -> Tensor:
        bands = [self.rows(weight, band.start, band.stop) for band in weight.bands()]
        return torch.cat(bands) if weight.shape else bands[0]


class StreamedLinear(nn.Module):
    """Linear layer that reads its weight from disk in each forward: y = x W^T + b.

    With `values="adapter"`, the output of the adapter is added to y.
    """

    def __init__(self, name: str, reader: _WeightReader) -> None:
        super().__init__()
        self.tuned_weight = reader.weights[f"{name}.weight"]
        self.tuned_bias = reader.weights.get(f"{name}.bias")
        self.reader = reader
        # This weight stays on meta. It exists because some models read `weight.dtype` in their
        # forward.
        shape = self.tuned_weight.shape
        self.weight = nn.Parameter(torch.empty(shape, dtype=reader.dtype, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output [..., out_features] for the input x [..., in_features]."""
        weight, reader = self.tuned_weight, self.reader
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        # Multiply one band of rows at a time, so that the entire weight is never in memory.
        for band in weight.bands():
            y[..., band] = F.linear(x, reader.rows(weight, band.start, band.stop))
        if self.tuned_bias is not None:
            y += reader.whole(self.tuned_bias)
        # Apply the adapter to x, as training does, instead of adding it to the weight.
        if reader.values == "adapter" and isinstance(weight.update, LoraUpdate):
            lora_A = weight.update.lora_A.read().to(x)
            lora_B = weight.update.lora_B.read().to(x)
            y += F.linear(F.linear(x, lora_A), lora_B) * weight.update.scaling
        return y


@torch.no_grad()
def streamed_logits(
    tuned: TunedModel,
    prompts: Sequence[Sequence[int]],
    *,
    values: Values,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None = None,
    positions: Sequence[Sequence[int]] | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Compute the logits of each prompt: fp32 [tokens, vocabulary], on the CPU.

    Args:
        values: the values of the weights, see `Values`.
        dtype: dtype of weights and matmuls.
        attention: Transformers' name of the attention implementation; None: the model's default.
        positions: for each prompt the positions whose logits are returned, as [positions,
            vocabulary]; None: all positions. With a vocabulary of 128k, the logits of one position
            take half a megabyte.
        on_layer: function that is called after each decoder layer.
    """
    model = copy.deepcopy(tuned.model).eval()
    # Treat placeholder tokens of pictures as ordinary tokens, as a GGUF file of the text model
    # does. Otherwise Gemma 4 replaces their embeddings.
    for name in ("image_token_id", "video_token_id", "audio_token_id"):
        if hasattr(model.config, name):
            setattr(model.config, name, -1)
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda *_: on_layer())
    if attention is not None:
        set_text_attention(model, attention)
    weights = dict(tuned.weights)
    if values == "adapter":
        weights |= _attach_to_experts(model, tuned)
    for name, first_name in tied_names(model).items():
        # A tied parameter has two names in the model, but is stored only once.
        weights[name] = weights[first_name]
    _stream(model, _WeightReader(weights, values, dtype, device))
    # Pad shorter prompts at the end. No attention mask is needed, because attention is causal.
    ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    if positions is not None:
        _compute_head_at(model, positions)
    logits = model(input_ids=ids.to(device), use_cache=False).logits
    if positions is not None:
        return list(logits[0].float().cpu().split(list(map(len, positions))))
    return [row[: len(prompt)].float().cpu() for row, prompt in zip(logits, prompts, strict=True)]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers of a model, in order."""
    return list(model.get_submodule(find_layers(model)).children())


def _compute_head_at(model: PreTrainedModel, positions: Sequence[Sequence[int]]) -> None:
    """Modify the model so that the output layer only computes the given positions of each prompt.

    The logits of all prompts are concatenated: [1, positions, vocabulary].
    """
    # Indices of all positions in the batch. For example, [[3, 5], [2]] has the rows [0, 0, 1] and
    # the columns [3, 5, 2].
    rows = [row for row, in_prompt in enumerate(positions) for _ in in_prompt]
    columns = [column for in_prompt in positions for column in in_prompt]

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *others = args
        return (hidden[rows, columns].unsqueeze(0), *others)

    model.get_output_embeddings().register_forward_pre_hook(select)


def _attach_to_experts(model: PreTrainedModel, tuned: TunedModel) -> dict[str, TunedWeight]:
    """Add LoRA modules to the stacks of experts of a model.

    Return the weights of the LoRA modules, by their parameter names in the model.
    """
    choose_top_k(model)
    experts = find_experts(model)
    weights = {}
    for name, weight in tuned.weights.items():
        update = weight.update
        if not isinstance(update, ExpertsUpdate):
            continue
        module, _, stack = name.rpartition(".")
        attach_to_stack(experts[module], stack, tuned.recipe.adapter)
        for key, stored in (("lora_A", update.lora_A), ("lora_B", update.lora_B)):
            rows = StoredRows(stored, torch.float32, stored.shape)
            weights[f"{name}{LORA_SUFFIX}.{key}"] = TunedWeight(None, rows)
    if weights:
        model.requires_grad_(False)
        use_grouped_experts(model)
    return weights


def _stream(model: PreTrainedModel, reader: _WeightReader) -> None:
    """Modify a model on the meta device so that its modules read each weight when they use it."""
    # Set the dtype of the parameters on meta too, because some models read it in their forward.
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(reader.dtype)
    # Load the buffers that are stored in the checkpoint. The others were computed when the model
    # was built, so they are only moved to the device.
    for name, module in model.named_modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            stored = reader.weights.get(f"{name}.{key}")
            values = buffer if stored is None else reader.whole(stored).to(buffer.dtype)
            setattr(module, key, values.to(reader.device))
    rest = {}  # modules that do not read their weights themselves, by name
    for name, module in list(model.named_modules()):
        if is_plain_linear(module):
            model.set_submodule(name, StreamedLinear(name, reader))
        elif type(module).forward is nn.Embedding.forward or module is model.get_input_embeddings():
            _read_token_rows(module, reader.weights[f"{name}.weight"], reader)
        else:
            rest[name] = module
    layers = find_layers(model)
    for number, layer in enumerate(decoder_layers(model)):
        prefix = f"{layers}.{number}"
        inside = [name for name in rest if name == prefix or name.startswith(f"{prefix}.")]
        # Read the remaining parameters of a layer directly before the forward of the layer.
        _read_before_forward(layer, {name: rest.pop(name) for name in inside}, reader)
    _read_parameters(rest, reader)


def _read_token_rows(module: nn.Module, weight: TunedWeight, reader: _WeightReader) -> None:
    """Make an embedding read only the rows of its input tokens, in each forward."""
    # Between two forwards the weight is one row of zeros, expanded to the full shape. It must not
    # be on meta, because Llama 4 moves the tokens to the device of the weight, and Gemma 4 reads
    # the row of the padding token.
    row = torch.zeros(1, *weight.shape[1:], dtype=reader.dtype, device=reader.device)
    unread = nn.Parameter(row.expand(weight.shape), requires_grad=False)

    def read(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids, *others = args
        tokens, indices = ids.unique(return_inverse=True)
        rows = [reader.rows(weight, token, token + 1) for token in tokens.tolist()]
        module.weight = nn.Parameter(torch.cat(rows), requires_grad=False)
        return (indices, *others)

    def drop(*_: object) -> None:
        module.weight = unread

    drop()
    # Remove `padding_idx`, which only affects gradients. It is an index into the entire vocabulary
    # and would be out of range for the smaller weight that `read` sets.
    vars(module)["padding_idx"] = None
    module.register_forward_pre_hook(read)
    module.register_forward_hook(drop)


def _read_before_forward(
    layer: nn.Module, modules: Mapping[str, nn.Module], reader: _WeightReader
) -> None:
    """Make a layer read the parameters of `modules` before its forward, and drop them afterwards.

    `modules` are the layer itself and the submodules that do not read their weights themselves.
    """

    def read(*_: object) -> None:
        _read_parameters(modules, reader)

    def drop(*_: object) -> None:
        for module in modules.values():
            for key, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(parameter.to("meta"), requires_grad=False))

    layer.register_forward_pre_hook(read)
    layer.register_forward_hook(drop)


def _read_parameters(modules: Mapping[str, nn.Module], reader: _WeightReader) -> None:
    for name, module in modules.items():
        for key, _ in list(module.named_parameters(recurse=False)):
            values = reader.whole(reader.weights[f"{name}.{key}" if name else key])
            setattr(module, key, nn.Parameter(values, requires_grad=False))
