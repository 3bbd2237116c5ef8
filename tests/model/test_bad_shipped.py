"""Bases in codes that are torn, or in a form that is not read: where, and the fix, at once."""

from __future__ import annotations

import json
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
from tunesmith.errors import ModelError, RecipeError, TunesmithError
from tunesmith.formats.form import ROW
from tunesmith.hub.model_files import read_model_files
from tunesmith.parallel.mesh import check_mesh
from tunesmith.parallel.mesh_shape import MeshShape
from tunesmith.training.run import train

SECONDS = 2.0  # of the processor; to build what is refused would take minutes
BLOCK = (32, 16)
UP = "model.layers.0.mlp.up_proj.weight"
SCALE = f"{UP}_scale_inv"
EXPERTS = "model.layers.0.mlp.experts.down_proj"

Fault = Callable[[Path], Any]


def config_of(**more: Any) -> Fault:
    return lambda folder: change_config(folder, quantization_config=fp8_config(BLOCK, **more))


def tensors_of(**changes: torch.Tensor | None) -> Fault:
    names = {"up": UP, "scale": SCALE}
    return lambda folder: change_tensors(folder, {names[key]: t for key, t in changes.items()})


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape).to(dtype)


def with_nan_code(rows: int, columns: int) -> torch.Tensor:
    """E4m3 codes of which one, the negative NaN, is no number."""
    codes = ones(rows, columns, dtype=torch.float8_e4m3fn)
    codes.view(torch.uint8)[rows // 2, columns // 2] = 255
    return codes


# name -> what is done to a checkpoint in FP8, words of the error, of its place, and of its fix
FP8: dict[str, tuple[Fault, str, str, str]] = {
    "another method": (
        config_of(quant_method="gptq"), "quantized with gptq", "config.json", "unquantized"),
    "no mapping": (
        lambda folder: change_config(folder, quantization_config="fp8"),
        "it must be a mapping", "config.json", "tunesmith fetch"),
    "a block of one size": (
        config_of(weight_block_size=[128]), "two whole numbers", "config.json", "fetch"),
    "a block of nothing": (
        config_of(weight_block_size=[0, 128]), "two whole numbers", "config.json", "fetch"),
    "a block in words": (
        config_of(weight_block_size="128x128"), "two whole numbers", "config.json", "fetch"),
    "names that are none": (
        config_of(modules_to_not_convert=[3]), "must be a list of names", "config.json", "fetch"),
    "one name as text": (
        config_of(modules_to_not_convert="lm_head"), "must be a list of names", "config.json",
        "fetch"),
    "experts in FP4": (
        config_of(expert_dtype="fp4"), "expert_dtype is 'fp4'", "config.json", "unquantized"),
    "an embedding in FP8": (
        config_of(modules_to_convert=["embed_tokens"]), "modules_to_convert", "config.json",
        "unquantized"),
    "no scales": (
        tensors_of(scale=None), f"the scales of {UP} are missing", "safetensors", "fetch"),
    "no weight": (tensors_of(up=None), f"quantized weight of {SCALE} is missing", "safetensors", "fetch"),
    "scales of another shape": (
        tensors_of(scale=ones(4, 3)), "up_proj.weight_scale_inv is [4, 3]", "safetensors", "fetch"),
    "one scale where there are blocks": (
        tensors_of(scale=torch.tensor(1.0)), "weight_scale_inv is []", "safetensors", "fetch"),
    "scales that are integers": (
        tensors_of(scale=ones(4, 4, dtype=torch.int32)), "integers", "safetensors",
        "unquantized"),
    "scales in e5m2": (
        tensors_of(scale=ones(4, 4, dtype=torch.float8_e5m2)), "stored as F8_E5M2",
        "safetensors", "fetch"),
    "codes in e5m2": (
        tensors_of(up=ones(128, 64, dtype=torch.float8_e5m2)), "stored as F8_E5M2", "safetensors",
        "fetch"),
    "a plain weight beside scales": (
        tensors_of(up=ones(128, 64)), "is stored as F32", "safetensors", "fetch"),
    "codes that are no matrix": (
        tensors_of(up=ones(2, 64, 64, dtype=torch.float8_e4m3fn)), "is [2, 64, 64]", "safetensors",
        "fetch"),
    "codes of another shape": (
        tensors_of(up=ones(128, 32, dtype=torch.float8_e4m3fn), scale=ones(4, 2)),
        "it is stored as [128, 32]", UP, "fetch"),
    "a scale that is no number": (
        tensors_of(scale=ones(4, 4) * torch.inf), "is not finite", SCALE, "fetch"),
    "a code that is no number": (
        tensors_of(up=with_nan_code(128, 64)), UP, "model.safetensors", "fetch"),
    "a plain weight that should be in codes": (
        tensors_of(up=ones(128, 64), scale=None), "stored without scales", UP,
        "modules_to_not_convert"),
}  # fmt: skip


# Of the same in the files of other tools: parts of the name of the layer that `tensor` stands for.
LAYER = "model.layers.0.mlp.up_proj"


def nvfp4_of(**more: Any) -> Fault:
    return lambda folder: change_config(folder, quantization_config=compressed_config(**more))


def rows_of(**more: Any) -> Fault:
    """In FP8, with a scale a row."""
    stated = compressed_fp8_config(ROW, **more)
    return lambda folder: change_config(folder, quantization_config=stated)


def row_group_of(weights: dict[str, Any], **more: Any) -> Fault:
    """Other words of the group, and of its weights."""
    [group] = compressed_fp8_config(ROW)["config_groups"].values()
    group = {**group, "weights": group["weights"] | weights, **more}
    return rows_of(config_groups={"group_0": group})


def modelopt_of(**more: Any) -> Fault:
    return lambda folder: change_config(folder, quantization_config=modelopt_config(**more))


def group_of(**more: Any) -> Fault:
    """Other words of the weights of the group."""
    config = compressed_config()
    config["config_groups"]["group_0"]["weights"] |= more
    return lambda folder: change_config(folder, quantization_config=config)


def part_of(part: str, tensor: torch.Tensor | None) -> Fault:
    return lambda folder: change_tensors(folder, {f"{LAYER}.{part}": tensor})


def all_faults(*faults: Fault) -> Fault:
    return lambda folder: [fault(folder) for fault in faults]


def own_file(text: str) -> Fault:
    """ModelOpt's own file in the place of config.json's words."""

    def spoil(folder: Path) -> None:
        change_config(folder, quantization_config=None)
        file = folder / "config.json"
        stated = json.loads(file.read_text())
        del stated["quantization_config"]
        file.write_text(json.dumps(stated))
        (folder / "hf_quant_config.json").write_text(text)

    return spoil


E4M3 = torch.float8_e4m3fn
TWO_GROUPS = {"a": {"weights": {}}, "b": {"weights": {}}}
COMPRESSED: dict[str, tuple[Fault, str, str, str]] = {
    "integers in one tensor": (
        rows_of(format="pack-quantized"), "compressed-tensors pack-quantized", "config.json",
        "unquantized"),
    "integers": (
        rows_of(format="int-quantized"), "compressed-tensors int-quantized", "config.json",
        "unquantized"),
    "integers, by their group": (
        row_group_of({"type": "int"}), "type is 'int'", "config.json", "unquantized"),
    "4 bits": (row_group_of({"num_bits": 4}), "num_bits is 4", "config.json", "unquantized"),
    "the format of 4 bits": (
        rows_of(format="nvfp4-pack-quantized"), "num_bits is 8", "config.json", "unquantized"),
    "another format of the group": (
        row_group_of({}, format="pack-quantized"), "format is 'pack-quantized'", "config.json",
        "unquantized"),
    "groups of a row": (
        row_group_of({"strategy": "group"}), "strategy is 'group'", "config.json", "unquantized"),
    "scales that are made as it runs": (
        row_group_of({"dynamic": True}), "dynamic is True", "config.json", "unquantized"),
    "with zero points": (
        row_group_of({"symmetric": False}), "symmetric is False", "config.json", "unquantized"),
    "blocks of no size": (
        row_group_of({"strategy": "block"}), "block_structure is None", "config.json", "fetch"),
    "blocks in words": (
        row_group_of({"strategy": "block", "block_structure": "128x128"}), "two whole numbers",
        "config.json", "fetch"),
    "two groups": (
        rows_of(config_groups=TWO_GROUPS), "config_groups is", "config.json", "unquantized"),
    "a group of activations alone": (
        rows_of(config_groups={"a": {"weights": None}}), "config_groups is", "config.json",
        "unquantized"),
    "keys and values alone": (
        rows_of(config_groups={}, kv_cache_scheme={"num_bits": 8}), "config_groups is {}",
        "config.json", "unquantized"),
    "weights with holes": (
        rows_of(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is",
        "config.json", "unquantized"),
    "no scales": (
        part_of("weight_scale", None), f"the scales of {UP} are missing", "safetensors", "fetch"),
    "scales by another tool": (
        all_faults(part_of("weight_scale", None), part_of("weight_scale_inv", ones(128, 1))),
        f"the scales of {UP} are missing", "safetensors", "fetch"),
    "no weight": (
        part_of("weight", None), f"quantized weight of {LAYER}.weight_scale", "safetensors", "fetch"),
    "too few scales": (
        part_of("weight_scale", ones(127, 1)), "weight_scale is [127, 1]", "safetensors", "fetch"),
    "one scale where rows have one each": (
        part_of("weight_scale", ones(1)), "weight_scale is [1]", "safetensors", "fetch"),
    "a scale for each block": (
        part_of("weight_scale", ones(4, 4)), "weight_scale is [4, 4]", "safetensors", "fetch"),
    "rows where one scale is stated": (
        row_group_of({"strategy": "tensor"}), "weight_scale is [", "safetensors", "fetch"),
    "scales in e4m3": (
        part_of("weight_scale", ones(128, 1, dtype=E4M3)), "weight_scale is stored as F8_E4M3",
        "safetensors", "fetch"),
    "codes in e5m2": (
        part_of("weight", ones(128, 64, dtype=torch.float8_e5m2)), "stored as F8_E5M2",
        "safetensors", "fetch"),
    "codes in int8": (
        part_of("weight", ones(128, 64, dtype=torch.int8)), "integers", "safetensors",
        "unquantized"),
    "a plain weight beside scales": (
        part_of("weight", ones(128, 64)), "is stored as F32", "safetensors", "fetch"),
    "codes without a row": (
        all_faults(
            part_of("weight", ones(128, 0, dtype=E4M3)), part_of("weight_scale", ones(128, 1))),
        "it is stored as [128, 0]", UP, "fetch"),
    "codes of another shape": (
        part_of("weight", ones(128, 32, dtype=E4M3)), "it is stored as [128, 32]", UP, "fetch"),
    "a scale that is no number": (
        part_of("weight_scale", ones(128, 1) * torch.nan), "is not finite",
        f"{LAYER}.weight_scale", "fetch"),
    "columns in another order": (
        part_of("weight_g_idx", ones(64)), "not part of this model", "base", "config.json"),
    "plain where it should be in codes": (
        all_faults(part_of("weight", ones(128, 64)), part_of("weight_scale", None)),
        "stored without scales", UP, "quantization_config.ignore"),
}  # fmt: skip
MODELOPT_FP8: dict[str, tuple[Fault, str, str, str]] = {
    "scales of blocks": (
        lambda folder: change_config(
            folder, quantization_config=modelopt_fp8_config(quant_algo="FP8_PB_WO")),
        "modelopt FP8_PB_WO", "config.json", "unquantized"),
    "two groups": (
        lambda folder: change_config(
            folder, quantization_config=modelopt_fp8_config(config_groups=TWO_GROUPS)),
        "config_groups is", "config.json", "unquantized"),
    "a scale a row": (
        part_of("weight_scale", ones(128, 1)), "weight_scale is [128, 1]", "safetensors", "fetch"),
    "no scale": (
        part_of("weight_scale", None), f"the scales of {UP} are missing", "safetensors", "fetch"),
    "a scale that is infinite": (
        part_of("weight_scale", torch.tensor(torch.inf)), "is not finite", f"{LAYER}.weight_scale",
        "fetch"),
}  # fmt: skip
NVFP4: dict[str, tuple[Fault, str, str, str]] = {
    "another format": (
        nvfp4_of(format="mixed-precision"), "compressed-tensors mixed-precision", "config.json",
        "unquantized"),
    "no groups": (nvfp4_of(config_groups={}), "config_groups is {}", "config.json", "unquantized"),
    "two groups": (
        nvfp4_of(config_groups=TWO_GROUPS), "config_groups is", "config.json", "unquantized"),
    "a group of no weights": (
        nvfp4_of(config_groups={"a": {"weights": None}}), "config_groups is", "config.json",
        "unquantized"),
    "groups of 32": (group_of(group_size=32), "group_size is 32", "config.json", "unquantized"),
    "integers": (group_of(type="int"), "type is 'int'", "config.json", "unquantized"),
    "8 bits": (group_of(num_bits=8), "num_bits is 8", "config.json", "unquantized"),
    "with zero points": (
        group_of(symmetric=False), "symmetric is False", "config.json", "unquantized"),
    "rotated weights": (
        nvfp4_of(transform_config={"config_groups": {"u": {}}}), "transform_config is",
        "config.json", "unquantized"),
    "weights with holes": (
        nvfp4_of(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is",
        "config.json", "unquantized"),
    "ignored names that are none": (
        nvfp4_of(ignore=[3]), "must be a list of names", "config.json", "fetch"),
    "an expression that is none": (
        nvfp4_of(ignore=["re:(.*"]), "not a valid regular expression", "config.json", "fetch"),
    "no scales": (
        part_of("weight_scale", None), f"{LAYER}.weight_scale", "safetensors", "fetch"),
    "no scale of all": (
        part_of("weight_global_scale", None), f"{LAYER}.weight_global_scale",
        "safetensors", "fetch"),
    "no codes": (
        part_of("weight_packed", None), f"quantized weight of {LAYER}.weight_", "safetensors", "fetch"),
    "torn codes": (
        part_of("weight_packed", ones(128, 31, dtype=torch.uint8)), "is [128, 31]", "safetensors",
        "fetch"),
    "codes that are no matrix": (
        part_of("weight_packed", ones(2, 64, 32, dtype=torch.uint8)), "is [2, 64, 32]",
        "safetensors", "fetch"),
    "codes that are no bytes": (
        part_of("weight_packed", ones(128, 32)), "is stored as F32", "safetensors", "fetch"),
    "codes of another shape": (
        all_faults(
            part_of("weight_packed", ones(128, 16, dtype=torch.uint8)),
            part_of("weight_scale", ones(128, 2, dtype=E4M3))),
        "it is stored as [128, 32]", f"{LAYER}.weight", "fetch"),
    "scales of another shape": (
        part_of("weight_scale", ones(128, 2, dtype=E4M3)), "weight_scale is [128, 2]",
        "safetensors", "fetch"),
    "scales that are powers of two": (
        part_of("weight_scale", ones(128, 4, dtype=torch.uint8)), "weight_scale is stored as U8",
        "safetensors", "fetch"),
    "a scale of all for each row": (
        part_of("weight_global_scale", ones(128)), "weight_global_scale is [128]", "safetensors",
        "fetch"),
    "a scale of all in bf16": (
        part_of("weight_global_scale", ones(1, dtype=torch.bfloat16)), "is stored as BF16",
        "safetensors", "fetch"),
    "a scale that is no number": (
        part_of("weight_scale", (ones(128, 4) * torch.nan).to(E4M3)), "is not finite",
        f"{LAYER}.weight_scale", "fetch"),
    "a scale of all that is no number": (
        part_of("weight_global_scale", ones(1) * torch.nan), "is not finite",
        f"{LAYER}.weight_global_scale", "fetch"),
    "a scale of all that is 0": (
        part_of("weight_global_scale", torch.zeros(1)), "and above 0: 0",
        f"{LAYER}.weight_global_scale", "fetch"),
    "plain and in codes": (
        part_of("weight", ones(128, 64)), "is stored both unquantized and in codes", "safetensors", "fetch"),
    "a zero point": (
        part_of("weight_zero_point", ones(128, 4)), "not part of this model", "base", "config.json"),
    "plain where it should be in codes": (
        all_faults(
            part_of("weight", ones(128, 64)), part_of("weight_packed", None),
            part_of("weight_scale", None), part_of("weight_global_scale", None)),
        "stored without scales", f"{LAYER}.weight", "quantization_config.ignore"),
}  # fmt: skip
MODELOPT: dict[str, tuple[Fault, str, str, str]] = {
    "another algorithm": (
        modelopt_of(quant_algo="NVFP4_AWQ"), "modelopt NVFP4_AWQ", "config.json", "unquantized"),
    "several algorithms": (
        modelopt_of(quant_algo="MIXED_PRECISION"), "modelopt MIXED_PRECISION", "config.json",
        "unquantized"),
    "inputs that are scaled first": (
        modelopt_of(pre_quant_scale=True), "pre_quant_scale is True", "config.json",
        "unquantized"),
    "groups of 32": (modelopt_of(group_size=32), "group_size is 32", "config.json", "unquantized"),
    "no second scale": (
        part_of("weight_scale_2", None), f"{LAYER}.weight_scale_2", "safetensors",
        "fetch"),
    "no scales": (
        part_of("weight_scale", None), f"{LAYER}.weight_scale", "safetensors", "fetch"),
    "a plain weight beside scales": (
        part_of("weight", ones(128, 64)), "is stored as F32", "safetensors", "fetch"),
    "all experts in one tensor": (
        lambda folder: change_tensors(folder, {"model.x.gate_up_proj": ones(2, 2).byte()}),
        "gate_up_proj is stored as U8", "safetensors", "fetch"),
    "a file of its own that is torn": (
        own_file("{"), "is not JSON", "hf_quant_config.json", "fetch"),
    "a file of its own that says nothing": (
        own_file('{"quantization": 4}'), "must be a mapping", "hf_quant_config.json", "fetch"),
    "a file of its own with another algorithm": (
        own_file('{"quantization": {"quant_algo": "W4A8_AWQ"}}'), "modelopt W4A8_AWQ",
        "config.json", "unquantized"),
}  # fmt: skip


def assert_refused(folder: Path, runs: Path, what: str, where: str, fix: str, **model: Any) -> None:
    """As a start reads it: config and headers, then the weights."""
    run = make_run(folder, runs, held=False, model=model)
    start = time.process_time()
    with pytest.raises(ModelError) as caught:
        built_model(run, folder)
    assert time.process_time() - start < SECONDS
    assert what in caught.value.what
    assert where in caught.value.where
    assert fix in caught.value.fix


AUTOFP8: dict[str, tuple[Fault, str, str, str]] = {
    "no scale": (
        part_of("weight_scale", None), f"the scales of {UP} are missing", "safetensors", "fetch"),
    "plain where it should be in codes": (
        all_faults(part_of("weight", ones(128, 64)), part_of("weight_scale", None)),
        "stored without scales", UP, "quantization_config.ignored_layers"),
}  # fmt: skip


# Of each tool: the block of its base, and the faults.
FP8_TOOLS = {
    "transformers": (BLOCK, FP8),
    "compressed-tensors": (ROW, COMPRESSED),
    "modelopt": (None, MODELOPT_FP8),
    "autofp8": (None, AUTOFP8),
}


@pytest.mark.parametrize(
    ("tool", "name"), [(tool, name) for tool, (_, cases) in FP8_TOOLS.items() for name in cases]
)
def test_fp8(tiny: Path, tmp_path: Path, tool: str, name: str) -> None:
    block, cases = FP8_TOOLS[tool]
    fault, what, where, fix = cases[name]
    folder = write_fp8(tiny, tmp_path / "base", block, tool=tool)
    fault(folder)
    assert_refused(folder, tmp_path, what, where, fix)


@pytest.mark.parametrize("name", NVFP4)
def test_nvfp4(tiny: Path, tmp_path: Path, name: str) -> None:
    fault, what, where, fix = NVFP4[name]
    folder = write_nvfp4(tiny, tmp_path / "base")
    fault(folder)
    assert_refused(folder, tmp_path, what, where, fix)


@pytest.mark.parametrize("name", MODELOPT)
def test_nvfp4_of_modelopt(tiny: Path, tmp_path: Path, name: str) -> None:
    fault, what, where, fix = MODELOPT[name]
    folder = write_nvfp4(tiny, tmp_path / "base", modelopt=True)
    fault(folder)
    assert_refused(folder, tmp_path, what, where, fix)


def test_a_file_that_is_cut_off(tiny: Path, tmp_path: Path) -> None:
    folder = write_fp8(tiny, tmp_path / "base", BLOCK)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert_refused(folder, tmp_path, "is damaged", "model.safetensors", "copy the file again")


MXFP4_FAULTS: dict[str, tuple[str, torch.Tensor | None, str]] = {
    "no scales": ("_scales", None, f"the scales of {EXPERTS}_blocks are missing"),
    "no blocks": ("_blocks", None, f"the quantized weight of {EXPERTS}_scales is missing"),
    "torn blocks": ("_blocks", ones(4, 64, 3, 15, dtype=torch.uint8), "is [4, 64, 3, 15]"),
    "scales of another shape": ("_scales", ones(4, 64, 2, dtype=torch.uint8), "is [4, 64, 2]"),
    "scales that are no bytes": ("_scales", ones(4, 64, 3), "stored as F32"),
    "an expert too few": ("", None, "it is stored as [3, 96, 64]"),
}


@pytest.mark.parametrize("name", MXFP4_FAULTS)
def test_mxfp4(tiny: Path, tmp_path: Path, name: str) -> None:
    suffix, tensor, what = MXFP4_FAULTS[name]
    folder = write_mxfp4_gpt_oss(tmp_path / "base", tiny)
    if suffix:
        change_tensors(folder, {f"{EXPERTS}{suffix}": tensor})
    else:
        stored = load_file(folder / "model.safetensors")
        names = (f"{EXPERTS}_blocks", f"{EXPERTS}_scales")
        change_tensors(folder, {part: stored[part][:3].clone() for part in names})
    run = make_run(folder, tmp_path, held=False)
    with pytest.raises(ModelError) as caught:
        built_model(run, folder)
    assert what in caught.value.what
    assert "fetch" in caught.value.fix


def test_as_shipped_of_a_plain_base(tiny: Path, tmp_path: Path) -> None:
    what = "is not stored in a supported quantized format"
    assert_refused(
        tiny, tmp_path, what, "config.json", "model.quantize=none", quantize="as-shipped"
    )


def test_as_shipped_trained_in_full(tiny: Path, tmp_path: Path) -> None:
    with refuses(RecipeError, names=["model.quantize", "as-shipped"]) as caught:
        make_run(tiny, tmp_path, model={"quantize": "as-shipped"}, adapter={"kind": "none"})
    assert holds(caught.value.fix, "model.quantize: none", "16-bit")


@pytest.mark.parametrize("quantize", ["as-shipped", "nf4"])
def test_a_layer_in_codes_is_not_saved_in_full(tiny: Path, tmp_path: Path, quantize: str) -> None:
    """It was an internal error."""
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    folder = write_fp8(tiny, tmp_path / "base", BLOCK)
    saved = {"modules_to_save": ["down_proj"]}
    run = make_run(folder, tmp_path, model={"quantize": quantize}, adapter=saved)
    with refuses(RecipeError, where="adapter.modules_to_save") as caught:
        built_model(run, folder)
    assert caught.value.where == "adapter.modules_to_save"
    assert "model.quantize=none" in caught.value.fix


def test_a_layer_as_it_ships_is_not_cut_over_ranks(tiny: Path, tmp_path: Path) -> None:
    folder = write_fp8(tiny, tmp_path / "base", BLOCK)
    run = make_run(folder, tmp_path, model={"quantize": "as-shipped"})
    spec = read_model_files(folder, run.model).spec
    with refuses(RecipeError, names=["replicate 1 x shard 1 x tensor 2"]) as caught:
        check_mesh(run, spec, MeshShape(1, 1, 2), 2)
    assert caught.value.fix == "set model.quantize=none"
    check_mesh(run, spec, MeshShape(1, 2, 1), 2)


def test_a_form_that_config_json_does_not_name(tiny: Path, tmp_path: Path) -> None:
    """Codes without the config's word for them."""
    folder = write_fp8(tiny, tmp_path / "base", BLOCK)
    change_config(folder, quantization_config=None)
    run = make_run(folder, tmp_path, held=False)
    with pytest.raises(TunesmithError) as caught:
        train(run, quiet=True)
    assert "tensors" in caught.value.what
