"""`tunesmith export RUN --to gguf | ollama`: runs of every kind, opened in llama.cpp."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
from transformers import AutoModelForCausalLM

from conftest import CHATML, write_tiny_llama
from errors import error_in, holds, lines_with, refuses
from export.modelfile import read_modelfile
from export.tiny_gguf import chat_tokenizer
from logged import logged_lines
from runs import make_run, peft_model
from tunesmith.checkpoint import manifest
from tunesmith.config.schema import Model
from tunesmith.errors import CheckpointError, ModelError, TunesmithError, UsageError
from tunesmith.hub.fetch import fetch
from tunesmith.model.safetensors_files import weights_digest
from tunesmith.tools.export import run_export
from tunesmith.tools.export.gguf import export as room
from tunesmith.tools.export.gguf.check import FileCheck
from tunesmith.tools.export.gguf.export import ExportedFile, export_adapter, export_gguf
from tunesmith.tools.export.gguf.llama_cpp import LlamaCpp
from tunesmith.tools.export.gguf.ollama import modelfile_text, ollama_name
from tunesmith.tools.export.merge_check import Difference
from tunesmith.tools.export.run_export import warn_of_distance
from warm import run_warm

pytestmark = pytest.mark.slow


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


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    make_run(tmp_path / "run", base, peft_model(base))
    return tmp_path / "run"


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_a_file_answers_as_the_tuned_model(run: Path, tmp_path: Path) -> None:
    exported = export_gguf(run, tmp_path / "model.gguf", quant="f16", device="cpu")
    assert exported.check is not None
    assert exported.check.base is not None
    assert exported.check.prompts == 12
    # f16 weights, and llama.cpp's keys and values in fp16
    assert exported.check.tuned.mean_kl < 1e-4 < 0.01 < exported.check.base.mean_kl
    assert exported.bytes == (tmp_path / "model.gguf").stat().st_size
    assert leftovers(tmp_path) == []


def test_notes_are_for_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = ExportedFile("a.gguf", "a.gguf", "q8_0", 1, ("a window",), None, "--no-check")
    monkeypatch.setattr(run_export, "export_gguf", lambda *_, **__: exported)
    options = {"force": False, "threads": 1, "no_check": True, "device": None, "json": False}
    options |= {"trust_remote_code": False, "converter": None}
    run_export.export_for_gguf(
        argparse.Namespace(
            run="run", output="a.gguf", to="gguf", adapter=False, quant="q8_0", **options
        )
    )
    out, err = capsys.readouterr()
    assert lines_with(err, "note", "a window")
    assert "a window" not in out


@pytest.mark.parametrize("kind", ["full", "nf4", "a plain model", "an embedding trained in full"])
def test_every_kind_of_run(kind: str, base: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    if kind == "full":
        tuned = AutoModelForCausalLM.from_pretrained(base)
        tuned.model.norm.weight.data *= 1.3
        make_run(path, base, tuned)
    elif kind == "nf4":
        make_run(path, base, peft_model(base), model={"quantize": "nf4", "dtype": "bf16"})
    elif kind == "a plain model":
        path = base
    else:
        options = {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}
        recipe = {"modules_to_save": ["embed_tokens"], "target": ["q_proj"]}
        make_run(path, base, peft_model(base, **options), adapter=recipe)
    exported = export_gguf(path, tmp_path / "model.gguf", quant="f16", device="cpu")
    assert exported.check is not None
    assert exported.check.tuned.mean_kl < 1e-4
    assert (exported.check.base is None) == (kind == "a plain model")
    names = {tensor.name for tensor in gguf.GGUFReader(exported.file).tensors}
    assert ("output.weight" in names) == (kind == "an embedding trained in full")


def test_a_folder_for_ollama(run: Path, tmp_path: Path) -> None:
    exported = export_gguf(run, tmp_path / "orders", for_ollama=True, device="cpu")
    names = sorted(path.name for path in (tmp_path / "orders").iterdir())
    assert names == ["LICENSE", "Modelfile", "orders-q4_k_m.gguf", "orders-q4_k_m.gguf.json"]
    record = json.loads((tmp_path / "orders" / "orders-q4_k_m.gguf.json").read_text())
    assert exported.check is not None
    assert record["check"] == json.loads(json.dumps(asdict(exported.check)))
    again = export_gguf(run, tmp_path / "orders", for_ollama=True, force=True, check=False)
    assert again.check is None
    modelfile = (tmp_path / "orders" / "Modelfile").read_text()
    assert read_modelfile(modelfile) == [
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


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("out/my-model_v1.5", "my-model_v1.5"),
        ("out/öllama x", "llama-x"),
        (".exported", "exported"),
        ("模型", "my-model"),
        ("n" * 99, "n" * 80),
    ],
)
def test_the_name_for_ollama_is_one_that_it_takes(folder: str, name: str) -> None:
    assert ollama_name(Path(folder)) == name


def test_the_folder_that_one_is_in_names_an_ollama_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my faq").mkdir()
    monkeypatch.chdir(tmp_path / "my faq")
    assert ollama_name(Path()) == "my-faq"


@pytest.mark.parametrize(
    ("file_name", "end"),
    [
        ("orders.gguf", "<|im_end|>"),
        ("my orders #2.gguf", "<|im_end|>"),
        ("orders.gguf", "<｜end▁of▁sentence｜>"),
        ("orders.gguf", "###"),
        ("orders.gguf", " user:"),
    ],
)
def test_ollama_reads_of_a_modelfile_what_was_meant(file_name: str, end: str) -> None:
    assert read_modelfile(modelfile_text(file_name, opened_run(end))) == [
        ("from", f"./{file_name}"),
        ("num_ctx", "4096"),
        ("stop", end),
    ]


def opened_run(end: str, system: str | None = None) -> Any:
    """What a Modelfile is written from: answers end with `end`, or with the tokenizer's own token."""
    tokenizer = SimpleNamespace(eos_token_id=1, decode=lambda ids: {7: end}[ids[0]])
    config = SimpleNamespace(max_position_embeddings=8192)
    return SimpleNamespace(
        files=SimpleNamespace(tokenizer=tokenizer, config=config),
        location=SimpleNamespace(
            run=SimpleNamespace(data=SimpleNamespace(seq_len=512, system=system))
        ),
        template=SimpleNamespace(end_ids=frozenset({1, 7})),
    )


