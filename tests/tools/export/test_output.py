"""Where exports are written, and what each of them refuses before and while it writes."""

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
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import CHATML, write_tiny_llama
from export.tiny_gguf import byte_level, structure_of
from runs import make_run, peft_model
from tunesmith.errors import TunesmithError, UsageError
from tunesmith.tools.export.cli import check_options
from tunesmith.tools.export.gguf.export import export_adapter, export_gguf
from tunesmith.tools.export.merge import merge
from tunesmith.tools.export.output import move_into_place, part_folder
from tunesmith.tools.export.vllm_adapter import export_peft

Export = Callable[[Path, Any], Any]


def _gguf(run: Path, output: Any, **options: Any) -> Any:
    return export_gguf(run, output, quant="q8_0", device="cpu", check=False, **options)


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
ADAPTERS = ["gguf --adapter", "vllm --adapter"]


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


def refused(export: Export, run: Path, output: Any, words: str) -> None:
    """Whether an export names what, where and a fix, and changes nothing below this folder."""
    before = sorted(os.walk("."))
    with pytest.raises(TunesmithError) as caught:
        export(run, output)
    assert words in caught.value.text()
    assert caught.value.where
    assert caught.value.fix
    assert sorted(os.walk(".")) == before


@pytest.mark.parametrize("name", EXPORTS)
def test_a_recipe_is_not_taken_for_its_run(name: str, run: Path) -> None:
    """It stands for the base."""
    text = (run / "config.yaml").read_text()
    Path("mine.yaml").write_text(re.sub("output_dir: .*", f"output_dir: {run}", text))
    refused(
        EXPORTS[name][0], Path("mine.yaml"), EXPORTS[name][1], "give the run directory instead: "
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPORTS)
def test_places_that_cannot_be_written(name: str, run: Path) -> None:
    export, output = EXPORTS[name]
    Path("file").write_text("mine")
    refused(export, run, f"file/{output}", "is a file")
    refused(export, run, f"/proc/{output}", "/proc")  # no room, or not to be written


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_are_not_to_be_replaced(
    name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, _ = EXPORTS[name]
    Path("empty").mkdir()
    monkeypatch.chdir("empty")
    refused(export, run, ".", "the current folder")
    refused(export, run, "..", "the current folder")
    refused(export, run, "", "--output is empty")
    refused(export, run, run / "final", "contains the adapter or its base model")
    refused(export, run, run.parent, "contains the adapter or its base model")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.txt").write_text("mine")
    refused(export, run, tmp_path / "mine", "mine.txt" if name in ("ollama", "merge") else "mine")


@pytest.mark.parametrize("name", ["gguf", "gguf --adapter", "ollama", "vllm --adapter"])
def test_a_folder_that_does_not_exist_yet_is_made(name: str, run: Path) -> None:
    export, output = EXPORTS[name]
    export(run, f"new/folder/{output}")
    # Beside a GGUF file lies what was measured of it.
    assert [name for name in os.listdir("new/folder") if name != f"{output}.json"] == [output]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of more than 6,000 bytes can be written, as on a disk that fills up."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", EXPORTS)
def test_a_disk_that_fills_up(name: str, run: Path, small_files: None) -> None:
    export, output = EXPORTS[name]
    refused(export, run, f"new/{output}", "grew larger")


def test_force_for_ollama_deletes_nothing_of_others(run: Path) -> None:
    _ollama(run, "out")
    Path("out/mine.txt").write_text("mine")
    refused(lambda *words: _ollama(*words, force=True), run, "out", "mine.txt")
    Path("out/mine.txt").unlink()
    _ollama(run, "out", force=True)
    assert sorted(os.listdir("out")) == ["Modelfile", "out-q8_0.gguf", "out-q8_0.gguf.json"]
    Path("out/Modelfile").unlink()
    refused(lambda *words: _ollama(*words, force=True), run, "out", "out-q8_0.gguf")


def test_force_replaces_no_file_but_an_export(run: Path) -> None:
    forced: Export = lambda *words: _gguf(*words, force=True)  # noqa: E731
    Path("notes.gguf").write_text("mine")
    refused(forced, run, "notes.gguf", "is not a GGUF file")
    _gguf(run, "model.gguf")
    before = Path("model.gguf").stat().st_ino
    forced(run, "model.gguf")
    assert Path("model.gguf").stat().st_ino != before
    # A model may be a GGUF file itself.
    refused(forced, Path("model.gguf"), "model.gguf", "contains the adapter or its base model")


@pytest.fixture
def adapter(run: Path, tmp_path: Path) -> Path:
    """The adapter's folder alone, which has no sums of its files."""
    ignored = shutil.ignore_patterns("manifest.json")
    return Path(shutil.copytree(run / "final", tmp_path / "adapter", ignore=ignored))


def _other_rank(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 5}))


def _change_tensors(adapter: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def _lost_tensor(adapter: Path) -> None:
    _change_tensors(adapter, lambda tensors: tensors.pop(min(tensors)))


def _torn(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(
    ("change", "words"),
    [(_other_rank, "of another shape"), (_lost_tensor, "missing"), (_torn, "cannot be read")],
)
def test_an_adapter_that_does_not_fit_its_base(
    name: str, change: Callable[[Path], None], words: str, adapter: Path
) -> None:
    """llama.cpp would take the scale of another rank, and vLLM find out when it starts."""
    change(adapter)
    export, output = EXPORTS[name]
    refused(export, adapter, output, words)


def test_a_part_of_a_process_of_the_same_number_is_removed(tmp_path: Path) -> None:
    """In a container the first process is number 1 each time."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    for number in (os.getpid(), ended.pid, os.getppid()):
        (tmp_path / f".out.{number}.part").mkdir()
    with part_folder(tmp_path / "out") as part:
        (part / "file").write_text("new")
        move_into_place(part, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [f".out.{os.getppid()}.part", "out"]


def test_an_error_removes_the_folders_that_were_made_for_it(tmp_path: Path) -> None:
    with pytest.raises(KeyError), part_folder(tmp_path / "a" / "b" / "out"):
        raise KeyError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("value", ["--quant bf16", "--adapter", "--threads 2", "--force"])
def test_an_option_names_the_formats_that_take_it(value: str) -> None:
    """The error of a format names all formats without an error, and no other."""
    option = value.split(maxsplit=1)[0]
    dest, setting = option.strip("-"), value.rsplit(maxsplit=1)[-1]
    refused, taken = {}, []
    for name in ("transformers", "gguf", "ollama", "vllm"):
        args = Namespace(to=name, quant=None, adapter=False, typed={dest: option})
        setattr(args, dest, setting)
        try:
            check_options(args)
            taken.append(name)
        except UsageError as error:
            refused[name] = error
    assert set(refused) >= {"transformers"}
    for error in refused.values():
        assert re.findall("gguf|ollama|vllm|transformers", error.what) == taken
