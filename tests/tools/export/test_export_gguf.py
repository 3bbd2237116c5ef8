"""`tunesmith export RUN --to gguf | ollama`: runs of every kind, opened in llama.cpp."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import pytest
from transformers import AutoModelForCausalLM

from conftest import CHATML, write_tiny_llama
from errors import check_shown, error_in, holds, lines_with, refuses
from export.test_modelfile import read_modelfile
from export.tiny_gguf import chat_tokenizer
from invoke import invoke
from logged import logged_lines
from runs import make_run, peft_model
from tunesmith.checkpoint import manifest
from tunesmith.config.schema import Model
from tunesmith.errors import CheckpointError, ModelError, UsageError
from tunesmith.hub.fetch import fetch
from tunesmith.model.safetensors_files import weights_digest
from tunesmith.tools.export.gguf import export as room
from tunesmith.tools.export.gguf.check import FileCheck
from tunesmith.tools.export.gguf.export import ExportedFile, export_adapter, export_gguf
from tunesmith.tools.export.gguf.llama_cpp import LlamaCpp
from tunesmith.tools.export.merge_check import Difference
from tunesmith.tools.export.run_export import warn_of_distance


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of width 256 with a small BPE, which llama.cpp opens; <|im_end|> ends turns."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = chat_tokenizer()
    write_tiny_llama(folder, vocab_size=len(tokenizer), hidden_size=256, intermediate_size=256)
    config = json.loads((folder / "config.json").read_text())
    config |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder)
    ends = {"eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>")}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    (folder / "LICENSE").write_text("Free.")
    return folder


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads of llama.cpp spin until both are done: for long where other tests have the cores."""
    monkeypatch.setattr(room, "available_cores", lambda: 1)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that no test changes."""
    folder = tmp_path_factory.mktemp("run") / "run"
    make_run(folder, base, peft_model(base))
    return folder


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_a_file_answers_as_the_tuned_model(run: Path, tmp_path: Path) -> None:
    parts: list[tuple[int, int]] = []
    with logged_lines() as lines:
        exported = export_gguf(
            run,
            tmp_path / "model.gguf",
            quant="f16",
            device="cpu",
            checking=lambda done, total: parts.append((done, total)),
        )
    assert exported.check is not None
    assert exported.check.base is not None
    assert exported.check.prompts == 12
    # f16 weights, and llama.cpp's keys and values in fp16
    assert exported.check.tuned.mean_kl < 1e-4 < 0.01 < exported.check.base.mean_kl
    assert exported.bytes == (tmp_path / "model.gguf").stat().st_size
    assert leftovers(tmp_path) == []
    # Two layers of the base and of the tuned model, six prompts at four positions
    total = 2 * 2 + 6 * 4
    assert parts == [(done, total) for done in range(total + 1)]
    (line,) = [line for line in lines if "--no-check" in line]
    assert holds(line, 6, 4)


# What is trained, its recipe, and PEFT's options of it.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nf4": ({"model": {"quantize": "nf4", "dtype": "bf16"}}, {}),
    "an embedding": (
        {"adapter": {"modules_to_save": ["embed_tokens"], "target": ["q_proj"]}},
        {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all weights", *KINDS])
def test_every_kind_of_run(kind: str, base: Path, tmp_path: Path) -> None:
    if kind == "all weights":
        tuned = AutoModelForCausalLM.from_pretrained(base)
        tuned.model.norm.weight.data *= 1.3
        make_run(tmp_path / "run", base, tuned)
    else:
        recipe, options = KINDS[kind]
        make_run(tmp_path / "run", base, peft_model(base, **options), **recipe)
    exported = export_gguf(tmp_path / "run", tmp_path / "a.gguf", quant="f16", device="cpu")
    assert exported.check is not None
    assert exported.check.base is not None
    assert exported.check.tuned.mean_kl < 1e-4
    names = {tensor.name for tensor in gguf.GGUFReader(exported.file).tensors}
    assert ("output.weight" in names) == (kind == "an embedding")


@pytest.mark.slow
def test_a_folder_for_ollama(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "orders"
    exported = export_gguf(run, folder, for_ollama=True, device="cpu")
    names = ["LICENSE", "Modelfile", "orders-q4_k_m.gguf", "orders-q4_k_m.gguf.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    record = json.loads((folder / names[-1]).read_text())
    assert exported.check is not None
    assert record["check"] == json.loads(json.dumps(asdict(exported.check)))
    assert export_gguf(run, folder, for_ollama=True, force=True, check=False).check is None
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


@pytest.fixture(scope="module")
def on_gguf(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a .gguf file, a run on it, and the cache of its conversion."""
    place = tmp_path_factory.mktemp("on-gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_CACHE", str(place / "cache"))
        file = place / "base-q8_0.gguf"
        export_gguf(base, file, quant="q8_0", check=False, device="cpu")
        folder = fetch(Model(name=str(file), dtype="fp32"))
        make_run(place / "run", folder, peft_model(folder), model={"name": str(file)})
        env = {"model_hash": weights_digest(folder)}
        (place / "run" / "env.json").write_text(json.dumps(env))
    return place


