"""A forward on the meta device that records the calls and the saved bytes of each layer.

Nothing is computed. Attention is replaced by a function that records its sizes and saves the same
tensors as FlashAttention. Experts run as grouped matmuls. All other code is Transformers' own, and
recurrent layers run in plain PyTorch even if kernels are installed. If several layers are
identical, only the first two run. The results of the second layer are used for the remaining ones.
"""

import inspect
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tunesmith.distributed.torch_private import SavingContext
from tunesmith.model.known.decoder import find_layers
from tunesmith.model.layers.experts import CalledByInterface
from tunesmith.model.layers.vision import set_text_attention

MEASURING_NAME = "tunesmith-sizes"
# Number of tokens of the measured forward. Recurrent layers compute chunks of 64 tokens (Mamba2:
# 256), and 256 is a multiple of both.
MEASURED_TOKENS = 256
GROUPED = "grouped_mm"
# Implementations of experts that the measurement replaces by GROUPED. All other implementations run
# unchanged.
BUILTIN_IMPLEMENTATIONS = (GROUPED, "eager", "batched_mm")
# Types of attributes that are compared to find identical layers. `int` includes `bool`.
PLAIN_TYPES = (int, float, str)


@dataclass
class LayerCall:
    """Sizes and saved bytes of one layer, recorded in a forward.

    Attributes:
        heads, kv_heads, head_dim, value_dim, window, softcap: sizes of the layer's attention.
            `heads` is 0 if the layer has no attention. The heads of several attentions in one layer
            (LongCat) are summed.
        experts_per_token: number of experts per token, or 0 if no module with experts was called
            with the router's choice.
        saved_bytes: bytes that autograd saves for the backward, without parameters.
    """

    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    window: int | None = None
    softcap: float | None = None
    experts_per_token: int = 0
    saved_bytes: int = 0


