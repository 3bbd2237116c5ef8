"""Frozen layers that stream from the host: a run has the bits of one whose layers all stay.

On a CPU host and device are one, and the same code runs without streams of CUDA: a slot that is
read at the wrong time has another layer's weights.
"""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import write_tiny_llama
from recipes import make_run, merge, write_feedback, write_pairs
from shipped_bases import write_fp8, write_mxfp4_gpt_oss, write_nvfp4, write_qwen3_moe
from tunesmith.build_model import build_model
from tunesmith.hub.model_files import read_model_files
from tunesmith.inference.load_run import load_run
from tunesmith.model.measured_spec import model_spec
from tunesmith.planning import memory, resolve
from tunesmith.planning.memory import MemoryEstimator
from tunesmith.planning.resolve import inference_plan
from tunesmith.planning.run_plan import Machine
from tunesmith.runtime import compilation
from tunesmith.runtime.stream import SLOTS, LayerStream, StreamedLayer
from tunesmith.stages import plan as plan_stage
from tunesmith.training.result import Result
from tunesmith.training.run import train

pytestmark = [pytest.mark.slow, pytest.mark.long]

LAYERS = 6
RECOMPUTED = {"train": {"recompute": "full"}}
OFFLOADED = {"train": {"cpu_offload": ["parameters"]}}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of six layers."""
    return write_tiny_llama(tmp_path_factory.mktemp("deep-llama"), num_hidden_layers=LAYERS)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that lets so many layers of the runs that follow stream, with other changes of
    their plan.
    """
    choose_plan = plan_stage.choose_plan

    def stream(count: int, **changes: Any) -> None:
        def planned(*args: Any) -> Any:
            model, trained, plan = choose_plan(*args)
            return model, trained, replace(plan, streamed_layers=count, **changes)

        monkeypatch.setattr(plan_stage, "choose_plan", planned)

    return stream


def run_of(model: Path, folder: Path, /, **changes: Any) -> Result:
    """A run of six steps with two validations in a folder."""
    base = {
        "train": {"duration": "6 steps", "compile": "off"},
        "validate": {"every": "3 steps"},
        "output_dir": str(folder / "run"),
    }
    torch.compiler.reset()
    folder.mkdir(exist_ok=True)
    return train(make_run(model, folder, **merge(base, changes)), quiet=True)


def adapter_in(folder: Path) -> bytes:
    return (folder / "run/final/adapter_model.safetensors").read_bytes()


def numbers_of(model: Path, folder: Path, /, **changes: Any) -> tuple[Any, bytes]:
    """What a run computes, and its adapter's file."""
    records = [(r.loss, r.grad_norm, r.val_loss) for r in run_of(model, folder, **changes).records]
    assert len(records) == 6
    return records, adapter_in(folder)


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "all layers": (LAYERS, {}),
    "recomputed": (LAYERS, RECOMPUTED),
    "half recomputed": (LAYERS, {"train": {"recompute": 3}}),
    "several micro batches": (LAYERS, {"train": {"micro_batch": "2 examples"}}),
    "two stay": (4, RECOMPUTED),
    "three stay": (3, {}),
    "dropout": (LAYERS, {"adapter": {"dropout": 0.1}}),
    "some adapters": (LAYERS, {"adapter": {"target": ["q_proj", "down_proj"]}}),
    "a module in full": (LAYERS, {"adapter": {"modules_to_save": ["layers.2.mlp.up_proj"], "target": ["q_proj"]}}),
    "nf4": (LAYERS, {"model": {"quantize": "nf4"}}),
    "nf4, recomputed": (4, merge({"model": {"quantize": "nf4"}}, RECOMPUTED)),
    "fp8": (LAYERS, {"model": {"quantize": "fp8", "dtype": "bf16"}}),
}  # fmt: skip


def nightly_but(names: Any, *first: str) -> list[Any]:
    """Parameters of a test, of which all but the first ones are nightly."""
    return [
        pytest.param(name, id=name, marks=() if name in first else pytest.mark.nightly)
        for name in names
    ]


