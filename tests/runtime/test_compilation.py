"""Compiled layers answer as plain ones do, all layers of a model share their graphs, and so do all
batches.
"""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Glm4Config,
    LlamaConfig,
    Ministral3Config,
    Olmo3Config,
    Qwen2Config,
    Qwen3_5TextConfig,
    SmolLM3Config,
)

from devices import graphs_compiled
from errors import holds, refuses
from ranks import run_ranks
from tunesmith.adapter import lora
from tunesmith.config.schema import Adapter
from tunesmith.data.batches.batch import Batch, collate
from tunesmith.data.text.example import Example
from tunesmith.errors import MachineError
from tunesmith.formats import fp8
from tunesmith.formats.linear import FrozenLinear
from tunesmith.formats.nf4 import Nf4
from tunesmith.loss import loss_and_grad
from tunesmith.model import attention, fused
from tunesmith.model.documents import Documents
from tunesmith.quant.replace import convert_to_eight_bit, replace_by_codes
from tunesmith.runtime import compilation
from tunesmith.runtime.compilation import (
    CompiledLayer,
    compile_layers,
    compile_loss,
    select_compile,
)
from tunesmith.runtime.recompute import recompute_layers

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(autouse=True)
def packed_kernel(varlen_on_cpu):
    forget = compilation.probe_compiler.cache_clear
    torch.compiler.reset()
    yield
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
# A window below the bound of the batches, biases on q, k and v, norms of q and k, layers that do
# not rotate, and the forms of families without a row.
FAMILIES = {
    "llama": lambda layers: LlamaConfig(**SIZES, num_hidden_layers=layers),
    "qwen2": lambda layers: Qwen2Config(**SIZES, num_hidden_layers=layers),
    "qwen2, two windows": lambda layers: Qwen2Config(
        **SIZES,
        num_hidden_layers=layers,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=1,
    ),
    "smollm3": lambda layers: SmolLM3Config(
        **SIZES, num_hidden_layers=layers, no_rope_layer_interval=3
    ),
    "ministral3": lambda layers: Ministral3Config(
        **SIZES,
        num_hidden_layers=layers,
        head_dim=8,
        sliding_window=8,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 8,
        },
    ),
    "olmo3, two windows": lambda layers: Olmo3Config(
        **SIZES,
        num_hidden_layers=layers,
        sliding_window=8,
        layer_types=["full_attention", *["sliding_attention"] * (layers - 1)],
    ),
    "glm4": lambda layers: Glm4Config(**SIZES, num_hidden_layers=layers, head_dim=8),
    "qwen3.5, without recurrence": lambda layers: Qwen3_5TextConfig(
        **SIZES,
        num_hidden_layers=layers,
        head_dim=8,
        layer_types=["full_attention"] * layers,
    ),
}