@pytest.fixture
def gguf_run(on_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A copy of the run, which a test may change, and the file of its base."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(on_gguf / "cache"))
    run = shutil.copytree(on_gguf / "run", tmp_path / "run")
    return Path(run), on_gguf / "base-q8_0.gguf"


def change_template(run: Path, text: str) -> Path:
    template = run / "final" / "chat_template.jinja"
    template.write_text(text)
    (run / "final" / manifest.MANIFEST).unlink()
    manifest.write_manifest(run / "final", 3, manifest.flush_files(run / "final"))
    return template


@pytest.mark.slow
def test_an_adapter_for_the_very_file_that_it_was_trained_on(gguf_run, tmp_path):
    run, file = gguf_run
    words = ["export", run, "--to", "gguf", "--adapter", "--device", "cpu", "--threads", 1]
    done = invoke(*words, "--output", tmp_path / "a.gguf")
    assert done.code == 0, done.err
    assert f"next: llama-server -m {file} --lora {tmp_path / 'a.gguf'}\n" in done.out
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    assert fields["general.base_model.0.name"].contents() == file.name
    assert fields["tunesmith.base.sha256"].contents() == sha256
    record = json.loads((tmp_path / "a.gguf.json").read_text())
    assert record["base"] == {"file": file.name, "sha256": sha256}
    check = record["check"]
    assert check["prompts"] == 12
    # llama.cpp rounds activations to 8 bits beside weights in q8_0; measured 3e-6 and 0.04
    assert check["tuned"]["mean_kl"] < 1e-4 < 0.01 < check["base"]["mean_kl"]
    # A template that the base's file does not have
    template = change_template(run, CHATML.replace("assistant", "helper"))
    done = invoke(*words, "--output", tmp_path / "b.gguf", "--no-check")
    assert f"--lora {tmp_path / 'b.gguf'} --chat-template-file {template}\n" in done.out
    record = json.loads((tmp_path / "b.gguf.json").read_text())
    assert (record["check"], record["unchecked"]) == (None, "--no-check")


@pytest.mark.slow
def test_an_adapter_and_its_file_for_ollama(gguf_run, on_gguf, tmp_path, monkeypatch):
    run, file = gguf_run
    options: dict[str, Any] = {"for_ollama": True, "check": False, "device": "cpu"}
    export_adapter(run, tmp_path / "orders", **options)
    names = sorted(path.name for path in (tmp_path / "orders").iterdir())
    assert names == ["Modelfile", "orders-lora.gguf", "orders-lora.gguf.json"]
    assert read_modelfile((tmp_path / "orders" / "Modelfile").read_text())[:2] == [
        ("from", str(file)),
        ("adapter", "./orders-lora.gguf"),
    ]
    cache = shutil.copytree(on_gguf / "cache", tmp_path / "cache")
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache))
    base_template = fetch(Model(name=str(file), dtype="fp32")) / "chat_template.jinja"
    for text, base_text, is_alike in (
        ("{# tools #}" + CHATML, CHATML, True),
        (CHATML.replace("assistant", "helper"), CHATML, False),
        ("{# tools #}" + CHATML, "", False),
    ):
        change_template(run, text)
        base_template.write_text(base_text)
        if not base_text:
            base_template.unlink()
        refused = refuses(UsageError, where="--to ollama --adapter", names=[file.name])
        with nullcontext() if is_alike else refused:
            export_adapter(run, tmp_path / "orders", force=True, **options)


@pytest.mark.slow
def test_an_adapter_is_refused_where_its_file_is_another(gguf_run, base, run, tmp_path):
    of_file, file = gguf_run
    other = tmp_path / file.name
    export_gguf(base, other, quant="q4_k_m", check=False, device="cpu")
    config = of_file / "config.yaml"
    config.write_text(config.read_text().replace(str(file), str(other)))
    with refuses(ModelError, where=str(other)):
        export_adapter(of_file, tmp_path / "adapter.gguf", device="cpu")
    assert not (tmp_path / "adapter.gguf").exists()
    with refuses(UsageError, where="--to ollama --adapter", fix=["--to gguf --adapter"]):
        export_adapter(run, tmp_path / "orders", for_ollama=True, device="cpu")


@pytest.mark.slow
def test_a_file_that_reads_prompts_otherwise_is_rejected(run, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaCpp, "ids", lambda *_, **options: [1, 2, 3])
    with refuses(CheckpointError, names=["llama.cpp"], fix=["tunesmith merge RUN"]):
        export_gguf(run, tmp_path / "model.gguf", quant="f16", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf.rejected"]


@pytest.mark.slow
def test_a_disk_that_fills_up_is_the_cause(run, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "write_gguf", full)
    monkeypatch.setattr(room, "_find_base", lambda *_: pytest.fail("it may download first"))
    with refuses(CheckpointError, cause="disk"):
        export_gguf(run, tmp_path / "model.gguf", device="cpu")
    assert [*tmp_path.iterdir()] == []


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
    for wrong in (["--adapter", "--quant", "f16"], ["--to", "transformers"]):
        refused = invoke(*words, "--output", tmp_path / "other.gguf", *wrong)
        assert refused.code == 2
        assert error_in(refused.err).where.startswith("command line: --")


@pytest.mark.parametrize(
    ("kl", "agreement", "near"),
    [
        (0.1, 0.9, True),
        (0.3, 0.9, False),  # a tenth of the base's would be 0.2
        (0.13, 0.46, False),  # another token at every second position
    ],
)
def test_a_file_that_answers_otherwise_is_told(kl, agreement, near, capsys):
    check = FileCheck(20, Difference(1.0, kl, agreement, kl), Difference(9.0, 2.0, 0.46, 2.0), 24)
    assert check.is_near == near
    exported = ExportedFile("a.gguf", "a.gguf", "q4_k_m", 1, ("a window",), check)
    table = exported.table().text()
    assert lines_with(table, round(agreement * 24), 24)
    assert lines_with(table, kl, 2)
    warn_of_distance(exported)
    assert bool(capsys.readouterr().err) != near
