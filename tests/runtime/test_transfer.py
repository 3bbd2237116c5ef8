"""Values leave a device as they were when they were asked for, and nothing later is waited for."""

from __future__ import annotations

import pytest
import torch

from tunesmith.batches.batch import Batch
from tunesmith.runtime.transfer import AsyncScalars, DevicePrefetcher, Snapshot

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and events need a CUDA GPU"),
]
DEVICES = [torch.device("cpu"), pytest.param(torch.device("cuda"), marks=gpu)]


def busy(device: torch.device, seconds: int = 200) -> torch.Tensor:
    """Work that keeps a GPU for a good while after this returns."""
    size = 4096 if device.type == "cuda" else 256
    x = torch.randn(size, size, device=device)
    for _ in range(seconds):
        x = (x @ x).clamp(-1, 1)
    return x


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_are_those_of_their_step(device: torch.device) -> None:
    loss = torch.tensor(1 / 3, device=device)
    norm = torch.tensor(2e300, dtype=torch.float64, device=device)
    expected = [loss.item(), norm.item()]
    reading = AsyncScalars(loss, norm)
    loss.fill_(7.0)  # the next step writes where this one did
    norm.fill_(float("nan"))
    assert reading.read() == expected
    assert reading.read() == expected
    low, none = AsyncScalars(*torch.tensor([-float("inf"), float("nan")])).read()
    assert low == -float("inf")
    assert none != none


@pytest.mark.parametrize("device", DEVICES)
def test_copies_are_as_the_tensors_were(device: torch.device) -> None:
    """Blocks, views, 0-d and host tensors: `state` of AdamW has all of these."""
    torch.manual_seed(0)
    block = torch.randn(300, 200, device=device)
    tensors = {
        "block": torch.nn.Parameter(block.clone()),
        "turned": block.clone().T,
        "part": block.clone()[::3, 5:],
        "half": block.bfloat16(),
        "step": torch.tensor(3.0, device=device),
        "host": torch.tensor(4.0),
    }
    expected = {name: tensor.detach().clone().cpu() for name, tensor in tensors.items()}
    copies = Snapshot(tensors)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(1)
    found = copies.on_host()
    assert list(found) == list(tensors)
    for name, tensor in found.items():
        assert tensor.device.type == "cpu"
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a batch is placed on a CUDA GPU only")
def test_a_placed_batch_is_there_and_stays_while_it_is_read() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    placer, sums, expected = DevicePrefetcher(device), [], []
    for number in range(50):
        ids = torch.full((1, 50_000), number)
        edges = torch.tensor([0, 50_000], dtype=torch.int32)
        batch = Batch(ids, ids.clone(), ids.clone(), edges, 50_000, 50_000, 1, 1)
        placed = placer(batch)
        placer.record_stream(placed)
        assert all(t.device == device for t in placed.tensors().values())
        moved = placed.to(device)
        assert all(moved.tensors()[n] is t for n, t in placed.tensors().items()), "copied again"
        busy(device, 1)  # the sum is read long after Python has let go of the batch
        sums.append(placed.input_ids.sum())
        expected.append(number * 50_000)
        del placed, moved
    assert torch.stack(sums).tolist() == expected