def build(layers: int, family: str = "llama", *, base: str = "dense") -> Any:
    """A model with adapters whose frozen weights are held as `base` says; in fp64 where that is
    dense, else in fp32.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](layers))
    model = model.double() if base == "dense" else model.float()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    if base == "nf4":
        replace_by_codes(model, Nf4(torch.float32), torch.float32)
        for name, layer in model.named_modules():
            if not isinstance(layer, FrozenLinear):
                continue
            layer.to_empty(device="cpu")
            layer.load({"": weights[f"{name}.weight"]}, name)
            if layer.bias is not None:
                layer.bias.data.copy_(weights[f"{name}.bias"])
    lora.attach_lora(model, Adapter(rank=2), seed=1)
    for _, layer in lora.loras(model):
        torch.nn.init.normal_(layer.lora_B, std=0.1)
        if base == "dense":
            layer.double()
    if base == "fp8":
        kind = fp8.select_scaling(torch.device("cpu")).recipe
        assert kind is not None
        assert convert_to_eight_bit(model, kind) > 0
    fused.fuse_modules(model, project=lora.project)
    model.set_attn_implementation(attention.register())
    return model.train()


def batch(seed: int, *, length: int, bound: int = 32) -> Batch:
    """One packed row of documents of 2 to `bound` tokens, up to `length` of them with padding
    after.
    """
    random = np.random.default_rng(seed)
    examples, left = [], length - int(random.integers(0, 3))
    while left >= 2:
        n = min(left, int(random.integers(2, bound + 1)))
        examples.append(Example(random.integers(0, 64, n).astype(np.int32), np.arange(n) > 0))
        left -= n
    return collate([examples], length=length, pad_id=0, max_document=bound)


def run(model: Any, b: Batch, backend: str = "varlen") -> dict[str, torch.Tensor]:
    torch.manual_seed(b.tokens)
    model.zero_grad()
    hidden = model.model(
        input_ids=b.input_ids,
        position_ids=b.position_ids,
        use_cache=False,
        documents=Documents(b.cu_seqlens, b.max_seqlen, backend),
    ).last_hidden_state
    (hidden * torch.randn_like(hidden)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(
    got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-10
) -> None:
    assert expected.keys() == got.keys()
    for name, reference in expected.items():
        assert reference.norm() > 0
        assert (got[name] - reference).norm() / reference.norm() < tolerance, name


class Counting:
    """A compiler that leaves graphs as they are and counts them."""

    graphs = 0

    def __call__(self, module: torch.fx.GraphModule, _: Any) -> Any:
        self.graphs += 1
        return module


def test_the_number_of_graphs_does_not_grow_with_layers_and_lengths():
    """One of the recomputed layers, one of the others."""
    plain, backend = build(5), Counting()
    fast = copy.deepcopy(plain)
    recompute_layers(fast.model.layers, 2)
    compile_layers(fast.model.layers, varied=True, backend=backend)
    assert [isinstance(layer, CompiledLayer) for layer in fast.model.layers] == [True] * 5
    for n in (20, 24, 31, 47):
        assert_alike(run(fast, batch(n, length=n)), run(plain, batch(n, length=n)))
    assert backend.graphs == 2


# Llama is above, Qwen2 below, Qwen3 on two ranks in tests/parallel/test_tensor.py.
@pytest.mark.parametrize(
    ("family", "kinds", "recomputed"),
    [
        ("glm4", 1, False),
        ("ministral3", 1, False),
        ("olmo3, two windows", 2, False),
        ("qwen2, two windows", 2, False),
        ("qwen3.5, without recurrence", 1, False),
        ("smollm3", 2, True),
    ],
)
def test_every_family_has_one_graph_for_each_kind_of_layer(family, kinds, recomputed):
    plain, backend = build(3, family), Counting()
    fast = copy.deepcopy(plain)
    recompute_layers(fast.model.layers, 3 * recomputed)
    compile_layers(fast.model.layers, varied=True, backend=backend)
    for n in (40, 48, 61):
        assert_alike(run(fast, batch(n, length=n)), run(plain, batch(n, length=n)))
    assert backend.graphs == kinds


# In 8 bits a difference in the last bit of fp32 can turn into one of e4m3.
TOLERANCE = {"nf4": 1e-4, "fp8": 0.05}


@pytest.mark.parametrize(
    ("base", "family", "recomputed"), [("fp8", "llama", True), ("nf4", "qwen2", False)]
)
def test_quantised_bases_have_one_graph_too(base, family, recomputed):
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    plain, backend = build(2, family, base=base), Counting()
    fast = copy.deepcopy(plain)
    recompute_layers(fast.model.layers, 2 * recomputed)
    compile_layers(fast.model.layers, varied=True, backend=backend)
    for n in (40, 48, 61):
        assert_alike(
            run(fast, batch(n, length=n)), run(plain, batch(n, length=n)), tolerance=TOLERANCE[base]
        )
    assert backend.graphs == 1


@pytest.mark.parametrize("base", ["fp8", "nf4"])
def test_a_recomputed_layer_leaves_out_the_product_that_nobody_reads(base):
    """down_proj's output goes into the sum after the layer, whose gradient needs no value: of the
    products of q/k/v, o, gate/up and down the backward runs three again.
    """
    if base == "nf4":
        pytest.importorskip("bitsandbytes")
    model, b = build(2, base=base), batch(40, length=40)
    recompute_layers(model.model.layers, 2)
    compile_layers(model.model.layers, varied=True, backend="aot_eager")
    run(model, b)
    with torch.profiler.profile() as profile:
        run(model, b)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["tunesmith::frozen_matmul"] == 2 * (4 + 3)
    assert calls["tunesmith::frozen_matmul_backward"] == 2 * 4
    if base == "nf4":  # forward, forward again without down_proj, and backward
        assert calls["bitsandbytes::dequantize_4bit"] == 2 * (7 + 6 + 7)


@pytest.mark.parametrize("varied", [False, True])
def test_varied_steps_make_no_graph_after_the_first(varied):
    model, backend = build(2), Counting()
    compile_layers(model.model.layers, varied=varied, backend=backend)
    for step in range(14):
        b = batch(step, length=96 + 16 * (step % 7) if varied else 96)
        assert len(b.cu_seqlens) > 2
        run(model, b)
        assert backend.graphs == 1, step


def test_the_real_compiler_answers_alike():
    plain = build(2)
    fast = copy.deepcopy(plain)
    before = graphs_compiled()
    compile_layers(fast.model.layers, varied=True)
    for n in (40, 56):
        assert_alike(run(fast, batch(n, length=n)), run(plain, batch(n, length=n)))
    assert graphs_compiled() == before + 1


def test_without_training_nothing_is_compiled():
    plain, backend = build(2), Counting()
    compile_layers(plain.model.layers, varied=True, backend=backend)
    plain.eval()
    run(plain, batch(1, length=40))
    assert backend.graphs == 0


def test_on_a_cpu_compiled_layers_with_packed_attention_answer_alike():
    """Attention by document stays outside the graphs there."""
    plain = build(2)
    fast = copy.deepcopy(plain)
    compile_layers(fast.model.layers, varied=True, backend="eager")
    b = batch(3, length=40)
    assert_alike(run(fast, b, "products"), run(plain, b, "products"))


def test_a_compiled_score_is_the_plain_one_for_every_size_of_chunk():
    score, before = compile_loss(loss_and_grad), graphs_compiled()
    for n in (7, 12, 30):
        raw, targets = torch.randn(n, 50, dtype=torch.bfloat16), torch.randint(0, 50, (n,))
        for got, expected in zip(
            score(raw.clone(), targets, None, None, 1.0),
            loss_and_grad(raw, targets, None, None, 1.0),
            strict=True,
        ):
            # The compiler keeps fp32 where the plain way does, in another order of adding: one bf16
            # rounding apart.
            torch.testing.assert_close(got, expected, rtol=8e-3, atol=1e-6)
    assert graphs_compiled() == before + 1


def test_a_compiled_score_scatters_nothing():
    """A scatter's target must lie in memory: the compiler would write the whole chunk once more, in
    fp32.
    """
    targets: list[str] = []

    def noting(module: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module

    raw, labels = torch.randn(5, 11, dtype=torch.bfloat16), torch.randint(0, 11, (5,))
    expected = loss_and_grad(raw.clone(), labels, None, 3.0, 0.5)
    got = torch.compile(loss_and_grad, backend=noting)(raw, labels, None, 3.0, 0.5)
    torch.testing.assert_close(got, expected)
    assert any("gather" in target for target in targets)
    assert not any("scatter" in target for target in targets)


def test_the_cache_lies_in_the_users_folder_unless_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(compilation.CACHE, "")  # so that it is restored, whatever the test leaves
    monkeypatch.delenv(compilation.CACHE)
    monkeypatch.delenv("TUNESMITH_CACHE", raising=False)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    own_folder = tmp_path / "tunesmith" / f"compiled-{os.getuid()}"
    compilation.use_persistent_cache()
    assert os.environ.get(compilation.CACHE, "") == str(own_folder / socket.gethostname())
    set_by_torch = str(Path(tempfile.gettempdir()) / "torchinductor_root")
    monkeypatch.setenv(compilation.CACHE, set_by_torch)
    compilation.use_persistent_cache()
    assert os.environ.get(compilation.CACHE, "") == str(own_folder / socket.gethostname())
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "of the node"))
    of_node = tmp_path / "of the node" / f"tunesmith-compiled-{os.getuid()}"
    monkeypatch.delenv(compilation.CACHE)
    compilation.use_persistent_cache()
    assert os.environ.get(compilation.CACHE, "") == str(of_node / socket.gethostname())
    monkeypatch.setenv(compilation.CACHE, "/elsewhere")
    compilation.use_persistent_cache()
    assert os.environ.get(compilation.CACHE, "") == "/elsewhere"


@pytest.mark.parametrize(
    ("choice", "device", "expected"),
    [
        ("auto", "cuda", True),
        ("auto", "cpu", False),
        ("on", "cpu", True),
        ("on", "cuda", True),
        ("off", "cuda", False),
    ],
)
def test_where_layers_are_compiled(choice, device, expected, monkeypatch):
    monkeypatch.setattr(compilation, "compiler_fault", lambda device: "")
    compiles, why = select_compile(choice, torch.device(device))
    assert compiles is expected
    assert why


def test_a_compiler_that_does_not_run_is_done_without(monkeypatch):
    cpu = torch.device("cpu")
    assert compilation.compiler_fault(cpu) == ""

    def refuse(*_, **__):
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", refuse)
    fault, assembler = compilation.probe_compiler(cpu)
    assert fault.endswith(": no C++ compiler")
    assert assembler == ""
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: x)
    assert compilation.compiler_fault(cpu) not in ("", fault), "its results are wrong"


def test_where_the_compiler_does_not_run_auto_goes_without_it_and_says_so(monkeypatch):
    monkeypatch.setattr(compilation, "compiler_fault", lambda device: "why")
    assert select_compile("auto", torch.device("cuda")) == (False, "why")


# Triton 3.6's error for a GPU that its ptxas does not know, below the lines of torch.compile
REFUSAL = """PTXASError: PTXAS error: Internal Triton PTX codegen error
`ptxas` stderr:
ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'"""
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
    """A GPU that needs an assembler for sm_121a: the compiler runs with one in Triton's variables,
    and fails without.
    """
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


