"""Whole runs on bases that ship in FP8 and NVFP4: what is resolved, resumed, merged and answered."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from errors import refuses
from recipes import make_run
from shipped_bases import write_fp8, write_nvfp4
from tunesmith.answers.load_run import load_run
from tunesmith.config.load import load_recipe
from tunesmith.errors import ModelError, RecipeError
from tunesmith.formats.form import ROW
from tunesmith.start.run import train

pytestmark = pytest.mark.slow

FOUR = {"train": {"duration": "4 steps"}, "checkpoint": {"every": "2 steps", "keep": 3}}


# form -> what writes it from a model
FORMS = {
    "fp8": partial(write_fp8, block=(48, 40)),
    "fp8 of compressed-tensors": partial(write_fp8, block=ROW, tool="compressed-tensors"),
    "nvfp4": write_nvfp4,
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name == "fp8" else pytest.mark.nightly) for name in FORMS
    ],
)
def base(
    request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return FORMS[request.param](tiny, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(make_run(base, folder, held=False, **FOUR), quiet=True)
    return folder


def losses(run: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows]


def test_a_run_without_its_last_checkpoint_goes_on_to_the_same_bits(base, trained, tmp_path):
    """By the same recipe, in which `model.quantize` is left out."""
    assert load_recipe(trained / "run" / "config.yaml").model.quantize == "as-shipped"
    shutil.copytree(trained / "run", tmp_path / "run")
    for name in ("final", "checkpoint-4"):
        shutil.rmtree(tmp_path / "run" / name)
    copy = make_run(base, trained, held=False, output_dir=str(tmp_path / "run"), **FOUR)
    assert train(copy, quiet=True).first_step == 2
    assert losses(tmp_path / "run") == losses(trained / "run")
    ours, theirs = (
        load_file(folder / "run/final/adapter_model.safetensors") for folder in (tmp_path, trained)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_fp8_of_it_is_refused(base: Path, tmp_path: Path) -> None:
    """Where the machine has fp8 matmuls: others take a base in bf16."""
    keys = {"model": {"dtype": "bf16", "quantize": "fp8"}, "train": {"duration": "2 steps"}}
    error: dict[str, Any] = {"names": ["model.quantize"], "fix": ["model.quantize=as-shipped"]}
    with refuses(ModelError, where="model.layers.0.self_attn.q_proj.weight", **error):
        train(make_run(base, tmp_path, held=False, **keys), quiet=True)


def test_a_run_that_began_dense_stays_so(base: Path, tmp_path: Path) -> None:
    """`auto` means what it meant when the run began."""
    train(make_run(base, tmp_path, held=False, model={"quantize": "none"}, **FOUR), quiet=True)
    more = {**FOUR, "train": {"duration": "6 steps"}}
    train(make_run(base, tmp_path, held=False, **more), quiet=True)
    assert len(losses(tmp_path / "run")) == 6
    assert load_recipe(tmp_path / "run" / "config.yaml").model.quantize == "none"


def test_training_it_in_full_is_refused_with_a_fix_that_trains(base: Path, tmp_path: Path) -> None:
    full = {"adapter": {"kind": "none"}, "train": {"duration": "2 steps"}}
    with refuses(RecipeError, where="model.quantize", names=["adapter.kind"]) as caught:
        train(make_run(base, tmp_path, held=False, **full), quiet=True)
    assert "model.quantize=none" in caught.value.fix
    assert not (tmp_path / "run").exists()
    train(make_run(base, tmp_path, held=False, model={"quantize": "none"}, **full), quiet=True)
    final = tmp_path / "run" / "final"
    assert "quantization_config" not in json.loads((final / "config.json").read_text())
    assert not any("scale" in name for name in load_file(final / "model.safetensors"))
    assert load_run(tmp_path / "run").model.dtype == torch.float32


def test_what_is_merged_is_dense(base, trained, tmp_path):
    merge = pytest.importorskip("tunesmith.tools.export.merge").merge
    merged = merge(trained / "run", tmp_path / "merged", dtype="bf16")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    shipped = sum(t.nbytes for t in load_file(base / "model.safetensors").values())
    assert merged.bytes > shipped / 2