@pytest.mark.parametrize(
    "system",
    [
        "Be brief.",
        'Say "yes" or "no"',
        '"quoted"',
        "One.\n\n# Two\n\tFROM here  ",
        '""',
        'a """ b',
        "日本",
    ],
)
def test_a_modelfile_has_the_system_message_of_the_run(system: str) -> None:
    commands = read_modelfile(modelfile_text("a.gguf", opened_run("<|im_end|>", system)))
    assert commands[3:] == [("system", system)]


def test_a_system_message_that_a_modelfile_cannot_hold_is_refused() -> None:
    with refuses(ModelError, where="data.system", fix=["--to gguf"]) as refused:
        modelfile_text("a.gguf", opened_run("<|im_end|>", 'Quote with """\nand go on.'))
    assert refused.value.where == "data.system"


@pytest.mark.parametrize(
    "text",
    ["PARAMETER num_ctx 4096\n", "FROM ./a\nSTOP x\n", 'FROM ./a\nPARAMETER stop "x\n', "FROM"],
)
def test_the_reader_of_modelfiles_refuses_what_ollama_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"no command|quote|no FROM|without a value"):
        read_modelfile(text)


def test_an_adapter_beside_its_base(run: Path, base: Path, tmp_path: Path) -> None:
    export_gguf(base, tmp_path / "base.gguf", quant="f16", device="cpu")
    export_adapter(run, tmp_path / "adapter.gguf")
    export_gguf(run, tmp_path / "merged.gguf", quant="f16", device="cpu")
    # Half a letter is not reported, and which token is likeliest may differ with the machine.
    texts = [[5, 9, 200, 31, 77], [40, 41, 42], [300, 7, 12, 90], [9], [77, 31, 200, 9, 5]]
    with LlamaCpp(tmp_path / "base.gguf", tmp_path / "adapter.gguf") as server:
        apart = [server.log_probabilities(ids, 600) for ids in texts]
    with LlamaCpp(tmp_path / "merged.gguf") as server:
        merged = [server.log_probabilities(ids, 600) for ids in texts]
    pairs = [
        (one, other)
        for one, other in zip(apart, merged, strict=True)
        if one is not None and other is not None
    ]
    assert pairs
    for one, other in pairs:
        assert (one - other).abs().max() < 0.02