class Watch:
    """Recorder of the layer calls of one forward.

    Attributes:
        layer: the record of the running layer, or `outside` between layers.
        scale: factor from the size of a recorded tensor to its size in a real run.
        experts_function: Transformers' name of the implementation of the model's experts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[LayerCall] = []
        self.outside = LayerCall()
        self.layer = self.outside
        self.scale = 1
        self.experts_function = GROUPED
        # Key: the `layer_form` of a layer, with the shapes of its arguments. Value: the records and
        # outputs of the layers that have this key.
        self.seen: dict[Hashable, list[tuple[LayerCall, Any]]] = {}
        # Storages that were counted. The references are kept until the end, so that a new storage
        # cannot get the id of a freed storage.
        self.storages: set[StorageWeakRef] = set()
        self.leave_out(model)

    def leave_out(self, module: nn.Module) -> None:
        """Exclude the module's parameters and buffers from the count of saved tensors."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.storages.add(StorageWeakRef(tensor.untyped_storage()))

    def run_layer(
        self, form: Hashable, forward: Callable[..., Any], *args: object, **options: object
    ) -> Any:
        """Run the layer, or return the result of an identical layer if two of them already ran.

        The result of the second identical layer is used, because the first layer may also save
        tensors that all layers share (rotary tables).

        Args:
            form: result of `layer_form`, which is equal for identical layers.
        """
        seen = self.seen.setdefault((form, _outline(args), _outline(options)), [])
        if len(seen) < 2:
            self.layer = LayerCall()
            self.calls.append(self.layer)
            output = forward(*args, **options)
            seen.append((self.layer, output))
            self.layer = self.outside
            return output
        call, output = seen[1]
        self.calls.append(replace(call))
        # Return a new tensor, because the next layer saves its input as it would in a real run.
        if isinstance(output, Tensor):
            return output.clone()
        return (output[0].clone(), *output[1:])

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves, unless its memory is already counted."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference not in self.storages:
            self.storages.add(reference)
            # Count the entire storage, because a view keeps all of it in memory.
            self.layer.saved_bytes += self.scale * storage.nbytes()
        return tensor

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **options: object,
    ) -> tuple[Tensor, None]:
        """Record an attention call: [1, heads, n, d] -> [1, n, heads, value_dim]."""
        self.layer.heads += query.shape[1]
        self.layer.kv_heads += key.shape[1]
        self.layer.head_dim = query.shape[-1]
        self.layer.value_dim = value.shape[-1]
        self.layer.window = sliding_window
        self.layer.softcap = softcap
        return SavingAttention.apply(query, key, value), None

    def looping_experts(
        self,
        forward: Callable[..., Tensor],
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
    ) -> Tensor:
        """Run experts whose own code loops over the selected experts (DBRX, LongCat).

        The loop needs index values, which meta tensors do not have. Therefore every token is
        assigned to the first experts.
        """
        per_token = top_k_index.shape[-1]
        # The router's choice, `top_k_index`, has the shape [tokens, experts per token].
        self.layer.experts_per_token = per_token
        choice = torch.arange(per_token).expand(top_k_index.shape)
        with _IndicesWithValues():
            return forward(hidden, choice, top_k_weights)

    def experts(
        self, module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Record a call of the experts and run them: [n, hidden] -> [n, hidden]."""
        self.layer.experts_per_token = top_k_index.shape[-1]
        if self.experts_function not in BUILTIN_IMPLEMENTATIONS:
            custom_output: Tensor = ALL_EXPERTS_FUNCTIONS[self.experts_function](
                module, hidden, top_k_index, top_k_weights
            )
            return custom_output
        dtype = hidden.dtype
        # Grouped matmuls on meta support only bf16.
        module.to(torch.bfloat16)
        self.leave_out(module)
        # Saved tensors are bf16 here. fp32 activations of a real run are twice as large.
        self.scale = dtype.itemsize // torch.bfloat16.itemsize
        output: Tensor = ALL_EXPERTS_FUNCTIONS[GROUPED](
            module, hidden.bfloat16(), top_k_index, top_k_weights.bfloat16()
        )
        self.scale = 1
        return output.to(dtype)


class _IndicesWithValues(TorchFunctionMode):
    """A mode that allows `index_add` on meta tensors with indices on the CPU."""

    def __torch_function__(
        self, func: Any, _types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.Tensor.index_add, torch.Tensor.index_add_):
            tensor, dim, index, source = args
            args = (tensor, dim, index.to(tensor.device), source)
        return func(*args, **(kwargs or {}))


class SavingAttention(torch.autograd.Function):
    """A replacement for an attention kernel. It saves the tensors that the kernel saves."""

    @staticmethod
    # Input [1, heads, n, d] and output [1, n, heads, d]: the layout of Transformers' attention.
    def forward(ctx: SavingContext, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _, heads, length, _ = query.shape
        output = query.new_empty(1, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


def run_on_meta(
    model: PreTrainedModel, tokens: int, *, training: bool = False
) -> tuple[list[LayerCall], int]:
    """Record what each decoder layer does with one document of `tokens` tokens.

    The model's attention stays replaced, so the model cannot be trained afterwards. Raise
    ModelError if the model does not run on meta.

    Args:
        training: count the tensors that autograd saves. The trained parameters must require
            gradients.

    Returns:
        The record of each layer, and the bytes that are saved outside of the layers.
    """
    try:
        return _run(model, tokens, None, training=training)
    # Run again with a mask, because some models need one: their indexer reads the mask, or their
    # attention reads the values of the positions if there is no mask. Meta tensors have no values.
    # The first run has no mask, because recurrent layers read the values of the mask.
    except (RuntimeError, TypeError):
        mask = torch.zeros(1, 1, tokens, tokens, device="meta")
        return _run(model, tokens, mask, training=training)


def _run(
    model: PreTrainedModel, tokens: int, mask: Tensor | None, *, training: bool
) -> tuple[list[LayerCall], int]:
    """Run one forward, with a mask [1, 1, tokens, tokens] or without one."""
    model.to("meta")  # includes buffers
    watch = Watch(model)
    hooks = []
    replaced = {}
    # Wrap each layer's forward. Tensors that are saved between layers are counted in `outside`.
    for index, layer in enumerate(model.get_submodule(find_layers(model)).children()):
        replaced[layer] = layer.forward
        form = layer_form(layer, index, model.config.get_text_config())
        layer.forward = partial(watch.run_layer, form, layer.forward)
    AttentionInterface.register(MEASURING_NAME, watch.attention)
    set_text_attention(model, MEASURING_NAME)
    has_experts = any(map(count_experts, model.modules()))
    set_experts: Callable[[str], None] = model.set_experts_implementation
    if has_experts:
        watch.experts_function = model.get_experts_implementation()[""]
        ALL_EXPERTS_FUNCTIONS.register(MEASURING_NAME, watch.experts)
        set_experts(MEASURING_NAME)
    for module in model.modules():
        if are_experts(module) and not isinstance(module, CalledByInterface):
            replaced[module] = module.forward
            module.forward = partial(watch.looping_experts, module.forward)
    if training:
        # Make the embeddings require gradients. With frozen embeddings, the first layer would save
        # fewer tensors than the other layers.
        embedding = model.get_input_embeddings()
        hooks.append(embedding.register_forward_hook(lambda *call: call[-1].requires_grad_()))
    model.train(training)
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    positions = torch.arange(tokens, device="meta")[None]
    # Count saved tensors only if training, because otherwise autograd saves nothing.
    counted: AbstractContextManager[object] = nullcontext()
    if training:
        counted = saved_tensors_hooks(watch.keep, lambda tensor: tensor)
    try:
        with torch.set_grad_enabled(training), counted:
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                # One row of logits suffices, because the cost of the head is computed from its
                # weights.
                logits_to_keep=1,
            )
    finally:
        if has_experts:
            set_experts(watch.experts_function)
        for hook in hooks:
            hook.remove()
        for module, forward in replaced.items():
            module.forward = forward
    return watch.calls, watch.outside.saved_bytes


def layer_form(layer: nn.Module, index: int, config: PretrainedConfig) -> Hashable:
    """Return a key that is equal for two decoder layers with identical computations.

    The key contains the modules and their plain attributes, the shapes of the tensors, and the
    config's values for the layer with this index.
    """
    depth = config.num_hidden_layers
    form: list[Hashable] = [
        (key, repr(value[index]))
        for key, value in config.to_dict().items()
        if isinstance(value, list) and len(value) >= depth
    ]
    for name, module in layer.named_modules():
        form.append((name, type(module)))
        for key, value in vars(module).items():
            # `layer_idx` differs in every layer, but it is only used for the cache, which is off.
            if key == "layer_idx":
                continue
            if isinstance(value, (*PLAIN_TYPES, tuple, list)):
                form.append((key, repr(value)))
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        form.append((name, _outline(tensor)))
    return tuple(form)


def _outline(value: object) -> Hashable:
    """Return a layer's arguments with tensors replaced by shape, dtype and requires_grad."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.requires_grad
    if isinstance(value, (tuple, list)):
        return tuple(_outline(part) for part in value)
    if isinstance(value, dict):
        return tuple((key, _outline(part)) for key, part in value.items())
    if value is None or isinstance(value, PLAIN_TYPES):
        return value
    return type(value).__qualname__


def are_experts(module: nn.Module) -> bool:
    """Return whether a module holds all experts of a layer.

    The forward of such a module takes the router's choice for each token.
    """
    return {"top_k_index", "top_k_weights"} <= inspect.signature(module.forward).parameters.keys()


def count_experts(module: nn.Module) -> int:
    """Return the module's number of experts, or 0 if it has no such attribute."""
    return int(getattr(module, "num_experts", 0))
