"""The stream of frozen layers: what is copied when, and that no number changes."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from devices import gpu
from errors import holds, refuses
from tunesmith.errors import MachineError
from tunesmith.planning.run_plan import StagedLayers
from tunesmith.presentation.plan import warning_text
from tunesmith.runtime import stream as stream_module
from tunesmith.runtime.stream import ALIGNED_BYTES, SLOTS, LayerStream

cpu_and_gpu = pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=gpu)])
LAYERS = 7
WIDTH = {"cpu": 40, "cuda": 1024}


class Layer(nn.Module):
    """A frozen matrix, a frozen vector, and a trained matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, width, device="meta").requires_grad_(requires_grad=False)
        self.trained = nn.Linear(width, width, bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.frozen(torch.tanh(self.trained(x))))


def built(device: torch.device, streamed: int) -> tuple[list[nn.Module], LayerStream | None]:
    """Layers with weights that depend on nothing but their names, of which some stream."""
    layers: list[nn.Module] = [Layer(WIDTH[device.type]) for _ in range(LAYERS)]
    stream = LayerStream(layers, streamed, device) if streamed else None
    on_host = stream.parameters if stream else set()
    generator = torch.Generator().manual_seed(5)
    for layer in layers:
        for name, parameter in list(layer.named_parameters()):
            values = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
            if parameter in on_host:
                parameter.data.copy_(values)
            else:
                owner, _, key = name.rpartition(".")
                made = nn.Parameter(values.to(device), requires_grad=parameter.requires_grad)
                layer.get_submodule(owner).register_parameter(key, made)
    if stream:
        stream.attach()
    return layers, stream


def step(layers: Sequence[nn.Module], device: torch.device) -> Tensor:
    """Loss of a forward, whose backward adds to the gradients."""
    rows = torch.linspace(-1, 1, 64 * WIDTH[device.type], device=device).view(64, -1)
    for layer in layers:
        rows = layer(rows)
    loss = rows.square().sum()
    loss.backward()
    return loss.detach()


def results(layers: Sequence[nn.Module], device: torch.device) -> list[Tensor]:
    """The losses of three steps, and their gradients."""
    losses = [step(layers, device) for _ in range(3)]
    gradients = [p.grad for layer in layers for p in layer.parameters() if p.grad is not None]
    assert len(gradients) == LAYERS
    return [*losses, *gradients]


@cpu_and_gpu
@pytest.mark.parametrize("streamed", [7, 3])
def test_streamed_layers_compute_what_resident_ones_do(name, streamed):
    device = torch.device(name)
    expected = results(built(device, 0)[0], device)
    layers, _ = built(device, streamed)
    if name == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        found = results(layers, device)
    finally:
        if name == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


class Driver:
    """A driver that page-locks so many blocks and no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, blocks: int) -> None:
        self.blocks, self.locked = blocks, list[int]()
        monkeypatch.setattr(stream_module, "page_lock", self.lock)
        monkeypatch.setattr(stream_module, "page_unlock", self.unlock)

    def lock(self, block: Tensor, device: torch.device) -> int:
        if len(self.locked) == self.blocks:
            return 2  # cudaErrorMemoryAllocation
        self.locked.append(block.data_ptr())
        return 0

    def unlock(self, blocks: Sequence[Tensor], device: torch.device) -> None:
        for block in blocks:
            self.locked.remove(block.data_ptr())


@cpu_and_gpu
def test_layers_whose_memory_cannot_be_locked_are_staged(name, monkeypatch):
    blocks = 5
    device = torch.device(name)
    expected = results(built(device, 0)[0], device)
    driver = Driver(monkeypatch, blocks=blocks)
    layers, stream = built(device, LAYERS)
    # Two of them stage the others.
    assert [host.locked for host in stream.streamed].count(True) == blocks - SLOTS
    assert len(driver.locked) == blocks
    for a, b in zip(results(layers, device), expected, strict=True):
        assert torch.equal(a, b)
    staged = [host.locked for host in stream.streamed].count(False)
    count, rate = stream.measure_staging()
    plan = SimpleNamespace(memory=None, streamed_layers=LAYERS)
    text = warning_text(plan, StagedLayers(count, rate))
    assert holds(text, f"{staged} of {LAYERS}", "thread")
    assert rate > 0
    assert len(driver.locked) == LAYERS - staged + SLOTS


@cpu_and_gpu
@pytest.mark.parametrize("blocks", [2, 3])
def test_layers_whose_backward_never_comes_are_brought_in_order(name, blocks, monkeypatch):
    device = torch.device(name)

    def losses(streamed: int) -> list[Tensor]:
        layers, _ = built(device, streamed)
        for layer in layers[:4]:
            layer.requires_grad_(requires_grad=False)
        return [step(layers, device) for _ in range(4)]

    expected = losses(0)
    Driver(monkeypatch, blocks=blocks)
    stage = LayerStream._stage
    monkeypatch.setattr(LayerStream, "_stage", lambda *args: (time.sleep(0.02), stage(*args)))
    found = losses(LAYERS)
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_two_blocks_must_be_locked(monkeypatch):
    Driver(monkeypatch, blocks=1)
    with refuses(MachineError, where="train.cpu_offload", names=["error 2", "12.8 kB"]):
        built(torch.device("cpu"), LAYERS)


def test_vectors_and_what_trains_do_not_move():
    layers, stream = built(torch.device("cpu"), 3)
    width = WIDTH["cpu"]
    size = -(-4 * width * width // ALIGNED_BYTES) * ALIGNED_BYTES
    assert stream.host_bytes == 3 * size
    assert stream.measure_staging() == (0, 0), "all of it is locked"
    assert [list(host.offsets) for host in stream.streamed] == [["frozen.weight"]] * 3
    assert all(not p.is_meta for layer in layers for p in layer.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
def test_on_a_gpu_two_slots_are_taken_and_the_host_is_page_locked():
    device = torch.device("cuda")
    torch.cuda.init()
    before = torch.cuda.memory_allocated()
    _, stream = built(device, LAYERS)
    matrix = 4 * WIDTH["cuda"] ** 2
    # Two slots, and of each layer the trained matrix and two vectors.
    taken = torch.cuda.memory_allocated() - before
    assert taken == pytest.approx((2 + LAYERS) * matrix, rel=0.03)
    assert all(host.block.is_pinned() for host in stream.streamed)
    block = stream.streamed[0].block
    del stream, _
    gc.collect()
    assert not block.is_pinned()
    # A refusal (this memory is locked already) leaves no error to the next kernel.
    block = torch.empty(4096, dtype=torch.uint8, pin_memory=True)
    assert stream_module.page_lock(block, torch.device("cuda"))
    assert torch.ones(1000, device="cuda").sum().item() == 1000
