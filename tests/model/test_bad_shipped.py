"""Bases in codes that are torn, or in a form that is not read: where, and the fix, at once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import refuses
from recipes import built_model, make_run
from shipped_bases import (
    change_config,
    change_tensors,
    compressed_config,
    compressed_fp8_config,
    fp8_config,
    modelopt_config,
    modelopt_fp8_config,
    write_fp8,
    write_mxfp4_gpt_oss,
    write_nvfp4,
)
from tunesmith.errors import ModelError, RecipeError
from tunesmith.formats.form import ROW
from tunesmith.hub.model_files import read_model_files
from tunesmith.parallel.mesh import check_mesh
from tunesmith.parallel.mesh_shape import MeshShape

SECONDS = 2.0  # of the processor; to build what is refused would take minutes
BLOCK = (32, 16)
LAYER = "model.layers.0.mlp.up_proj"
UP = f"{LAYER}.weight"
SCALE = f"{UP}_scale_inv"
EXPERTS = "model.layers.0.mlp.experts.down_proj"
E4M3, BYTES = torch.float8_e4m3fn, torch.uint8
TWO_GROUPS = {"a": {"weights": {}}, "b": {"weights": {}}}

Fault = Callable[[Path], Any]


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape).to(dtype)


def with_nan_code(rows: int, columns: int) -> torch.Tensor:
    """E4m3 codes of which one, the negative NaN, is no number."""
    codes = ones(rows, columns, dtype=E4M3)
    codes.view(BYTES)[rows // 2, columns // 2] = 255
    return codes


def stated(config: Any) -> Fault:
    return lambda folder: change_config(folder, quantization_config=config)


def parts(**tensors: torch.Tensor | None) -> Fault:
    """Other tensors of the layer, by the last part of their names."""
    return lambda folder: change_tensors(folder, {f"{LAYER}.{k}": t for k, t in tensors.items()})


def experts(**tensors: torch.Tensor | None) -> Fault:
    return lambda folder: change_tensors(folder, {f"{EXPERTS}{k}": t for k, t in tensors.items()})


def fp8(**more: Any) -> Fault:
    return stated(fp8_config(BLOCK, **more))


def rows_of(**more: Any) -> Fault:
    """compressed-tensors in FP8 with a scale a row."""
    return stated(compressed_fp8_config(ROW, **more))


def nvfp4_of(weights: dict[str, Any] | None = None, **more: Any) -> Fault:
    config = compressed_config(**more)
    if weights is not None:
        config["config_groups"]["group_0"]["weights"] |= weights
    return stated(config)


FILE, CONFIG = "safetensors", "config.json"
# What wrote the base, what is done to it, and values of the error, of its place and of its fix.
CASES: list[tuple[str, Fault, str, str, str]] = [
    ("fp8", fp8(quant_method="gptq"), "gptq", CONFIG, "unquantized"),
    ("fp8", stated("fp8"), "mapping", CONFIG, "tunesmith fetch"),
    ("fp8", parts(weight_scale_inv=None), UP, FILE, "fetch"),
    ("fp8", parts(weight_scale_inv=ones(4, 3)), "[4, 3]", FILE, "fetch"),
    ("fp8", parts(weight_scale_inv=ones(4, 4) * torch.inf), "finite", SCALE, "fetch"),
    ("fp8", parts(weight=with_nan_code(128, 64)), UP, "model.safetensors", "fetch"),
    (
        "fp8", parts(weight=ones(128, 64), weight_scale_inv=None), "scales", UP,
        "modules_to_not_convert",
    ),
    ("rows", rows_of(format="int-quantized"), "int-quantized", CONFIG, "unquantized"),
    ("rows", rows_of(config_groups=TWO_GROUPS), "config_groups", CONFIG, "unquantized"),
    ("rows", parts(weight_scale=ones(127, 1)), "[127, 1]", FILE, "fetch"),
    ("rows", parts(weight_g_idx=ones(64)), "model", "base", CONFIG),
    ("modelopt fp8", stated(modelopt_fp8_config(quant_algo="FP8_PB_WO")), "FP8_PB_WO", CONFIG,
     "unquantized"),
    ("nvfp4", nvfp4_of(format="mixed-precision"), "mixed-precision", CONFIG, "unquantized"),
    ("nvfp4", nvfp4_of({"group_size": 32}), "group_size is 32", CONFIG, "unquantized"),
    ("nvfp4", nvfp4_of(transform_config={"config_groups": {"u": {}}}), "transform_config", CONFIG,
     "unquantized"),
    ("nvfp4", parts(weight_global_scale=None), f"{LAYER}.weight_global_scale", FILE, "fetch"),
    ("nvfp4", parts(weight_packed=ones(128, 31, dtype=BYTES)), "[128, 31]", FILE, "fetch"),
    ("nvfp4", parts(weight_scale=(ones(128, 4) * torch.nan).to(E4M3)), "finite",
     f"{LAYER}.weight_scale", "fetch"),
    ("nvfp4", parts(weight=ones(128, 64)), "both", FILE, "fetch"),
    ("modelopt", stated(modelopt_config(quant_algo="NVFP4_AWQ")), "NVFP4_AWQ", CONFIG,
     "unquantized"),
    ("modelopt", stated(modelopt_config(pre_quant_scale=True)), "pre_quant_scale is True", CONFIG,
     "unquantized"),
    ("fp8", stated(None), "tensors", "", ""),  # a form that config.json does not name
    ("mxfp4", experts(_scales=None), f"{EXPERTS}_blocks", "", "tunesmith fetch"),
    ("mxfp4", experts(_blocks=ones(4, 64, 3, 15, dtype=BYTES)), "[4, 64, 3, 15]", "", "fetch"),
    ("mxfp4", experts(_scales=ones(4, 64, 3)), "F32", "", "tunesmith fetch"),
]  # fmt: skip


@pytest.fixture(scope="module")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "fp8": write_fp8(tiny, folder / "fp8", BLOCK),
        "rows": write_fp8(tiny, folder / "rows", ROW, tool="compressed-tensors"),
        "modelopt fp8": write_fp8(tiny, folder / "one scale", None, tool="modelopt"),
        "nvfp4": write_nvfp4(tiny, folder / "nvfp4"),
        "modelopt": write_nvfp4(tiny, folder / "modelopt", modelopt=True),
        "mxfp4": write_mxfp4_gpt_oss(folder / "mxfp4", tiny),
    }


@pytest.mark.parametrize(("tool", "fault", "what", "where", "fix"), CASES)
def test_a_base_in_codes_is_refused(tool, fault, what, where, fix, bases, tmp_path) -> None:
    """As a start reads it: config and headers, then the weights."""
    folder = Path(shutil.copytree(bases[tool], tmp_path / "base"))
    fault(folder)
    run = make_run(folder, tmp_path, held=False)
    start = time.process_time()
    with pytest.raises(ModelError) as caught:
        built_model(run, folder)
    assert time.process_time() - start < SECONDS
    assert what in caught.value.what
    assert where in caught.value.where
    assert fix in caught.value.fix


def test_as_shipped_of_a_plain_base(tiny: Path, tmp_path: Path) -> None:
    run = make_run(tiny, tmp_path, held=False, model={"quantize": "as-shipped"})
    with refuses(ModelError, where="config.json", fix=["model.quantize=none"]):
        built_model(run, tiny)


@pytest.mark.parametrize("quantize", ["as-shipped", "nf4"])
def test_a_layer_in_codes_is_not_saved_in_full(quantize: str, bases: dict, tmp_path: Path) -> None:
    folder = bases["fp8"]
    saved = {"modules_to_save": ["down_proj"]}
    run = make_run(folder, tmp_path, model={"quantize": quantize}, adapter=saved)
    with refuses(RecipeError, where="adapter.modules_to_save", fix=["model.quantize=none"]):
        built_model(run, folder)


def test_a_layer_as_it_ships_is_not_cut_over_ranks(bases: dict, tmp_path: Path) -> None:
    run = make_run(bases["fp8"], tmp_path, model={"quantize": "as-shipped"})
    spec = read_model_files(bases["fp8"], run.model).spec
    with refuses(RecipeError, names=["tensor 2"], fix=["model.quantize=none"]):
        check_mesh(run, spec, MeshShape(1, 1, 2), 2)
    check_mesh(run, spec, MeshShape(1, 2, 1), 2)
