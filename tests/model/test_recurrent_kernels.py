"""Recurrent layers whose kernels take the edges of documents: packed equals each document alone.

The kernels run on GPUs only. Stand-ins of their very signatures (flash-linear-attention 0.6.0,
causal-conv1d 1.6, mamba-ssm 2.2) lie where Transformers looks for them; they compute document by
document in PyTorch, and note what reaches them. What shows here is what Transformers' layers hand
on; that the kernels keep documents apart is tried on the GPU before a run.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.integrations import hub_kernels, use_kernel_func_from_hub_with_fallback
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

import vision_models
from errors import lines_with
from logged import logged_lines
from recipes import make_run
from tunesmith.config.schema import MethodConfig, Model
from tunesmith.methods import make_method
from tunesmith.methods.base import TrainModel
from tunesmith.model import gpu_kernels
from tunesmith.model.load import build_on_meta
from tunesmith.model.measured_spec import measure_spec
from tunesmith.model.recurrent import ByDocument, PackedCall, use_packed_calls
from tunesmith.model.recurrent_kernels import Trial, describe_trials, try_packed_calls
from tunesmith.model.support import measure_support
from tunesmith.training.run import train

from .test_packed_families import (
    BASE,
    DELTA,
    FAMILIES,
    LENGTHS,
    alone,
    build,
    packed,
    packed_batch,
)

KIMI = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
OTHERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "olmo_hybrid": (DELTA, ("OlmoHybridGatedDeltaNet",)),
    "kimi_linear": (KIMI, ("KimiLinearDeltaAttention",)),
}
WITH_SEQ_IDX = PackedCall("cu_seq_lens_q")
WITH_EDGES_AS_THEY_ARE = PackedCall("cu_seqlens")
WITH_GAPS = PackedCall("cu_seq_lens_q", seq_idx=False, gap=3)


class Kernels:
    """Stand-ins for kernels, and the calls that they got by (name, keywords)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.leak = False  # whether they take the edges and do not go by them

    def edges_of(self, cu_seqlens: Tensor | None, n: int) -> list[int]:
        if cu_seqlens is None or self.leak:
            return [0, n]
        assert cu_seqlens.dtype == torch.int64
        return cu_seqlens.tolist()

    def delta_rule(self, name: str, reference: Callable[..., Any]) -> Callable[..., Any]:
        def chunk_gated_delta_rule(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            g: Tensor,
            beta: Tensor,
            scale: float | None = None,
            initial_state: Tensor | None = None,
            output_final_state: bool = False,
            use_qk_l2norm_in_kernel: bool = False,
            use_beta_sigmoid_in_kernel: bool = False,
            allow_neg_eigval: bool = False,
            state_v_first: bool = False,
            cu_seqlens: Tensor | None = None,
            cu_seqlens_cpu: Tensor | None = None,
            chunk_indices: Tensor | None = None,
            cp_context: Any = None,
            **kwargs: Any,
        ) -> tuple[Tensor, None]:
            self.calls.append((name, {"cu_seqlens": cu_seqlens}))
            assert cu_seqlens is None or torch.equal(cu_seqlens, cu_seqlens_cpu)
            edges = self.edges_of(cu_seqlens, q.shape[1])
            outputs = []
            for start, end in pairwise(edges):
                parts = [tensor[:, start:end] for tensor in (q, k, v)]
                output, _ = reference(
                    *parts,
                    g=g[:, start:end],
                    beta=beta[:, start:end],
                    use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                )
                outputs.append(output)
            return torch.cat(outputs, dim=1), None

        return chunk_gated_delta_rule

    def causal_conv1d_fn(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        seq_idx: Tensor | None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
        final_states_out: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        self.calls.append(("causal_conv1d_fn", {"seq_idx": seq_idx}))
        width = weight.shape[1]
        total = torch.zeros_like(x)
        for lag in range(width):
            shifted = F.pad(x, (lag, 0))[..., : x.shape[-1]]
            if seq_idx is not None and not self.leak:
                assert seq_idx.dtype == torch.int32
                other = F.pad(seq_idx, (lag, 0), value=-1)[:, : x.shape[-1]]
                shifted = shifted * (other == seq_idx).unsqueeze(1)
            total = total + shifted * weight[:, width - 1 - lag, None]
        if bias is not None:
            total = total + bias[:, None]
        return F.silu(total) if activation else total

    def mamba_chunk_scan_combined(self, reference: Callable[..., Any]) -> Callable[..., Any]:
        def mamba_chunk_scan_combined(
            x: Tensor,
            dt: Tensor,
            A: Tensor,
            B: Tensor,
            C: Tensor,
            chunk_size: int,
            D: Tensor | None = None,
            z: Tensor | None = None,
            dt_bias: Tensor | None = None,
            initial_states: Tensor | None = None,
            seq_idx: Tensor | None = None,
            cu_seqlens: Tensor | None = None,
            dt_softplus: bool = False,
            dt_limit: tuple[float, float] = (0.0, float("inf")),
            return_final_states: bool = False,
            return_varlen_states: bool = False,
        ) -> Tensor:
            self.calls.append(("mamba_chunk_scan_combined", {"seq_idx": seq_idx}))
            lengths = [x.shape[1]]
            if seq_idx is not None and not self.leak:
                lengths = seq_idx[0].bincount().tolist()
            outputs = []
            parts = [tensor.split(lengths, dim=1) for tensor in (x, dt, B, C)]
            for x_, dt_, B_, C_ in zip(*parts, strict=True):
                outputs.append(
                    reference(
                        x_,
                        dt_,
                        A,
                        B_,
                        C_,
                        chunk_size,
                        D=D,
                        dt_bias=dt_bias,
                        dt_softplus=dt_softplus,
                        dt_limit=dt_limit,
                    )
                )
            return torch.cat(outputs, dim=1).to(x.dtype)

        return mamba_chunk_scan_combined

    def mamba_split_conv1d_scan_combined(self, scan: Callable[..., Any]) -> Callable[..., Any]:
        def mamba_split_conv1d_scan_combined(
            zxbcdt: Tensor,
            conv1d_weight: Tensor,
            conv1d_bias: Tensor | None,
            dt_bias: Tensor,
            A: Tensor,
            D: Tensor,
            chunk_size: int,
            initial_states: Tensor | None = None,
            seq_idx: Tensor | None = None,
            dt_limit: tuple[float, float] = (0.0, float("inf")),
            return_final_states: bool = False,
            activation: str = "silu",
            rmsnorm_weight: Tensor | None = None,
            rmsnorm_eps: float = 1e-6,
            outproj_weight: Tensor | None = None,
            outproj_bias: Tensor | None = None,
            headdim: int | None = None,
            ngroups: int = 1,
            norm_before_gate: bool = True,
        ) -> Tensor:
            assert headdim is not None
            assert outproj_weight is not None
            assert not norm_before_gate
            heads = len(D)
            dim = heads * headdim
            states = conv1d_weight.shape[0] - dim
            z, xBC, dt = zxbcdt.split([dim, dim + states, heads], dim=-1)
            xBC = self.causal_conv1d_fn(
                xBC.mT, conv1d_weight, conv1d_bias, seq_idx, activation=activation
            ).mT
            x, B, C = xBC.split([dim, states // 2, states // 2], dim=-1)
            y = scan(
                x.unflatten(-1, (heads, headdim)),
                dt,
                A,
                B.unflatten(-1, (ngroups, -1)),
                C.unflatten(-1, (ngroups, -1)),
                chunk_size,
                D=D,
                dt_bias=dt_bias,
                seq_idx=seq_idx,
                dt_softplus=True,
                dt_limit=dt_limit,
            )
            gated = y.flatten(-2) * F.silu(z)
            if rmsnorm_weight is not None:
                groups = gated.unflatten(-1, (ngroups, -1))
                normed = groups * (groups.square().mean(-1, keepdim=True) + rmsnorm_eps).rsqrt()
                gated = normed.flatten(-2) * rmsnorm_weight
            return F.linear(gated, outproj_weight, outproj_bias)

        return mamba_split_conv1d_scan_combined

    def edges_seen(self) -> dict[str, Any]:
        """The last keyword of each kernel, as a list."""
        return {
            name: {key: None if value is None else value.tolist() for key, value in seen.items()}
            for name, seen in self.calls
        }


def kernel_functions(model: nn.Module) -> list[tuple[ModuleType, str, Any]]:
    """Transformers' wrappers around the fallbacks of kernels, with their module and name in it."""
    modules = {sys.modules[type(part).__module__] for part in model.modules()}
    functions = []
    for module in modules:
        for name, value in vars(module).items():
            function = value
            while inspect.isfunction(function) and hasattr(function, "__wrapped__"):
                if function.__globals__ is vars(hub_kernels):
                    functions.append((module, name, function))
                function = function.__wrapped__
    return functions


def install(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, packages: tuple[str, ...]
) -> Kernels:
    """Put stand-ins of these packages where Transformers looks, and let it look again."""
    kernels = Kernels()
    functions = kernel_functions(model)
    references = {}
    for _, _, function in functions:
        names = inspect.getclosurevars(function).nonlocals
        references[names["func_name"]] = function.__wrapped__
    if "fla" in packages:
        rule = "chunk_kda" if "chunk_kda" in references else "chunk_gated_delta_rule"
        place = "kda" if rule == "chunk_kda" else "gated_delta_rule"
        add_package(
            monkeypatch, f"fla.ops.{place}", **{rule: kernels.delta_rule(rule, references[rule])}
        )
    if "causal_conv1d" in packages:
        add_package(monkeypatch, "causal_conv1d", causal_conv1d_fn=kernels.causal_conv1d_fn)
    if "mamba_ssm" in packages:
        scan = kernels.mamba_chunk_scan_combined(references["mamba_chunk_scan_combined"])
        add_package(
            monkeypatch,
            "mamba_ssm.ops.triton.ssd_combined",
            mamba_chunk_scan_combined=scan,
            mamba_split_conv1d_scan_combined=kernels.mamba_split_conv1d_scan_combined(scan),
        )
    for module, name, function in functions:
        names = inspect.getclosurevars(function).nonlocals
        choose = use_kernel_func_from_hub_with_fallback(names["func_name"], names["package"])
        monkeypatch.setattr(module, name, choose(function.__wrapped__))
    return kernels


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a GPU, as the stand-ins run on it."""
    monkeypatch.setattr(gpu_kernels, "runs_kernels", lambda device: device.type == "cpu")


def add_package(monkeypatch: pytest.MonkeyPatch, path: str, **functions: object) -> None:
    inner = ModuleType(path)
    vars(inner).update(functions)
    monkeypatch.setitem(sys.modules, path, inner)
    while "." in path:
        path, _, name = path.rpartition(".")
        outer = ModuleType(path)
        setattr(outer, name, inner)
        monkeypatch.setitem(sys.modules, path, outer)
        inner = outer


def settings(model_type: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    return OTHERS.get(model_type) or FAMILIES[model_type]


def try_on_cpu(model_type: str, dtype: str = "fp32") -> dict[str, Trial]:
    config = AutoConfig.for_model(model_type, **{**BASE, **settings(model_type)[0]})
    on_meta = build_on_meta(config, Model(name="model", dtype=dtype))
    return try_packed_calls(on_meta, settings(model_type)[1], torch.device("cpu"))


CASES = [
    ("qwen3_5_text", ("fla", "causal_conv1d"), WITH_SEQ_IDX),
    ("qwen3_next", ("fla", "causal_conv1d"), WITH_SEQ_IDX),
    ("olmo_hybrid", ("fla", "causal_conv1d"), WITH_SEQ_IDX),
    ("kimi_linear", ("fla", "causal_conv1d"), WITH_EDGES_AS_THEY_ARE),
    ("nemotron_h", ("mamba_ssm", "causal_conv1d"), WITH_SEQ_IDX),
    ("mamba2", ("mamba_ssm", "causal_conv1d"), WITH_SEQ_IDX),
    ("granitemoehybrid", ("mamba_ssm", "causal_conv1d"), WITH_SEQ_IDX),
    ("bamba", ("mamba_ssm", "causal_conv1d"), WITH_SEQ_IDX),
    ("falcon_h1", ("mamba_ssm", "causal_conv1d"), WITH_SEQ_IDX),
    ("zamba2", ("mamba_ssm", "causal_conv1d"), WITH_SEQ_IDX),
    ("lfm2", ("causal_conv1d",), WITH_SEQ_IDX),
    # causal-conv1d has no wheels.
    ("qwen3_5_text", ("fla",), WITH_GAPS),
    ("qwen3_next", ("fla",), WITH_GAPS),
    ("olmo_hybrid", ("fla",), WITH_GAPS),
]


@pytest.mark.slow
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(("model_type", "packages", "call"), CASES)
def test_kernels_take_all_documents_in_one_call(
    model_type: str,
    packages: tuple[str, ...],
    call: PackedCall,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FAMILIES, model_type, settings(model_type))
    model = build(model_type)
    batch = packed_batch()
    cotangent = torch.randn(sum(LENGTHS), 64, generator=torch.Generator().manual_seed(2))
    expected_logits, expected = alone(model, batch, cotangent)
    class_names = settings(model_type)[1]
    kernels = install(monkeypatch, model, packages)

    trials = try_on_cpu(model_type)
    assert trials == {name: Trial(call) for name in class_names}
    assert try_on_cpu(model_type, "bf16") == trials
    assert describe_trials(trials)[0].startswith(f"{next(iter(trials))}: ")

    root = TrainModel(
        model, make_method(MethodConfig()), attention_backend="products", recurrent=class_names
    ).train()
    use_packed_calls(model, {name: trial.call for name, trial in trials.items()})
    kernels.calls.clear()
    logits, gradients = packed(root, batch, cotangent)
    # Those of FAMILIES, in fp32: sums in another order.
    scale = expected_logits.abs().max()
    assert (logits - expected_logits).abs().max() <= 1e-5 * scale
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-4 * largest, name

    edges = torch.tensor([0, *LENGTHS]).cumsum(0)
    numbers = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))[None].tolist()
    edges += torch.arange(len(edges)) * call.gap
    layers = sum(isinstance(part, ByDocument) for part in model.modules())
    names = [name for name, _ in kernels.calls]
    for name, keywords in kernels.edges_seen().items():
        assert names.count(name) == layers
        expected_keyword = edges.tolist() if "cu_seqlens" in keywords else numbers
        assert list(keywords.values()) == [expected_keyword]


@pytest.mark.slow
@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(
    ("model_type", "packages", "why"),
    [
        ("qwen3_5_text", (), "flash-linear-attention"),
        ("qwen3_5_text", ("causal_conv1d",), "flash-linear-attention"),
        ("kimi_linear", ("fla",), "causal_conv1d"),
        ("nemotron_h", ("causal_conv1d",), "mamba_ssm"),
        ("jamba", ("causal_conv1d",), "does not pass document boundaries to a kernel"),
        ("minimax", (), "does not pass document boundaries to a kernel"),
    ],
)
def test_layers_without_such_kernels_stay_on_one_row_a_document(
    model_type: str, packages: tuple[str, ...], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, model_type, settings(model_type))
    install(monkeypatch, build(model_type), packages)
    trials = try_on_cpu(model_type)
    [trial] = trials.values()
    assert trial.call is None
    assert why in trial.why
    assert describe_trials(trials)[0].startswith("warning: ")


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("model_type", ["qwen3_5_text", "nemotron_h", "lfm2"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_kernel_that_lets_documents_reach_each_other_is_not_taken(
    model_type: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages: tuple[str, ...] = ("causal_conv1d", "fla")
    if model_type == "nemotron_h":
        packages = ("causal_conv1d", "mamba_ssm")
    if model_type == "lfm2":
        packages = ("causal_conv1d",)
    kernels = install(monkeypatch, build(model_type), packages)
    kernels.leak = True
    [trial] = try_on_cpu(model_type, dtype).values()
    # Gaps keep a convolution apart whatever its kernel does; nothing keeps a state. LFM2 of
    # Transformers 5.17 takes the numbers of documents alone, no edges.
    has_gaps = model_type == "lfm2"
    if has_gaps:
        has_gaps = "seq_idx" not in inspect.signature(Lfm2ShortConv.forward).parameters
    assert trial.call == (PackedCall("cu_seq_lens_q", False, 2) if has_gaps else None)


def test_kernels_are_called_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A type is measured on the CPU and on meta, and may train there, with FLA installed."""
    model = build("qwen3_5_text")
    config = model.config
    kernels = install(monkeypatch, model, ("fla",))

    def no_gpu(*_: object) -> list[int]:
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr(kernels, "edges_of", no_gpu)
    ids = packed_batch().input_ids
    with pytest.raises(RuntimeError, match="0 active drivers"):
        model(ids)
    assert measure_support(config).state == "packed"
    measure_spec(config.to_dict() | {"bos_token_id": 3}, where="config.json")
    build_on_meta(config, Model(name="model", dtype="bf16"))
    model(ids)
    assert len(kernels.calls) == 1
    monkeypatch.setattr(gpu_kernels, "runs_kernels", lambda device: True)
    with pytest.raises(RuntimeError, match="0 active drivers"):
        model(ids)


@pytest.mark.slow
def test_a_run_takes_its_kernels(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the recipe on: tried on the layers of the base, used on those with adapters."""
    model = vision_models.build("qwen3_5", tmp_path / "model", tiny)

    def train_once(name: str) -> tuple[list[float], list[str]]:
        run = make_run(
            model,
            tmp_path,
            held=False,
            adapter={"kind": "lora"},
            train={"duration": "3 steps", "micro_batch": "128 tokens", "recompute": "full"},
            output_dir=str(tmp_path / name),
        )
        with logged_lines() as lines:
            losses = [record.loss for record in train(run).records]
        return losses, list(lines)

    expected, lines = train_once("without")
    assert lines_with("\n".join(lines), "Qwen3_5GatedDeltaNet", "padded")
    kernels = install(monkeypatch, build("qwen3_5_text"), ("fla",))
    monkeypatch.setattr(gpu_kernels, "runs_kernels", lambda device: device.type == "cpu")
    losses, lines = train_once("with")
    of_kernels = lines_with("\n".join(lines), "Qwen3_5GatedDeltaNet", "kernels")
    assert any("padded" not in line for line in of_kernels)
    assert kernels.edges_seen()["chunk_gated_delta_rule"]["cu_seqlens"] is not None
    # fp32; sums in another order.
    assert losses == pytest.approx(expected, rel=1e-5)
