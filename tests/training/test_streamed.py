"""Frozen layers that stream from the host: a run has the bits of one whose layers all stay.

On a CPU host and device are one, and the same code runs without streams of CUDA: a slot that is
read at the wrong time has another layer's weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import write_tiny_llama
from recipes import make_run, merge, write_pairs
from shipped_bases import write_fp8, write_nvfp4, write_qwen3_moe
from tunesmith.answers.load_run import load_run
from tunesmith.planning import memory, resolve
from tunesmith.runtime.stream import StreamedLayer
from tunesmith.start import plan as plan_stage
from tunesmith.start.run import train
from tunesmith.training.result import Result

pytestmark = [pytest.mark.slow, pytest.mark.long]

LAYERS = 6
ADAPTER = "run/final/adapter_model.safetensors"
RECOMPUTED = {"train": {"recompute": "full"}}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("deep-llama"), num_hidden_layers=LAYERS)


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that lets so many layers of the runs that follow stream."""
    choose_plan = plan_stage.choose_plan

    def stream(count: int) -> None:
        def planned(*args: Any) -> Any:
            model, trained, plan = choose_plan(*args)
            return model, trained, replace(plan, streamed_layers=count)

        monkeypatch.setattr(plan_stage, "choose_plan", planned)

    return stream


def run_of(model: Path, folder: Path, /, **changes: Any) -> Result:
    base = {
        "train": {"duration": "6 steps", "compile": "off"},
        "validate": {"every": "3 steps"},
        "output_dir": str(folder / "run"),
    }
    torch.compiler.reset()
    folder.mkdir(exist_ok=True)
    return train(make_run(model, folder, **merge(base, changes)), quiet=True)


def numbers_of(model: Path, folder: Path, /, **changes: Any) -> tuple[Any, bytes]:
    records = [(r.loss, r.grad_norm, r.val_loss) for r in run_of(model, folder, **changes).records]
    assert len(records) == 6
    return records, (folder / ADAPTER).read_bytes()


AS_SHIPPED = {"model": {"quantize": "as-shipped"}, **RECOMPUTED}
# what writes a base from the tiny one, or None; how many layers stream; changes of the recipe
CASES: dict[str, tuple[Callable[[Path, Path], Path] | None, int, dict[str, Any]]] = {
    "half recomputed": (None, LAYERS, {"train": {"recompute": 3}}),
    "nf4": (None, LAYERS, {"model": {"quantize": "nf4"}}),
    "two stay": (None, 4, RECOMPUTED),
    "several micro batches, dropout": (None, LAYERS, {"train": {"micro_batch": "2 examples"}, "adapter": {"dropout": 0.1}}),
    "a module in full": (None, LAYERS, {"adapter": {"modules_to_save": ["layers.2.mlp.up_proj"], "target": ["q_proj"]}}),
    "fp8": (None, LAYERS, {"model": {"quantize": "fp8", "dtype": "bf16"}}),
    "fp8 as shipped": (lambda plain, folder: write_fp8(plain, folder, (32, 32)), LAYERS, AS_SHIPPED),
    "nvfp4 as shipped": (write_nvfp4, LAYERS, AS_SHIPPED),
    "mixture in nf4": (lambda plain, folder: write_qwen3_moe(folder, plain, num_hidden_layers=LAYERS), LAYERS, {"model": {"quantize": "nf4"}, **RECOMPUTED}),
}  # fmt: skip
NAMES = [
    pytest.param(name, id=name, marks=() if number < 2 else pytest.mark.nightly)
    for number, name in enumerate(CASES)
]


@pytest.mark.parametrize("name", NAMES)
def test_a_streamed_run_has_the_bits_of_a_resident_one(name, deep, tmp_path, stream):
    write, count, changes = CASES[name]
    if "nf4" in name:
        pytest.importorskip("bitsandbytes")
    model = write(deep, tmp_path / "model") if write else deep
    resident = numbers_of(model, tmp_path / "resident", **changes)
    stream(count)
    assert numbers_of(model, tmp_path / "streamed", **changes) == resident


@pytest.mark.nightly
def test_preferences_stream_alike(deep, tmp_path, stream):
    """The reference is the base without its adapter: another forward over the same slots."""
    data = {}
    for split, first in (("train", 0), ("validation", 24)):
        file = write_pairs(tmp_path / f"{split}.jsonl", 24, first)
        data[split] = {"source": str(file), "format": "preference"}
    changes: dict[str, Any] = {"method": "dpo", "data": data}
    resident = numbers_of(deep, tmp_path / "resident", **changes)
    stream(LAYERS)
    assert numbers_of(deep, tmp_path / "streamed", **changes) == resident


def test_a_resumed_run_streams_and_has_the_bits_of_one_that_does_not(deep, tmp_path, stream):
    """The checkpoint holds the adapter alone, as without streaming."""
    resident = numbers_of(deep, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/run/final")
    shutil.rmtree(tmp_path / "run/run/checkpoint-6")
    stream(LAYERS)
    assert run_of(deep, tmp_path / "run").first_step == 4
    assert (tmp_path / "run" / ADAPTER).read_bytes() == resident[1]


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
    run_of(deep, tmp_path / "run", train={"cpu_offload": ["parameters"]})
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
