"""Comparison of tunesmith's quantized GGUF files with llama.cpp: types and bytes of all tensors.

    npm pack @node-llama-cpp/linux-x64@3.22.1   # then unpack the archive
    python benchmarks/parity/gguf_types.py --converter llama_cpp_python-0.3.36.tar.gz \\
        --libllama package/bins/linux-x64 [--write] [MODEL ...]

llama.cpp's converter writes a tiny random model of each type in bf16. This file is quantized by
llama.cpp's `llama_model_quantize` and by tunesmith. `--write` records llama.cpp's types in
tests/tools/export/gguf_types.json, and a test compares them with tunesmith's types. The exit code
is 1 if a tensor differs. Both packages contain llama.cpp 0.5.0. `make dev` downloads the sdist of
the converter.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parents[2] / "tests" / "tools" / "export" / "gguf_types.json"
QUANTS = ("q4_k_m", "q5_k_m", "q6_k", "q8_0")
# Keys of the GGUF header that determine the types of tensors
KEYS = ("block_count", "expert_count", "attention.head_count", "attention.head_count_kv")
SMALL = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
NARROW = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
DELTA = {
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 4,
    "linear_num_value_heads": 8, "num_hidden_layers": 12,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 3,
}  # fmt: skip
WINDOWS = {
    "sliding_window": 16,
    "num_hidden_layers": 12,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
}
GEMMA4 = {
    **WINDOWS, "global_head_dim": 64, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}  # fmt: skip
# Names of models, with their model_type and settings. Sizes that are not multiples of 256 are from
# real models.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, 288 columns": ("llama", {"hidden_size": 288, "intermediate_size": 400}),
    "llama, 70B": ("llama", {**NARROW, "num_hidden_layers": 80}),
    "qwen1.5, 72B": ("qwen2", {**NARROW, "num_hidden_layers": 80, "num_key_value_heads": 8}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", {"num_hidden_layers": 10}),
    "olmo3": ("olmo3", {"sliding_window": 16, "num_hidden_layers": 12}),
    "glm4": ("glm4", {}),
    "ministral3": ("ministral3", {}),
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "gpt_oss": (
        "gpt_oss",
        {**LOCAL_EXPERTS, "hidden_size": 288, "intermediate_size": 288, "sliding_window": 16},
    ),
    "llama4": ("llama4_text", {**LOCAL_EXPERTS, "intermediate_size_mlp": 512}),
    "llama4, every second": (
        "llama4_text",
        {**LOCAL_EXPERTS, "intermediate_size_mlp": 768, "interleave_moe_layer_step": 2},
    ),
    "qwen3_5": ("qwen3_5_text", DELTA),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {**DELTA, **EXPERTS, "shared_expert_intermediate_size": 256},
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "moe", "mamba", "moe", "attention", "moe"] * 2,
            "ssm_state_size": 32, "mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 2,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 320,
            "moe_shared_expert_intermediate_size": 512,
        },
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "conv", "full_attention"] * 3}),
    "lfm2_moe": (
        "lfm2_moe",
        {**EXPERTS, "layer_types": ["conv", "conv", "full_attention"] * 3, "num_dense_layers": 2},
    ),
    "gemma4, 31B": ("gemma4_text", {**GEMMA4, "attention_k_eq_v": True}),
    "gemma4, 26B-A4B": (
        "gemma4_text",
        {
            **GEMMA4, "attention_k_eq_v": True, "enable_moe_block": True, "num_experts": 4,
            "top_k_experts": 2, "moe_intermediate_size": 256,
        },
    ),
    "gemma4, E4B": (
        "gemma4_text",
        {
            **GEMMA4, "num_kv_shared_layers": 6, "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 512,
        },
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="*", help=", ".join(MODELS))
    parser.add_argument(
        "--converter", type=Path, help="llama.cpp's converter, as for `tunesmith export`"
    )
    parser.add_argument(
        "--libllama", type=Path, help="folder with the shared libraries of llama.cpp"
    )
    parser.add_argument("--write", action="store_true", help=f"record the types in {RECORD.name}")
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert is not None:
        convert_to_bf16(arguments.convert)
        return
    from tunesmith.tools.export.gguf.converter import find_converter

    quantize = load_llama(arguments.libllama)
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    problems = 0
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in arguments.models or MODELS}
        for name, folder in folders.items():
            save_random_model(name, folder)
        # The converter contains another version of the package `gguf`, so it needs its own process.
        converter = find_converter(arguments.converter)
        assert converter is not None, "no converter of llama.cpp was found: pass --converter"
        command = [sys.executable, __file__, "--convert", scratch]
        subprocess.run(command, check=True, env=converter.environment)
        for name, folder in folders.items():
            quantized = {quant: folder / f"{quant}.gguf" for quant in QUANTS}
            for quant, file in quantized.items():
                quantize(folder / "plain.gguf", file, quant)
            record[name], differences = compare(folder / "plain.gguf", quantized)
            problems += bool(differences)
            print(f"{name:24}", "; ".join(differences) or "equal", flush=True)
    if arguments.write:
        lines = [f"{json.dumps(name)}: {json.dumps(row)}" for name, row in record.items()]
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    sys.exit(f"{problems} models differ from llama.cpp" if problems else 0)


def save_random_model(name: str, folder: Path) -> None:
    """Save a tiny random model in bf16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SMALL, **settings})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    # The converter truncates Gemma's embedding to the number of tokens in this file.
    tokens = {"model": {"vocab": list(range(config.vocab_size))}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokens))


