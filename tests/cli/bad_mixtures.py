"""What goes wrong with mixtures of experts, with bases as they ship, and with adapters of experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cli.bad_table import config, cut
from cli.bad_world import Case, World
from shipped_bases import change_config, change_tensors

UP = "model.layers.1.mlp.experts.3.up_proj.weight"
SCALE = f"{UP}_scale_inv"
BLOCKS = "model.layers.0.mlp.experts.down_proj_blocks"
SCALES = "model.layers.0.mlp.experts.down_proj_scales"


@dataclass
class MixtureWorld(World):
    """A world whose good model is a mixture.

    Attributes:
        fp8: the same in FP8; mxfp4: a gpt-oss in MXFP4; nothing is trained of the two.
        adapters: PEFT files for the mixture by their form, "stacked" and "single".
    """

    fp8: Path = Path()
    mxfp4: Path = Path()
    adapters: Path = Path()

    def of(self, name: str, spoil: Callable[[Path], object], **changes: Any) -> list[str]:
        """`train` of a spoilt copy of one of the models."""
        folder = Path(shutil.copytree(getattr(self, name), self.folder / "model"))
        spoil(folder)
        return self.train(tiny=folder, **changes)

    def adapter(self, form: str, spoil: Callable[[Path], object], **changes: Any) -> list[str]:
        """`train` that goes on from a spoilt copy of an adapter."""
        folder = Path(shutil.copytree(self.adapters / form, self.folder / "adapter"))
        spoil(folder)
        own = {"rank": 2, "alpha": 16, "target": ["q_proj", "experts"]}
        return self.train(adapter={"from": str(folder), **own, **changes})


def tensor(name: str, values: torch.Tensor | None) -> Callable[[Path], object]:
    return lambda folder: change_tensors(folder, {name: values})


def quantized(**values: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        stated = json.loads((folder / "config.json").read_text())["quantization_config"]
        change_config(folder, quantization_config=stated | values)

    return spoil


def said(**values: Any) -> Callable[[Path], object]:
    return lambda folder: config(folder, **values)


def settings(**values: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return spoil


def e4m3(*shape: int) -> torch.Tensor:
    return torch.ones(shape).to(torch.float8_e4m3fn)


def u8(*shape: int, value: int = 120) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.uint8)


def lost_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {UP: "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


GATE_OF_LAYER = "model.layers.0.mlp.gate.weight"

MIXTURES = [
    Case("experts", "a router as target", lambda w: w.train("adapter.target=[gate]"), "adapter.target", "router", "modules_to_save"),
    Case("experts", "one stack without the other", lambda w: w.train("adapter.target=[experts.gate_up_proj]"), "adapter.target", "down_proj", "'experts'"),
    Case("experts", "one expert as target", lambda w: w.train("adapter.target=[experts.3]"), "adapter.target", "experts.3", "all-linear"),
    Case("experts", "a name of other checkpoints", lambda w: w.train("adapter.target=[w1]"), "adapter.target", "w1", "all-linear"),
    Case("experts", "dropout", lambda w: w.train("adapter.dropout=0.1"), "adapter.dropout", "experts", "adapter.dropout: 0"),
    Case("experts", "target and saved in full", lambda w: w.train("adapter.target=[experts]", "adapter.modules_to_save=[experts]"), "adapter.modules_to_save", "experts"),
    Case("experts", "a stack to save", lambda w: w.train("adapter.modules_to_save=[down_proj]", "adapter.target=[q_proj]"), "adapter.modules_to_save", "down_proj"),
    Case("experts", "as-shipped of plain weights", lambda w: w.train("model.quantize=as-shipped"), "config.json", "model.quantize=none"),
    Case("experts", "a scheme that is none", lambda w: w.train("model.quantize=mxfp4"), "model.quantize", "mxfp4", "nf4"),
    Case("experts", "codes that train in full", lambda w: w.train("model.quantize=nf4", adapter={"kind": "none"}), "model.quantize", "nf4"),
    Case("config", "zero experts", lambda w: w.of("tiny", said(num_local_experts=0)), "model", "config.json", "mlp.gate_proj"),
    Case("config", "experts in words", lambda w: w.of("tiny", said(num_local_experts="8")), "config.json", "'8'"),
    Case("config", "a width that is another", lambda w: w.of("tiny", said(moe_intermediate_size=24)), "model", "24", "experts"),
    Case("config", "more experts than are stored", lambda w: w.of("tiny", said(num_local_experts=16)), "model", "experts"),
    Case("config", "fewer experts than are stored", lambda w: w.of("tiny", said(num_local_experts=4)), "model", "experts"),
    Case("weights", "an expert's projection is missing", lambda w: w.of("tiny", tensor(UP, None)), "model", "experts"),
    Case("weights", "an expert of another shape", lambda w: w.of("tiny", tensor(UP, torch.ones(32, 63))), "model", "experts"),
    Case("weights", "an expert turned", lambda w: w.of("tiny", tensor(UP, torch.ones(64, 32))), "model", "experts"),
    Case("weights", "an expert of integers", lambda w: w.of("tiny", tensor(UP, torch.ones(32, 64, dtype=torch.int8))), "model", "experts.3.up_proj"),
    Case("weights", "a router for other experts", lambda w: w.of("tiny", tensor(GATE_OF_LAYER, torch.ones(4, 64))), "model", "mlp.gate"),
    Case("weights", "a file that is cut off", lambda w: w.of("tiny", lambda f: cut(f / "model.safetensors")), "model.safetensors", "copy"),
    Case("weights", "a shard is missing", lambda w: w.of("tiny", lost_shard), "model", "1 of 1"),
    Case("fp8", "an expert without scales", lambda w: w.of("fp8", tensor(SCALE, None)), "safetensors", UP),
    Case("fp8", "an expert without codes", lambda w: w.of("fp8", tensor(UP, None)), "safetensors", SCALE),
    Case("fp8", "scales of another shape", lambda w: w.of("fp8", tensor(SCALE, torch.ones(9, 9))), "safetensors", "[9, 9]"),
    Case("fp8", "a scale that is NaN", lambda w: w.of("fp8", tensor(SCALE, torch.full((2, 2), torch.nan))), SCALE, "not finite"),
    Case("fp8", "codes of another kind", lambda w: w.of("fp8", tensor(UP, torch.ones(32, 64).to(torch.float8_e5m2))), "safetensors", "F8_E5M2"),
    Case("fp8", "codes of another shape", lambda w: w.of("fp8", tensor(UP, e4m3(32, 48))), "", "experts"),
    Case("fp8", "experts in FP4", lambda w: w.of("fp8", quantized(expert_dtype="fp4")), "config.json", "expert_dtype is 'fp4'"),
    Case("fp8", "a method that is none", lambda w: w.of("fp8", quantized(quant_method="fp6")), "config.json", "fp6"),
    Case("fp8", "groups of FP4", lambda w: w.of("fp8", quantized(quant_method="compressed-tensors", format="nvfp4-pack-quantized")), "config.json", "config_groups"),
    Case("fp8", "no groups", lambda w: w.of("fp8", quantized(quant_method="compressed-tensors", format="float-quantized")), "config.json", "config_groups is None"),
    Case("fp8", "integers of compressed-tensors", lambda w: w.of("fp8", quantized(quant_method="compressed-tensors", format="pack-quantized")), "config.json", "compressed-tensors pack-quantized"),
    Case("fp8", "a block of nothing", lambda w: w.of("fp8", quantized(weight_block_size=[0, 32])), "config.json", "weight_block_size"),
    Case("mxfp4", "no scales", lambda w: w.of("mxfp4", tensor(SCALES, None)), "safetensors", "scales"),
    Case("mxfp4", "no blocks", lambda w: w.of("mxfp4", tensor(BLOCKS, None)), "safetensors", "codes"),
    Case("mxfp4", "torn blocks", lambda w: w.of("mxfp4", tensor(BLOCKS, u8(4, 64, 3, 15))), "safetensors", "[4, 64, 3, 15]"),
    Case("mxfp4", "scales of another shape", lambda w: w.of("mxfp4", tensor(SCALES, u8(4, 64, 2))), "safetensors", "[4, 64, 2]"),
    Case("mxfp4", "a scale that is NaN", lambda w: w.of("mxfp4", tensor(SCALES, u8(4, 64, 3, value=255))), SCALES.removesuffix("_scales"), "not finite"),
    Case("mxfp4", "blocks that are no bytes", lambda w: w.of("mxfp4", tensor(BLOCKS, torch.ones(4, 64, 3, 16))), "safetensors", "F32"),
    Case("mxfp4", "a method that is none", lambda w: w.of("mxfp4", quantized(quant_method="mxfp6")), "model.safetensors", "mxfp6"),
    Case("adapter", "of other experts", lambda w: w.adapter("other", lambda f: None), "adapter_model.safetensors", "of another shape"),
    Case("adapter", "of another rank", lambda w: w.adapter("stacked", settings(r=3)), "adapter_config.json", "adapter.rank: 3"),
    Case("adapter", "one stack", lambda w: w.adapter("stacked", settings(target_parameters=["mlp.experts.down_proj"])), "adapter_config.json", "target_parameters"),
    Case("adapter", "a router", lambda w: w.adapter("stacked", settings(target_parameters=["mlp.gate.weight"])), "adapter_config.json", "mlp.gate.weight"),
    Case("adapter", "dropout", lambda w: w.adapter("stacked", lambda f: None, dropout=0.1), "adapter.dropout", "experts"),
    Case("adapter", "experts one by one", lambda w: w.adapter("single", lambda f: None), "adapter_model.safetensors", "separately"),
]  # fmt: skip
