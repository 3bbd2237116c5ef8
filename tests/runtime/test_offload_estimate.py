"""`train.cpu_offload` in the plan: what the host takes, and where it is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from tunesmith.batches.schedule import StepSize
from tunesmith.config.load import from_mapping
from tunesmith.config.schema import Run
from tunesmith.errors import MachineError, RecipeError
from tunesmith.host.chips import CHIPS
from tunesmith.model.arch.shapes import SHAPES
from tunesmith.model.arch.spec import ModelSpec, adapter_parameters, read_spec
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.forecast import plan_on_paper
from tunesmith.planning.machines import Cluster
from tunesmith.planning.memory import MemoryEstimator
from tunesmith.planning.resolve import resolve_plan
from tunesmith.planning.run_plan import Machine, MemoryEstimate, RunPlan
from tunesmith.planning.workload import Workload

SPEC: ModelSpec = read_spec(SHAPES["llama3-8b"].config, where="test")
SHARDS, ONE = MeshShape(1, 8, 1), MeshShape()
FULL, LORA = {"kind": "none"}, {"kind": "lora"}
TOKENS, RECOMPUTED = 4096, 20
INPUT = 2 * TOKENS * SPEC.hidden  # of a layer, in bf16


WORK = Workload(StepSize(65536, 65536), 2048, None, 4 * SPEC.active, 0.02, 0.0, 0.0, 1.0, "test")


def recipe(adapter: dict[str, Any], *offload: str, recompute: object = RECOMPUTED) -> Run:
    values = {
        "model": {"name": "m", "dtype": "bf16"},
        "data": {"train": {"source": "rows.jsonl"}},
        "output_dir": "out",
        "adapter": adapter,
        "train": {"cpu_offload": list(offload), "recompute": recompute},
    }
    return from_mapping(values, where="test", base=Path.cwd())


def machine(device: str = "cuda:0", gib: int = 79, *, integrated: bool = False) -> Machine:
    size = gib << 30
    return Machine(device, size, ("varlen", ""), (True, ""), card_bytes=size, integrated=integrated)


def trained(run: Run) -> int:
    return SPEC.parameters if run.adapter.kind == "none" else adapter_parameters(SPEC, run.adapter)


def estimate(run: Run, mesh: MeshShape = SHARDS, found: Machine | None = None) -> MemoryEstimate:
    return MemoryEstimator(run, SPEC, found or machine(), trained(run), mesh).estimate(TOKENS)


def plan(run: Run, mesh: MeshShape, found: Machine) -> RunPlan:
    estimator = MemoryEstimator(run, SPEC, found, trained(run), mesh)
    return resolve_plan(estimator, Cluster(CHIPS["h100"]), WORK)


def test_the_host_takes_the_shards_of_a_model_trained_in_full() -> None:
    """In fp32: 4 bytes of weight, 4 of gradient, 8 of moments. What is gathered stays."""
    here, moved = estimate(recipe(FULL)), estimate(recipe(FULL, "parameters"))
    assert moved.host == pytest.approx(16 * SPEC.parameters / 8, abs=64)
    assert (moved.weights, moved.gradients, moved.optimizer) == (0, 0, 0)
    for part in ("gathered", "activations", "workspace"):
        assert getattr(moved, part) == getattr(here, part)
    assert here.total - moved.total == moved.host


def test_the_host_takes_the_frozen_shards_and_the_adapter_stays() -> None:
    here, moved = estimate(recipe(LORA)), estimate(recipe(LORA, "parameters"))
    adapter = 4 * adapter_parameters(SPEC, recipe(LORA).adapter)
    layers = 2 * SPEC.layer_matrices
    ends = 2 * SPEC.parameters - layers  # embedding, norms and head, which are not sharded
    assert moved.host == layers / 8
    assert (here.weights, moved.weights) == (moved.host + ends + adapter, ends + adapter)
    for found in (here, moved):
        assert (found.gradients, found.optimizer) == (adapter, 2 * adapter)


def test_the_host_takes_the_inputs_of_the_layers_that_recompute() -> None:
    here, moved = estimate(recipe(LORA), ONE), estimate(recipe(LORA, "activations"), ONE)
    assert moved.host == RECOMPUTED * INPUT
    assert here.activations - moved.activations == RECOMPUTED * INPUT
    assert (here.recomputed_layer, moved.recomputed_layer) == (INPUT, 0)
    assert 0 <= moved.workspace - here.workspace <= INPUT
    both = estimate(recipe(FULL, "parameters", "activations"))
    assert both.host == estimate(recipe(FULL, "parameters")).host + RECOMPUTED * INPUT


@pytest.mark.parametrize("moved", ["parameters", "activations"])
def test_a_gpu_that_shares_the_hosts_memory_refuses_offload(moved: str) -> None:
    with refuses(RecipeError, where="train.cpu_offload", fix=["train.cpu_offload=[]"]):
        plan(recipe(LORA, moved), ONE, machine(integrated=True))


def test_one_process_offloads_frozen_parameters_alone() -> None:
    fix = ["train.cpu_offload=[]", "train.optimizer=adamw-8bit", "adapter.kind=lora"]
    with refuses(RecipeError, where="train.cpu_offload", names=["FSDP2"], fix=fix):
        plan(recipe(FULL, "parameters"), ONE, machine())
    assert plan(recipe(LORA, "activations"), ONE, machine()).cpu_offload == ("activations",)


MATRICES = sum(layer.matmul for layer in SPEC.layers)  # of all layers, all alike


@pytest.mark.parametrize(("gib", "streamed"), [(8, 28), (16, 10), (79, 0)])
def test_layers_that_fit_stay_and_the_others_stream(gib: int, streamed: int) -> None:
    small = machine(gib=gib)
    found, whole = (
        estimate(recipe(LORA, *offload, recompute="full"), ONE, small)
        for offload in (["parameters"], [])
    )
    assert found.streamed_layers == streamed
    layer = 2 * MATRICES // SPEC.depth
    assert found.host == streamed * layer
    assert found.weights == whole.weights - found.host + (2 * layer if streamed else 0)
    usable = 0.9 * small.free_bytes
    assert found.total <= usable
    assert not streamed or usable < found.total + layer


@pytest.mark.parametrize(
    ("offload", "gib", "offered"),
    [
        ((), 12, ["[parameters]"]),
        (("activations",), 12, ["[activations, parameters]"]),
        (("parameters",), 2, []),
    ],
)
def test_a_run_that_does_not_fit_is_offered_to_stream(offload, gib, offered):
    """What is offloaded already stays in the offer."""
    cluster = Cluster(replace(CHIPS["rtx-4090"], gib=gib))
    planner = plan_on_paper(recipe(LORA, *offload, recompute="auto"), SPEC, cluster, WORK)
    with refuses(MachineError) as refused:
        planner.choose()
    assert re.findall(r"train\.cpu_offload='?(\[.*?\])", str(refused.value.fix)) == offered


def test_on_a_cpu_offload_has_no_effect() -> None:
    run = recipe(FULL, "parameters", "activations")
    assert estimate(run, ONE, machine("cpu")) == estimate(recipe(FULL), ONE, machine("cpu"))
    assert plan(run, ONE, machine("cpu")).cpu_offload == ()
