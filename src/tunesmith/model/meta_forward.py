"""One forward of a model on meta: what each of its layers is called with, and saves for a backward.

Nothing is computed. Attention is replaced by a function that notes its sizes and keeps what a
FlashAttention keeps; experts run as grouped products. All else runs as Transformers wrote it:
recurrent layers in plain PyTorch, whatever kernels are installed. Of layers that are alike two run;
they stand for the others.
"""

import inspect
from collections.abc import Callable, Hashable
from contextlib import nullcontext
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
from tunesmith.model.decoder import find_layers
from tunesmith.model.experts import CalledByInterface, HasExperts
from tunesmith.model.vision import set_text_attention

MEASURING_NAME = "tunesmith-sizes"
GROUPED = "grouped_mm"
# Implementations of the experts, which all stand for GROUPED here; another computes on meta itself.
OF_TRANSFORMERS = (GROUPED, "eager", "batched_mm")


@dataclass
class LayerCall:
    """The work that one layer was seen to do.

    Attributes:
        heads, kv_heads, head_dim, value_dim, window, softcap: of its attention; 0 heads: it has
            none. Heads of several attentions (LongCat) are added up.
        experts_per_token: of experts whose choice is an argument of theirs; 0: of none.
        saved_bytes: of tensors that autograd saves for the backward, parameters not counted.
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
    """The calls of a forward, layer by layer.

    Attributes:
        layer: the one that runs; `outside` where none does.
        scale: how much larger a saved tensor is than it is here.
        experts_function: how the model computes its experts, by Transformers' name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[LayerCall] = []
        self.outside = LayerCall()
        self.layer = self.outside
        self.scale = 1
        self.experts_function = GROUPED
        # Of each form of layer, called alike: the calls that ran, and what each returned.
        self.seen: dict[Hashable, list[tuple[LayerCall, Any]]] = {}
        # Alive until the end, so that no later storage gets the number of an earlier one.
        self.storages: set[StorageWeakRef] = set()
        self.leave_out(model)

    def leave_out(self, module: nn.Module) -> None:
        """Parameters and buffers are there anyway."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.storages.add(StorageWeakRef(tensor.untyped_storage()))

    def run_layer(
        self, form: Hashable, forward: Callable[..., Any], *args: object, **options: object
    ) -> Any:
        """A layer's own forward; where two of its form ran, as the second of them.

        The first may keep what all share, such as rotary tables.

        Args:
            form: all that tells this layer from others, as `layer_form` finds it.
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
        # A tensor of its own: the next layer that runs keeps it, as it would this layer's.
        if isinstance(output, Tensor):
            return output.clone()
        return (output[0].clone(), *output[1:])

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves, unless its memory is there anyway."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference not in self.storages:
            self.storages.add(reference)
            # The whole storage: a view keeps all of it alive.
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
        """Attention as Transformers calls it: [1, heads, n, d] -> [1, n, heads, value_dim]."""
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
        """Experts whose own code loops over those that are chosen (DBRX, LongCat).

        Their choice has values here: every token goes to the first ones.
        """
        per_token = top_k_index.shape[-1]
        # The width of the router's choice, [tokens, experts a token].
        self.layer.experts_per_token = per_token
        choice = torch.arange(per_token).expand(top_k_index.shape)
        with _IndicesWithValues():
            return forward(hidden, choice, top_k_weights)

    def experts(
        self, module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Experts as Transformers calls them: [n, hidden] -> [n, hidden]."""
        self.layer.experts_per_token = top_k_index.shape[-1]
        if self.experts_function not in OF_TRANSFORMERS:
            custom_output: Tensor = ALL_EXPERTS_FUNCTIONS[self.experts_function](
                module, hidden, top_k_index, top_k_weights
            )
            return custom_output
        dtype = hidden.dtype
        # On meta grouped products have no other type.
        module.to(torch.bfloat16)
        self.leave_out(module)
        # fp32 activations are twice as large as the bf16 ones that are seen here.
        self.scale = dtype.itemsize // torch.bfloat16.itemsize
        output: Tensor = ALL_EXPERTS_FUNCTIONS[GROUPED](
            module, hidden.bfloat16(), top_k_index, top_k_weights.bfloat16()
        )
        self.scale = 1
        return output.to(dtype)


class _IndicesWithValues(TorchFunctionMode):
    """Lets a tensor on meta be added to at indices on the CPU; PyTorch lets it be read at them."""

    def __torch_function__(
        self, func: Any, _types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.Tensor.index_add, torch.Tensor.index_add_):
            tensor, dim, index, source = args
            args = (tensor, dim, index.to(tensor.device), source)
        return func(*args, **(kwargs or {}))


class SavingAttention(torch.autograd.Function):
    """Saves what a kernel of attention saves: its inputs and its output."""

    @staticmethod
    # The shapes of attention as Transformers calls it: [1, heads, n, d] in, [1, n, heads, d] out.
    def forward(ctx: SavingContext, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _, heads, length, _ = query.shape
        output = query.new_empty(1, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


def run_on_meta(
    model: PreTrainedModel, tokens: int, *, training: bool = False
) -> tuple[list[LayerCall], int]:
    """Record what each decoder layer of a model on meta does with one document of so many tokens,
    and the bytes that are saved outside of the layers.

    The model cannot be trained after it: its attention stays replaced. ModelError where
    it does not run on meta.

    Args:
        training: count what autograd keeps, of a model whose parameters that train are marked.
    """
    try:
        return _run(model, tokens, None, training=training)
    # Indexers read a mask, and attention of a model's own would find documents in the positions,
    # which have no values here. With a whole mask neither happens; but recurrent layers read its
    # values too.
    except (RuntimeError, TypeError):
        mask = torch.zeros(1, 1, tokens, tokens, device="meta")
        return _run(model, tokens, mask, training=training)


def _run(
    model: PreTrainedModel, tokens: int, mask: Tensor | None, *, training: bool
) -> tuple[list[LayerCall], int]:
    """One try, with a mask [1, 1, tokens, tokens] or none."""
    model.to("meta")  # buffers too
    watch = Watch(model)
    hooks = []
    replaced = {}
    # Around the layers: what autograd keeps between them is counted in `outside`.
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
        # Of frozen embeddings the first layer would keep less than the others.
        embedding = model.get_input_embeddings()
        hooks.append(embedding.register_forward_hook(lambda *call: call[-1].requires_grad_()))
    model.train(training)
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    positions = torch.arange(tokens, device="meta")[None]
    # Without training nothing is saved for a backward, and nothing is to count.
    counted = saved_tensors_hooks(watch.keep, lambda tensor: tensor) if training else nullcontext()
    try:
        with torch.set_grad_enabled(training), counted:
            model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                use_cache=False,
                # The head is counted by its size, not by its run.
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
    """Return what two decoder layers share that do the same with their input: modules, the values
    in them, shapes, and what the config says of the layer with this index.
    """
    depth = config.num_hidden_layers
    form: list[Hashable] = []
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) >= depth:
            form.append((key, repr(value[index])))
    for name, module in layer.named_modules():
        form.append((name, type(module)))
        for key, value in vars(module).items():
            # Its place tells a layer's cache from others', of which there is none.
            if isinstance(value, (bool, int, float, str, tuple, list)) and key != "layer_idx":
                form.append((key, repr(value)))
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        form.append((name, tensor.shape, tensor.dtype, tensor.requires_grad))
    return tuple(form)


def _outline(value: object) -> Hashable:
    """Arguments of a layer without the values of tensors, which there are none of on meta."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.requires_grad
    if isinstance(value, (tuple, list)):
        return tuple(_outline(part) for part in value)
    if isinstance(value, dict):
        return tuple((key, _outline(part)) for key, part in value.items())
    is_plain = value is None or isinstance(value, (bool, int, float, str))
    return value if is_plain else type(value).__qualname__


def are_experts(module: nn.Module) -> bool:
    """Tell whether a module is all experts of a layer, and gets the choice of each token."""
    return {"top_k_index", "top_k_weights"} <= inspect.signature(module.forward).parameters.keys()


def count_experts(module: nn.Module) -> int:
    """The experts that a module says it holds; 0 where it says nothing."""
    return int(module.num_experts) if isinstance(module, HasExperts) else 0
