"""Tiny checkpoints whose weights ship in FP8, NVFP4 or MXFP4, made of plain ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tunesmith.formats.e2m1 import E2M1_VALUES
from tunesmith.formats.form import ROW

Tensors = dict[str, torch.Tensor]
UNROUNDED = ("embed", "lm_head", "vision", "projector")


def rounded(weight: torch.Tensor, block: tuple[int, int] | None) -> tuple[torch.Tensor, ...]:
    """e4m3 codes of a weight, and their scales: one for each block, or one of all."""
    if block is None:
        scale = weight.abs().max() / 448
        return (weight / scale).to(torch.float8_e4m3fn), scale
    height, width = block[0], block[1] or weight.shape[1]
    parts = [row.split(width, 1) for row in weight.split(height)]
    scale = torch.stack([torch.stack([part.abs().max() / 448 for part in row]) for row in parts])
    spread = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)
    spread = spread[: weight.shape[0], : weight.shape[1]]
    return (weight / spread).to(torch.float8_e4m3fn), scale


def pack_fp4(values: torch.Tensor) -> torch.Tensor:
    """The codes nearest to values [..., n], two a byte: [..., n / 2]."""
    middles = (E2M1_VALUES[1:] + E2M1_VALUES[:-1]) / 2
    sizes = torch.bucketize(values.abs().contiguous(), middles.to(values.device))
    codes = sizes | (values < 0).long() << 3
    low, high = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def encode_nvfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Codes of a weight, the scales of its groups in e4m3, and what these are divided by."""
    scale = 448 * 6 / weight.abs().max().item()
    groups = weight.float().unflatten(-1, (-1, 16))
    scales = (groups.abs().amax(-1) / 6 * scale).to(torch.float8_e4m3fn)
    steps = scales.float().clamp_min(2**-9) / scale
    return pack_fp4((groups / steps.unsqueeze(-1)).flatten(-2)), scales, scale


def fp8_config(block: tuple[int, int] | None, **more: Any) -> dict[str, Any]:
    static = "dynamic" if block else "static"
    sizes = list(block) if block else None
    return {"quant_method": "fp8", "weight_block_size": sizes, "activation_scheme": static, **more}


def write_fp8(
    plain: Path,
    folder: Path,
    block: tuple[int, int] | None,
    *,
    scales: torch.dtype = torch.float32,
    keep: tuple[str, ...] = (),
    tool: str = "transformers",
) -> Path:
    """A copy of a checkpoint with its layers' matrices in FP8, as `tool` writes it, but `keep`."""
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    tensors: Tensors = {}
    kept = []
    for name, weight in load_file(plain / "model.safetensors").items():
        if weight.ndim != 2 or any(word in name for word in (*UNROUNDED, *keep)):
            tensors[name] = weight
            kept.append(name.removesuffix(".weight"))
            continue
        codes, scale = rounded(weight.float(), block)
        stem = name.removesuffix("weight")
        if tool == "transformers":
            tensors |= {name: codes, f"{stem}weight_scale_inv": scale.to(scales)}
            unused = ["activation_scale"]
        else:
            tensors |= {name: codes, f"{stem}weight_scale": scale.to(scales)}
            unused = ["input_scale", "output_scale", "k_scale", "v_scale"]
        if block is None:
            tensors |= {f"{stem}{word}": torch.tensor(0.5) for word in unused}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if tool == "compressed-tensors":
        stated = compressed_fp8_config(block, *kept)
    elif tool == "modelopt":
        stated = modelopt_fp8_config(*(f"*{word}*" for word in keep))
    elif tool == "autofp8":
        stated = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": kept}
    else:
        stated = fp8_config(block, modules_to_not_convert=["lm_head", *keep])
    return change_config(folder, quantization_config=stated)


def write_fp8_stacks(plain: Path, folder: Path, block: tuple[int, int] | None) -> Path:
    """A copy of a checkpoint in FP8 whose experts are stacks, with Mistral Small 4's names."""
    write_fp8(plain, folder, block, keep=("mlp.gate.", ".experts."))
    tensors: Tensors = {}
    experts: dict[str, list[torch.Tensor]] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        before, found, after = name.partition(".experts.")
        if not found:
            tensors[name] = weight
        elif weight.ndim == 3:
            experts[name] = list(weight.float())
        else:
            key = "down_proj" if "down" in after else "gate_up_proj"
            experts.setdefault(f"{before}.experts.{key}", []).append(weight.float())
    count = min(len(weights) for weights in experts.values())
    for name, weights in experts.items():
        # By their names, an expert's gate comes before its up projection.
        parts = len(weights) // count
        joined = [torch.cat(weights[i : i + parts]) for i in range(0, len(weights), parts)]
        codes, scales = zip(*(rounded(weight, block) for weight in joined), strict=True)
        tensors[name] = torch.stack(codes)
        scale = torch.stack(scales)
        tensors[f"{name}_scale_inv"] = scale if block else scale.view(-1, 1, 1)
        tensors[f"{name}_activation_scale"] = torch.full((len(joined),), 0.5)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stated = fp8_config(block, modules_to_not_convert=["lm_head", "mlp.gate"])
    return change_config(folder, quantization_config=stated)


