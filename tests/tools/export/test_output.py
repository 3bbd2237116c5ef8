"""Where exports are written: each refuses a bad place before it writes, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import CHATML, write_tiny_llama
from export.tiny_gguf import byte_level, structure_of
from invoke import invoke
from runs import make_run, peft_model
from tunesmith.errors import TunesmithError, UsageError
from tunesmith.tools.export.cli import check_options
from tunesmith.tools.export.gguf.export import export_adapter, export_gguf
from tunesmith.tools.export.merge import merge
from tunesmith.tools.export.output import move_into_place, part_folder
from tunesmith.tools.export.vllm_adapter import export_peft

Export = Callable[[Path, Any], Any]


def _gguf(run: Path, output: Any, **options: Any) -> Any:
    given = {"quant": "q8_0", "device": "cpu", "check": False, **options}
    return export_gguf(run, output, **given)


def _ollama(run: Path, output: Any, **options: Any) -> Any:
    return _gguf(run, output, for_ollama=True, **options)


def _merged(run: Path, output: Any) -> Any:
    return merge(run, output, device="cpu")


# Each with the name of what it writes.
EXPORTS: dict[str, tuple[Export, str]] = {
    "gguf": (_gguf, "out.gguf"),
    "gguf --adapter": (export_adapter, "out.gguf"),
    "ollama": (_ollama, "out"),
    "vllm --adapter": (export_peft, "out"),
    "merge": (_merged, "out"),
}
FOLDERS = ["ollama", "vllm --adapter", "merge"]
ADAPTERS = ["gguf --adapter", "vllm --adapter", "merge"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adapter, which no test changes."""
    folder = tmp_path_factory.mktemp("exports")
    tokenizer = byte_level(structure_of("gpt-2"))
    tokenizer.chat_template = CHATML
    write_tiny_llama(folder / "base", vocab_size=len(tokenizer))
    config = json.loads((folder / "base" / "config.json").read_text())
    config |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    (folder / "base" / "config.json").write_text(json.dumps(config))
    tokenizer.save_pretrained(folder / "base")
    make_run(folder / "run", folder / "base", peft_model(folder / "base"))
    return folder / "run"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(export: Export, run: Path, output: Any, value: str) -> None:
    """An export names a value, a place and a fix, and changes nothing below this folder."""
    before = sorted(os.walk("."))
    with pytest.raises(TunesmithError) as caught:
        export(run, output)
    assert value in caught.value.text()
    assert caught.value.where
    assert caught.value.fix
    assert sorted(os.walk(".")) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTS)
def test_places_and_runs_that_are_refused(name: str, run: Path) -> None:
    export, output = EXPORTS[name]
    Path("file").write_text("mine")
    refused(export, run, f"file/{output}", "file")
    refused(export, run, f"/proc/{output}", "/proc")  # no room, or not to be written
    refused(export, Path("nowhere"), output, "nowhere")
    # A recipe stands for the base, not for its run.
    text = (run / "config.yaml").read_text()
    Path("mine.yaml").write_text(re.sub("output_dir: .*", f"output_dir: {run}", text))
    refused(export, Path("mine.yaml"), output, str(run))


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_are_not_to_be_replaced(name, run, tmp_path, monkeypatch):
    export, _ = EXPORTS[name]
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    for place in (".", "..", "", run / "final", run.parent):
        refused(export, run, place, "--output")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("mine")
    refused(export, run, tmp_path / "mine", "mine")
    (tmp_path / "text").write_text("mine")
    refused(export, run, tmp_path / "text", "text")


@pytest.mark.slow
def test_files_that_are_not_to_be_replaced(run: Path) -> None:
    for output in ("model", "old.gguf"):
        Path("old.gguf").write_bytes(b"GGUF")
        refused(_gguf, run, output, "--force" if output != "model" else ".gguf")
    Path("link.gguf").symlink_to("elsewhere.gguf")
    Path("notes.gguf").write_text("mine")
    forced: Export = lambda *words: _gguf(*words, force=True)  # noqa: E731
    refused(forced, run, "link.gguf", "link.gguf")
    refused(forced, run, "notes.gguf", "GGUF")
    refused(lambda *words: _gguf(*words, quant="q3_k_s"), run, "model.gguf", "q4_k_m")
    _gguf(run, "model.gguf")
    before = Path("model.gguf").stat().st_ino
    forced(run, "model.gguf")
    assert Path("model.gguf").stat().st_ino != before
    # A model may be a GGUF file itself.
    refused(forced, Path("model.gguf"), "model.gguf", "--output")


