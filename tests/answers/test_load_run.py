"""What a path stands for, and that the prompt in use is the one that was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from errors import refuses
from runs import make_run, peft_model, write_checkpoint
from tunesmith.answers import load_run as load_run_module
from tunesmith.answers.load_run import load_run, locate_run, require_held_out
from tunesmith.build_model import build_model
from tunesmith.checkpoint import manifest
from tunesmith.cli.options import notify_weights
from tunesmith.errors import (
    EXIT_FAILED,
    EXIT_USAGE,
    CheckpointError,
    MachineError,
    TunesmithError,
    UsageError,
)
from tunesmith.host.chips import Chip
from tunesmith.planning import resolve
from tunesmith.rows.samples import Conversation
from tunesmith.runtime.device import host_budget
from tunesmith.tokens.text import builtin_templates


@pytest.fixture(scope="module")
def made(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    make_run(folder, tiny, peft_model(tiny))
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy of a run of LoRA on the tiny Llama."""
    shutil.copytree(made, tmp_path / "run")
    recipe = tmp_path / "run" / "config.yaml"
    recipe.write_text(recipe.read_text().replace(str(made), str(tmp_path / "run")))
    return tmp_path / "run"


def test_what_a_path_stands_for(run: Path, tiny: Path, tmp_path: Path) -> None:
    for path in (run, run / "final"):
        place = locate_run(path)
        assert (place.holds, place.folder, place.base.name) == ("adapter", run / "final", str(tiny))
        assert place.run is not None
        assert place.run.adapter.rank == 4
    place = locate_run(shutil.copytree(run / "final", tmp_path / "elsewhere"))
    assert (place.holds, place.base.name, place.base.dtype) == ("adapter", str(tiny), "fp32")
    assert place.run is None
    make_run(tmp_path / "full", tiny, AutoModelForCausalLM.from_pretrained(tiny))
    assert locate_run(tmp_path / "full").holds == "full"
    assert locate_run(tmp_path / "full", base_only=True).base.name == str(tiny)
    assert locate_run(tiny).holds == "base"


