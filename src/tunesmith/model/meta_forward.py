"""One forward of a model on meta: what each of its layers is asked for, and keeps for a backward.

Nothing is computed. Attention is replaced by a function that notes its sizes and keeps what a
FlashAttention keeps; experts run as grouped products. All else runs as Transformers wrote it:
recurrent layers in plain PyTorch, unless their kernels are installed.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tunesmith.errors import ModelError

NAME = "tunesmith-sizes"


@dataclass
class LayerCall:
    """What one layer was seen to do.

    Attributes:
        heads, kv_heads, head_dim, value_dim, window, softcap: of its attention; 0 heads: it has
            none.
        experts_per_token: of experts that are called through Transformers' interface; 0: of none.
        kept: bytes of tensors that autograd keeps for the backward, parameters not counted.
    """

    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    value_dim: int = 0
    window: int | None = None
    softcap: float | None = None
    experts_per_token: int = 0
    kept: int = 0


class Watch:
    """The calls of a forward, layer by layer; `layer` is the one that runs."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[LayerCall] = []
        self.layer = LayerCall()  # what comes before the first
        # Alive until the end, so that no later storage gets the number of an earlier one.
        self.storages = {StorageWeakRef(tensor.untyped_storage()) for tensor in model.parameters()}
        self.storages |= {StorageWeakRef(tensor.untyped_storage()) for tensor in model.buffers()}

    def enter(self, _module: nn.Module, _args: Any) -> None:
        self.layer = LayerCall()
        self.calls.append(self.layer)

    def leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self.layer = LayerCall()

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves, unless its memory is there anyway."""
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference not in self.storages:
            self.storages.add(reference)
            self.layer.kept += storage.nbytes()
        return tensor

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Attention as Transformers calls it: [1, heads, n, d] -> [1, n, heads, value_dim]."""
        self.layer.heads = query.shape[1]
        self.layer.kv_heads = key.shape[1]
        self.layer.head_dim = query.shape[-1]
        self.layer.value_dim = value.shape[-1]
        self.layer.window = options.get("sliding_window")
        self.layer.softcap = options.get("softcap")
        return KeptAttention.apply(query, key, value), None  # type: ignore[no-untyped-call]

    def experts(
        self, module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Experts as Transformers calls them: [n, hidden] -> [n, hidden]."""
        self.layer.experts_per_token = top_k_index.shape[-1]
        output: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](
            module, hidden, top_k_index, top_k_weights
        )
        return output


class KeptAttention(torch.autograd.Function):
    """Keeps what a kernel of attention keeps: its inputs and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        _, heads, length, _ = query.shape
        output = query.new_empty(1, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


def run_on_meta(model: PreTrainedModel, tokens: int, *, training: bool = False) -> list[LayerCall]:
    """What each decoder layer of a model on meta does with one document of so many tokens.

    The model cannot be trained after it: its attention and experts are replaced. ModelError where
    it does not run on meta.

    Args:
        training: count what autograd keeps, of a model whose parameters that train are marked.
    """
    watch = Watch(model)
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(watch.enter)
        layer.register_forward_hook(watch.leave)
    AttentionInterface.register(NAME, watch.attention)
    model.set_attn_implementation(NAME)
    if any(hasattr(module, "num_experts") for module in model.modules()):
        ALL_EXPERTS_FUNCTIONS.register(NAME, watch.experts)
        with_interface: Callable[[str], None] = model.set_experts_implementation
        with_interface(NAME)
    embedding = model.get_input_embeddings()
    if training:
        # Of frozen embeddings the first layer would keep less than the others.
        embedding.register_forward_hook(lambda _module, _args, output: output.requires_grad_())
    model.to("meta")  # buffers too
    model.train(training)
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    positions = torch.arange(tokens, device="meta")[None]
    counted = saved_tensors_hooks(watch.keep, lambda tensor: tensor) if training else nullcontext()
    with torch.set_grad_enabled(training), counted:
        model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1)
    return watch.calls


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers: of those with as many entries as the config has layers, the
    largest.
    """
    count = model.config.get_text_config().num_hidden_layers
    layers = nn.ModuleList()
    most = 0
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) != count:
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        if size > most:
            most = size
            layers = module
    if not layers:
        raise ModelError(
            f"no list of {count} layers in {type(model).__name__}",
            why="parameters and memory are counted layer by layer",
            fix="take a causal language model of Transformers",
        )
    return layers