@pytest.mark.parametrize("case", nightly_but(CASES, "half recomputed", "nf4"))
def test_a_streamed_run_has_the_bits_of_a_resident_one(case, deep, tmp_path, stream):
    count, changes = CASES[case]
    if "nf4" in case:
        pytest.importorskip("bitsandbytes")
    resident = numbers_of(deep, tmp_path / "resident", **changes)
    stream(count)
    assert numbers_of(deep, tmp_path / "streamed", **changes) == resident


def write_mixture(plain: Path, folder: Path) -> Path:
    return write_qwen3_moe(folder, plain, num_hidden_layers=LAYERS)


SHIPPED = {"model": {"quantize": "as-shipped"}}
BASES: dict[str, tuple[Callable[[Path, Path], Path], dict[str, Any]]] = {
    "fp8 as shipped": (lambda plain, folder: write_fp8(plain, folder, (32, 32)), SHIPPED),
    "nvfp4 as shipped": (write_nvfp4, SHIPPED),
    "mixture": (write_mixture, {"model": {"dtype": "fp32"}}),
    "mixture in nf4": (write_mixture, {"model": {"dtype": "fp32", "quantize": "nf4"}}),
    "mxfp4 as shipped": (lambda plain, folder: write_mxfp4_gpt_oss(folder, plain, LAYERS), {"model": {"dtype": "bf16", "quantize": "as-shipped"}}),
}  # fmt: skip


@pytest.mark.nightly
@pytest.mark.parametrize("case", BASES)
def test_bases_of_other_makes_stream_alike(case, deep, tmp_path, stream, monkeypatch):
    """In codes as they ship, and with experts, of which all of a layer come; the plan knows what
    the host takes.
    """
    write, changes = BASES[case]
    if "nf4" in case:
        pytest.importorskip("bitsandbytes")
    model = write(deep, tmp_path / "model")
    changes = merge(RECOMPUTED, changes)
    resident = numbers_of(model, tmp_path / "resident", **changes)
    streams = []
    attach = LayerStream.attach
    monkeypatch.setattr(LayerStream, "attach", lambda self: (streams.append(self), attach(self)))
    stream(LAYERS)
    assert numbers_of(model, tmp_path / "streamed", **changes) == resident
    run = make_run(model, tmp_path, **merge(changes, OFFLOADED))
    spec = model_spec(json.loads((model / "config.json").read_text()), where="test")
    card = Machine("cuda:0", 0, ("varlen", ""), (True, ""), card_bytes=0)
    estimator = MemoryEstimator(run, spec, card, 1)
    # Routers that stay dense and biases of experts are 3 to 4 % of layers so small.
    [held] = streams
    assert held.host_bytes == pytest.approx(estimator.streamed_bytes, rel=0.05)
    assert 2 * held.slot_bytes == pytest.approx(estimator.slot_bytes, rel=0.05)


@pytest.mark.nightly
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_stream_alike(backend, deep, tmp_path, stream, monkeypatch):
    """As on a GPU: compiled layers, packed rows, one graph for all."""
    compile_layers = partial(compilation.compile_layers, backend=backend)
    monkeypatch.setattr(compilation, "compile_layers", compile_layers)
    monkeypatch.setattr(compilation, "compile_loss", lambda score: score)
    changes = {"train": {"compile": "on", "recompute": 3}}
    resident = numbers_of(deep, tmp_path / "resident", **changes)
    stream(4)
    assert numbers_of(deep, tmp_path / "streamed", **changes) == resident


@pytest.mark.nightly
def test_offloaded_inputs_and_streamed_layers_go_together(deep, tmp_path, stream):
    resident = numbers_of(deep, tmp_path / "resident", **RECOMPUTED)
    stream(LAYERS, cpu_offload=("parameters", "activations"))
    assert numbers_of(deep, tmp_path / "streamed", **RECOMPUTED) == resident


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_preferences_stream_alike(method, deep, tmp_path, stream):
    """The reference is the base without its adapter: another forward over the same slots."""
    write = write_feedback if method == "kto" else write_pairs
    form = {"format": "feedback" if method == "kto" else "preference"}
    train = {"source": str(write(tmp_path / "train.jsonl", 24)), **form}
    held = {"source": str(write(tmp_path / "held.jsonl", 8, first=24)), **form}
    data = {"train": train, "validation": held}
    changes: dict[str, Any] = {"method": {"name": method}, "data": data}
    resident = numbers_of(deep, tmp_path / "resident", **changes)
    stream(LAYERS)
    assert numbers_of(deep, tmp_path / "streamed", **changes) == resident


