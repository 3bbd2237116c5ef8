"""The CUDA path against its own slower forms: each body runs on the CPU too, where it shows that
the test itself runs.

On a GPU everything is bf16, which rounds to 8 bits (2^-9 = 0.2 % a value): tolerances are a few of
those.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from conftest import byte_tokenizer
from devices import cpu_and_gpu
from recipes import make_run
from tunesmith.adapter import lora
from tunesmith.batches.batch import collate
from tunesmith.build_model import build_model
from tunesmith.hub.model_files import read_model_files
from tunesmith.methods import make_method
from tunesmith.model.layers.attention import attend
from tunesmith.model.layers.documents import Documents
from tunesmith.planning.calibrate import MemoryMeter, calibrate_recompute
from tunesmith.planning.resolve import inference_plan
from tunesmith.planning.run_plan import MemoryEstimate, RunPlan
from tunesmith.runtime import compilation
from tunesmith.runtime.device import prepare_allocator
from tunesmith.runtime.recompute import recompute_layers
from tunesmith.start.build import build
from tunesmith.start.request import Request
from tunesmith.tokens.text.example import Example
from tunesmith.training.session import Session

pytestmark = pytest.mark.slow


def error(got: Tensor, expected: Tensor) -> float:
    """Relative difference in the L2 norm."""
    assert expected.norm() > 0
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def session_of(tiny: Path, folder: Path, **changes: Any) -> Session:
    """A built run in bf16 whose lora_B is drawn: with zeros, gradients of lora_A are zero."""
    changes["model"] = {"dtype": "bf16", **changes.get("model", {})}
    session = build(Request(make_run(tiny, folder, held=False, **changes)))
    source = torch.Generator().manual_seed(3)
    for _, layer in lora.loras(session.model.model):
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=source) * 0.05)
    session.model.train()
    return session


@cpu_and_gpu
@pytest.mark.parametrize("window", [None, 24], ids=["all", "window"])
@pytest.mark.parametrize("heads", [(8, 2), (4, 4)], ids=["grouped", "alike"])
def test_varlen_attention_and_its_gradients_are_those_of_plain_products(device, heads, window):
    """The products are taken in fp32 of the same bf16 values, so 1 % is what bf16 may lose."""
    torch.manual_seed(0)
    lengths = [1, 130, 64, 7, 300]
    edges = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    leaves = [
        torch.randn(sum(lengths), h, 64).to(device, torch.bfloat16)
        for h in (heads[0], heads[1], heads[1])
    ]
    weight = torch.randn(sum(lengths), heads[0], 64).to(device, torch.bfloat16)
    results = []
    for backend, dtype in (("varlen", torch.bfloat16), ("batched_matmul", torch.float32)):
        q, k, v = (leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves)
        out = attend(q, k, v, Documents(edges, 384, backend), window=window)
        out.backward(weight.to(dtype))
        results.append((out.detach(), q.grad, k.grad, v.grad))
    for got, expected in zip(*results, strict=True):
        assert error(got, expected) < 0.01


# In 8 bits the last bit of a norm may round a whole row's values to other numbers, which in e4m3
# are 6 % apart.
@cpu_and_gpu
@pytest.mark.parametrize(
    ("base", "tolerance"),
    [
        pytest.param("none", 0.03, id="bf16"),
        pytest.param("fp8", 0.1, id="fp8", marks=pytest.mark.nightly),
        pytest.param("nf4", 0.03, id="nf4", marks=pytest.mark.nightly),
    ],
)
def test_a_compiled_step_has_the_loss_and_the_gradients_of_an_eager_one(
    device, base, tolerance, tiny, tmp_path, monkeypatch
):
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    if device.type == "cpu":  # no C++ compiler is needed, and no time to wait for one
        eager = partial(compilation.compile_layers, backend="aot_eager")
        monkeypatch.setattr(compilation, "compile_layers", eager)
        monkeypatch.setattr(compilation, "compile_loss", lambda score: score)
    found = []
    for choice in ("off", "on"):
        torch.compiler.reset()
        session = session_of(tiny, tmp_path, model={"quantize": base}, train={"compile": choice})
        assert session.plan.compiled == (choice == "on")
        assert base == "none" or session.plan.base.startswith(base), session.plan.why["base"]
        batch = session.loader(0).batch(0)
        total = torch.zeros((), device=device)
        for micro in batch.micro:
            loss = session.model(micro.to(device)).loss
            loss.backward()
            total += loss.detach()
        gradients = {name: p.grad for name, p in session.model.trained_parameters()}
        found.append((float(total) / batch.supervised, gradients))
    torch.compiler.reset()
    (eager_loss, expected), (loss, got) = found
    assert loss == pytest.approx(eager_loss, rel=0.01)
    assert got.keys() == expected.keys()
    assert len(got) == 2 * 7 * 2  # A and B of seven layers in two blocks
    for name in expected:
        assert error(got[name], expected[name]) < tolerance, name


def fits(model: Any, batch: Any, recomputed: int) -> int:
    """Bytes that torch reserves for a forward and backward, 0 where it ran out of them."""
    recompute_layers(model.layers, recomputed)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        model(batch).loss.backward()
        return torch.cuda.max_memory_reserved()
    except torch.OutOfMemoryError:
        return 0
    finally:
        model.zero_grad(set_to_none=True)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA GPU: a CPU's allocator has no limit"
)
def test_recompute_is_calibrated_without_running_out_of_memory(tmp_path):
    """The limit is halfway between what no and what every layer recomputed needs."""
    layers, tokens, device = 8, 8192, torch.device("cuda", 0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, dtype=torch.bfloat16, pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    run = make_run(tmp_path, tmp_path, held=False, model={"dtype": "bf16"})
    files = read_model_files(tmp_path, run.model)
    model, _ = build_model(
        run,
        files,
        inference_plan(run, files, device),
        method=make_method(run.method),
        weights="random",
    )
    model.train()
    example = Example(np.arange(1024, dtype=np.int32) % 250, np.arange(1024) > 1000)
    batch = collate([[example] * (tokens // 1024)], length=tokens, pad_id=0, max_document=1024)
    batch = batch.to(device)
    kept, recomputed = (fits(model, batch, count) for count in (0, layers))
    assert 0 < recomputed < kept
    limit = (kept + recomputed) // 2
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        assert not fits(model, batch, 0), "the limit must be reached"
        estimate = MemoryEstimate(tokens, weights=limit, recomputed_layer=tokens * 1024 * 2)
        plan = RunPlan(str(device), "varlen", "bf16", layers, memory=estimate)
        failed = torch.cuda.memory_stats()["num_ooms"]
        budget, meter = int(0.9 * limit), MemoryMeter(device)
        plan = calibrate_recompute(model, plan, batch, meter, budget=budget)
        count = plan.recomputed_layers
        assert torch.cuda.memory_stats()["num_ooms"] == failed
        assert 0 < count <= layers
        assert fits(model, batch, count)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        prepare_allocator(device)
