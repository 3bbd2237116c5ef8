"""Whole runs on bases that ship in FP8 and NVFP4: what is resolved, resumed, merged and answered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vision_models
from errors import holds, lines_with, refuses
from recipes import make_run, recipe
from shipped_bases import fp8_config, write_fp8, write_nvfp4
from tunesmith.config.dump import to_yaml
from tunesmith.config.load import load_recipe
from tunesmith.errors import ModelError, RecipeError
from tunesmith.formats.form import ROW
from tunesmith.inference.load_run import load_run
from tunesmith.training.run import train

pytestmark = pytest.mark.slow

FOUR = {"train": {"duration": "4 steps"}, "checkpoint": {"every": "2 steps", "keep": 3}}


# Words of what a run says of each.
FORMS = {
    "fp8": ("FP8", "48 x 40"),
    "fp8 of compressed-tensors": ("FP8", "one scale per row"),
    "nvfp4": ("NVFP4",),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name == "fp8" else pytest.mark.nightly) for name in FORMS
    ],
)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def base(form: str, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(form)
    if form == "nvfp4":
        return write_nvfp4(tiny, folder)
    if form == "fp8":
        return write_fp8(tiny, folder, (48, 40))
    return write_fp8(tiny, folder, ROW, tool="compressed-tensors")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(make_run(base, folder, held=False, **FOUR), quiet=True)
    return folder


def losses(run: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows]


def test_config_yaml_holds_what_was_resolved(form: str, trained: Path) -> None:
    assert load_recipe(trained / "run" / "config.yaml").model.quantize == "as-shipped"
    text = (trained / "run" / "log.txt").read_text()
    assert lines_with(text, *FORMS[form])
    assert "base: as-shipped" in text


def test_a_run_without_its_last_checkpoint_goes_on_to_the_same_bits(base, trained, tmp_path):
    """By the same recipe, in which `model.quantize` is left out."""
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


def test_a_resume_refuses_another_form_of_the_base(base: Path, trained: Path) -> None:
    for quantize in ("none", "nf4"):
        changed = make_run(base, trained, held=False, model={"quantize": quantize}, **FOUR)
        with refuses(RecipeError, fix=["--fresh"]) as caught:
            train(changed, quiet=True)
        assert "force" not in caught.value.fix, "a finished run has nothing to resume"
        assert f'model.quantize: "as-shipped" -> "{quantize}"' in caught.value.where


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


def test_what_is_merged_is_dense_and_says_why(form, base, trained, tmp_path):
    merge = pytest.importorskip("tunesmith.tools.export.merge").merge
    merged = merge(trained / "run", tmp_path / "merged", dtype="bf16")
    assert holds(merged.note, FORMS[form][0], "bf16")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    shipped = sum(t.nbytes for t in load_file(base / "model.safetensors").values())
    assert merged.bytes > shipped / 2


@pytest.mark.nightly
def test_the_text_model_of_ministral_3_is_kept_as_it_ships(tiny: Path, tmp_path: Path) -> None:
    """Per tensor, with scales of activations, in a vision-language checkpoint; `merge` writes the
    whole again, dense.
    """
    merge = pytest.importorskip("tunesmith.tools.export.merge").merge
    plain = vision_models.build("mistral3", tmp_path / "plain", tiny)
    names = json.loads((plain / "model.safetensors.index.json").read_text())["weight_map"]
    assert any("vision" in name for name in names)
    folder = vision_models.as_fp8(plain, tmp_path / "fp8")
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"] == fp8_config(
        None,
        modules_to_not_convert=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )
    made = recipe(folder, tmp_path, held=False, **FOUR)
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(made))
    train(file, quiet=True)
    text = (tmp_path / "run" / "log.txt").read_text()
    assert len(lines_with(text, "FP8", "the base model is stored in")) == 1
    merge(tmp_path / "run", tmp_path / "merged")
    written = {}
    for part in (tmp_path / "merged").glob("*.safetensors"):
        written |= load_file(part)
    assert written.keys() == names.keys()
    assert "quantization_config" not in (tmp_path / "merged/config.json").read_text()
