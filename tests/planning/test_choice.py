"""`plan` and `train` choose the mesh and the micro batch by one function."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from errors import holds, refuses
from tunesmith.config.load import from_mapping
from tunesmith.distributed.heartbeat import Heartbeat
from tunesmith.errors import MachineError
from tunesmith.host.chips import Chip
from tunesmith.model.arch.shapes import SHAPES
from tunesmith.model.arch.spec import read_spec
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning.forecast import Planner, plan_on_paper
from tunesmith.planning.machines import Cluster, read_cluster
from tunesmith.planning.run_plan import RunPlan
from tunesmith.planning.workload import measure_work
from tunesmith.start import plan as plan_stage
from tunesmith.units import Size

FULL = {"adapter": {"kind": "none"}}
AUTO = {"parallel": {"tensor": "auto"}}
MANY = {"train": {"global_batch": "32 examples"}}
# Shape, machines, recipe -> the mesh.
RUNS = {
    "70B in full": ("llama3-70b", "2x8xh100", FULL | AUTO | MANY, (1, 2, 8)),
    "70B, LoRA": ("llama3-70b", "2x8xh100", AUTO | MANY, (2, 4, 2)),
    "70B, LoRA, Sparks": ("llama3-70b", "2x-dgx-spark", AUTO | MANY, (1, 2, 1)),
    "8B, LoRA, Sparks": ("llama3-8b", "2x-dgx-spark", MANY, (2, 1, 1)),
    "8B on fp8, which is not cut": ("llama3-8b", "8xh200", AUTO | MANY | {"model": {"name": "m", "quantize": "fp8"}}, (8, 1, 1)),
}  # fmt: skip


def make(shape: str, recipe: dict, cluster: Cluster) -> tuple[Planner, SimpleNamespace]:
    """A planner, and tokens of 512 examples of 1,000 to 2,048 tokens."""
    data = {"train": {"source": "rows.jsonl"}}
    values = {"data": data, "output_dir": "out", "model": {"name": "m"}} | recipe
    run = from_mapping(values, where="test", base=Path.cwd())
    lengths = np.random.default_rng(0).integers(1000, 2049, 512)
    counts = SimpleNamespace(supervised=int(lengths.sum()), longest=int(lengths.max()))
    tokens = SimpleNamespace(
        lengths=lengths, shared=np.zeros_like(lengths), row_lengths=lengths,
        document_lengths=lambda: lengths, longest_sequences=lengths, has_pairs=False,
        repeats=np.ones(512), counts=counts,
    )  # fmt: skip
    spec = read_spec(SHAPES[shape].config, where=shape)
    work = measure_work(run, spec, tokens)  # type: ignore[arg-type]
    return plan_on_paper(run, spec, cluster, work), tokens


def planned_in_training(
    monkeypatch: pytest.MonkeyPatch,
    planner: Planner,
    tokens: SimpleNamespace,
    before: str | None = None,
) -> RunPlan:
    """What `train` plans on ranks whose machine is the planner's, each with a GPU of its name."""
    cluster = planner.cluster
    machine = replace(planner.machine, name=cluster.chip.name, device="cuda:1")
    monkeypatch.setattr(plan_stage, "define_model", lambda run, files: None)
    monkeypatch.setattr(plan_stage, "count_trained", lambda run, model: planner.trained)
    monkeypatch.setattr(plan_stage, "probe_machine", lambda *_: machine)
    monkeypatch.setattr(plan_stage, "eight_bit_shapes", lambda *_: [])
    ranks = SimpleNamespace(
        raise_on_all_ranks=nullcontext, all_gather_object=lambda value: [value] * cluster.world, rank=min(1, cluster.world - 1), world=cluster.world,
        local_world=cluster.per_node, name=str, heartbeat=Heartbeat(),
    )  # fmt: skip
    previous = Size(int(before.split()[0]), "tokens") if before else None
    data = SimpleNamespace(train=tokens, schedule=None)
    files = SimpleNamespace(spec=planner.spec)
    device = torch.device("cuda:1")
    return plan_stage.choose_plan(planner.run, files, data, previous, device, ranks)[2]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RUNS)
def test_train_takes_what_plan_puts_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, on, recipe, mesh = RUNS[name]
    planner, tokens = make(shape, recipe, read_cluster(on))
    best = planner.best()
    taken = planned_in_training(monkeypatch, planner, tokens)
    assert best.fits
    assert (taken.mesh, taken.layout) == (best.plan.mesh, best.plan.layout)
    assert taken.memory == best.plan.memory
    assert taken.mesh == MeshShape(*mesh)
    assert holds(taken.why["mesh"], len(planner.meshes()))


@pytest.mark.slow
def test_without_a_speed_the_first_mesh_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is not in the table: as many copies as fit, then the fewest shards."""
    for gib, mesh in ((100, (8, 1, 1)), (40, (4, 2, 1))):
        nf4 = {"model": {"name": "m", "quantize": "nf4"}}
        cluster = Cluster(Chip("NVIDIA Other", gib), 1, 8)
        planner, tokens = make("llama3-70b", AUTO | MANY | nf4, cluster)
        taken = planned_in_training(monkeypatch, planner, tokens)
        first = next(f for f in map(planner.forecast, planner.meshes()) if f.fits and not f.tight)
        assert taken.mesh == first.plan.mesh == MeshShape(*mesh)
        assert taken.layout == first.plan.layout


def test_a_resumed_run_keeps_its_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    planner, tokens = make("llama3-70b", FULL | AUTO | MANY, read_cluster("2x8xh100"))
    size = planner.best().plan.layout.micro_batch
    other = size.amount // 2
    kept = planned_in_training(monkeypatch, planner, tokens, before=f"{other} tokens")
    assert kept.layout.micro_batch == Size(other, "tokens")
    assert "checkpoint" in kept.why["micro batch"]


def test_a_host_that_cannot_hold_what_its_ranks_offload_is_refused(monkeypatch) -> None:
    """8 ranks of a node offload a 16th each of 16 bytes a parameter."""
    train = {"train": {"global_batch": "32 examples", "cpu_offload": ["parameters"]}}
    keys = FULL | train | {"parallel": {"shard": 16}}
    planner, tokens = make("llama3-8b", keys, read_cluster("2x8xh100"))
    host = 8 * planner.best().plan.memory.host
    assert host == pytest.approx(8 * planner.spec.parameters, rel=1e-6)
    monkeypatch.setattr(plan_stage, "available_memory", lambda: host)
    assert planned_in_training(monkeypatch, planner, tokens).cpu_offload == ("parameters",)
    monkeypatch.setattr(plan_stage, "available_memory", lambda: host - 1)
    with refuses(MachineError, where="train.cpu_offload", names=["64.2 GB", "8 ranks"]):
        planned_in_training(monkeypatch, planner, tokens)


def test_train_refuses_what_fits_no_mesh_and_names_tensor_ranks(monkeypatch) -> None:
    planner, tokens = make("llama3-70b", FULL | MANY, read_cluster("2x8xh100"))
    assert not planner.best().fits
    with refuses(MachineError, names=["GiB", "weights", "recompute"]) as refused:
        planned_in_training(monkeypatch, planner, tokens)
    assert refused.value.fix.startswith("set parallel.tensor=auto; or ")
