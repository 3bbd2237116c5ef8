"""GGUF files that llama.cpp's own converter makes of a run, in llama.cpp and beside other files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoTokenizer, PreTrainedModel

from errors import refuses
from export.converter_models import MODELS, trained_run, write_base
from export.test_in_llama_cpp import NOISE, largest_difference
from export.tiny_gguf import VARIANTS, chat_tokenizer, random_model, write_model
from tunesmith.errors import CheckpointError
from tunesmith.inference.load_run import locate_run, read_run_files
from tunesmith.tools.export.gguf.check import check_file
from tunesmith.tools.export.gguf.converter import Converter
from tunesmith.tools.export.gguf.export import export_adapter, export_gguf
from tunesmith.tools.export.gguf.llama_cpp import LlamaCpp
from tunesmith.tools.export.tuned_weights import open_tuned_model

pytestmark = pytest.mark.nightly

CONVERT_ALL = Path(__file__).parent / "convert_all.py"
# The bounds of YaRN's ramp are not rounded in gpt-oss (`truncate`), and llama.cpp rounds them.
NOISE_OF = {"gpt_oss": 0.1}


def convert_all(folder: Path, converter: Converter, *quants: str) -> None:
    """Convert every model in `folder` in one process."""
    command = [sys.executable, "-P", str(CONVERT_ALL), str(folder), str(converter.folder), *quants]
    subprocess.run(command, check=True, env=converter.environment, capture_output=True)
    for error in folder.glob("*.txt"):
        raise AssertionError(error.read_text())


@pytest.fixture(scope="module")
def models(
    converter: Converter, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, PreTrainedModel]]:
    """All of MODELS as f16 files, and in memory."""
    pytest.importorskip("xllamacpp")
    folder = tmp_path_factory.mktemp("models")
    in_memory = {name: write_base(name, folder / name) for name in MODELS}
    convert_all(folder, converter, "f16")
    return folder, in_memory


@pytest.mark.parametrize("name", MODELS)
def test_converted_logits_are_those_of_transformers(name: str, models: Any) -> None:
    folder, in_memory = models
    with LlamaCpp(folder / f"{name}-f16.gguf") as server:
        # Prompts longer than the windows of 16 tokens
        assert largest_difference(server, in_memory[name], 20) < NOISE_OF.get(name, NOISE)


def header_of(file: Path) -> dict[str, Any]:
    """Keys and values, without what a file says of itself."""
    reader = GGUFReader(file)
    fields = reader.fields.items()
    return {key: field.contents() for key, field in fields if not key.startswith("GGUF.")}


# The converter guesses these from the folder's name, or leaves the default to llama.cpp, and we
# write them; or the other way around. `write_model` is not told what ends a turn.
OTHER_KEYS = re.compile(
    r"tokenizer\.ggml\.eot_token_id|general\.(basename|finetune|version|size_label)|gemma2?\.rope\.freq_base"
    r"|\w+\.(vocab_size|attention\.(key|value)_length|rope\.dimension_count)"
)


def test_own_files_are_those_of_the_converter(converter: Converter, tmp_path: Path) -> None:
    """Compare the files of every form in VARIANTS, byte by byte."""
    for variant in VARIANTS:
        folder = tmp_path / "models" / variant
        tokenizer = chat_tokenizer()
        sizes = {"vocab_size": len(tokenizer), "num_hidden_layers": 7}
        if variant != "phi3-long":  # its factors are for another width
            sizes["hidden_size"] = 256
        model = random_model(variant, **sizes)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        # Transformers gives a folder of Qwen 2 or 3 the splits of Qwen's own tokenizer.
        tokenizer = AutoTokenizer.from_pretrained(folder)
        write_model(tmp_path / f"{variant}.gguf", model, tokenizer, "q4_k_m")
    convert_all(tmp_path / "models", converter, "q4_k_m")
    for variant in VARIANTS:
        files = tmp_path / f"{variant}.gguf", tmp_path / "models" / f"{variant}-q4_k_m.gguf"
        ours, theirs = map(GGUFReader, files)
        of_theirs = {tensor.name: tensor for tensor in theirs.tensors}
        assert {tensor.name for tensor in ours.tensors} == of_theirs.keys(), variant
        for tensor in ours.tensors:
            other = of_theirs[tensor.name]
            assert tensor.tensor_type == other.tensor_type, (variant, tensor.name)
            assert tensor.data.tobytes() == other.data.tobytes(), (variant, tensor.name)
        keys = map(header_of, files)
        ours_only, theirs_only = (
            {key: value for key, value in side.items() if not OTHER_KEYS.fullmatch(key)}
            for side in keys
        )
        assert ours_only == theirs_only, variant


def test_a_run_with_adapted_experts(converter: Converter, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    write_base("qwen3_moe", tmp_path / "base")
    targets = ("q_proj", "v_proj", "experts")
    run = trained_run(tmp_path / "base", tmp_path / "work", adapter={"target": targets})
    seen: list[tuple[int, int]] = []
    file, folder = tmp_path / "out.gguf", converter.folder
    options: dict[str, Any] = {"quant": "f16", "device": "cpu", "converter": folder}
    options["progress"] = lambda done, total: seen.append((done, total))
    exported = export_gguf(run.output_dir, file, **options)
    assert exported.bytes == file.stat().st_size
    assert seen[-1] == (exported.bytes, exported.bytes)
    assert len(seen) > 10
    assert exported.check is not None
    assert exported.check.base is not None
    # f16 weights, and llama.cpp's keys and values in fp16
    assert exported.check.tuned.mean_kl < 1e-4 < exported.check.base.mean_kl
    record = json.loads((tmp_path / "out.gguf.json").read_text())
    assert record["converter"] == {"folder": str(folder), "sha256": converter.sha256}


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ADAPTED: dict[str, Any] = {
    "qwen3_moe": ATTENTION,
    "qwen3_5": "all-linear",  # rows of its recurrent layers change places
    "glm4": "all-linear",
    "llama4": (*ATTENTION, *MLP),
    "nemotron_h": (*ATTENTION, "in_proj", "up_proj", "down_proj"),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_and_its_base_are_the_tuned_model(name, converter, tmp_path):
    """With rsLoRA. Measured: at most 2e-6 nats, and 0.01 to 0.2 without the adapter."""
    pytest.importorskip("xllamacpp")
    write_base(name, tmp_path / "base")
    adapter = {"rank": 4, "rslora": True, "target": ADAPTED[name]}
    run = trained_run(tmp_path / "base", tmp_path / "run", adapter=adapter)
    file, base = tmp_path / "lora.gguf", tmp_path / "base.gguf"
    export_adapter(run.output_dir, file, converter=converter.folder)
    export_gguf(tmp_path / "base", base, quant="f32", converter=converter.folder, check=False)
    tuned = open_tuned_model(read_run_files(locate_run(run.output_dir)))
    cpu = torch.device("cpu")
    check = check_file(file, tuned, tuned, base_file=base, device=cpu, threads=1)
    assert check.base is not None
    assert check.tuned.mean_kl < 1e-5 < 1e-3 < check.base.mean_kl


def test_a_model_that_llama_cpp_computes_otherwise_is_rejected(converter, tmp_path):
    pytest.importorskip("xllamacpp")
    # llama.cpp always divides by the sum of the chosen experts' weights.
    write_base("qwen3_moe", tmp_path / "base", norm_topk_prob=False)
    place = tmp_path / "out.gguf"
    with refuses(CheckpointError, where="out.gguf.rejected", fix=["tunesmith merge RUN"]):
        export_gguf(tmp_path / "base", place, quant="f16", device="cpu", converter=converter.folder)
    assert [path.name for path in tmp_path.glob("*out.gguf*")] == ["out.gguf.rejected"]
