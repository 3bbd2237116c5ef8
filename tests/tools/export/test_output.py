"""Where exports are written: each refuses a bad place before it writes, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tunesmith.errors import TunesmithError
from tunesmith.tools.export.gguf.export import export_adapter, export_gguf
from tunesmith.tools.export.merge import merge
from tunesmith.tools.export.output import move_into_place, part_folder
from tunesmith.tools.export.vllm_adapter import export_peft

Export = Callable[[Path, Any], Any]


def _gguf(run: Path, output: Any, **options: Any) -> Any:
    given = {"quant": "q8_0", "device": "cpu", "check": False, **options}
    return export_gguf(run, output, **given)


# Each with the name of what it writes.
EXPORTS: dict[str, tuple[Export, str]] = {
    "gguf": (_gguf, "out.gguf"),
    "gguf --adapter": (export_adapter, "out.gguf"),
    "ollama": (partial(_gguf, for_ollama=True), "out"),
    "vllm --adapter": (export_peft, "out"),
    "merge": (partial(merge, device="cpu"), "out"),
}


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
    # A recipe is neither a run nor a model.
    refused(export, run / "config.yaml", output, "config.yaml")


@pytest.mark.parametrize("name", ["ollama", "vllm --adapter", "merge"])
def test_folders_that_are_not_to_be_replaced(name, run, tmp_path, monkeypatch):
    export, _ = EXPORTS[name]
    for folder in ("empty", "mine"):
        Path(folder).mkdir()
    Path("mine/mine.txt").write_text("mine")
    monkeypatch.chdir("empty")
    for place in (".", "..", "", run / "final", run.parent):
        refused(export, run, place, "--output")
    refused(export, run, tmp_path / "mine", "mine")
    refused(export, run, tmp_path / "mine" / "mine.txt", "mine.txt")


@pytest.mark.slow
def test_files_that_are_not_to_be_replaced(run: Path) -> None:
    Path("old.gguf").write_bytes(b"GGUF")
    refused(_gguf, run, "model", ".gguf")
    refused(_gguf, run, "old.gguf", "--force")
    Path("link.gguf").symlink_to("elsewhere.gguf")
    Path("notes.gguf").write_text("mine")
    forced = partial(_gguf, force=True)
    refused(forced, run, "link.gguf", "link.gguf")
    refused(forced, run, "notes.gguf", "GGUF")
    before = Path("old.gguf").stat().st_ino
    forced(run, "old.gguf")
    assert Path("old.gguf").stat().st_ino != before


@pytest.mark.slow
def test_force_for_ollama_deletes_nothing_of_others(run: Path) -> None:
    forced = partial(_gguf, for_ollama=True, force=True)
    forced(run, "new/out")
    Path("new/out/mine.txt").write_text("mine")
    refused(forced, run, "new/out", "mine.txt")
    Path("new/out/mine.txt").unlink()
    forced(run, "new/out")
    names = ["LICENSE", "Modelfile", "out-q8_0.gguf", "out-q8_0.gguf.json"]
    assert sorted(os.listdir("new/out")) == names
    Path("new/out/Modelfile").unlink()
    refused(forced, run, "new/out", "LICENSE")


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
    tensors = load_file(file)
    save_file({name: tensors[name] for name in sorted(tensors)[1:]}, file)


@pytest.mark.parametrize("name", ["gguf --adapter", "vllm --adapter", "merge"])
@pytest.mark.parametrize("change", [_other_rank, _lost_tensor])
def test_an_adapter_that_does_not_fit_its_base(name, change, run, tmp_path):
    """llama.cpp would take the scale of another rank, and vLLM find out when it starts."""
    # The adapter's folder alone has no sums of its files.
    ignored = shutil.ignore_patterns("manifest.json")
    adapter = Path(shutil.copytree(run / "final", tmp_path / "adapter", ignore=ignored))
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