def test_an_assembler_that_does_not_know_the_chip_is_replaced_by_the_toolkits(
    blackwell, monkeypatch
):
    new = assembler(blackwell / "cuda-13.0", "sm_90a", "sm_121a")
    monkeypatch.setenv("CUDA_HOME", str(blackwell / "cuda-13.0"))
    assert compilation.assemblers() == [str(blackwell / "old" / "bin" / "ptxas"), new]
    fault, instead = compilation.probe_compiler(torch.device("cpu"))
    assert (fault, os.environ["TRITON_PTXAS_PATH"], os.environ["TRITON_PTXAS_BLACKWELL_PATH"]) == (
        "",
        new,
        new,
    )
    assert holds(instead, new, "Triton's")
    monkeypatch.setattr(compilation, "probe_compiler", lambda device: (fault, instead))
    for choice in ("auto", "on"):
        compiles, why = select_compile(choice, torch.device("cuda"))
        assert compiles
        assert new in why


def test_the_variable_that_a_user_set_for_older_chips_serves_blackwell_too(blackwell, monkeypatch):
    """Triton 3.6 reads another variable for Blackwell than the one that most advice names."""
    new = assembler(blackwell / "mine", "sm_121a")
    monkeypatch.setenv("TRITON_PTXAS_PATH", new)
    assert compilation.probe_compiler(torch.device("cpu"))[0] == ""
    assert os.environ["TRITON_PTXAS_BLACKWELL_PATH"] == new


