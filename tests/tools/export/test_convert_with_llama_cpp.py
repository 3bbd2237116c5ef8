"""GGUF files that llama.cpp's own converter makes of a run, in llama.cpp and beside other files."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import AutoTokenizer, PreTrainedModel

from errors import refuses
from export.converter_models import MODELS, trained_run, write_base
from export.test_in_llama_cpp import NOISE, largest_difference
from export.tiny_gguf import VARIANTS, chat_tokenizer, random_model, write_model
from tunesmith.errors import CheckpointError, ModelError
from tunesmith.inference.load_run import locate_run, read_run_files
from tunesmith.tools.export.gguf.check import check_file, require_same_model
from tunesmith.tools.export.gguf.converter import Converter
from tunesmith.tools.export.gguf.export import export_gguf
from tunesmith.tools.export.gguf.llama_cpp import LlamaCpp
from tunesmith.tools.export.tuned_weights import open_tuned_model

pytestmark = pytest.mark.slow

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
def test_logits_are_those_of_transformers(name: str, models: Any) -> None:
    folder, in_memory = models
    with LlamaCpp(folder / f"{name}-f16.gguf") as server:
        # Prompts longer than the windows of 16 tokens
        assert largest_difference(server, in_memory[name], 20) < NOISE_OF.get(name, NOISE)


def unpaired(rows: np.ndarray) -> np.ndarray:
    """Return the rows of heads of 16 in the order of Transformers."""
    return rows.reshape(-1, 8, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


# A mistake a family: other settings of the model that the file is compared with; or the end of a
# key's or a tensor's name in the file, and what becomes of its values.
MISTAKES: dict[str, dict[str, Any] | tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "qwen3_moe": {"norm_topk_prob": False},
    "qwen3_5": ("attn_norm.weight", lambda weight: weight - 1),
    "qwen3_5_moe": ("ffn_gate_inp_shexp.weight", np.zeros_like),
    "gpt_oss": ("ffn_down_exps.bias", np.zeros_like),
    "gemma4": {"final_logit_softcapping": 1.0},
    "mistral3": ("attn_q.weight", unpaired),
    "nemotron_h": ("exp_probs_b.bias", np.zeros_like),
    "olmo3": ("attention.sliding_window", lambda window: window * 32),
    "glm4": ("attn_v.bias", np.zeros_like),
    "llama4": {"no_rope_layers": [1, 1, 1, 1]},
}


@pytest.mark.parametrize("name", MODELS)
def test_check_finds_a_mistake_and_nothing_else(name: str, models: Any, tmp_path: Path) -> None:
    folder, in_memory = models
    file = Path(shutil.copy(folder / f"{name}-f16.gguf", tmp_path))
    check_and_require(file, folder / name)
    mistake = MISTAKES.get(name)
    if mistake is None:
        return
    base, model = folder / name, in_memory[name]
    if isinstance(mistake, dict):
        base = tmp_path / "base"
        model = write_base(name, base, **mistake)
    else:
        ending, change = mistake
        reader = GGUFReader(file, "r+")
        values = {tensor.name: tensor.data for tensor in reader.tensors}
        values |= {key: field.parts[-1] for key, field in reader.fields.items()}
        changed = [array for key, array in values.items() if key.endswith(ending)]
        assert changed
        for array in changed:
            array[...] = change(array)
        reader.data.flush()
    with LlamaCpp(file) as server:
        assert largest_difference(server, model, 20) > 0.05
    with refuses(CheckpointError, where=file.name):
        check_and_require(file, base)


def check_and_require(file: Path, base: Path) -> None:
    tuned = open_tuned_model(read_run_files(locate_run(base)))
    check = check_file(file, tuned, None, beyond_window=True, device=torch.device("cpu"), threads=1)
    is_routed = any(layer.experts for layer in tuned.files.spec.layers)
    require_same_model(check, "f16", file, is_routed=is_routed)


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
    exported = export_gguf(
        run.output_dir,
        tmp_path / "out.gguf",
        quant="f16",
        device="cpu",
        converter=converter.folder,
        progress=lambda done, total: seen.append((done, total)),
    )
    size = (tmp_path / "out.gguf").stat().st_size
    assert exported.bytes == size
    assert seen[-1] == (size, size)
    assert len(seen) > 10
    assert exported.check is not None
    assert exported.check.base is not None
    # f16 weights, and llama.cpp's keys and values in fp16
    assert exported.check.tuned.mean_kl < 1e-4 < exported.check.base.mean_kl
    record = json.loads((tmp_path / "out.gguf.json").read_text())
    assert record["converter"] == {"folder": str(converter.folder), "sha256": converter.sha256}


def test_a_model_that_llama_cpp_computes_otherwise_is_rejected(
    converter: Converter, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    # llama.cpp always divides by the sum of the chosen experts' weights.
    write_base("qwen3_moe", tmp_path / "base", norm_topk_prob=False)
    place = tmp_path / "out.gguf"
    with refuses(CheckpointError, where="out.gguf.rejected", fix=["tunesmith merge RUN"]):
        export_gguf(tmp_path / "base", place, quant="f16", device="cpu", converter=converter.folder)
    assert [path.name for path in tmp_path.glob("*out.gguf*")] == ["out.gguf.rejected"]


def test_another_version_of_the_converter_is_refused(converter: Converter, tmp_path: Path) -> None:
    other = shutil.copytree(converter.folder, tmp_path / "llama.cpp")
    source = (other / "conversion" / "base.py").read_text()
    source = source.replace("index_tensors(", "list_tensors(")
    (other / "conversion" / "base.py").write_text(source)
    write_base("olmo3", tmp_path / "base")
    with refuses(
        ModelError, where="llama.cpp", names=["olmo3"], fix=["tunesmith merge RUN --output FOLDER"]
    ):
        export_gguf(tmp_path / "base", tmp_path / "out.gguf", check=False, converter=other)
    assert not [*tmp_path.glob("*out.gguf*"), *tmp_path.glob(".*part")]
