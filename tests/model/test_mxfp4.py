"""Experts that ship in MXFP4, read as Transformers makes them dense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from errors import lines_with, refuses
from recipes import built_model, make_run
from shipped_bases import write_mxfp4_gpt_oss
from tunesmith.config.load import load_recipe
from tunesmith.errors import RecipeError
from tunesmith.formats.mxfp4 import decode_mxfp4
from tunesmith.training.run import train

TWO = {"train": {"duration": "2 steps"}, "data": {"seq_len": 96}}


@pytest.fixture(scope="module")
def base(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mxfp4_gpt_oss(tmp_path_factory.mktemp("gpt-oss"), tiny)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_code_with_each_exponent_is_that_of_transformers(dtype: torch.dtype) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 255, 16, 16)
    exponents = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(1, 255, 16)
    wanted = convert_moe_packed_tensors(blocks, exponents.contiguous(), dtype=dtype)
    values = decode_mxfp4(blocks, exponents, dtype).transpose(1, 2)
    assert torch.equal(values, wanted)
    assert torch.equal(values.signbit(), wanted.signbit())


def test_a_checkpoint_is_read_bit_for_bit(base: Path, tmp_path: Path, monkeypatch) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    )
    run = make_run(base, tmp_path, held=False, model={"dtype": "bf16", "quantize": "none"})
    # In pieces that are no whole expert.
    monkeypatch.setattr("tunesmith.model.stored_tensors.MAX_READ_WEIGHTS", 64 * 40)
    ours = dict(built_model(run, base).model.named_parameters())
    compared = 0
    for name, weight in theirs.named_parameters():
        assert torch.equal(ours[name], weight), name
        compared += name.endswith(("gate_up_proj", "down_proj"))
    assert compared == 4


RUNS = {
    "as it ships": ({}, "as-shipped", "stay quantized and are dequantized for one matmul at a time"),
    "dense": ({"model": {"quantize": "none"}}, "none", "dequantized to fp32 while loading"),
    "nf4": ({"model": {"quantize": "nf4"}}, "nf4", "dequantized and quantized to nf4 while loading"),
    "full": (
        {"model": {"quantize": "none"}, "adapter": {"kind": "none"}}, "none", "dequantized to fp32"
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "quantize", "line"), RUNS.values(), ids=RUNS)
def test_it_trains(base: Path, tmp_path: Path, changes: dict, quantize: str, line: str) -> None:
    merge = pytest.importorskip("tunesmith.tools.export.merge").merge
    train(make_run(base, tmp_path, held=False, **TWO, **changes), quiet=True)
    run = tmp_path / "run"
    assert load_recipe(run / "config.yaml").model.quantize == quantize
    assert lines_with((run / "log.txt").read_text(), "MXFP4", line)
    final = run / "final"
    if "adapter" not in changes:
        merged = merge(run, tmp_path / "merged")
        assert merged.merge_check.passed
        note = (
            "the run trained on an nf4 base" if quantize == "nf4" else "the base is stored in MXFP4"
        )
        assert merged.note.startswith(note)
        final = tmp_path / "merged"
    assert "quantization_config" not in json.loads((final / "config.json").read_text())
    stored = load_file(final / "model.safetensors")
    assert not any(name.endswith(("_blocks", "_scales")) for name in stored)
    AutoModelForCausalLM.from_pretrained(final)


def test_codes_are_not_trained_in_full(base: Path, tmp_path: Path) -> None:
    run = make_run(base, tmp_path, held=False, adapter={"kind": "none"}, **TWO)
    with refuses(
        RecipeError, where="model.quantize", names=["adapter.kind"], fix=["model.quantize=none"]
    ):
        train(run, quiet=True)
