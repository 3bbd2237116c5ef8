"""Bases in codes that are torn, or in a form that is not read: where, and the fix, at once."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from errors import holds, refuses
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
E4M3, E5M2, BYTES = torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8
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


def fp8(**more: Any) -> Fault:
    return stated(fp8_config(BLOCK, **more))


def rows_of(weights: dict[str, Any] | None = None, **more: Any) -> Fault:
    """compressed-tensors in FP8 with a scale a row: other words of it, or of its weights."""
    config = compressed_fp8_config(ROW, **more)
    if weights is not None:
        config["config_groups"]["group_0"]["weights"] |= weights
    return stated(config)


def nvfp4_of(weights: dict[str, Any] | None = None, **more: Any) -> Fault:
    config = compressed_config(**more)
    if weights is not None:
        config["config_groups"]["group_0"]["weights"] |= weights
    return stated(config)


def own_file(text: str) -> Fault:
    """ModelOpt's own file in the place of config.json's words."""

    def spoil(folder: Path) -> None:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        del config["quantization_config"]
        file.write_text(json.dumps(config))
        (folder / "hf_quant_config.json").write_text(text)

    return spoil


FILE, CONFIG = "safetensors", "config.json"
# What wrote the base, what is done to it, and values of the error, of its place and of its fix.
CASES: list[tuple[str, Fault, str, str, str]] = [
    ("fp8", fp8(quant_method="gptq"), "gptq", CONFIG, "unquantized"),
    ("fp8", stated("fp8"), "mapping", CONFIG, "tunesmith fetch"),
    ("fp8", fp8(weight_block_size=[0, 128]), "[0, 128]", CONFIG, "fetch"),
    ("fp8", fp8(modules_to_not_convert=[3]), "[3]", CONFIG, "fetch"),
    ("fp8", fp8(expert_dtype="fp4"), "expert_dtype is 'fp4'", CONFIG, "unquantized"),
    ("fp8", fp8(modules_to_convert=["embed_tokens"]), "modules_to_convert", CONFIG, "unquantized"),
    ("fp8", parts(weight_scale_inv=None), UP, FILE, "fetch"),
    ("fp8", parts(weight=None), SCALE, FILE, "fetch"),
    ("fp8", parts(weight_scale_inv=ones(4, 3)), "[4, 3]", FILE, "fetch"),
    ("fp8", parts(weight_scale_inv=ones(4, 4, dtype=torch.int32)), "integers", FILE, "unquantized"),
    ("fp8", parts(weight=ones(128, 64, dtype=E5M2)), "F8_E5M2", FILE, "fetch"),
    ("fp8", parts(weight=ones(2, 64, 64, dtype=E4M3)), "[2, 64, 64]", FILE, "fetch"),
    (
        "fp8", parts(weight=ones(128, 32, dtype=E4M3), weight_scale_inv=ones(4, 2)), "[128, 32]",
        UP, "fetch",
    ),
    ("fp8", parts(weight_scale_inv=ones(4, 4) * torch.inf), "finite", SCALE, "fetch"),
    ("fp8", parts(weight=with_nan_code(128, 64)), UP, "model.safetensors", "fetch"),
    (
        "fp8", parts(weight=ones(128, 64), weight_scale_inv=None), "scales", UP,
        "modules_to_not_convert",
    ),
    ("rows", rows_of(format="int-quantized"), "int-quantized", CONFIG, "unquantized"),
    ("rows", rows_of({"type": "int"}), "type is 'int'", CONFIG, "unquantized"),
    ("rows", rows_of({"strategy": "group"}), "strategy is 'group'", CONFIG, "unquantized"),
    ("rows", rows_of({"strategy": "block"}), "block_structure is None", CONFIG, "fetch"),
    ("rows", rows_of(config_groups=TWO_GROUPS), "config_groups", CONFIG, "unquantized"),
    ("rows", parts(weight_scale=None, weight_scale_inv=ones(128, 1)), UP, FILE, "fetch"),
    ("rows", parts(weight_scale=ones(127, 1)), "[127, 1]", FILE, "fetch"),
    ("rows", parts(weight_scale=ones(128, 1, dtype=E4M3)), "F8_E4M3", FILE, "fetch"),
    ("rows", parts(weight_g_idx=ones(64)), "model", "base", CONFIG),
    (
        "rows", parts(weight=ones(128, 64), weight_scale=None), "scales", UP,
        "quantization_config.ignore",
    ),
    ("modelopt fp8", stated(modelopt_fp8_config(quant_algo="FP8_PB_WO")), "FP8_PB_WO", CONFIG,
     "unquantized"),
    ("modelopt fp8", parts(weight_scale=torch.tensor(torch.inf)), "finite",
     f"{LAYER}.weight_scale", "fetch"),
    (
        "autofp8", parts(weight=ones(128, 64), weight_scale=None), "scales", UP,
        "quantization_config.ignored_layers",
    ),
    ("nvfp4", nvfp4_of(format="mixed-precision"), "mixed-precision", CONFIG, "unquantized"),
    ("nvfp4", nvfp4_of(config_groups={"a": {"weights": None}}), "config_groups", CONFIG,
     "unquantized"),
    ("nvfp4", nvfp4_of({"group_size": 32}), "group_size is 32", CONFIG, "unquantized"),
    ("nvfp4", nvfp4_of({"symmetric": False}), "symmetric is False", CONFIG, "unquantized"),
    ("nvfp4", nvfp4_of(transform_config={"config_groups": {"u": {}}}), "transform_config", CONFIG,
     "unquantized"),
    ("nvfp4", nvfp4_of(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config", CONFIG,
     "unquantized"),
    ("nvfp4", nvfp4_of(ignore=["re:(.*"]), "re:(.*", CONFIG, "fetch"),
    ("nvfp4", parts(weight_global_scale=None), f"{LAYER}.weight_global_scale", FILE, "fetch"),
    ("nvfp4", parts(weight_packed=None), f"{LAYER}.weight_", FILE, "fetch"),
    ("nvfp4", parts(weight_packed=ones(128, 31, dtype=BYTES)), "[128, 31]", FILE, "fetch"),
    ("nvfp4", parts(weight_scale=ones(128, 4, dtype=BYTES)), "U8", FILE, "fetch"),
    ("nvfp4", parts(weight_global_scale=ones(1, dtype=torch.bfloat16)), "BF16", FILE, "fetch"),
    ("nvfp4", parts(weight_scale=(ones(128, 4) * torch.nan).to(E4M3)), "finite",
     f"{LAYER}.weight_scale", "fetch"),
    ("nvfp4", parts(weight_global_scale=torch.zeros(1)), "0", f"{LAYER}.weight_global_scale",
     "fetch"),
    ("nvfp4", parts(weight=ones(128, 64)), "both", FILE, "fetch"),
    ("modelopt", stated(modelopt_config(quant_algo="NVFP4_AWQ")), "NVFP4_AWQ", CONFIG,
     "unquantized"),
    ("modelopt", stated(modelopt_config(pre_quant_scale=True)), "pre_quant_scale is True", CONFIG,
     "unquantized"),
    (
        "modelopt", lambda f: change_tensors(f, {"model.x.gate_up_proj": ones(2, 2).byte()}), "U8",
        FILE, "fetch",
    ),
    ("modelopt", own_file("{"), "JSON", "hf_quant_config.json", "fetch"),
    ("modelopt", own_file('{"quantization": 4}'), "mapping", "hf_quant_config.json", "fetch"),
    ("modelopt", own_file('{"quantization": {"quant_algo": "W4A8_AWQ"}}'), "W4A8_AWQ", CONFIG,
     "unquantized"),
    ("fp8", lambda f: shorten(f / "model.safetensors"), "damaged", FILE, "copy the file again"),
]  # fmt: skip


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.fixture(scope="module")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    blocks = {"fp8": BLOCK, "rows": ROW, "modelopt fp8": None, "autofp8": None}
    tools = {"fp8": "transformers", "rows": "compressed-tensors", "modelopt fp8": "modelopt"}
    made = {
        name: write_fp8(tiny, folder / name, block, tool=tools.get(name, name))
        for name, block in blocks.items()
    }
    made["nvfp4"] = write_nvfp4(tiny, folder / "nvfp4")
    made["modelopt"] = write_nvfp4(tiny, folder / "modelopt", modelopt=True)
    return made


@pytest.mark.parametrize(("tool", "fault", "what", "where", "fix"), CASES)
def test_a_base_in_codes_is_refused(
    tool: str, fault: Fault, what: str, where: str, fix: str, bases: dict, tmp_path: Path
) -> None:
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


MXFP4_FAULTS: list[tuple[str, torch.Tensor | None, str]] = [
    ("_scales", None, f"{EXPERTS}_blocks"),
    ("_blocks", None, f"{EXPERTS}_scales"),
    ("_blocks", ones(4, 64, 3, 15, dtype=BYTES), "[4, 64, 3, 15]"),
    ("_scales", ones(4, 64, 2, dtype=BYTES), "[4, 64, 2]"),
    ("_scales", ones(4, 64, 3), "F32"),
    ("", None, "[3, 96, 64]"),  # an expert too few
]


@pytest.fixture(scope="module")
def mxfp4(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mxfp4_gpt_oss(tmp_path_factory.mktemp("mxfp4"), tiny)


@pytest.mark.parametrize(("suffix", "tensor", "what"), MXFP4_FAULTS)
def test_mxfp4(
    suffix: str, tensor: torch.Tensor | None, what: str, mxfp4: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(mxfp4, tmp_path / "base"))
    if suffix:
        change_tensors(folder, {f"{EXPERTS}{suffix}": tensor})
    else:
        stored = load_file(folder / "model.safetensors")
        names = (f"{EXPERTS}_blocks", f"{EXPERTS}_scales")
        change_tensors(folder, {part: stored[part][:3].clone() for part in names})
    with refuses(ModelError, fix=["tunesmith fetch"]) as caught:
        built_model(make_run(folder, tmp_path, held=False), folder)
    assert what in caught.value.what


def test_as_shipped_of_a_plain_base(tiny: Path, tmp_path: Path) -> None:
    run = make_run(tiny, tmp_path, held=False, model={"quantize": "as-shipped"})
    with refuses(ModelError, where="config.json", fix=["model.quantize=none"]):
        built_model(run, tiny)


def test_as_shipped_trained_in_full(tiny: Path, tmp_path: Path) -> None:
    with refuses(RecipeError, names=["model.quantize", "as-shipped"]) as caught:
        make_run(tiny, tmp_path, model={"quantize": "as-shipped"}, adapter={"kind": "none"})
    assert holds(caught.value.fix, "model.quantize: none")


@pytest.mark.parametrize("quantize", ["as-shipped", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_layer_in_codes_is_not_saved_in_full(bases: dict, tmp_path: Path, quantize: str) -> None:
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
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


def test_a_form_that_config_json_does_not_name(bases: dict, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases["fp8"], tmp_path / "base"))
    change_config(folder, quantization_config=None)
    run = make_run(folder, tmp_path, held=False)
    with pytest.raises(ModelError, match="tensors"):
        built_model(run, folder)
