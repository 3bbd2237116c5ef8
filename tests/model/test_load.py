"""Our way of loading against Transformers' from_pretrained, for every family."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.config.schema import Model
from tunesmith.model import load
from tunesmith.model.dtypes import DTYPES
from tunesmith.model.weights import load_weights

from . import families


def ours(folder: Path, dtype: str = "fp32", **more):
    spec = Model(name=str(folder), dtype=dtype)
    built = load.build_on_meta(load.load_configs(folder, spec)[0], spec, **more)
    assert all(p.is_meta for p in built.parameters())
    load.materialize(built, torch.device("cpu"))
    load_weights(built, folder)
    return built.eval()


@pytest.fixture(scope="module", params=sorted(families.VARIANTS))
def family(request, tmp_path_factory) -> Path:
    return families.build(request.param, tmp_path_factory.mktemp("families"))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_tensor_is_from_pretraineds(family: Path, dtype: str) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(family, dtype=DTYPES[dtype]).eval()
    mine = ours(family, dtype)
    for kind in ("named_parameters", "named_buffers"):
        left, right = dict(getattr(mine, kind)()), dict(getattr(theirs, kind)())
        assert left.keys() == right.keys()
        for name, tensor in right.items():
            assert left[name].dtype == tensor.dtype, name
            assert torch.equal(left[name], tensor), name
            assert left[name].requires_grad == tensor.requires_grad
    assert sum(1 for _ in mine.named_buffers()) > 0
    tied = mine.get_input_embeddings().weight is mine.get_output_embeddings().weight
    assert tied == (theirs.get_input_embeddings().weight is theirs.get_output_embeddings().weight)


def test_logits_are_from_pretraineds(family: Path) -> None:
    ids = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32).eval()
    mine = ours(family)
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)


def test_stacks_of_zeros_take_no_memory() -> None:
    """Llama 4 makes its experts so: here 2 GiB, of which the process would grow."""
    config = AutoConfig.for_model(
        "llama4_text", **families.SMALL | {"hidden_size": 1024, "intermediate_size": 8192},
        num_local_experts=32, intermediate_size_mlp=64, head_dim=16, interleave_moe_layer_step=2,
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load.build_on_meta(config, Model(name="here", dtype="fp32"))
    assert model.get_parameter("model.layers.1.feed_forward.experts.gate_up_proj").is_meta
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 20, "KiB"