def convert_to_bf16(models: Path) -> None:
    """Write plain.gguf into the folder of each model.

    The file has no tokenizer, because the types of tensors do not depend on it.
    """
    import logging

    import gguf
    import torch
    from conversion import get_model_class
    from conversion.base import ModelBase, ModelType, get_model_architecture

    logging.disable(logging.WARNING)
    ModelBase.no_mtp = True
    file_type = gguf.LlamaFileType.MOSTLY_BF16
    for folder in models.iterdir():
        config = ModelBase.load_hparams(folder, False)
        converter = get_model_class(get_model_architecture(config, ModelType.TEXT))
        converter.set_vocab = lambda self: None
        with torch.inference_mode():
            converter(folder, file_type, folder / "plain.gguf", model_name="tiny").write()


def compare(plain: Path, quantized: dict[str, Path]) -> tuple[dict[str, Any], list[str]]:
    """Return the record of a model, and the differences of types and bytes as lines of text."""
    import torch
    from gguf import GGUFReader

    from tunesmith.tools.export.gguf.types import PlainTensor, tensor_types
    from tunesmith.tools.export.gguf.write import BandThreads, tensor_jobs

    reader = GGUFReader(plain)
    arch = reader.fields["general.architecture"].contents()
    header = {"general.architecture": arch}
    for key in (f"{arch}.{key}" for key in KEYS):
        if key in reader.fields:
            header[key] = reader.fields[key].contents()
    tensors = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        tensors[tensor.name] = PlainTensor(shape, tensor.tensor_type.name)
    types = {}
    differences = []
    for quant, file in quantized.items():
        theirs = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
        types[quant] = {name: tensor.tensor_type.name for name, tensor in theirs.items()}
        ours = tensor_types(tensors, quant, header)
        with BandThreads(1) as threads:
            for tensor in reader.tensors:
                name = tensor.name
                if ours[name] != types[quant][name]:
                    differences.append(
                        f"{quant} {name}: type {ours[name]}, llama.cpp has {types[quant][name]}"
                    )
                    continue
                weight = torch.from_numpy(tensor.data.copy())
                if tensors[name].ggml_type == "BF16":
                    weight = weight.view(torch.bfloat16)
                data = b"".join(threads.run(tensor_jobs(weight, ours[name], name)))
                if data != theirs[name].data.tobytes():
                    differences.append(f"{quant} {name}: type {ours[name]}, but the bytes differ")
    return {"header": header, "groups": grouped(tensors, types)}, differences


def grouped(tensors: dict[str, Any], types: dict[str, dict[str, str]]) -> list[list[Any]]:
    """Group the tensors that differ only in their layer.

    Return a list per group: name, shape, type before quantization, layers, and the types for each
    quantization. If all layers have the same type, it is listed once.
    """
    names: dict[str, list[str]] = {}
    for name, (shape, plain) in tensors.items():
        pattern = re.sub(r"^blk\.\d+", "blk.{}", name)
        names.setdefault(json.dumps([pattern, shape, plain]), []).append(name)
    groups = []
    for head, members in names.items():
        layers = [int(name.split(".")[1]) for name in members if name.startswith("blk.")]
        by_quant = {}
        for quant in QUANTS:
            row = [types[quant][name] for name in members]
            by_quant[quant] = " ".join(row if len(set(row)) > 1 else row[:1])
        groups.append([*json.loads(head), layers or [None], by_quant])
    return groups


# Log callback for llama.cpp that prints nothing. Its arguments are level, text and data.
SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def load_llama(folder: Path) -> Any:
    """Return a function that quantizes a file with llama.cpp.

    The arguments of the function are the source, the target and a name of QUANTS.
    """
    from gguf import LlamaFileType

    class Parameters(ctypes.Structure):
        # The first two fields of llama_model_quantize_params, and memory for the other fields.
        _fields_ = (
            ("threads", ctypes.c_int32),
            ("file_type", ctypes.c_int32),
            ("others", ctypes.c_char * 128),
        )

    for pattern in ("libggml-base*.so", "libggml.*so", "libllama.*so"):
        (file,) = folder.glob(pattern)
        library = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
        if pattern == "libggml.*so":
            library.ggml_backend_load.restype = ctypes.c_void_p
            assert library.ggml_backend_load(str(folder / "libggml-cpu-x64.so").encode())
    library.llama_model_quantize_default_params.restype = Parameters
    library.llama_backend_init()
    library.llama_log_set(SILENT, None)

    def quantize(source: Path, target: Path, quant: str) -> None:
        parameters = library.llama_model_quantize_default_params()
        parameters.threads, parameters.file_type = 1, LlamaFileType[f"MOSTLY_{quant.upper()}"]
        names = str(source).encode(), str(target).encode()
        assert library.llama_model_quantize(*names, ctypes.byref(parameters)) == 0

    return quantize


if __name__ == "__main__":
    main()