@pytest.mark.nightly
def test_a_backward_without_its_copies_differs(deep, tmp_path, stream, monkeypatch):
    """The tests above have teeth: a slot then holds a later layer."""
    resident = numbers_of(deep, tmp_path / "resident")
    take = LayerStream.take
    forward_only = lambda self, turn, ahead: take(self, turn, ahead) if ahead > turn else None  # noqa: E731
    monkeypatch.setattr(LayerStream, "take", forward_only)
    stream(LAYERS)
    assert numbers_of(deep, tmp_path / "streamed")[0] != resident[0]


def test_a_resumed_run_streams_and_has_the_bits_of_one_that_does_not(deep, tmp_path, stream):
    """The checkpoint holds the adapter alone, as without streaming."""
    resident = numbers_of(deep, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/run/final")
    shutil.rmtree(tmp_path / "run/run/checkpoint-6")
    stream(LAYERS)
    assert run_of(deep, tmp_path / "run").first_step == 4
    assert adapter_in(tmp_path / "run") == resident[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
def test_on_a_gpu_compiled_layers_stream_alike(deep, tmp_path, stream):
    """Run with CUBLAS_WORKSPACE_CONFIG=:4096:8 where other tests have used the GPU before."""
    changes = {
        "model": {"dtype": "bf16"},
        "train": {"compile": "on", "recompute": 3, "deterministic": True},
    }
    resident = numbers_of(deep, tmp_path / "resident", **changes)
    stream(4)
    assert numbers_of(deep, tmp_path / "streamed", **changes) == resident


@pytest.mark.nightly
def test_a_model_that_does_not_fit_streams_as_it_answers(deep, tmp_path, monkeypatch):
    """As on a GPU without room: each forward brings the layers of which the run had said so."""
    run_of(deep, tmp_path / "run", **OFFLOADED)
    ids = torch.arange(20).unsqueeze(0) + 30
    found = []
    for share in (0.8, 0.0):
        monkeypatch.setattr(resolve, "ANSWERING_SHARE", share)
        loaded = load_run(tmp_path / "run/run")
        with torch.no_grad():
            found.append(loaded.model(input_ids=ids).logits)
        monkeypatch.setattr(memory, "moved_to_host", lambda run, machine: run.train.cpu_offload)
    assert isinstance(loaded.train_model.layers[0], StreamedLayer)
    # One fp32 rounding of a merged weight.
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


class CountedMemory(TorchDispatchMode):
    """Counts the bytes of storages that torch allocates inside it, as an allocator of a card: those
    of the host's blocks are not torch's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                self.count(tensor.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key in self.held or not storage.resizable():
            return
        self.held[key] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.free, key)

    def free(self, key: int) -> None:
        self.live -= self.held.pop(key)


@pytest.mark.parametrize("quantize", nightly_but(["none", "nf4"], "none"))
def test_loading_takes_no_more_of_the_card_than_training(quantize, tmp_path):
    """Two slots and what stays: no layer passes through the card on its way to the host."""
    model = write_tiny_llama(tmp_path / "model", num_hidden_layers=12, hidden_size=256)
    run = make_run(model, tmp_path, model={"quantize": quantize})
    files = read_model_files(model, run.model)
    plan = inference_plan(run, files, torch.device("cpu"))
    build_model(run, files, plan)  # the trial of nf4 is over then
    with CountedMemory() as counted:
        root, _ = build_model(run, files, replace(plan, streamed_layers=12))
        loaded = counted.peak
        gc.collect()
        held = counted.live
    stream = root.layers[0].stream
    streamed = {host.layer.get_parameter(name) for host in stream.streamed for name in host.offsets}
    tensors = [*root.buffers(), *(p for p in root.parameters() if p not in streamed)]
    stays = sum(tensor.nbytes for tensor in tensors)
    assert held == pytest.approx(stays + SLOTS * stream.slot_bytes, rel=0.03)
    assert loaded - held < 0.01 * stream.host_bytes
    assert stream.host_bytes == 12 * stream.slot_bytes
