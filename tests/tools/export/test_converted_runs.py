"""Runs of families that llama.cpp's converter writes: their adapters and their answers there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from export.converter_models import trained_run, write_base
from tunesmith.inference.decoding import Decoding, answer_batch
from tunesmith.inference.load_run import load_run, locate_run, read_run_files
from tunesmith.tools.export.gguf.check import check_file
from tunesmith.tools.export.gguf.converter import Converter
from tunesmith.tools.export.gguf.export import export_adapter, export_gguf
from tunesmith.tools.export.gguf.llama_cpp import LlamaCpp
from tunesmith.tools.export.merge_check import probe_prompts
from tunesmith.tools.export.tuned_weights import open_tuned_model

pytest.importorskip("xllamacpp")

pytestmark = pytest.mark.slow

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("qwen3_moe", ATTENTION),
        # Rows of its recurrent layers change places.
        ("qwen3_5", "all-linear"),
        ("gemma4_unified", "all-linear"),
        ("gemma4_text", (*ATTENTION, *MLP, "per_layer_input_gate", "per_layer_projection")),
        ("glm4", "all-linear"),
        ("llama4", (*ATTENTION, *MLP)),
        ("nemotron_h", (*ATTENTION, "in_proj", "up_proj", "down_proj")),
    ],
)
def test_an_adapter_and_its_base_are_the_tuned_model(
    name: str, target: Any, converter: Converter, tmp_path: Path
) -> None:
    """With rsLoRA. Measured: at most 2e-6 nats, and 0.01 to 0.2 without the adapter."""
    write_base(name, tmp_path / "base")
    adapter = {"rank": 4, "rslora": True, "target": target}
    run = trained_run(tmp_path / "base", tmp_path / "run", adapter=adapter)
    folder = converter.folder
    export_adapter(run.output_dir, tmp_path / "lora.gguf", converter=folder)
    base = tmp_path / "base.gguf"
    export_gguf(tmp_path / "base", base, quant="f32", converter=folder, check=False)
    tuned = open_tuned_model(read_run_files(locate_run(run.output_dir)))
    check = check_file(
        tmp_path / "lora.gguf",
        tuned,
        tuned,
        base_file=base,
        device=torch.device("cpu"),
        threads=1,
    )
    assert check.base is not None
    assert check.tuned.mean_kl < 1e-5 < 1e-3 < check.base.mean_kl


@pytest.mark.parametrize(
    ("name", "near_tie"),
    [
        ("qwen3_moe", 0.0),
        # llama.cpp rounds the ends of the YaRN ramp: log probabilities differ by up to 0.06.
        ("gpt_oss", 0.12),
    ],
)
def test_llama_cpp_writes_what_chat_writes(
    name: str, near_tie: float, converter: Converter, tmp_path: Path
) -> None:
    """Token for token: greedy continuations of up to 50 tokens from a file in f16.

    If two tokens are nearer than `near_tie`, in nats, either may be written.
    """
    write_base(name, tmp_path / "base")
    run = trained_run(tmp_path / "base", tmp_path / "run")
    file = tmp_path / "model.gguf"
    exported = export_gguf(run.output_dir, file, quant="f16", converter=converter.folder)
    assert exported.check is not None
    assert exported.check.is_near
    loaded = load_run(run.output_dir, device="cpu")
    rows = loaded.files.config.vocab_size
    compared = 0
    with LlamaCpp(file, context=512) as server:
        for prompt in probe_prompts(loaded, rows=3, tokens=24)[0]:
            (own,) = answer_batch(
                loaded.model,
                loaded.files.tokenizer,
                [prompt],
                Decoding(max_new_tokens=50),
                stops=loaded.template.end_ids,
            )
            # The server's answer has its end token, too.
            body = {"prompt": prompt, "n_predict": 50, "temperature": 0, "return_tokens": True}
            reply = server.post("/completion", {**body, "cache_prompt": False})
            theirs = reply["tokens"][: len(own.ids)]
            if theirs != own.ids:
                same = next(i for i, token in enumerate(own.ids) if theirs[i : i + 1] != [token])
                values = server.log_probabilities([*prompt, *own.ids[:same]], rows)
                assert values is not None
                assert values.max() - values[own.ids[same]] <= near_tie
            compared += len(own.ids)
    assert compared >= 50
