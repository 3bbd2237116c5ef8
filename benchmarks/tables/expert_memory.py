"""Peak memory of loading a mixture of experts and of a step with LoRA on it: dense, in nf4, and as
it ships in FP8, NVFP4 or MXFP4.

    python benchmarks/tables/expert_memory.py --tokenizer DIR --json docs/measurements/expert-memory.json
    python benchmarks/tables/expert_memory.py --write docs/measurements/README.md  # the table, from that file

Two random mixtures: a Qwen 3 whose experts are stored one by one, in bf16, in FP8 (blocks of 128 x
128, or a scale a row) and in NVFP4, and a gpt-oss whose experts are in MXFP4. Each case runs in a process of
its own, in bf16 on the CPU. Counted from before the model is built: the peak of all resident pages (VmHWM of
/proc/self/status, which is ru_maxrss, set back before each phase) less those of files. `held` is
what is resident once the model is loaded, `planned` what a plan counts for it: the base, and the
adapter in fp32. A step is a forward and backward of 64 tokens, with every layer recomputed, and an
update of an adapter of rank 4 by AdamW.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from generated import table, write_or_check
from host_memory import status

MIB = 2**20
RECORD = Path("docs/measurements/expert-memory.json")
TOKENS = 64
BLOCK = 128
# name: (base, model.quantize)
CASES = {
    "bf16, dense": ("bf16", "none"),
    "bf16, nf4": ("bf16", "nf4"),
    "FP8, dense": ("fp8", "none"),
    "FP8, nf4": ("fp8", "nf4"),
    "FP8, as shipped": ("fp8", "as-shipped"),
    "FP8 with a scale a row, as shipped": ("fp8-rows", "as-shipped"),
    "NVFP4, dense": ("nvfp4", "none"),
    "NVFP4, nf4": ("nvfp4", "nf4"),
    "NVFP4, as shipped": ("nvfp4", "as-shipped"),
    "MXFP4, dense": ("mxfp4", "none"),
    "MXFP4, nf4": ("mxfp4", "nf4"),
    "MXFP4, as shipped": ("mxfp4", "as-shipped"),
}
SIZES = {
    "vocab_size": 4096, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "num_experts_per_tok": 4, "max_position_embeddings": 1024,
    "eos_token_id": 2, "pad_token_id": 0, "dtype": "bfloat16",
}  # fmt: skip


def write_base(folder: Path, kind: str, tokenizer: Path) -> None:
    """Write a mixture of some 200 M random parameters."""
    import shutil

    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, GptOssConfig, Qwen3MoeConfig

    config: Any
    if kind == "mxfp4":
        config = GptOssConfig(
            intermediate_size=512, num_hidden_layers=8, num_local_experts=32,
            layer_types=["full_attention"] * 8, rope_scaling=None, **SIZES,
        )  # fmt: skip
    else:
        config = Qwen3MoeConfig(
            intermediate_size=512, moe_intermediate_size=512, num_hidden_layers=8, num_experts=32,
            **SIZES,
        )  # fmt: skip
    folder.mkdir()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    if kind != "bf16":
        file = folder / "model.safetensors"
        from safetensors.torch import load_file

        from tunesmith.export.vllm import quantization_config

        tensors = load_file(file)
        changes = {"mxfp4": in_mxfp4, "fp8": in_fp8, "fp8-rows": in_fp8_rows, "nvfp4": in_nvfp4}
        change = changes[kind]
        for name in list(tensors):
            tensors |= change(name, tensors.pop(name))
        save_file(tensors, file, metadata={"format": "pt"})
        stated = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        if kind == "fp8":
            stated = {
                "quant_method": "fp8",
                "weight_block_size": [BLOCK, BLOCK],
                "activation_scheme": "dynamic",
                "modules_to_not_convert": ["lm_head", "model.layers.*.mlp.gate"],
            }
        if kind in ("fp8-rows", "nvfp4"):
            stated = quantization_config(kind.removesuffix("-rows"))
            stated["ignore"] += ["re:.*mlp.gate$"]
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": stated}))
    for part in tokenizer.glob("tokenizer*"):
        shutil.copyfile(part, folder / part.name)


def in_mxfp4(name: str, weight: Any) -> dict[str, Any]:
    """What gpt-oss ships of a weight; its experts are [experts, in, out] in the model."""
    from tunesmith.model.fp4 import encode_mxfp4

    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: weight}
    blocks, scales = encode_mxfp4(weight.mT)
    return {f"{name}_blocks": blocks.contiguous(), f"{name}_scales": scales}


def in_fp8(name: str, weight: Any) -> dict[str, Any]:
    """What Qwen's FP8 checkpoints have of a weight."""
    if is_plain(name, weight):
        return {name: weight}
    codes, scales = codes_of(weight, (BLOCK, BLOCK))
    return {name: codes, f"{name}_scale_inv": scales}


def in_fp8_rows(name: str, weight: Any) -> dict[str, Any]:
    """What compressed-tensors has of a weight in FP8."""
    if is_plain(name, weight):
        return {name: weight}
    codes, scales = codes_of(weight, (1, weight.shape[1]))
    return {name: codes, f"{name}_scale": scales.bfloat16()}


def codes_of(weight: Any, block: tuple[int, int]) -> tuple[Any, Any]:
    """A weight in e4m3, and the scale of each block."""
    import torch

    from tunesmith.quant.as_shipped import block_scales, spread_blocks

    scales = block_scales(weight.float(), block)
    codes = weight.float() / spread_blocks(scales, block, weight.shape)
    return codes.to(torch.float8_e4m3fn), scales