@pytest.mark.slow
def test_force_for_ollama_deletes_nothing_of_others(run: Path) -> None:
    forced: Export = lambda *words: _ollama(*words, force=True)  # noqa: E731
    _ollama(run, "out")
    Path("out/mine.txt").write_text("mine")
    refused(forced, run, "out", "mine.txt")
    Path("out/mine.txt").unlink()
    forced(run, "out")
    assert sorted(os.listdir("out")) == ["Modelfile", "out-q8_0.gguf", "out-q8_0.gguf.json"]
    Path("out/Modelfile").unlink()
    refused(forced, run, "out", "out-q8_0.gguf")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gguf", "gguf --adapter", "ollama", "vllm --adapter"])
def test_a_folder_that_does_not_exist_yet_is_made(name: str, run: Path) -> None:
    export, output = EXPORTS[name]
    export(run, f"new/folder/{output}")
    # Beside a GGUF file lies what was measured of it.
    assert [name for name in os.listdir("new/folder") if name != f"{output}.json"] == [output]


def test_a_file_of_the_command_needs_no_converter(run, tmp_path, monkeypatch):
    """$LLAMA_CPP_DIR may be a folder of programs, for another tool."""
    monkeypatch.setenv("LLAMA_CPP_DIR", str(tmp_path))
    words = ["export", run, "--to", "gguf", "--quant", "f16", "--no-check", "--output", "a.gguf"]
    assert invoke(*words).code == 0
    assert Path("a.gguf").is_file()


@contextmanager
def small_files() -> Iterator[None]:
    """No file of more than 6,000 bytes can be written, as on a disk that fills up."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", EXPORTS)
def test_a_disk_that_fills_up(name: str, run: Path) -> None:
    export, output = EXPORTS[name]
    with small_files():
        refused(export, run, f"new/{output}", output)


@pytest.fixture
def adapter(run: Path, tmp_path: Path) -> Path:
    """The adapter's folder alone, which has no sums of its files."""
    ignored = shutil.ignore_patterns("manifest.json")
    return Path(shutil.copytree(run / "final", tmp_path / "adapter", ignore=ignored))


def _other_rank(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 5}))


def _lost_tensor(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors: dict[str, torch.Tensor] = load_file(file)
    tensors.pop(min(tensors))
    save_file(tensors, file)


def _torn(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("change", [_other_rank, _lost_tensor, _torn])
def test_an_adapter_that_does_not_fit_its_base(name, change, adapter):
    """llama.cpp would take the scale of another rank, and vLLM find out when it starts."""
    change(adapter)
    export, output = EXPORTS[name]
    refused(export, adapter, output, "adapter")


def test_a_part_of_an_ended_process_is_removed(tmp_path: Path) -> None:
    """In a container the first process is number 1 each time."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    for number in (os.getpid(), ended.pid, os.getppid()):
        (tmp_path / f".out.{number}.part").mkdir()
    (tmp_path / ".out.mine.part").mkdir()
    with part_folder(tmp_path / "out") as part:
        (part / "file").write_text("new")
        move_into_place(part, tmp_path / "out")
    kept = [f".out.{os.getppid()}.part", ".out.mine.part", "out"]
    assert sorted(os.listdir(tmp_path)) == kept


def test_an_error_removes_the_folders_that_were_made_for_it(tmp_path: Path) -> None:
    with pytest.raises(KeyError), part_folder(tmp_path / "a" / "b" / "out"):
        raise KeyError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", ["--quant bf16", "--adapter", "--threads 2", "--force"])
def test_an_option_names_the_formats_that_take_it(value: str) -> None:
    option = value.split(maxsplit=1)[0]
    dest, setting = option.strip("-"), value.rsplit(maxsplit=1)[-1]
    refused_by, taken = {}, []
    for name in ("transformers", "gguf", "ollama", "vllm"):
        args = Namespace(to=name, quant=None, adapter=False, typed={dest: option})
        setattr(args, dest, setting)
        try:
            check_options(args)
            taken.append(name)
        except UsageError as error:
            refused_by[name] = error
    assert "transformers" in refused_by
    for error in refused_by.values():
        assert re.findall("gguf|ollama|vllm|transformers", error.what) == taken
