"""`tunesmith export RUN --to gguf | ollama`: runs of every kind, opened in llama.cpp."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest

from conftest import CHATML
from errors import check_shown, refuses
from invoke import invoke
from runs import make_run, peft_model
from tunesmith.errors import CheckpointError, ModelError
from tunesmith.tools.export.gguf import export as room
from tunesmith.tools.export.gguf.export import export_gguf
from tunesmith.tools.export.gguf.llama_cpp import LlamaCpp
from tunesmith.tools.export.gguf.ollama import modelfile_text, ollama_name


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """(command, value) in the order of the file; a parameter by its own name."""
    commands = []
    while text := text.lstrip():
        if text.startswith("#"):
            text = text.partition("\n")[2]
            continue
        match = re.match(r"(?:parameter[ \t]+)?([a-z0-9_]+)[ \t]", text, re.I)
        assert match, text
        value, text = _read_value(text[match.end() :])
        commands.append((match[1].lower(), value))
    return commands


def _read_value(text: str) -> tuple[str, str]:
    """A value goes to the end of its line; one that opens with a quote until a line ends with that
    quote. Nothing is escaped, and characters that cannot be printed are dropped.
    """
    lines = text.split("\n")
    for count in range(1, len(lines) + 1):
        shown = (c for c in "\n".join(lines[:count]).strip() if c.isprintable() or c in "\n\t")
        value = "".join(shown)
        quote = next((quote for quote in ('"""', '"') if value.startswith(quote)), "")
        if len(value) >= 2 * len(quote) and value.endswith(quote):
            return value[len(quote) : len(value) - len(quote)], "\n".join(lines[count:])
    raise ValueError(f"a quote that nothing closes: {text!r}")


def opened_run(end: str, system: str | None = None) -> Any:
    """What a Modelfile is written from: answers end with `end`, or with the tokenizer's own token."""
    tokenizer = SimpleNamespace(eos_token_id=1, decode=lambda ids: {7: end}[ids[0]])
    config = SimpleNamespace(max_position_embeddings=8192)
    data = SimpleNamespace(seq_len=512, system=system)
    return SimpleNamespace(
        files=SimpleNamespace(tokenizer=tokenizer, config=config),
        location=SimpleNamespace(run=SimpleNamespace(data=data)),
        template=SimpleNamespace(end_ids=frozenset({1, 7})),
    )


@pytest.mark.parametrize(
    ("file_name", "end", "system"),
    [
        ("orders.gguf", "<|im_end|>", None),
        ("my orders #2.gguf", "<｜end▁of▁sentence｜>", "Be brief."),
        ("orders.gguf", " user:", '"quoted"'),
        ("orders.gguf", "###", "One.\n\n# Two\n\tFROM here  "),
        ("orders.gguf", "###", 'a """ b 日本'),
    ],
)
def test_ollama_reads_of_a_modelfile_what_was_meant(file_name, end, system):
    expected = [("from", f"./{file_name}"), ("num_ctx", "4096"), ("stop", end)]
    expected += [("system", system)] if system else []
    assert read_modelfile(modelfile_text(file_name, opened_run(end, system))) == expected


@pytest.mark.parametrize(
    ("end", "system", "where"),
    [("###", 'Quote with """\nand go on.', "data.system"), ('a"b', None, "--to ollama")],
)
def test_what_a_modelfile_cannot_hold_is_refused(end: str, system: str | None, where: str) -> None:
    with refuses(ModelError, where=where, fix=["--to gguf"]):
        modelfile_text("a.gguf", opened_run(end, system))


def test_the_name_for_ollama_is_one_that_it_takes() -> None:
    folders = "out/my-model_v1.5", "out/öllama x", ".exported", "模型"
    names = ["my-model_v1.5", "llama-x", "exported", "my-model"]
    assert [ollama_name(Path(folder)) for folder in folders] == names


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads of llama.cpp spin until both are done: for long where other tests have the cores."""
    monkeypatch.setattr(room, "available_cores", lambda: 1)


@pytest.mark.slow
def test_a_file_answers_as_the_tuned_model(run: Path, tmp_path: Path) -> None:
    exported = export_gguf(run, tmp_path / "model.gguf", quant="f16", device="cpu")
    # f16 weights, and llama.cpp's keys and values in fp16
    assert exported.check.tuned.mean_kl < 1e-4 < 0.01 < exported.check.base.mean_kl
    assert exported.bytes == (tmp_path / "model.gguf").stat().st_size
    assert sorted(os.listdir(tmp_path)) == ["model.gguf", "model.gguf.json"]


@pytest.mark.slow
def test_an_embedding_trained_in_full_on_a_4_bit_base(base: Path, tmp_path: Path) -> None:
    tuned = peft_model(base, modules_to_save=["embed_tokens"], target_modules=["q_proj"])
    adapter = {"modules_to_save": ["embed_tokens"], "target": ["q_proj"]}
    quantized = {"quantize": "nf4", "dtype": "bf16"}
    make_run(tmp_path / "run", base, tuned, adapter=adapter, model=quantized)
    exported = export_gguf(tmp_path / "run", tmp_path / "a.gguf", quant="f16", device="cpu")
    assert exported.check.tuned.mean_kl < 1e-4
    assert "output.weight" in {tensor.name for tensor in gguf.GGUFReader(exported.file).tensors}


@pytest.mark.slow
def test_a_folder_for_ollama(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "orders"
    exported = export_gguf(run, folder, for_ollama=True, device="cpu")
    names = ["LICENSE", "Modelfile", "orders-q4_k_m.gguf", "orders-q4_k_m.gguf.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    record = json.loads((folder / names[-1]).read_text())
    assert record["check"] == json.loads(json.dumps(asdict(exported.check)))
    assert read_modelfile((folder / "Modelfile").read_text()) == [
        ("from", "./orders-q4_k_m.gguf"),
        ("num_ctx", "2048"),  # the model's own
        ("stop", "<|im_end|>"),
    ]
    template = gguf.GGUFReader(exported.file).fields["tokenizer.chat_template"].contents()
    assert template.endswith(CHATML)
    # Ollama keeps a template that is 100 edits or more from each of its own
    assert len(template) - len(CHATML) > 100
    with LlamaCpp(Path(exported.file)) as server:
        rendered = server.post("/apply-template", {"messages": [{"role": "user", "content": "hi"}]})
    assert rendered["prompt"] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.slow
def test_a_file_that_reads_prompts_otherwise_is_rejected(run, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaCpp, "ids", lambda *_, **options: [1, 2, 3])
    with refuses(CheckpointError, names=["llama.cpp"], fix=["tunesmith merge RUN"]):
        export_gguf(run, tmp_path / "model.gguf", quant="f16", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf.rejected"]


@pytest.mark.slow
def test_the_command(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    words = ["export", run, "--to", "gguf", "--quant", "q8_0", "--device", "cpu", "--threads", 1]
    done = invoke(*words, "--output", file, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["bytes"] == file.stat().st_size
    assert report["check"]["tuned"]["mean_kl"] < 0.01
    refused = invoke(*words, "--output", file)
    assert refused.code == 2
    check_shown(refused.err, fix=["--force"])
    forced = invoke(*words, "--output", file, "--force", "--no-check")
    assert f"next: llama-server -m {file} -c 8192" in forced.out