def test_where_no_assembler_knows_the_chip_the_run_goes_on_uncompiled_and_says_what_was_tried(
    blackwell,
):
    why, _ = compilation.probe_compiler(torch.device("cpu"))
    assert holds(why, "'sm_121a'")
    assert str(blackwell / "old" / "bin" / "ptxas") in why
    assert "set TRITON_PTXAS_PATH" in why
    assert not any(name in os.environ for name in compilation.ASSEMBLERS)


def test_the_folder_of_compiled_code_is_the_users_alone(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "compiled"
    assert compilation.private_folder(folder).stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    with refuses(MachineError, where=str(folder), fix=["TORCHINDUCTOR_CACHE_DIR"]):
        compilation.private_folder(folder)
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with refuses(MachineError, where=str(folder), fix=["TORCHINDUCTOR_CACHE_DIR"]):
        compilation.private_folder(folder)


# Prints the gradient of an operator whose backward multiplies by the first argument, compiled by a
# version whose digest is the second.
OF_VERSION = """
import sys
import torch
from tunesmith.runtime import compilation

compilation.source_digest = lambda: sys.argv[2]
compilation.use_persistent_cache()

@torch.library.custom_op("of_test::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2

double.register_fake(torch.empty_like)
double.register_autograd(
    lambda ctx, grad: grad * int(sys.argv[1]), setup_context=lambda ctx, inputs, output: None
)
x = torch.zeros(4, requires_grad=True)
torch.compile(lambda x: double(x.sin()))(x).sum().backward()
print(round(float(x.grad[0])))
"""


@pytest.mark.slow
def test_a_backward_that_another_version_compiled_is_not_taken(tmp_path, monkeypatch):
    """The compiler's cache goes by the forward, which is the same."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    printed = []
    for words in (["2", "first"], ["5", "first"], ["5", "second"]):
        command = [sys.executable, "-c", OF_VERSION, *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        printed.append(done.stdout.split()[-1])
    # Of the second, torch's own behavior: what the digest is for.
    assert printed == ["2", "2", "5"]


def test_a_cache_folder_that_cannot_be_written_leaves_torch_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv(compilation.CACHE, "")  # so that it is restored, whatever the test leaves
    monkeypatch.delenv(compilation.CACHE)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    compilation.use_persistent_cache()
    assert os.environ.get(compilation.CACHE, "") == ""
    assert compilation.CACHE not in os.environ


def attempt(cache: Path, path: str) -> object:
    """What ATTEMPT exits with where programs lie in `path`: 0 where the compiler runs, else why not."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(cache), "PATH": path}
    sys.argv = ["-c", "cpu"]
    try:
        exec(compilation.ATTEMPT, {})
    except SystemExit as end:
        return end.code
    return None


def test_the_attempt_in_a_new_process_tells_by_its_exit_status_whether_the_compiler_runs(tmp_path):
    """The real program on the CPU, with a C++ compiler and without one."""
    assert run_ranks(1, attempt, tmp_path / "a", os.environ["PATH"]) == [0]
    (fault,) = run_ranks(1, attempt, tmp_path / "b", "")
    assert "compiler" in fault
