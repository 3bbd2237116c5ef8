"""The faster parts against Transformers' own modules: outputs and gradients, of every family with a
row and of some without.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm4 import modeling_glm4 as glm4
from transformers.models.helium.modeling_helium import HeliumRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.olmo3 import modeling_olmo3 as olmo3
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter
from tunesmith.model import attention
from tunesmith.model.documents import Documents, use_documents
from tunesmith.model.fused import (
    FusedAttention,
    FusedJoinedMLP,
    FusedMLP,
    FusedNorm,
    FusedZeroCenteredNorm,
    fuse_modules,
)
from tunesmith.model.fused_functions import geglu, rms_norm, rotate, swiglu
from tunesmith.model.recurrent import run_by_document

from . import families

KINDS = (FusedAttention, (FusedMLP, FusedJoinedMLP), (FusedNorm, FusedZeroCenteredNorm))


def random_documents(lengths=(5, 24, 23, 9)):
    torch.manual_seed(5)
    ids = torch.randint(3, 120, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    edges = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return ids, positions, Documents(edges, max(lengths))


def run(model, ids, positions, weight, **options):
    model.zero_grad()
    hidden = model.base_model(
        input_ids=ids, position_ids=positions, use_cache=False, **options
    ).last_hidden_state
    (hidden * weight).sum().backward()
    return hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance):
    torch.testing.assert_close(
        ours[0], theirs[0], rtol=0, atol=tolerance * theirs[0].abs().max().item()
    )
    assert ours[1].keys() == theirs[1].keys()
    assert len(ours[1]) > 0
    for name, reference in theirs[1].items():
        norm = reference.norm()
        assert norm > 0, f"{name}: a zero reference proves nothing"
        assert (ours[1][name] - reference).norm() / norm <= tolerance, name


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", sorted(families.VARIANTS))
def test_every_family_equals_eager_transformers(family, adapted, tmp_path):
    """Packed, fused and through our attention, against Transformers' eager attention with its dense
    block mask.
    """
    folder = families.build(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").train()
    if adapted:
        lora.attach_lora(model, Adapter(rank=3, alpha=9), seed=1)
        for _, layer in lora.loras(model):
            torch.nn.init.normal_(layer.lora_B, std=0.2)
    else:
        model.lm_head.requires_grad_(model.lm_head.weight is model.get_input_embeddings().weight)
    ids, positions, documents = random_documents()
    weight = torch.randn(1, ids.shape[1], model.config.hidden_size)
    fused = copy.deepcopy(model)
    theirs = run(model, ids, positions, weight)
    fuse_modules(fused, project=lora.project)
    for mixins in KINDS:
        count = sum(isinstance(module, mixins) for module in fused.modules())
        assert count >= model.config.num_hidden_layers
    fused.set_attn_implementation(attention.register())
    # fp32 sums in another order, through three layers and an attention.
    assert_same(run(fused, ids, positions, weight, documents=documents), theirs, 3e-5)


# Copies and near copies of the families with a row: settings that bring out what is special about
# each, and how many attentions, MLPs and norms are fused in four layers.
NEIGHBORS = {
    # Positions beyond 8 make the queries grow.
    "ministral3": (
        {
            "sliding_window": 16,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 8, "mscale": 1.0, "mscale_all_dim": 1.0,
            },
        },
        (4, 4, 9),
    ),
    "olmo3": ({"sliding_window": 16}, (4, 4, 17)),
    "glm4": ({"attention_bias": True}, (4, 4, 17)),
    "qwen3_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
        (4, 1, 17),
    ),
    # Three recurrent layers, whose gated norm and projections stay Transformers'.
    "qwen3_5_text": (
        {
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        (1, 4, 11),
    ),
    # Only its norms are.
    "gpt_oss": ({"num_local_experts": 4, "sliding_window": 16}, (0, 0, 9)),
}  # fmt: skip


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", NEIGHBORS)
def test_neighbors_equal_their_own_forwards(name, adapted):
    """Hidden states and each gradient in fp32, through four layers: sums of another order."""
    settings, counts = NEIGHBORS[name]
    sizes = {**families.SMALL, "num_hidden_layers": 4, "head_dim": 16, **settings}
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if adapted:
        lora.attach_lora(model, Adapter(rank=3, alpha=9), seed=1)
        for _, layer in lora.low_ranks(model):
            torch.nn.init.normal_(layer.lora_B, std=0.2)
    model.set_attn_implementation(attention.register())
    if name == "qwen3_5_text":
        run_by_document(model, ["Qwen3_5GatedDeltaNet"])
    ids, positions, documents = random_documents()
    weight = torch.randn(1, ids.shape[1], model.config.hidden_size)
    fused = copy.deepcopy(model)
    assert fuse_modules(fused, project=lora.project) == sum(counts)
    for mixins, count in zip(KINDS, counts, strict=True):
        assert sum(isinstance(module, mixins) for module in fused.modules()) == count
    with use_documents(documents):
        theirs = run(model, ids, positions, weight, documents=documents)
        ours = run(fused, ids, positions, weight, documents=documents)
    # These delta rules magnify: weights that are moved by 6e-8 move the gradients by 1.4e-4 or more
    assert_same(ours, theirs, 1e-4 if name == "qwen3_5_text" else 1e-5)


@pytest.mark.parametrize("family", ["llama-3", "qwen3"])
def test_generation_is_unchanged(family, tmp_path):
    folder = families.build(family, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    fused = copy.deepcopy(plain)
    assert fuse_modules(fused, project=lora.project) > 0
    ids = torch.randint(3, 120, (2, 9))
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(plain.generate(ids, **settings), fused.generate(ids, **settings))


def test_names_and_values_of_the_weights_stay(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(families.build("qwen3", tmp_path))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fuse_modules(model, project=lora.project)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def assert_equal_with_gradients(ours, theirs, *leaves):
    """Value and gradients of two functions of the same float64 leaves."""
    a, b = ours(*leaves), theirs(*leaves)
    weight = torch.randn_like(b)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    got, wanted = (
        torch.autograd.grad((a * weight).sum(), leaves),
        torch.autograd.grad((b * weight).sum(), leaves),
    )
    for x, y in zip(got, wanted, strict=True):
        assert y.abs().max() > 1e-3, "a zero reference proves nothing"
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def leaf(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_swiglu():
    torch.manual_seed(0)
    assert_equal_with_gradients(swiglu, lambda g, u: F.silu(g) * u, leaf(5, 7), leaf(5, 7))


def test_geglu():
    torch.manual_seed(0)
    formula = lambda g, u: F.gelu(g, approximate="tanh") * u  # noqa: E731
    assert_equal_with_gradients(geglu, formula, leaf(5, 7), leaf(5, 7))


def test_rms_norm():
    torch.manual_seed(0)
    formula = lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w  # noqa: E731
    assert_equal_with_gradients(lambda x, w: rms_norm(x, w, 1e-5), formula, leaf(2, 5, 7), leaf(7))


def test_rms_norm_of_zero_centered_weights():
    torch.manual_seed(0)
    formula = lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1 + w)  # noqa: E731
    ours = lambda x, w: rms_norm(x, w, 1e-5, wide=True, offset=1.0)  # noqa: E731
    assert_equal_with_gradients(ours, formula, leaf(2, 5, 7), leaf(7))


@pytest.mark.parametrize(
    ("norm", "form"),
    [
        (LlamaRMSNorm(64, eps=1e-5), {}),
        (Olmo2RMSNorm(64, eps=1e-5), {"wide": True}),
        (HeliumRMSNorm(64, eps=1e-5), {"wide": True}),
        (GemmaRMSNorm(64, eps=1e-5), {"wide": True, "offset": 1.0}),
    ],
    ids=["llama", "olmo2", "helium", "gemma"],
)
def test_rms_norm_rounds_as_transformers_does(norm, form):
    torch.manual_seed(0)
    norm = norm.bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(40, 64).bfloat16()
    assert torch.equal(rms_norm(x, norm.weight, 1e-5, **form), norm(x))


def angles(width):
    """cos and sin [5, width] of two halves alike, as Transformers makes them."""
    half = torch.randn(5, width // 2, dtype=torch.float64)
    both = torch.cat((half, half), -1)
    return both.cos(), both.sin()


@pytest.mark.parametrize("width", [8, 4], ids=["whole heads", "half of each head"])
def test_rotation(width):
    torch.manual_seed(0)
    cos, sin = angles(width)
    theirs = lambda x: qwen3_next.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=1)[0]  # noqa: E731
    assert_equal_with_gradients(lambda x: rotate(x, cos, sin), theirs, leaf(5, 3, 8))


def test_rotation_of_pairs():
    torch.manual_seed(0)
    cos, sin = angles(4)
    theirs = lambda x: glm4.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=1)[0]  # noqa: E731
    by_pairs = [t[:, :2].repeat_interleave(2, -1) for t in (cos, sin)]
    ours = lambda x: rotate(x, *by_pairs, pairs=True)  # noqa: E731
    assert_equal_with_gradients(ours, theirs, leaf(5, 3, 8))


def test_rotation_by_wider_angles_rounds_once():
    """OLMo 3 has cos and sin in fp32 in a bf16 model too."""
    torch.manual_seed(0)
    cos, sin = (t.float() for t in angles(8))
    x = torch.randn(5, 3, 8).bfloat16()
    theirs, _ = olmo3.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=1)
    ours = rotate(x, cos, sin)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)