def in_nvfp4(name: str, weight: Any) -> dict[str, Any]:
    """What compressed-tensors has of a weight in NVFP4."""
    import torch

    from tunesmith.model.fp4 import encode_nvfp4, nvfp4_scale

    if is_plain(name, weight):
        return {name: weight}
    scale = nvfp4_scale(weight.abs().max().item())
    codes, scales = encode_nvfp4(weight, scale)
    return {
        f"{name}_packed": codes,
        f"{name}_scale": scales,
        f"{name}_global_scale": torch.tensor([scale]),
    }


def is_plain(name: str, weight: Any) -> bool:
    """Whether a weight stays as it is in FP8 and NVFP4."""
    left_out = ("embed", "lm_head", "mlp.gate.", "norm")
    return weight.ndim != 2 or any(word in name for word in left_out)


class Peak:
    """The peak of resident pages that are no files', from when it is made or set back."""

    def __init__(self) -> None:
        gc.collect()
        # Freed pages that the process keeps would be taken again, and not be counted.
        ctypes.CDLL(None).malloc_trim(0)
        self.began = status("VmRSS") - status("RssFile")
        self.reset()

    def reset(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def held(self) -> int:
        gc.collect()
        return status("VmRSS") - status("RssFile") - self.began

    def bytes(self) -> int:
        return status("VmHWM") - status("RssFile") - self.began


def measure(base: Path, quantize: str) -> dict[str, Any]:
    """Figures of one case, in bytes."""
    from dataclasses import replace

    import torch

    from tunesmith.build_model import build_model, count_trained
    from tunesmith.config.load import from_mapping
    from tunesmith.hub.model_files import read_model_files
    from tunesmith.model.random_init import seed_of
    from tunesmith.planning.resolve import MemoryEstimator, inference_plan
    from tunesmith.planning.run_plan import Machine

    recipe = {
        "model": {"name": str(base), "dtype": "bf16", "quantize": quantize},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"train": {"source": "none.jsonl", "format": "messages"}, "seq_len": TOKENS},
        "train": {"recompute": "full", "micro_batch": f"{TOKENS} tokens", "compile": "off"},
        "output_dir": str(base / "run"),
    }
    run = from_mapping(recipe, where="benchmark", base=base)
    device = torch.device("cpu")
    files = read_model_files(base, run.model)
    run = replace(run, model=files.model)
    torch.ones(8, 8) @ torch.ones(8, 8)  # starts the threads
    torch.manual_seed(seed_of(0, "tokens") % 2**31)
    peak = Peak()
    plan = replace(inference_plan(run, files, device), recomputed_layers=files.spec.depth)
    root, _ = build_model(run, files, plan)
    figures: dict[str, Any] = {"load": peak.bytes(), "held": peak.held()}
    trained = [parameter for parameter in root.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    model: Any = root.model.train()
    model.set_attn_implementation("eager")
    ids = torch.randint(3, 4096, (1, TOKENS))
    peak.reset()
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:]).backward()
    optimizer.step()
    figures["step"] = peak.bytes()
    machine = Machine("cpu", 0, ("products", ""), (False, ""), (None, ""), 0)
    count = count_trained(run, root.model)
    estimator = MemoryEstimator(run, files.spec, machine, count)
    figures["planned"] = estimator.base_bytes(2) + 4 * count
    figures["layer_dense"] = 2 * max(layer.experts for layer in files.spec.layers)
    return figures


def measure_all(tokenizer: Path, folder: Path) -> dict[str, Any]:
    """Each case in a fresh process, on the bases in `folder`, which are written if need be."""
    record: dict[str, Any] = {"tokens": TOKENS, "bytes": {}, "cases": {}}
    for kind in dict.fromkeys(kind for kind, _ in CASES.values()):
        if not (folder / kind).exists():
            write_base(folder / kind, kind, tokenizer)
        record["bytes"][kind] = (folder / kind / "model.safetensors").stat().st_size
    for case, (kind, quantize) in CASES.items():
        words = ["--base", str(folder / kind), "--quantize", quantize]
        command = [sys.executable, __file__, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{case} failed:\n{done.stderr[-4000:]}")
        record["cases"][case] = json.loads(done.stdout.splitlines()[-1])
        print(case, json.dumps(record["cases"][case]), flush=True)
    return record


def page() -> str:
    """The table in Markdown."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    head = (
        "base on the disk, and in memory",
        "files, MiB",
        "peak of loading",
        "held",
        "planned",
        "peak of a step",
    )
    rows = []
    for case, found in record["cases"].items():
        on_disk = record["bytes"][CASES[case][0]]
        sizes = [on_disk, *(found[key] for key in ("load", "held", "planned", "step"))]
        rows.append((case, *(f"{size / MIB:,.0f}" for size in sizes)))
    return table(head, rows)


def main() -> None:
    if sys.argv[1:2] in (["--write"], ["--check"]):
        sys.exit(write_or_check(__doc__, "benchmarks/tables/expert_memory.py", page))
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer's files")
    p.add_argument("--folder", type=Path, help="keep the bases here, and take those that are there")
    p.add_argument("--json", type=Path, help="write the figures to this file")
    p.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    p.add_argument("--quantize", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.base:
        print(json.dumps(measure(a.base, a.quantize)))
        return
    if a.tokenizer is None and a.folder is None:
        p.error("--tokenizer DIR is missing, or --folder DIR with bases from an earlier run")
    with tempfile.TemporaryDirectory() as name:
        record = measure_all(a.tokenizer, a.folder or Path(name))
    if a.json:
        a.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
