"""Selection of the layers that tensor parallelism shards. It follows Transformers' plan for the
model type.

The plan (`base_model_tp_plan` of the config) lists the linear layers that are sharded by output
rows (colwise) and by input columns (rowwise). A block is a module with colwise layers followed by
one rowwise layer: attention or an MLP. A module outside the blocks must process each token
separately, and its parameters must be vectors of the hidden size, as in a norm. A parameter inside
a block that is not sharded must belong to a single head or be a scalar. If neither the plan nor
these rules cover a parameter, the model is rejected, and the error names the parameter.

Experts are never sharded, even if the plan shards them. Router and experts process each token
separately, so each rank computes all experts for its own tokens and needs no communication.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from tunesmith.errors import ModelError
from tunesmith.formats.linear import FrozenLinear
from tunesmith.model.known.decoder import find_decoder
from tunesmith.model.layers.fused import FusedNorm
from tunesmith.quant.linear_layers import is_plain_linear

TENSOR_KEY = "parallel.tensor"
COLWISE = "colwise"
ROWWISE = "rowwise"
# Styles in Transformers' plans for layers that every rank holds completely. The first is for a norm
# over one head, whose gradient is summed over the ranks. The second is for the projection to latent
# keys, which all heads read.
REPLICATED_STYLES = ("replicated_with_grad_allreduce", "mla_kv_a_proj")
# Styles in Transformers' plans for attention with norms over all heads (OLMo 2, OLMo 3, OLMoE,
# MiniMax M2), and the styles that replace them. Transformers gathers the heads for the norm and
# splits them again. In tunesmith the layers are sharded like other layers, and the ranks only
# exchange the sum of squares of the norm.
GATHERED = {"colwise_gather_output": COLWISE, "rowwise_split_input": ROWWISE}
NORM_PROJECTIONS = {"q_norm": "q_proj", "k_norm": "k_proj"}
# Layers of latent attention that Transformers' plans do not list. Every rank holds them completely.
LATENT_QUERIES = ("q_a_proj",)
# Style in Transformers' plans for the module with all experts of a layer, and name of the module
# that selects the experts of a token.
EXPERTS_STYLE = "moe_tp_experts"
ROUTER = "router"
# Style in Transformers' plans for a module that has parameters itself. Other entries of the plan
# list these parameters.
OWN_PARAMETERS = "local_params"
# Plans for layers that are missing in Transformers' plans. The layers can be sharded, because
# Transformers shards layers of other model types that have the same structure.
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
# Name of the embedding. It is always sharded by the vocabulary, even if the plan does not list it.
EMBEDDING = "embed_tokens"


@dataclass
class ParallelBlock:
    """An attention or MLP module in which each rank computes some of the heads or columns.

    Attributes:
        name: the name of the module in the decoder.
        module: the attention or MLP module.
        colwise: the layers that are sharded by output rows, by name.
        rowwise: the layer after them, which is sharded by input columns, by name.
        replicated: the other linear layers by name. Every rank computes them completely.
        norms: norms over all heads, by name. Each rank has the part of the weight that belongs to
            its heads.
        by_head: names of the parameters of the module itself that have the shape [heads]. Each rank
            has the elements of its heads.
    """

    name: str
    module: nn.Module
    colwise: dict[str, nn.Linear | FrozenLinear] = field(default_factory=dict)
    rowwise: dict[str, nn.Linear | FrozenLinear] = field(default_factory=dict)
    replicated: dict[str, nn.Linear | FrozenLinear] = field(default_factory=dict)
    norms: dict[str, FusedNorm] = field(default_factory=dict)
    by_head: list[str] = field(default_factory=list)

    @property
    def kv_heads(self) -> int | None:
        """Number of key-value heads. None for an MLP, or if there is no layer `k_proj`."""
        keys = self.colwise.get("k_proj")
        if keys is None:
            return None
        head_dim: int = vars(self.module)["head_dim"]
        return keys.out_features // head_dim


def find_blocks(model: PreTrainedModel) -> list[ParallelBlock]:
    """Find the blocks of a causal LM that tensor parallelism can shard.

    The model may be on the meta device, have fused modules, and have an adapter.

    Raises:
        ModelError: if there is no plan for the model type, or if the model has a parameter that
            neither the plan nor the rules of this module cover.
    """
    decoder = find_decoder(model)
    config = decoder.config.get_text_config()
    plan = {**(config.base_model_tp_plan or {}), **ADDED_PLANS.get(config.model_type, {})}
    if not plan:
        raise _unsupported(model, "Transformers has no tensor-parallel plan for this model type")
    if not type(decoder).__module__.startswith("transformers."):
        raise _unsupported(model, "the model's code is not part of Transformers")
    experts = [
        name for name, _ in decoder.named_modules() if plan.get(_pattern(name)) == EXPERTS_STYLE
    ]
    blocks = {}
    for name, module in decoder.named_modules():
        action = plan.get(_pattern(name))
        if action in (None, OWN_PARAMETERS) or name == EMBEDDING or _is_in(name, experts):
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
            **dict.fromkeys(REPLICATED_STYLES, block.replicated),
        }
        if action not in groups:
            raise _unsupported(
                model, f"Transformers' plan has the unsupported action {action} for {name}"
            )
        if isinstance(module, nn.Linear | FrozenLinear) and is_plain_linear(module):
            groups[action][child] = module
    for block in blocks.values():
        if len(block.rowwise) != 1 or not block.colwise:
            raise _unsupported(
                model, f"the module {block.name} has no pair of layers that ranks can share"
            )
    _check_rest(model, decoder, blocks, plan, _token_wise_modules(experts))
    return list(blocks.values())


def _pattern(name: str) -> str:
    """Return the name of a module in the notation of plans, such as `layers.*.mlp.up_proj`."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _is_in(name: str, modules: Iterable[str]) -> bool:
    """Return whether a module name is one of `modules` or is nested in one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _token_wise_modules(experts: Iterable[str]) -> set[str]:
    """Return the names of mixture-of-experts modules, which process each token separately.

    Every rank holds these modules completely, and their parameters may have any shape. Usually the
    parent module of the experts contains only parts of the mixture, so the name of the parent is
    returned. Shared experts in the parent are an exception: they are blocks and are sharded.
    """
    names = set()
    for name in experts:
        mixture = name.rpartition(".")[0]
        if _pattern(mixture) == "layers.*":
            # In Gemma 4 the parent is the decoder layer itself, which also contains attention and
            # MLP. List only the experts and the router.
            names |= {name, f"{mixture}.{ROUTER}"}
        else:
            names.add(mixture)
    return names


def _norms_of_heads(attention: nn.Module) -> dict[str, FusedNorm]:
    """Return the norms of an attention module that are computed over all heads, by name.

    Return {} if the module has no norms over all heads, or if the class of the norms is not
    supported.
    """
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
    token_wise: Collection[str],
) -> None:
    """Raise ModelError if a parameter outside the sharded layers is not supported.

    If a block has parameters of shape [heads] or additional layers of latent attention, they are
    recorded in the block.

    Args:
        blocks: the blocks by name. They are modified.
        plan: the plan of the model type.
        token_wise: names of modules whose parameters may have any shape.
    """
    embedding = decoder.get_input_embeddings()
    heads = decoder.config.get_text_config().num_attention_heads
    for name, module in decoder.named_modules():
        # The block that contains the module, or is the module itself.
        block = next((block for block in blocks.values() if _is_in(name, [block.name])), None)
        if module is embedding or (block is None and _is_in(name, token_wise)):
            continue
        # Skip the layers and norms of a block that are already recorded in the block. Other
        # parameters of the block are checked below.
        if block is not None and block.name != name:
            child = name[len(block.name) + 1 :]
            if child in block.colwise | block.rowwise | block.norms | block.replicated:
                continue
            if block.replicated and child in LATENT_QUERIES:
                assert isinstance(module, nn.Linear | FrozenLinear)
                block.replicated[child] = module
                continue
        for key, parameter in module.named_parameters(recurse=False):
            full_name = f"{name}.{key}" if name else key
            action = plan.get(_pattern(full_name))
            if action == COLWISE and block is not None and parameter.shape == (heads,):
                block.by_head.append(key)
                continue
            if action is not None:
                raise _unsupported(
                    model,
                    f"Transformers' plan gives {full_name} the action {action}, which is not "
                    "supported for this parameter",
                )
            if not _can_replicate(parameter.shape, block, embedding.embedding_dim):
                shape = " x ".join(f"{size:,}" for size in parameter.shape)
                raise _unsupported(
                    model, f"the plan of Transformers does not cover {full_name} [{shape}]"
                )


def _can_replicate(shape: torch.Size, block: ParallelBlock | None, hidden: int) -> bool:
    """Return whether the shape of a parameter allows every rank to hold the parameter
    completely.
    """
    if len(shape) > 1:
        return False
    if shape.numel() == 1:
        return True
    if block is None:
        return shape.numel() == hidden
    if block.replicated:
        # Accept a norm of latent attention. Its size is at most the output size of a replicated
        # layer, because it normalizes values that all heads share.
        return any(shape.numel() <= layer.out_features for layer in block.replicated.values())
    return bool(shape.numel() == vars(block.module).get("head_dim", 0))


def _unsupported(model: PreTrainedModel, why: str) -> ModelError:
    model_type = find_decoder(model).config.get_text_config().model_type
    return ModelError(
        f"tensor parallelism is not supported for this {model_type} model",
        where=TENSOR_KEY,
        why=why,
        fix=f"set {TENSOR_KEY}: 1; parallel.shard distributes any model over the ranks",
    )