@pytest.fixture
def gguf_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A run on a .gguf file, and that file."""
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "base" / "base-q8_0.gguf"
    export_gguf(base, file, quant="q8_0", check=False, device="cpu")
    folder = fetch(Model(name=str(file), dtype="fp32"))
    make_run(tmp_path / "run", folder, peft_model(folder), model={"name": str(file)})
    env = {"model_hash": weights_digest(folder)}
    (tmp_path / "run" / "env.json").write_text(json.dumps(env))
    return tmp_path / "run", file


def test_an_adapter_for_the_very_file_that_it_was_trained_on(
    gguf_run: tuple[Path, Path], tmp_path: Path
) -> None:
    run, file = gguf_run
    exported = export_adapter(run, tmp_path / "adapter.gguf", device="cpu")
    assert exported.base == str(file)
    assert exported.check is not None
    assert exported.check.base is not None
    # llama.cpp rounds activations to 8 bits beside weights in q8_0; measured 3e-6 and 0.04
    assert exported.check.tuned.mean_kl < 1e-4 < 0.01 < exported.check.base.mean_kl
    assert exported.check.prompts == 12
    assert exported.check.is_near
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    fields = gguf.GGUFReader(exported.file).fields
    assert fields["general.base_model.0.name"].contents() == file.name
    assert fields["tunesmith.base.sha256"].contents() == sha256
    record = json.loads((tmp_path / "adapter.gguf.json").read_text())
    assert record["base"] == {"file": file.name, "sha256": sha256}
    assert record["check"]["tuned"]["mean_kl"] == exported.check.tuned.mean_kl


def test_the_command_that_serves_an_adapter_and_its_file(
    gguf_run: tuple[Path, Path], tmp_path: Path
) -> None:
    run, file = gguf_run
    words = ["export", run, "--to", "gguf", "--adapter", "--device", "cpu", "--threads", 1]
    done = run_warm([*words, "--output", tmp_path / "a.gguf"])
    assert done.returncode == 0, done.stderr
    assert lines_with(done.stdout, 12, "llama.cpp")
    assert f"next: llama-server -m {file} --lora {tmp_path / 'a.gguf'}\n" in done.stdout
    # A template that the base's file does not have
    template = run / "final" / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "helper"))
    (run / "final" / manifest.MANIFEST).unlink()
    manifest.write_manifest(run / "final", 3, manifest.flush_files(run / "final"))
    done = run_warm([*words, "--output", tmp_path / "b.gguf", "--no-check"])
    assert f"--lora {tmp_path / 'b.gguf'} --chat-template-file {template}\n" in done.stdout
    assert lines_with(done.stdout, "--no-check")
    record = json.loads((tmp_path / "b.gguf.json").read_text())
    assert (record["check"], record["unchecked"]) == (None, "--no-check")


def test_an_adapter_and_its_file_for_ollama(gguf_run: tuple[Path, Path], tmp_path: Path) -> None:
    run, file = gguf_run
    export_adapter(run, tmp_path / "orders", for_ollama=True, check=False, device="cpu")
    names = sorted(path.name for path in (tmp_path / "orders").iterdir())
    assert names == ["Modelfile", "orders-lora.gguf", "orders-lora.gguf.json"]
    assert read_modelfile((tmp_path / "orders" / "Modelfile").read_text())[:2] == [
        ("from", str(file)),
        ("adapter", "./orders-lora.gguf"),
    ]
    template = run / "final" / "chat_template.jinja"
    base_template = fetch(Model(name=str(file), dtype="fp32")) / "chat_template.jinja"
    same, other = "{# tools #}" + CHATML, CHATML.replace("assistant", "helper")
    for text, base_text, is_alike in (
        (same, CHATML, True),
        (other, CHATML, False),
        (same, "", False),
    ):
        template.write_text(text)
        base_template.write_text(base_text)
        if not base_text:
            base_template.unlink()
        (run / "final" / manifest.MANIFEST).unlink()
        manifest.write_manifest(run / "final", 3, manifest.flush_files(run / "final"))
        refused = refuses(UsageError, where="--to ollama --adapter", names=[file.name])
        with nullcontext() if is_alike else refused:
            export_adapter(
                run, tmp_path / "orders", for_ollama=True, force=True, check=False, device="cpu"
            )


def test_an_adapter_is_refused_where_its_file_is_another(
    gguf_run: tuple[Path, Path], base: Path, tmp_path: Path
) -> None:
    run, file = gguf_run
    export_gguf(base, file, quant="q4_k_m", check=False, force=True, device="cpu")
    with refuses(ModelError, where=str(file)):
        export_adapter(run, tmp_path / "adapter.gguf", device="cpu")
    assert not (tmp_path / "adapter.gguf").exists()


def test_ollama_takes_an_adapter_for_a_gguf_file_alone(run: Path, tmp_path: Path) -> None:
    with refuses(UsageError, where="--to ollama --adapter", fix=["--to gguf --adapter"]):
        export_adapter(run, tmp_path / "orders", for_ollama=True, device="cpu")


def test_what_a_check_costs_is_told_before_and_while_it_runs(run: Path, tmp_path: Path) -> None:
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
    # Two layers of the base and of the tuned model, six prompts at four positions
    total = 2 * 2 + 6 * 4
    assert parts == [(done, total) for done in range(total + 1)]
    (line,) = [line for line in lines if "--no-check" in line]
    assert holds(line, 6, 4)


def test_a_file_that_reads_prompts_otherwise_is_rejected(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaCpp, "ids", lambda *_, **options: [1, 2, 3])
    with refuses(CheckpointError, names=["llama.cpp"], fix=["tunesmith merge RUN"]):
        export_gguf(run, tmp_path / "model.gguf", quant="f16", device="cpu")
    assert not (tmp_path / "model.gguf").exists()
    assert (tmp_path / "model.gguf.rejected").is_file()
    assert not list(tmp_path.glob("*.gguf*.json"))
    assert leftovers(tmp_path) == []


def _exists(folder: Path) -> dict[str, Any]:
    (folder / "model.gguf").write_bytes(b"GGUF")
    return {}


def _no_suffix(folder: Path) -> dict[str, Any]:
    return {"output": folder / "model"}


def _folder_of_others(folder: Path) -> dict[str, Any]:
    (folder / "orders").mkdir()
    (folder / "orders" / "mine.txt").write_text("mine")
    return {"output": folder / "orders", "for_ollama": True, "force": True}


def _link(folder: Path) -> dict[str, Any]:
    (folder / "model.gguf").symlink_to(folder / "elsewhere.gguf")
    return {"force": True}


def _unknown_quant(folder: Path) -> dict[str, Any]:
    return {"quant": "q3_k_s"}


def _no_run(folder: Path) -> dict[str, Any]:
    return {"path": folder / "nowhere"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_exists, "--force"),
        (_no_suffix, ".gguf"),
        (_folder_of_others, "mine.txt"),
        (_link, "a file or symbolic link"),
        (_unknown_quant, "q4_k_m"),
        (_no_run, "there is no"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    run: Path, tmp_path: Path, make: Callable[[Path], dict[str, Any]], words: str
) -> None:
    options = {"path": run, "output": tmp_path / "model.gguf", "device": "cpu", **make(tmp_path)}
    before = sorted(os.walk(tmp_path))
    with pytest.raises(TunesmithError) as caught:
        export_gguf(**options)
    assert words in caught.value.text()
    assert sorted(os.walk(tmp_path)) == before


def test_no_room_on_the_disk(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "write_gguf", full)
    monkeypatch.setattr(room, "_find_base", lambda *_: pytest.fail("it may download first"))
    with refuses(CheckpointError, cause="disk"):
        export_gguf(run, tmp_path / "model.gguf", device="cpu")
    assert not (tmp_path / "model.gguf").exists()
    assert leftovers(tmp_path) == []


def test_the_command(run: Path, tmp_path: Path) -> None:
    words = ["export", run, "--to", "gguf", "--quant", "q8_0", "--device", "cpu", "--threads", 1]
    done = run_warm([*words, "--output", tmp_path / "model.gguf"])
    assert done.returncode == 0, done.stderr
    assert lines_with(done.stdout, 12, "llama.cpp")
    assert f"next: llama-server -m {tmp_path / 'model.gguf'} -c 8192" in done.stdout
    again = run_warm([*words, "--output", tmp_path / "model.gguf", "--json"])
    assert again.returncode == 2
    forced = run_warm([*words, "--output", tmp_path / "model.gguf", "--json", "--force"])
    report = json.loads(forced.stdout)
    assert report["bytes"] == (tmp_path / "model.gguf").stat().st_size
    assert report["check"]["tuned"]["mean_kl"] < 0.01
    for wrong in (["--adapter", "--quant", "f16"], ["--to", "transformers"]):
        refused = run_warm([*words, "--output", tmp_path / "other.gguf", *wrong])
        assert refused.returncode == 2, refused.stdout
        assert error_in(refused.stderr).where.startswith("command line: --")


@pytest.mark.parametrize(
    ("kl", "agreement", "near"),
    [
        (0.1, 0.9, True),
        (0.3, 0.9, False),  # a tenth of the base's would be 0.2
        (0.13, 0.46, False),  # another token at every second position
    ],
)
def test_a_file_that_answers_otherwise_is_not_near(kl: float, agreement: float, near: bool) -> None:
    base = Difference(9.0, 2.0, 0.46, 2.0)
    assert FileCheck(20, Difference(1.0, kl, agreement, kl), base, 24).is_near == near


@pytest.mark.parametrize(
    ("rounding", "base", "same", "values"),
    [
        (Difference(1.0, 0.052, 1.0, 0.052), Difference(9.0, 2.0, 0.2, 2.0), 24, (0.052, 2)),
        (Difference(1.0, 0.6, 0.7, 0.6), Difference(9.0, 2.0, 0.2, 2.0), 17, (0.6, 2)),
        (Difference(1.0, 3.0, 0.5, 3.0), Difference(9.0, 0.3, 0.2, 0.3), 12, (3, 0.3)),
        (Difference(1.0, 0.002, 0.96, 0.002), None, 23, (0.002,)),
    ],
)
def test_what_a_check_found_is_told_within_80_columns(
    rounding: Difference,
    base: Difference | None,
    same: int,
    values: tuple[float, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    check = FileCheck(20, rounding, base, 24)
    exported = ExportedFile("a.gguf", "a.gguf", "q4_k_m", 1, (), check)
    out = exported.table().text()
    warn_of_distance(exported)
    _, err = capsys.readouterr()
    assert lines_with(out, same, 24)
    assert lines_with(out, *values)
    assert lines_with(out, "verdict", "good")
    assert bool(lines_with(out, "not good")) != check.is_near
    assert max(map(len, out.splitlines())) <= 80
    assert bool(err) != check.is_near, "a warning"
