"""The cuts of a model's layers over ranks, by Transformers' own plan for its type.

The plan (`base_model_tp_plan` of the config) says which linear layers are sharded by output rows
(colwise) and which by input columns (rowwise). A block is a module that has one rowwise layer and
colwise ones before it: attention, or an MLP. Everything outside the blocks must work token by
token on vectors of the hidden size, as norms do; everything inside them that is not cut must be of
one head, or of no width at all. What the plan or this rule does not cover is refused by name.

Experts are not cut, whatever the plan says of them. With their router they work token by token, so
that each rank computes all experts for its own tokens, without an exchange.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.formats.linear import FrozenLinear
from tunesmith.model.decoder import find_decoder, find_layers
from tunesmith.model.fused import FusedNorm
from tunesmith.quant.linear_layers import is_plain_linear

TENSOR_KEY = "parallel.tensor"
COLWISE = "colwise"
ROWWISE = "rowwise"
# A norm over one head, whose gradients are summed; latent keys, of which each head reads all.
WHOLE_STYLES = ("replicated_with_grad_allreduce", "mla_kv_a_proj")
# Attention whose norms are over all heads (OLMo 2, 3, OLMoE, MiniMax M2): Transformers gathers the
# heads for them, and splits them after; here ranks share the sum of squares.
GATHERED = {"colwise_gather_output": COLWISE, "rowwise_split_input": ROWWISE}
NORM_PROJECTIONS = {"q_norm": "q_proj", "k_norm": "k_proj"}
# Latent attention: its queries have such layers too, which plans do not name.
LATENT_QUERIES = ("q_a_proj",)
# All experts of a layer, and what chooses among them.
EXPERTS_STYLE = "moe_tp_experts"
ROUTER = "router"
# A module that computes with parameters of its own, which other entries name.
OWN_PARAMETERS = "local_params"
# What Transformers' plans leave out, of types that are cut as others of their kind.
ATTENTION = {
    "layers.*.self_attn.q_proj": COLWISE,
    "layers.*.self_attn.k_proj": COLWISE,
    "layers.*.self_attn.v_proj": COLWISE,
    "layers.*.self_attn.o_proj": ROWWISE,
}
LATENT_ATTENTION = {
    "layers.*.self_attn.q_proj": COLWISE,
    "layers.*.self_attn.q_b_proj": COLWISE,
    "layers.*.self_attn.kv_a_proj_with_mqa": "mla_kv_a_proj",
    "layers.*.self_attn.kv_b_proj": COLWISE,
    "layers.*.self_attn.o_proj": ROWWISE,
}
ADDED_PLANS: dict[str, dict[str, str]] = {
    "deepseek_v3": LATENT_ATTENTION,
    "gpt_oss": {
        **ATTENTION,
        "layers.*.self_attn.sinks": COLWISE,
        "layers.*.self_attn": OWN_PARAMETERS,
        "layers.*.mlp.experts": EXPERTS_STYLE,
    },
    "granitemoe": ATTENTION,
    "granitemoeshared": ATTENTION,
    "qwen2_moe": {
        "layers.*.mlp.shared_expert.gate_proj": COLWISE,
        "layers.*.mlp.shared_expert.up_proj": COLWISE,
        "layers.*.mlp.shared_expert.down_proj": ROWWISE,
    },
}
# An embedding, which is sharded by the vocabulary whatever the plan says.
EMBEDDING = "embed_tokens"


@dataclass
class ParallelBlock:
    """A module of which each rank computes a part of the heads or columns.

    Attributes:
        module: attention or MLP.
        colwise: its layers that are sharded by output rows.
        rowwise: the one behind them, sharded by input columns.
        whole: its other linear layers, which every rank computes.
        norms: those over all heads, of which each rank has a part.
        by_head: names of its own parameters [heads], of which each rank has a part.
    """

    name: str
    module: nn.Module
    colwise: dict[str, nn.Linear | FrozenLinear] = field(default_factory=dict)
    rowwise: dict[str, nn.Linear | FrozenLinear] = field(default_factory=dict)
    whole: dict[str, nn.Linear | FrozenLinear] = field(default_factory=dict)
    norms: dict[str, FusedNorm] = field(default_factory=dict)
    by_head: list[str] = field(default_factory=list)

    @property
    def kv_heads(self) -> int | None:
        """Heads of keys and values; None in an MLP, and where keys are no layer of their own."""
        keys = self.colwise.get("k_proj")
        if keys is None:
            return None
        head_dim: int = vars(self.module)["head_dim"]
        return keys.out_features // head_dim


def find_blocks(model: PreTrainedModel) -> list[ParallelBlock]:
    """The blocks of a causal LM, fused and with an adapter or not; on meta or not.

    ModelError where Transformers has no plan for the type, or the model has a part of which it is
    not known how ranks share it.
    """
    decoder = find_decoder(model)
    config = decoder.config.get_text_config()
    plan = {**(config.base_model_tp_plan or {}), **ADDED_PLANS.get(config.model_type, {})}
    if not plan:
        raise _unsupported(model, "Transformers has no tensor-parallel plan for it")
    if not type(decoder).__module__.startswith("transformers."):
        raise _unsupported(model, "its code is not part of Transformers")
    experts = [
        name for name, _ in decoder.named_modules() if plan.get(_pattern(name)) == EXPERTS_STYLE
    ]
    blocks: dict[str, ParallelBlock] = {}
    for name, module in decoder.named_modules():
        action = plan.get(_pattern(name), "")
        if not action or name == EMBEDDING or action == OWN_PARAMETERS:
            continue
        if _is_in(name, experts):
            continue
        parent, _, child = name.rpartition(".")
        if parent not in blocks:
            owner = decoder.get_submodule(parent)
            blocks[parent] = ParallelBlock(parent, owner, norms=_norms_of_heads(owner))
        block = blocks[parent]
        if block.norms:
            action = GATHERED.get(action, action)
        groups = {
            COLWISE: block.colwise,
            ROWWISE: block.rowwise,
            **dict.fromkeys(WHOLE_STYLES, block.whole),
        }
        if action not in groups:
            raise _unsupported(model, f"Transformers' plan is {action} for {name}")
        if isinstance(module, nn.Linear | FrozenLinear) and is_plain_linear(module):
            groups[action][child] = module
    for block in blocks.values():
        if len(block.rowwise) != 1 or not block.colwise:
            raise _unsupported(model, f"{block.name} has no pair of layers that ranks share")
    _check_rest(model, decoder, blocks, plan, _whole_modules(model, decoder, experts))
    return list(blocks.values())


def _pattern(name: str) -> str:
    """The name of a module as plans write it: `layers.*.mlp.up_proj`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _is_in(name: str, modules: Iterable[str]) -> bool:
    """Tell whether a module of this name is one of `modules`, or in one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _whole_modules(
    model: PreTrainedModel, decoder: PreTrainedModel, experts: Iterable[str]
) -> set[str]:
    """The modules that work token by token, whatever they hold: experts and what routes to them.

    Those are all of a mixture's module but its blocks, the shared experts.
    """
    layers = set(model.get_submodule(find_layers(model)).children())
    whole = set()
    for name in experts:
        mixture = name.rpartition(".")[0]
        if decoder.get_submodule(mixture) in layers:
            # Beside attention and MLP (Gemma 4): the two that make a mixture, by name.
            whole |= {name, f"{mixture}.{ROUTER}"}
        else:
            whole.add(mixture)
    return whole


def _norms_of_heads(attention: nn.Module) -> dict[str, FusedNorm]:
    """The norms of an attention that are over all heads, if their code is supported; else none."""
    norms = {}
    parts = dict(attention.named_children())
    for name, projection in NORM_PROJECTIONS.items():
        norm = parts.get(name)
        layer = parts.get(projection)
        if not isinstance(norm, FusedNorm) or not isinstance(layer, nn.Linear | FrozenLinear):
            return {}
        if norm.weight.numel() != layer.out_features:
            return {}
        norms[name] = norm
    return norms


def _check_rest(
    model: PreTrainedModel,
    decoder: PreTrainedModel,
    blocks: Mapping[str, ParallelBlock],
    plan: Mapping[str, str],
    whole: Collection[str],
) -> None:
    """ModelError for a parameter outside the cut layers of an unsupported kind.

    Notes what of a block is cut beside its layers, or stays whole.

    Args:
        whole: modules whose parameters may have any shape.
    """
    embedding = decoder.get_input_embeddings()
    hidden = embedding.embedding_dim
    for name, module in decoder.named_modules():
        if module is embedding:
            continue
        block = _block_of(name, blocks)
        if block is None and _is_in(name, whole):
            continue
        # Of the block itself only the parameters that are its own are left to check.
        if block is not None and block.name != name:
            child = name[len(block.name) + 1 :]
            if child in block.colwise or child in block.rowwise or child in block.norms:
                continue
            if child in block.whole:
                continue
            if block.whole and child in LATENT_QUERIES:
                assert isinstance(module, nn.Linear | FrozenLinear)
                block.whole[child] = module
                continue
        for key, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{key}" if name else key
            action = plan.get(_pattern(full_name))
            heads = decoder.config.get_text_config().num_attention_heads
            if action == COLWISE and block is not None and parameter.shape == (heads,):
                block.by_head.append(key)
                continue
            if action is not None:
                raise _unsupported(model, f"Transformers' plan is {action} for {full_name}")
            if not _is_whole(parameter.shape, block, hidden):
                shape = " x ".join(f"{size:,}" for size in parameter.shape)
                raise _unsupported(model, f"it has {full_name} [{shape}], which is not in the plan")


def _block_of(name: str, blocks: Mapping[str, ParallelBlock]) -> ParallelBlock | None:
    """The block that a module of this name is in, or is."""
    for block_name, block in blocks.items():
        if _is_in(name, [block_name]):
            return block
    return None


def _is_whole(shape: torch.Size, block: ParallelBlock | None, hidden: int) -> bool:
    """Tell whether a parameter can stay whole on every rank."""
    if len(shape) > 1:
        return False
    if shape.numel() == 1:
        return True
    if block is None:
        return shape.numel() == hidden
    if block.whole:
        # A norm of latent attention, before its heads part.
        return any(shape.numel() <= layer.out_features for layer in block.whole.values())
    return bool(shape.numel() == vars(block.module).get("head_dim", 0))


def _unsupported(model: PreTrainedModel, why: str) -> ModelError:
    model_type = find_decoder(model).config.get_text_config().model_type
    return ModelError(
        f"tensor parallelism is not supported for this {model_type}",
        where=TENSOR_KEY,
        why=why,
        fix=f"{TENSOR_KEY}: 1; parallel.shard divides the memory of any model",
    )