@pytest.mark.slow
def test_without_final_the_newest_whole_checkpoint_is_taken(
    run: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands that take it for the run say so: the run may be overtaken by itself."""
    notify_weights(locate_run(run))
    assert capsys.readouterr().err == ""
    shutil.rmtree(run / "final")
    for step in (9, 10, 100):
        write_checkpoint(run / f"checkpoint-{step}", tiny, peft_model(tiny), step)
    (run / "checkpoint-100" / "manifest.json").unlink()
    place = locate_run(run)
    assert place.folder == run / "checkpoint-10"
    assert "checkpoint-100" in place.note
    notify_weights(place)
    assert f"{run / 'checkpoint-10'}:" in capsys.readouterr().err.split()
    notify_weights(locate_run(run / "checkpoint-10"))
    assert capsys.readouterr().err == "", "it was named"
    (run / "final").mkdir()
    assert "final" in locate_run(run).note
    assert not locate_run(run).is_note_shown, "final/ is damaged"


@pytest.mark.parametrize("late", [True, False])
def test_a_checkpoint_deleted_while_it_is_read_is_told(
    run: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Late is before its tokenizer is read: that of the base would be taken, of another template."""
    (run / "final").rename(run / "checkpoint-3")

    def while_the_run_goes_on(*args: Any, **options: Any) -> Any:
        built = build_model(*args, **options) if late else None
        manifest.prune(run, 1, latest=0, keep_step=None)
        return built or build_model(*args, **options)

    monkeypatch.setattr("tunesmith.build_model.build_model", while_the_run_goes_on)
    with refuses(CheckpointError, where="checkpoint-3", names=["checkpoint.keep"]) as caught:
        load_run(run, device="cpu")
    assert str(run) in caught.value.fix
    assert "again" in caught.value.fix, "the run directory is what was given"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "dtype"),
    [
        (Chip("cpu", 64.0, bf16=True), torch.bfloat16),
        (Chip("cpu", 64.0, bf16=False), torch.float32),  # the CPU emulates bf16
        (Chip("cpu", 1e-6, bf16=False), torch.bfloat16),  # which is all that fits
    ],
)
def test_a_plain_model_is_computed_in_the_faster_dtype(
    chip: Chip, dtype: torch.dtype, tiny: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    folder = shutil.copytree(tiny, tmp_path / "plain")
    config = folder / "config.json"
    values = json.loads(config.read_text()) | {"dtype": "bfloat16"}
    config.write_text(json.dumps(values))
    monkeypatch.setattr(resolve, "chip_of", lambda device: chip)
    monkeypatch.setattr(load_run_module, "_check_memory", lambda files, place: None)
    assert load_run(folder, device="cpu").model.dtype == dtype
    assert load_run(folder, device="cpu", dtype="bf16").model.dtype == torch.bfloat16
    recipe = run / "config.yaml"
    recipe.write_text(recipe.read_text().replace("dtype: fp32", "dtype: bf16"))
    assert load_run(run, device="cpu").model.dtype == torch.bfloat16, "as it was trained"


# Files of a run that are written anew or deleted (None), and what is told of it
WITHOUT_MODEL: list[tuple[dict[str, str | None], str, int, str]] = [
    ({}, "missing", EXIT_USAGE, "missing"),
    ({"final/manifest.json": None}, "", EXIT_FAILED, "tunesmith train"),
    ({"final/adapter_model.safetensors": "torn"}, "", EXIT_FAILED, "adapter_model.safetensors"),
    ({"final/adapter_model.safetensors": "torn"}, "final", EXIT_FAILED, "incomplete"),
    ({"final/manifest.json": '{"step": 1'}, "", EXIT_FAILED, "manifest.json"),
    ({"config.yaml": "model: {nam: x}\n"}, "", EXIT_USAGE, "config.yaml:1"),
    ({"ad/x": ""}, "ad", EXIT_USAGE, "has no model"),
    ({"ad/notes.txt": ""}, "ad/notes.txt", EXIT_USAGE, ".txt"),
    ({}, "config.yaml", EXIT_USAGE, "config.yaml"),
    ({"ad/adapter_config.json": "{"}, "ad", EXIT_USAGE, "adapter_config.json:1"),
    ({"ad/adapter_config.json": '{"r": 4}'}, "ad", EXIT_USAGE, "base_model_name_or_path"),
]


@pytest.mark.parametrize(("files", "path", "code", "words"), WITHOUT_MODEL)
def test_paths_without_a_model_are_told(
    run: Path, files: dict[str, str | None], path: str, code: int, words: str
) -> None:
    for name, text in files.items():
        (run / name).parent.mkdir(exist_ok=True)
        if text is None:
            (run / name).unlink()
        else:
            (run / name).write_text(text)
    with pytest.raises(TunesmithError) as caught:
        locate_run(run / path)
    assert caught.value.exit_code == code
    assert words in caught.value.text()
    assert caught.value.fix


def test_a_name_that_is_neither_a_folder_nor_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could be an id on the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refuses(
        UsageError, where="someone/none", fix=["HF_HUB_OFFLINE=0 tunesmith fetch someone/none"]
    ):
        locate_run("someone/none")
    # The Hub may have it, so what it stands for is known once it is loaded; evaluate needs more.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    location = locate_run("someone/none")
    assert location.holds == "base"
    with refuses(UsageError, names=[location.note]):
        require_held_out(location, "someone/none")
    (tmp_path / "hub" / "models--someone--none").mkdir(parents=True)
    assert locate_run("someone/none").note != location.note


def test_opened_model_is_that_of_peft(run: Path, tiny: Path) -> None:
    """Logits to 1e-5, fp32; and the base by itself is Transformers'."""
    ids = torch.tensor([[5, 6, 7, 8, 200]])
    with torch.no_grad():
        expected = peft_model(tiny)(input_ids=ids).logits
        found = load_run(run, device="cpu").model(input_ids=ids).logits
        base = load_run(run, device="cpu", base_only=True).model(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(tiny)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(base, plain, atol=1e-5, rtol=0)
    assert (found - base).abs().max() > 0.01


def test_a_model_that_does_not_fit_into_memory_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = host_budget()._replace(ceiling=100_000)
    monkeypatch.setattr("tunesmith.runtime.device.host_budget", lambda: budget)
    with refuses(MachineError):
        load_run(run, device="cpu")


@pytest.mark.slow
def test_the_saved_template_is_the_one_in_use(run: Path) -> None:
    template = b"{% for m in messages %}[{{ m.content }}{{ eos_token }}{% endfor %}"
    (run / "final" / "chat_template.jinja").write_bytes(template)
    manifest.write_manifest(run / "final", 3, manifest.flush_files(run / "final"))
    opened = load_run(run, device="cpu")
    prompt = opened.template.prompt(Conversation([{"role": "user", "content": "hi"}]))
    assert opened.tokenizer.decode(prompt) == "[hi<|im_end|>"


@pytest.mark.slow
def test_alpaca_rows_meet_the_saved_alpaca_text_as_in_training(
    run: Path, tiny: Path, tmp_path: Path
) -> None:
    """Instruction and input apart, as trained; a plain chat template would get them as one message."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = builtin_templates.alpaca(bos=False)
    tokenizer.save_pretrained(run / "final")
    (run / "final" / "manifest.json").unlink()
    opened = load_run(shutil.copytree(run / "final", tmp_path / "adapter"), device="cpu")
    both = [{"role": "user", "content": "Add\n1 2"}, {"role": "assistant", "content": "3"}]
    prompt = opened.template.prompt(Conversation(both, instruction=("Add", "1 2", "3")))
    text = opened.tokenizer.decode(prompt)
    assert "### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n" in text
