"""Compiled layers answer as plain ones do, and all layers and batches share their graphs."""

from __future__ import annotations

import copy
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from devices import graphs_compiled
from errors import holds, refuses
from tunesmith.adapter import lora
from tunesmith.batches.batch import Batch, collate
from tunesmith.config.schema import Adapter
from tunesmith.errors import MachineError
from tunesmith.formats import fp8
from tunesmith.loss import loss_and_grad
from tunesmith.model.layers import attention, fused
from tunesmith.model.layers.documents import Documents
from tunesmith.quant.replace import convert_to_eight_bit
from tunesmith.runtime import compilation
from tunesmith.runtime.compilation import (
    CompiledLayer,
    compile_layers,
    compile_loss,
    select_compile,
)
from tunesmith.runtime.recompute import recompute_layers
from tunesmith.tokens.text.example import Example

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def packed_kernel(request, varlen_on_cpu):
    resets = request.node.get_closest_marker("slow") is not None
    forget = compilation.probe_compiler.cache_clear
    if resets:
        torch.compiler.reset()
    yield
    if resets:
        torch.compiler.reset()
    forget()


SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
# A window below the bound of the batches, and biases on q, k and v
TWO_WINDOWS = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


def build(layers: int, family: str = "llama", *, base: str = "dense") -> Any:
    """A model with adapters over a base that is dense in fp64, or in fp8 in fp32."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": layers}
    config = LlamaConfig(**sizes) if family == "llama" else Qwen2Config(**sizes, **TWO_WINDOWS)
    model = AutoModelForCausalLM.from_config(config)
    model = model.double() if base == "dense" else model.float()
    lora.attach_lora(model, Adapter(rank=2), seed=1)
    for _, layer in lora.loras(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        if base == "dense":
            layer.double()
    if base == "fp8":
        kind = fp8.select_scaling(CPU).recipe
        assert kind is not None
        assert convert_to_eight_bit(model, kind) > 0
    fused.fuse_modules(model, project=lora.project)
    model.set_attn_implementation(attention.register())
    return model.train()


def batch(seed: int, *, length: int, bound: int = 32) -> Batch:
    """One packed row of documents of 2 to `bound` tokens, with padding after."""
    random = np.random.default_rng(seed)
    examples, left = [], length - int(random.integers(0, 3))
    while left >= 2:
        n = min(left, int(random.integers(2, bound + 1)))
        examples.append(Example(random.integers(0, 64, n).astype(np.int32), np.arange(n) > 0))
        left -= n
    return collate([examples], length=length, pad_id=0, max_document=bound)


def run(model: Any, b: Batch) -> dict[str, torch.Tensor]:
    torch.manual_seed(b.tokens)
    model.zero_grad()
    hidden = model.model(
        input_ids=b.input_ids,
        position_ids=b.position_ids,
        use_cache=False,
        documents=Documents(b.cu_seqlens, b.max_seqlen, "varlen"),
    ).last_hidden_state
    (hidden * torch.randn_like(hidden)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Counting:
    """A compiler that leaves graphs as they are and counts them."""

    graphs = 0

    def __call__(self, module: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs += 1
        return module


def compare(
    plain: Any,
    backend: Any,
    lengths: tuple[int, ...] = (40, 48, 61),
    *,
    recomputed: int = 0,
    tolerance: float = 1e-10,
) -> None:
    """Fail unless the model has the gradients that it has with its layers compiled."""
    fast = copy.deepcopy(plain)
    recompute_layers(fast.model.layers, recomputed)
    compile_layers(fast.model.layers, varied=True, backend=backend)
    assert all(isinstance(layer, CompiledLayer) for layer in fast.model.layers)
    for n in lengths:
        b = batch(n, length=n)
        got, expected = run(fast, b), run(plain, b)
        assert expected.keys() == got.keys()
        for name, reference in expected.items():
            assert reference.norm() > 0
            assert (got[name] - reference).norm() / reference.norm() < tolerance, name


# In 8 bits a difference in the last bit of fp32 can turn into one of e4m3.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "base", "recomputed", "tolerance", "kinds"),
    [
        ("qwen2", "dense", 0, 1e-10, 2),
        ("llama", "dense", 2, 1e-10, 2),
        ("llama", "fp8", 3, 0.05, 1),
    ],
)
def test_each_kind_of_layer_has_one_graph(family, base, recomputed, tolerance, kinds):
    backend = Counting()
    compare(build(3, family, base=base), backend, recomputed=recomputed, tolerance=tolerance)
    assert backend.graphs == kinds


@pytest.mark.slow
def test_steps_of_one_length_make_no_graph_after_the_first_and_evaluation_none():
    model, backend = build(2), Counting()
    compile_layers(model.model.layers, varied=False, backend=backend)
    for step in range(5):
        b = batch(step, length=96)
        assert len(b.cu_seqlens) > 2
        run(model, b)
        assert backend.graphs == 1, step
    model.eval()
    run(model, batch(1, length=40))
    assert backend.graphs == 1


@pytest.mark.slow
def test_the_real_compiler_answers_alike():
    before = graphs_compiled()
    compare(build(1), "inductor", (40, 56))
    assert graphs_compiled() == before + 1


@pytest.mark.slow
def test_a_compiled_score_is_the_plain_one_for_every_size_of_chunk():
    score, before = compile_loss(loss_and_grad), graphs_compiled()
    for n in (7, 12, 30):
        raw, targets = torch.randn(n, 50, dtype=torch.bfloat16), torch.randint(0, 50, (n,))
        found = score(raw.clone(), targets, None, None, 1.0)
        for got, expected in zip(found, loss_and_grad(raw, targets, None, None, 1.0), strict=True):
            # The compiler keeps fp32 where the plain way does, in another order of adding: one bf16
            # rounding apart.
            torch.testing.assert_close(got, expected, rtol=8e-3, atol=1e-6)
    assert graphs_compiled() == before + 1


def test_the_folder_of_compiled_code_is_the_users_alone(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "compiled"
    assert compilation.private_folder(folder).stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with refuses(MachineError, where=str(folder), fix=["TORCHINDUCTOR_CACHE_DIR"]):
        compilation.private_folder(folder)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with refuses(MachineError, where=str(folder)):
        compilation.private_folder(folder)


@pytest.mark.parametrize(
    ("choice", "device", "fault", "expected"),
    [
        ("auto", "cuda", "", True),
        ("auto", "cuda", "why", False),
        ("auto", "cpu", "", False),
        ("on", "cpu", "", True),
        ("off", "cuda", "", False),
    ],
)
def test_where_layers_are_compiled(choice, device, fault, expected, monkeypatch):
    monkeypatch.setattr(compilation, "compiler_fault", lambda device: fault)
    compiles, why = select_compile(choice, torch.device(device))
    assert compiles is expected
    assert why == fault if fault else why


@pytest.mark.slow
def test_a_compiler_that_does_not_run_is_done_without(monkeypatch):
    assert compilation.compiler_fault(CPU) == ""

    def refuse(*_, **__):
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", refuse)
    fault, assembler = compilation.probe_compiler(CPU)
    assert fault.endswith(": no C++ compiler")
    assert assembler == ""
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: x)
    assert compilation.compiler_fault(CPU) not in ("", fault), "its results are wrong"


# Of Triton 3.6 for a GPU that its ptxas does not know
REFUSAL = "PTXASError: ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'"
# In place of ATTEMPT where there is no GPU: does the assembler that Triton reads for Blackwell know
# one?
ASSEMBLE = """import os, subprocess, sys
sys.exit(subprocess.run([os.environ['TRITON_PTXAS_BLACKWELL_PATH'], '--gpu-name=sm_121a']).returncode)"""


def assembler(folder, *known):
    """A ptxas that knows these chips: it exits as the real one does."""
    file = folder / "bin" / "ptxas"
    file.parent.mkdir(parents=True)
    names = " | ".join(f"--gpu-name={chip}" for chip in known)
    file.write_text(f"#!/bin/sh\ncase $1 in {names}) exit 0;; *) exit 255;; esac\n")
    file.chmod(0o755)
    return str(file)


@pytest.fixture
def blackwell(monkeypatch, tmp_path):
    """A GPU that needs an assembler for sm_121a, by Triton's variables."""
    own = assembler(tmp_path / "triton", "sm_90a")

    def compiled(function):
        path = os.environ.get("TRITON_PTXAS_BLACKWELL_PATH", own)
        if subprocess.run([path, "--gpu-name=sm_121a"], check=False).returncode:
            raise RuntimeError(REFUSAL)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(compilation, "ATTEMPT", ASSEMBLE)
    monkeypatch.setattr(compilation, "glob", lambda pattern: [])
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name in compilation.ASSEMBLERS:  # set and deleted, so that what the code sets is undone
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(Path(assembler(tmp_path / "old", "sm_90a")).parent))
    return tmp_path


# Triton 3.6 reads another variable for Blackwell than the one that most advice names.
@pytest.mark.slow
def test_an_assembler_that_does_not_know_the_chip_is_replaced(blackwell, monkeypatch):
    new = assembler(blackwell / "new", "sm_90a", "sm_121a")
    monkeypatch.setenv("CUDA_HOME", str(blackwell / "new"))
    fault, instead = compilation.probe_compiler(CPU)
    assert fault == ""
    assert [os.environ[name] for name in compilation.ASSEMBLERS] == [new, new]
    assert holds(instead, new, "Triton's")
    monkeypatch.setattr(compilation, "probe_compiler", lambda device: (fault, instead))
    compiles, why = select_compile("auto", torch.device("cuda"))
    assert compiles
    assert new in why
