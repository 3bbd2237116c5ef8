"""The faster parts against Transformers' own modules: outputs and gradients, for every family with
a row and without.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter
from tunesmith.model import attention
from tunesmith.model.architectures import ARCHITECTURES
from tunesmith.model.documents import Documents
from tunesmith.model.fused import fuse_modules
from tunesmith.model.fused_functions import rms_norm, rotate, swiglu

from . import families


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
    changed = fuse_modules(fused, project=lora.project)
    if ARCHITECTURES[family.split("-")[0]].tensor_parallel:
        assert changed > 0
    fused.set_attn_implementation(attention.register())
    # fp32 sums in another order, through three layers and an attention.
    assert_same(run(fused, ids, positions, weight, documents=documents), theirs, 3e-5)


@pytest.mark.parametrize("family", ["llama-3", "qwen3"])
def test_generation_is_unchanged(family, tmp_path):
    folder = families.build(family, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    fused = copy.deepcopy(plain)
    assert fuse_modules(fused) > 0
    ids = torch.randint(3, 120, (2, 9))
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    assert torch.equal(plain.generate(ids, **settings), fused.generate(ids, **settings))


def test_names_and_values_of_the_weights_stay(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(families.build("qwen3", tmp_path))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fuse_modules(model)
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


def test_rms_norm():
    torch.manual_seed(0)
    formula = lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w  # noqa: E731
    assert_equal_with_gradients(lambda x, w: rms_norm(x, w, 1e-5), formula, leaf(2, 5, 7), leaf(7))


def test_rms_norm_rounds_as_transformers_does():
    torch.manual_seed(0)
    norm = LlamaRMSNorm(64, eps=1e-5).bfloat16()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(40, 64).bfloat16()
    assert torch.equal(rms_norm(x, norm.weight, 1e-5), norm(x))


def test_rotation():
    torch.manual_seed(0)
    angles = torch.randn(5, 4, dtype=torch.float64)
    cos, sin = (f(torch.cat((angles, angles), -1)) for f in (torch.cos, torch.sin))
    theirs = lambda x: apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=1)[0]  # noqa: E731
    assert_equal_with_gradients(lambda x: rotate(x, cos, sin), theirs, leaf(5, 3, 8))
