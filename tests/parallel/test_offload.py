"""Offload of shards, moments and inputs of recomputed layers to the host changes no number.

On a CPU host and device are one: the same code runs, and only a GPU shows that memory is freed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.graph import save_on_cpu
from transformers import LlamaConfig, LlamaForCausalLM

from devices import cpu_and_gpu
from ranks import free_port, run_ranks
from recipes import make_run, merge
from tunesmith.adapter import lora
from tunesmith.config.schema import MethodConfig, Model
from tunesmith.data.batches.batch import Batch
from tunesmith.distributed.vocab_parallel import local_part
from tunesmith.methods import make_method
from tunesmith.methods.base import TrainModel
from tunesmith.model import load
from tunesmith.model.fused import fuse_modules
from tunesmith.model.weights import copy_full_tensor
from tunesmith.optim.optimizer import Optimizer
from tunesmith.parallel import shard
from tunesmith.parallel.mesh import DIMENSIONS, Mesh
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.planning import memory
from tunesmith.runtime import recompute
from tunesmith.runtime.recompute import offload_inputs, recompute_layers
from tunesmith.training.run import train

pytestmark = pytest.mark.slow

FULL, LORA = {"adapter": {"kind": "none"}}, {"adapter": {"kind": "lora"}}
OFFLOADED = {"train": {"cpu_offload": ["parameters", "activations"], "recompute": "full"}}
CASES: dict[str, dict[str, tuple[dict[str, Any], dict[str, int]]]] = {
    "shards": {"full": (FULL, {"shard": 2})},
    "others": {
        "lora on nf4": (merge(LORA, {"model": {"quantize": "nf4"}}), {"shard": 2}),
        "lora on copies": (LORA, {"replicate": 2}),
        "lora, tensor": (LORA, {"tensor": 2}),
    },
}


def offloaded(model: Path, folder: Path, cases: list[tuple[dict[str, Any], int]]) -> list[Any]:
    """Loss, norm and validation loss of each step of each recipe, and what was offloaded, as if on
    a GPU.
    """
    found, policy, hook = [], shard.CPUOffloadPolicy, save_on_cpu
    used: list[str] = []
    memory.moved_to_host = lambda run, machine: run.train.cpu_offload  # type: ignore[assignment]
    shard.CPUOffloadPolicy = lambda **options: used.append("policy") or policy(**options)  # type: ignore
    recompute.save_on_cpu = lambda **options: used.append("input") or hook(**options)  # type: ignore
    for changes, port in cases:
        os.environ["MASTER_PORT"] = str(port)
        used.clear()
        result = train(make_run(model, folder, **changes), quiet=True)
        numbers = [(r.loss, r.grad_norm, r.val_loss) for r in result.records]
        found.append((numbers, used.count("policy"), used.count("input")))
    return found


@pytest.mark.parametrize("group", ["shards", pytest.param("others", marks=pytest.mark.nightly)])
def test_offloaded_runs_have_the_bits_of_those_that_are_not(group, tiny, tmp_path):
    """The gradients of several micro batches are added up by FSDP."""
    pytest.importorskip("bitsandbytes")
    cases = []
    for name, (what, mesh) in CASES[group].items():
        base = merge(
            what, {"train": {"duration": "2 steps", "micro_batch": "128 tokens"}, "parallel": mesh}
        )
        for part, changes in (("", {"train": {"recompute": "full"}}), (", offloaded", OFFLOADED)):
            cases.append(
                (merge(base, {**changes, "output_dir": str(tmp_path / (name + part))}), free_port())
            )
    found = run_ranks(2, offloaded, tiny, tmp_path, cases)[0]
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
    ids = torch.randint(3, 127, (1, tokens))
    positions, edges = (
        torch.arange(tokens).unsqueeze(0),
        torch.tensor([0, tokens], dtype=torch.int32),
    )
    return Batch(ids, positions, ids.clone(), edges, tokens, tokens, tokens, 1).to(device)


def built(
    run: Any, mesh: Mesh, device: torch.device, offload: bool, host: torch.device | None = None
) -> TrainModel:
    """host: where offloaded shards lie, if not in the host's memory."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
    )
    torch.manual_seed(7)
    whole = dict(LlamaForCausalLM(config).named_parameters())
    model = load.build_on_meta(config, Model(name="x", dtype="fp32"))
    if run.adapter.kind == "lora":
        lora.attach_lora(model, run.adapter, seed=1)
    fuse_modules(model, project=lora.project)
    root = TrainModel(model, make_method(MethodConfig()), attention_backend="products").train()
    recompute_layers(root.layers, LAYERS)
    if offload:
        offload_inputs(root.layers)
    shard.shard_model(root, mesh, run, torch.float32, offload=offload)
    host = host or torch.device("cpu")
    load.materialize(model, device, shards=host if offload else None)
    root.to(None if offload else device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in whole:
                copy_full_tensor(parameter, whole[name])
            else:
                nn.init.constant_(parameter, 0.01)
    return root


def waits_on_host(root: TrainModel, kind: str) -> set[nn.Parameter]:
    """What offloading moves: all of a model trained in full; beside an adapter its frozen layers.

    Embedding, last norm and head are needed from the start of a forward to its end, and stay.
    """
    parts = [root] if kind == "none" else root.layers
    return {
        parameter
        for part in parts
        for name, parameter in part.named_parameters()
        if not lora.is_adapter_weight(name)
    }


@cpu_and_gpu
@pytest.mark.parametrize("kind", ["none", pytest.param("lora", marks=pytest.mark.nightly)])
def test_what_is_offloaded_lies_on_the_host_and_trains_alike(kind, device, mesh, tiny, tmp_path):
    run = make_run(tiny, tmp_path, held=False, adapter={"kind": kind})
    run = replace(run, train=replace(run.train, compile="off"))
    losses, kept = [], []
    for offload in (False, True):
        root = built(run, mesh, device, offload)
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
        moments = {
            value.device.type for part in optimizer.parts.values() for value in part.state.values()
        }
        assert moments == {"cpu" if offload and kind == "none" else device.type}
    # The same products; on a GPU AdamW runs there or on the host, and its sums round in another
    # order.
    on_device, on_host = losses[:3], losses[3:]
    if device.type == "cpu":
        assert on_host == on_device
    else:
        assert [loss for pair in on_host for loss in pair] == pytest.approx(
            [n for pair in on_device for n in pair], rel=1e-5
        )
        # The input of each layer, fp32. The last layer stays gathered, as the backward begins with
        # it: beside an adapter its weights and their copy from the host come on top.
        inputs = LAYERS * TOKENS[device.type] * WIDTH * 4
        last = 2 * 7 * WIDTH * WIDTH * 4 if kind == "lora" else 0
        assert kept[0] - kept[6] >= 0.9 * inputs - last
