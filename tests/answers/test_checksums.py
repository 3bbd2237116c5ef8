"""A file with one flipped bit is named before it is read, by every command that opens what a run wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from errors import check_shown, refuses
from invoke import invoke
from runs import make_run, peft_model
from tunesmith.answers.load_run import load_run
from tunesmith.checkpoint import manifest
from tunesmith.errors import EXIT_USAGE, ModelError

WEIGHTS = "adapter_model.safetensors"


def flip(file: Path) -> None:
    """Flip a bit near the end, where a weight's low bits are: the file still loads."""
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


COMMANDS = {
    "generate": "generate {}/lora --input {}/prompts.jsonl --output {}/made.jsonl --max-new-tokens 2 --device cpu",
    "eval": "eval {}/lora --data {}/lora-rows.jsonl --device cpu --json",
    "merge": "merge {}/lora --output {}/merged --device cpu",
    "adapter.from": "train {}/lora/config.yaml adapter.from={}/lora/final output_dir={}/next",
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", COMMANDS)
def test_a_flipped_bit_of_the_weights(verb: str, copied: Path) -> None:
    (copied / "prompts.jsonl").write_text('{"prompt": "hello"}\n')
    words = COMMANDS[verb].replace("{}", str(copied)).split()
    file = copied / "lora" / "final" / WEIGHTS
    flip(file)
    done = invoke(*words)
    assert done.code == EXIT_USAGE, done.err
    check_shown(done.err, where=str(file), names=[WEIGHTS])
    assert "--fresh" in done.err
    assert not (copied / "merged").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_flipped_bit_of_a_whole_model(name: str, copied: Path) -> None:
    flip(copied / "full" / "final" / name)
    with refuses(ModelError, names=[name]):
        load_run(copied / "full", device="cpu")


@pytest.mark.slow
def test_a_base_that_an_earlier_run_wrote(copied: Path, tiny: Path) -> None:
    base, recipe = copied / "full" / "final", copied / "lora" / "config.yaml"
    recipe.write_text(recipe.read_text().replace(str(tiny), str(base)))
    flip(base / "model.safetensors")
    with refuses(ModelError, names=["model.safetensors"]):
        load_run(copied / "lora", device="cpu")
    done = invoke("train", recipe, f"output_dir={copied / 'next'}")
    assert done.code == EXIT_USAGE, done.err
    check_shown(done.err, names=["model.safetensors"])
    assert not (copied / "next").exists()


@pytest.mark.slow
def test_the_base_alone_needs_no_whole_adapter(copied: Path) -> None:
    """What is not read is not compared; an edited folder is opened without its manifest."""
    final = copied / "lora" / "final"
    flip(final / WEIGHTS)
    loaded = load_run(copied / "lora", device="cpu", base_only=True)
    assert not any("lora" in name for name, _ in loaded.model.named_parameters())
    edited = Path(shutil.copytree(final, copied / "edited"))
    for folder in (copied / "lora", edited):
        with refuses(ModelError, names=[WEIGHTS]):
            load_run(folder, device="cpu")
    (edited / manifest.MANIFEST).unlink()
    load_run(edited, device="cpu")
