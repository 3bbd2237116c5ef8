"""A file with one flipped bit is named before it is read, by every command that opens what a run
has written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from errors import error_in, holds, refuses
from logged import logged_lines
from runs import make_run, peft_model
from tunesmith.checkpoint import manifest
from tunesmith.errors import EXIT_OK, EXIT_USAGE, ModelError
from warm import run_warm

pytestmark = pytest.mark.slow

WEIGHTS = "adapter_model.safetensors"


def flip(file: Path) -> None:
    """Flip a bit near the end, where a weight's low bits or a template's last words are: the file
    still loads.
    """
    data = bytearray(file.read_bytes())
    data[len(data) - 8] ^= 1
    file.write_bytes(data)


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs: `lora` and `full`."""
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "lora", tiny, peft_model(tiny))
    make_run(folder / "full", tiny, AutoModelForCausalLM.from_pretrained(tiny))
    return folder


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs, tmp_path / "runs"))


def chat(folder: Path) -> list[object]:
    return ["chat", folder / "lora" / "final", "--device", "cpu"]


def generate(folder: Path) -> list[object]:
    (folder / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    words = [
        "--input",
        folder / "prompts.jsonl",
        "--output",
        folder / "out.jsonl",
        "--max-new-tokens",
        2,
    ]
    return ["generate", folder / "lora", *words, "--device", "cpu"]


def evaluate(folder: Path) -> list[object]:
    return [
        "eval",
        folder / "lora",
        "--data",
        folder / "lora-rows.jsonl",
        "--device",
        "cpu",
        "--json",
    ]


def merge(folder: Path) -> list[object]:
    return ["merge", folder / "lora", "--output", folder / "merged", "--device", "cpu"]


def push(folder: Path) -> list[object]:
    """Of a run whose base is on the Hub; it is refused before anything is sent."""
    recipe = folder / "lora" / "config.yaml"
    name = json.loads((folder / "lora" / "final" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    recipe.write_text(recipe.read_text().replace(name, "someone/tiny"))
    return ["push", folder / "lora"]


def from_adapter(folder: Path) -> list[object]:
    recipe = folder / "lora" / "config.yaml"
    changes = [f"adapter.from={folder / 'lora' / 'final'}", f"output_dir={folder / 'next'}"]
    return ["train", recipe, *changes, "train.duration=1 steps", "log.tensorboard=false"]


VERBS: dict[str, Callable[[Path], list[object]]] = {
    "chat": chat, "generate": generate, "eval": evaluate, "merge": merge, "push": push, "adapter.from": from_adapter,
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_a_flipped_bit_of_the_weights(verb: str, copied: Path) -> None:
    words = VERBS[verb](copied)
    if verb not in ("chat", "push"):
        assert run_warm(words).returncode == EXIT_OK, "whole files are opened as before"
        for made in ("out.jsonl", "merged", "next"):
            path = copied / made
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    flip(copied / "lora" / "final" / WEIGHTS)
    done = run_warm(words)
    assert done.returncode == EXIT_USAGE, done.stderr
    assert holds(error_in(done.stderr).text(), WEIGHTS)
    assert f"where: {copied / 'lora' / 'final' / WEIGHTS}" in done.stderr
    assert "--fresh" in done.stderr
    assert not (copied / "merged").exists()


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_a_flipped_bit_of_a_whole_model(name: str, copied: Path) -> None:
    from tunesmith.inference.load_run import load_run

    load_run(copied / "full", device="cpu")
    flip(copied / "full" / "final" / name)
    with refuses(ModelError, names=[name]):
        load_run(copied / "full", device="cpu")


def test_a_base_that_an_earlier_run_wrote(copied: Path) -> None:
    base = copied / "full" / "final"
    words = [
        "train",
        copied / "lora" / "config.yaml",
        f"model.name={base}",
        f"output_dir={copied / 'next'}",
    ]
    flip(base / "model.safetensors")
    done = run_warm([*words, "train.duration=1 steps"])
    assert done.returncode == EXIT_USAGE, done.stderr
    assert holds(error_in(done.stderr).text(), "model.safetensors")
    assert not (copied / "next").exists()


def test_the_base_alone_needs_no_whole_adapter(copied: Path) -> None:
    """What is not read is not compared: neither the tuned weights nor the optimizer's state."""
    from tunesmith.inference.load_run import load_run

    flip(copied / "lora" / "final" / WEIGHTS)
    loaded = load_run(copied / "lora", device="cpu", base_only=True)
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    with refuses(ModelError, names=[WEIGHTS]):
        load_run(copied / "lora", device="cpu")


@pytest.mark.parametrize("text", [None, "{", "[]", '{"files": {"a": 1}}', '{"version": 3}'])
def test_a_folder_without_a_manifest_of_ours_is_opened(text: str | None, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x")
    if text is not None:
        (tmp_path / manifest.MANIFEST).write_text(text)
    manifest.check_sums(tmp_path)


def test_an_edited_folder_is_opened_without_its_manifest(copied: Path) -> None:
    """The way on that the message names."""
    from tunesmith.inference.load_run import load_run

    edited = Path(shutil.copytree(copied / "lora" / "final", copied / "edited"))
    flip(edited / WEIGHTS)
    with refuses(ModelError, names=[WEIGHTS]):
        load_run(edited, device="cpu")
    (edited / manifest.MANIFEST).unlink()
    load_run(edited, device="cpu")


def test_the_time_of_large_files_is_announced(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with logged_lines() as lines:
        manifest.check_sums(copied / "lora" / "final")
        assert lines == []
        monkeypatch.setattr(manifest, "ANNOUNCED_BYTES", 1000)
        manifest.check_sums(copied / "lora" / "final")
    assert len(lines) == 1
    assert "checksums" in lines[0]