def compressed_config(*ignore: str, **more: Any) -> dict[str, Any]:
    """As llm-compressor writes it, with activations in 4 bits too."""
    of_all = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    group = {
        "targets": ["Linear"],
        "format": "nvfp4-pack-quantized",
        "weights": {**of_all, "symmetric": True, "dynamic": False},
        "input_activations": {**of_all, "symmetric": True, "dynamic": "local"},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed", "config_groups": {"group_0": group},
        "ignore": ["lm_head", *ignore], "sparsity_config": {}, "transform_config": {},
        "kv_cache_scheme": None, **more,
    }  # fmt: skip


def compressed_fp8_config(
    block: tuple[int, int] | None, *ignore: str, **more: Any
) -> dict[str, Any]:
    """As llm-compressor writes it; activations are rounded too."""
    strategy = {None: "tensor", ROW: "channel"}.get(block, "block")
    of_all = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None}
    one_scale = {**of_all, "strategy": "tensor", "dynamic": False}
    group = {
        "targets": ["Linear"], "format": "float-quantized",
        "weights": {
            **of_all, "strategy": strategy,
            "block_structure": block if strategy == "block" else None, "dynamic": False,
        },
        "input_activations": {**of_all, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }  # fmt: skip
    if block is None:
        group["input_activations"] = one_scale
    stated = {
        "format": "float-quantized", "config_groups": {"group_0": group},
        "sparsity_config": {"format": "dense", "global_sparsity": 0.1},
        "kv_cache_scheme": one_scale if block is None else None,
    }  # fmt: skip
    return compressed_config(*ignore, **(stated | more))


def modelopt_fp8_config(*ignore: str, **more: Any) -> dict[str, Any]:
    of_all = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"input_activations": of_all, "weights": of_all, "targets": ["Linear"]}
    stated = {"quant_algo": "FP8", "config_groups": {"group_0": group}}
    return modelopt_config(*ignore, **(stated | more))


def modelopt_config(*ignore: str, **more: Any) -> dict[str, Any]:
    """As ModelOpt's `convert_hf_quant_config_format` writes it into config.json."""
    of_all = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    group = {"input_activations": of_all, "weights": of_all, "targets": ["Linear"]}
    return {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "config_groups": {"group_0": group},
        "ignore": ["lm_head", *ignore],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.33.0"}, **more,
    }  # fmt: skip


def write_nvfp4(
    plain: Path, folder: Path, *, modelopt: bool = False, keep: tuple[str, ...] = ()
) -> Path:
    """A copy of a checkpoint with its layers' matrices in NVFP4, but those named in `keep`."""
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    tensors: Tensors = {}
    kept = []
    for name, weight in load_file(plain / "model.safetensors").items():
        is_kept = any(word in name for word in keep)
        if is_kept:
            kept.append(name.removesuffix(".weight"))
        if is_kept or weight.ndim != 2 or any(word in name for word in UNROUNDED):
            tensors[name] = weight
            continue
        codes, scales, scale = encode_nvfp4(weight)
        stem = name.removesuffix(".weight")
        tensors[f"{stem}.weight_scale"] = scales
        if modelopt:
            tensors[name] = codes
            tensors[f"{stem}.weight_scale_2"] = torch.tensor(1 / scale)
            tensors[f"{stem}.input_scale"] = torch.tensor(0.5)
        else:
            tensors[f"{stem}.weight_packed"] = codes
            tensors[f"{stem}.weight_global_scale"] = torch.tensor([scale])
            tensors[f"{stem}.input_global_scale"] = torch.tensor([2.0])
        if modelopt and stem.endswith(("k_proj", "v_proj")):
            tensors[f"{stem}.{stem[-6]}_scale"] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stated = modelopt_config if modelopt else compressed_config
    return change_config(folder, quantization_config=stated(*kept))


def change_config(folder: Path, **changes: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def change_tensors(folder: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    """Write tensors of a checkpoint anew, or leave them out."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def write_qwen3_moe(folder: Path, tokenizer: Path, **sizes: Any) -> Path:
    """A tiny random Qwen 3 whose experts are stored one by one."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"moe_intermediate_size": 40, "num_hidden_layers": 1} | sizes
    config = Qwen3MoeConfig(
        vocab_size=272, hidden_size=64, intermediate_size=96, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=256, eos_token_id=2, pad_token_id=0, **sizes,
    )  # fmt: skip
    torch.manual_seed(2)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return folder


MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}


def write_mxfp4_gpt_oss(folder: Path, tokenizer: Path, layers: int = 2) -> Path:
    """A tiny random gpt-oss in bf16 whose experts ship in MXFP4."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=272, hidden_size=64, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=4,
        num_experts_per_tok=2, layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        sliding_window=16, max_position_embeddings=256, rope_scaling=None, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(5)
    model = GptOssForCausalLM(config).to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["GptOssForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    return draw_mxfp4_experts(folder)


def draw_mxfp4_experts(folder: Path) -> Path:
    """Replace the experts of a gpt-oss checkpoint with random ones in MXFP4."""
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensors.pop(name).shape
            shape = (experts, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(118, 126, shape, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return change_config(folder, quantization_config=MXFP4)
