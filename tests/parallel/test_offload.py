"""Offload to the host changes no number; only a GPU shows that memory is freed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.distributed.fsdp import CPUOffloadPolicy

from conftest import write_tiny_llama
from devices import cpu_and_gpu
from ranks import run_each
from recipes import make_run, merge
from tunesmith.adapter import lora
from tunesmith.batches.batch import Batch
from tunesmith.build_model import build_model
from tunesmith.config.schema import Run
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.hub.model_files import read_model_files
from tunesmith.methods import make_method
from tunesmith.optim.optimizer import Optimizer
from tunesmith.parallel import shard
from tunesmith.parallel.mesh import DIMENSIONS, Mesh
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning import memory
from tunesmith.planning.resolve import inference_plan
from tunesmith.runtime import recompute
from tunesmith.start.run import train
from tunesmith.train_model import TrainModel

pytestmark = pytest.mark.slow

FULL, LORA = {"adapter": {"kind": "none"}}, {"adapter": {"kind": "lora"}}
OFFLOADED = {"train": {"cpu_offload": ["parameters", "activations"], "recompute": "full"}}
CASES: dict[str, dict[str, tuple[dict[str, Any], dict[str, int]]]] = {
    "shards": {"full": (FULL, {"shard": 2})},
    "others": {
        "lora on nf4": (merge(LORA, {"model": {"quantize": "nf4"}}), {"shard": 2}),
        "lora, tensor": (LORA, {"tensor": 2}),
    },
}


def offloaded(model: Path, folder: Path, changes: dict[str, Any]) -> tuple[Any, int, int]:
    """Numbers of each step, and how often shards and inputs were offloaded, as if on a GPU."""
    policy, used = CPUOffloadPolicy, []
    memory.moved_to_host = lambda run, machine: run.train.cpu_offload  # type: ignore[assignment]
    shard.CPUOffloadPolicy = lambda **options: used.append("policy") or policy(**options)  # type: ignore
    recompute.save_on_cpu = lambda **options: used.append("input") or save_on_cpu(**options)  # type: ignore
    result = train(make_run(model, folder, **changes), quiet=True)
    numbers = [(r.loss, r.grad_norm, r.val_loss) for r in result.records]
    return numbers, used.count("policy"), used.count("input")


@pytest.mark.parametrize("group", ["shards", pytest.param("others", marks=pytest.mark.nightly)])
def test_offloaded_runs_have_the_bits_of_those_that_are_not(group, tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    cases = []
    for name, (what, mesh) in CASES[group].items():
        steps = {"train": {"duration": "2 steps", "micro_batch": "128 tokens"}, "parallel": mesh}
        for part, changes in (("", {"train": {"recompute": "full"}}), (", offloaded", OFFLOADED)):
            place = {"output_dir": str(tmp_path / (name + part))}
            cases.append((tiny, tmp_path, merge(merge(what, steps), changes | place)))
    found = run_each(2, offloaded, cases)[0]
    for name, plain, moved in zip(CASES[group], found[::2], found[1::2], strict=True):
        assert len(plain[0]) == 2
        assert moved[0] == plain[0], name
        assert plain[1:] == (0, 0)
        assert moved[1] == 1, name
        # Two layers, two steps, and more than one micro batch in each
        assert moved[2] >= 2 * 2 * 2, name


# ---- one rank, on a CPU and on a GPU ----


class OneRank(MeshShape):
    """A mesh of one rank that counts as several, whose models are sharded."""

    world = 2  # type: ignore[assignment]


@pytest.fixture
def mesh(device: torch.device) -> Iterator[Mesh]:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Mesh(
            OneRank(), dist.init_device_mesh(device.type, (1, 1, 1), mesh_dim_names=DIMENSIONS)
        )
    finally:
        dist.destroy_process_group()


LAYERS, WIDTH = 4, 256
TOKENS = {"cuda": 2048, "cpu": 256}  # enough to be seen in a GPU's memory


def batch(device: torch.device) -> Batch:
    torch.manual_seed(3)
    tokens = TOKENS[device.type]
    ids, positions = torch.randint(3, 127, (1, tokens)), torch.arange(tokens).unsqueeze(0)
    edges = torch.tensor([0, tokens], dtype=torch.int32)
    return Batch(ids, positions, ids.clone(), edges, tokens, tokens, tokens, 1).to(device)


def built(run: Run, mesh: Mesh, device: torch.device, *offload: str) -> TrainModel:
    files = read_model_files(Path(run.model.name), run.model)
    plan = inference_plan(run, files, device)
    plan = replace(plan, attention="batched_matmul", recomputed_layers=LAYERS, cpu_offload=offload)
    return build_model(run, files, plan, method=make_method(run.method), mesh=mesh)[0].train()


def waits_on_host(root: TrainModel, kind: str) -> set[nn.Parameter]:
    """What offloading moves: all of a model trained in full; beside an adapter its frozen layers."""
    parts = [root] if kind == "none" else root.layers
    return {
        parameter
        for part in parts
        for name, parameter in part.named_parameters()
        if not lora.is_adapter_weight(name)
    }


@cpu_and_gpu
@pytest.mark.parametrize("kind", ["none", pytest.param("lora", marks=pytest.mark.nightly)])
def test_what_is_offloaded_lies_on_the_host_and_trains_alike(kind, device, mesh, tmp_path):
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS}
    model = write_tiny_llama(tmp_path / "model", **sizes)
    run = make_run(model, tmp_path, adapter={"kind": kind}, train={"compile": "off"})
    losses, kept = [], []
    for offload in ((), ("parameters", "activations")):
        root = built(run, mesh, device, *offload)
        optimizer = Optimizer(root.trained_parameters(), run.train)
        for step in range(3):
            optimizer.start_step(1e-3, step)
            for last in (False, True):
                shard.set_gradient_sync(root, mesh, last=last)
                before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
                loss = root(batch(device)).loss / TOKENS[device.type]
                kept.append(torch.cuda.memory_allocated() - before if device.type == "cuda" else 0)
                loss.backward()
            losses.append((float(loss), float(optimizer.step())))
        moved = waits_on_host(root, kind) if offload else set()
        for parameter in root.parameters():
            place = "cpu" if parameter in moved else device.type
            assert local_part(parameter.data).device.type == place
        states = [part.state for part in optimizer.parts.values()]
        moments = {value.device.type for state in states for value in state.values()}
        assert moments == {"cpu" if offload and kind == "none" else device.type}
    on_device, on_host = losses[:3], losses[3:]
    if device.type == "cpu":
        assert on_host == on_device
    else:
        # AdamW runs there or on the host, and its sums round in another order.
        torch.testing.assert_close(
            torch.tensor(on_host), torch.tensor(on_device), rtol=1e-5, atol=0
        )
        # The input of each layer, fp32. The last layer stays gathered, as the backward begins with
        # it: beside an adapter its weights and their copy from the host come on top.
        inputs = LAYERS * TOKENS[device.type] * WIDTH * 4
        last = 2 * 7 * WIDTH * WIDTH * 4 if kind == "lora" else 0
        assert kept[0] - kept[6] >= 0.9 * inputs - last
