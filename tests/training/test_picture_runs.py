"""Whole runs of vision-language models on rows with pictures, from tokens to final/."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import signal
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText

from errors import error_in, holds, refuses
from invoke import invoke
from picture_runs import (
    FAMILIES,
    picture_recipe,
    picture_run,
    write_mixed,
    write_vision_model,
)
from tunesmith.answers.load_run import load_run
from tunesmith.batches.pixels import PixelTask, make_pixels
from tunesmith.config.load import load_recipe
from tunesmith.errors import DataError, RunError, StoppedError
from tunesmith.hub.model_files import read_model_files
from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.rows.compare.splits import read_splits
from tunesmith.rows.samples import pictures_of
from tunesmith.start.run import train
from tunesmith.tokens.token_set import TokenSet
from tunesmith.tokens.tokenize import tokenize
from tunesmith.training.result import Result
from tunesmith.training.trainer import Trainer

pytestmark = [pytest.mark.slow, pytest.mark.long]

ROWS = 18
# One family's projector is trained beside an adapter, and the other's in a model trained in full.
ADAPTER_AND_PROJECTOR, FULL_AND_PROJECTOR = FAMILIES
NIGHTLY = pytest.mark.nightly
QWEN_FIRST = pytest.mark.parametrize(
    "family", [FAMILIES[0], pytest.param(FAMILIES[1], marks=NIGHTLY)]
)
GEMMA_FIRST = pytest.mark.parametrize(
    "family", [FAMILIES[1], pytest.param(FAMILIES[0], marks=NIGHTLY)]
)


class Trained(NamedTuple):
    model: Path
    rows: Path
    held: Path
    result: Result
    trained_model: dict[str, bool]

    @property
    def folder(self) -> Path:
        return self.rows.parent

    @property
    def losses(self) -> list[float]:
        return [record.loss for record in self.result.records]

    def changed(self, out: str, **changes: Any) -> Any:
        changes = {"model": self.trained_model, "output_dir": str(self.folder / out), **changes}
        return picture_run(self.model, self.rows, **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    """The run of a family: LoRA on packed rows, of which one in three is a text alone."""

    @cache
    def of(family: str) -> Trained:
        folder = tmp_path_factory.mktemp(family)
        model = write_vision_model(folder / "model", family)
        rows, held = write_mixed(folder, ROWS), write_mixed(folder, 6, seed=1)
        trained_model = {"train_projector": family == ADAPTER_AND_PROJECTOR}
        run = picture_run(
            model,
            rows,
            model=trained_model,
            data={"validation": {"source": str(held), "format": "messages"}},
            validate={"every": "6 steps"},
        )
        return Trained(model, rows, held, train(run, quiet=True), trained_model)

    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_fall_and_do_not_depend_on_the_layout(family, trained):
    run = trained(family)
    assert run.losses[-1] < run.losses[0] - 0.3
    changes = {
        "data": {"pack": False},
        "train": {"duration": "3 steps", "micro_batch": "3 examples"},
    }
    other = train(run.changed("layout", **changes), quiet=True)
    for here, there in zip(other.records, run.result.records, strict=False):
        assert here.loss == pytest.approx(there.loss, rel=1e-5)
        assert here.grad_norm == pytest.approx(there.grad_norm, rel=1e-4)


def test_what_is_refused(trained, tiny, tmp_path):
    run = trained("qwen2_5_vl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(picture_recipe(run.model, run.rows)))
    for verb, words, named in (
        (["train"], [f"model.name={tiny}"], ["model.vision is true", "model.vision=false"]),
        (["train"], ["model.vision=false"], ["model.vision", "model.vision=true"]),
        (["plan", "--on", "1x2xh100"], ["parallel.tensor=2"], ["vision encoder"]),
    ):
        shown = invoke(*verb, recipe, *words, f"output_dir={tmp_path / 'out'}")
        error = error_in(shown.err)
        assert shown.code == 2
        assert holds(f"{error.what}\n{error.why}\n{error.fix}", *named), shown.err
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_stopped_goes_on_bit_for_bit(trained: Callable[[str], Trained]) -> None:
    run = trained("qwen2_5_vl")
    held = {"validation": {"source": str(run.held), "format": "messages"}}
    cut = run.changed("cut", data=held, validate={"every": "6 steps"})

    def stop(record: StepRecord) -> None:
        if record.step == 3:
            signal.raise_signal(signal.SIGINT)

    with refuses(StoppedError, names=["SIGINT"]):
        train(cut, quiet=True, on_record=stop)
    train(cut, quiet=True)
    here, there = (read_records(run.folder / name / "metrics.jsonl") for name in ("cut", "run"))
    figures = [[(r.step, r.loss, r.grad_norm, r.val_loss) for r in part] for part in (here, there)]
    assert figures[0] == figures[1]
    for file in (run.folder / "run" / "final").glob("*.safetensors"):
        assert (run.folder / "cut/final" / file.name).read_bytes() == file.read_bytes()


def test_a_picture_that_changes_is_refused(trained, tmp_path, monkeypatch):
    run = trained("qwen2_5_vl")
    shutil.copytree(run.folder / "pictures", tmp_path / "pictures")
    rows = Path(shutil.copy(run.rows, tmp_path))
    picture = tmp_path / "pictures/0-3-0.png"
    first = picture.read_bytes()
    start = picture_run(run.model, rows, model=run.trained_model, checkpoint={"every": "1 steps"})
    fit = Trainer.fit

    def changed(self: Trainer) -> Any:
        picture.write_bytes((tmp_path / "pictures/0-5-0.png").read_bytes())
        return fit(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", changed)
        with refuses(RunError, where=f"{rows}:4, picture 1", fix=["checkpoint.resume=force"]):
            train(start, quiet=True)
    with refuses(DataError, where=f"data.train: {rows}", names=["pictures"]):
        train(start, quiet=True)
    picture.write_bytes(first)
    assert train(start, quiet=True).records[-1].loss == run.losses[-1]


def held_tokens(run: Trained) -> TokenSet:
    loaded = load_run(run.folder / "run", device="cpu")
    assert loaded.run is not None
    _, rows = read_splits(loaded.run.data, 0)
    return tokenize(rows, loaded.run.data, loaded.template, cache=None, what="test")


@QWEN_FIRST
def test_a_run_is_scored_and_asked_by_the_command_line(family, trained, tmp_path):
    run = trained(family)
    folder = run.folder / "run"
    scores = json.loads(invoke("eval", folder, "--json").out)
    assert scores["tuned"]["loss"] == pytest.approx(run.result.records[-1].val_loss, rel=1e-6)
    few = ["--max-new-tokens", 6]
    answers = []
    for batch in (1, 6):
        out = tmp_path / f"{batch}.jsonl"
        words = ["--input", run.held, "--output", out, "--batch-size", batch]
        assert invoke("generate", folder, *words, *few).code == 0
        answers.append([json.loads(line)["output"] for line in out.read_text().splitlines()])
    # What shares a batch changes no answer.
    assert answers[0] == answers[1]


def loss_in_transformers(model: Any, run: Trained) -> float:
    """Of the held-out rows, one by one, by the public forward of the whole model."""
    tokens, total, count = held_tokens(run), 0.0, 0
    processor = read_model_files(run.model, picture_run(run.model, run.rows).model).pictures
    for i, example in enumerate(tokens):
        ids = torch.tensor(example.ids.tolist())[None]
        inputs: dict[str, Any] = {}
        row = pictures_of(tokens.parts[0].sample(i))
        if row:
            made = make_pixels(processor, PixelTask(row))
            inputs = {name: torch.from_numpy(array) for name, array in made.inputs.items()}
        is_picture = (ids == processor.token_id).long()
        inputs |= {"mm_token_type_ids": is_picture, "token_type_ids": is_picture}
        taken = inspect.signature(model.forward).parameters
        inputs = {name: value for name, value in inputs.items() if name in taken}
        with torch.no_grad():
            logits = model(input_ids=ids, **inputs).logits[0, :-1]
        wanted = torch.tensor(example.trained[1:].tolist())
        total += cross_entropy(logits[wanted], ids[0, 1:][wanted], reduction="sum").item()
        count += int(wanted.sum())
    return total / count


@GEMMA_FIRST
def test_transformers_and_peft_open_what_a_run_leaves(family, trained, tmp_path):
    from peft import PeftModel

    run = trained(family)
    final = run.folder / "run" / "final"
    expected = run.result.records[-1].val_loss
    base = AutoModelForImageTextToText.from_pretrained(run.model, dtype=torch.float32).eval()
    assert abs(loss_in_transformers(base, run) - expected) > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of keys that are missing
        warnings.simplefilter("ignore", FutureWarning)
        tuned = PeftModel.from_pretrained(base, final).eval()
    names = load_file(final / "adapter_model.safetensors").keys()
    own = (".lora_", ".modules_to_save.")
    found = {
        name.replace(".modules_to_save", "").replace(".default.", ".")
        for name in tuned.state_dict()
        if any(part in name for part in own)
    }
    assert found == set(names)
    assert any("merger" in name for name in names) == (family == ADAPTER_AND_PROJECTOR)
    assert loss_in_transformers(tuned.get_base_model(), run) == pytest.approx(expected, rel=1e-5)
    merged = tmp_path / "merged"
    assert invoke("merge", run.folder / "run", "--output", merged).code == 0
    model, info = AutoModelForImageTextToText.from_pretrained(
        merged, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    assert loss_in_transformers(model.eval(), run) == pytest.approx(expected, rel=1e-5)
    for folder in (final, merged):
        for name in ("preprocessor_config.json", "processor_config.json"):
            assert (folder / name).read_bytes() == (run.model / name).read_bytes()


@GEMMA_FIRST
def test_full_fine_tuning_leaves_the_tower_as_it_was(family, trained):
    run = trained(family)
    trains_projector = family == FULL_AND_PROJECTOR
    full = run.changed(
        "full",
        model={"train_projector": trains_projector},
        adapter={"kind": "none"},
        train={"duration": "2 steps", "learning_rate": 1e-3},
    )
    result = train(full, quiet=True)
    assert result.records[0].loss == pytest.approx(run.losses[0], rel=1e-5)
    final = run.folder / "full" / "final"
    before, after = (load_file(f / "model.safetensors") for f in (run.model, final))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = "visual|vision" if trains_projector else "visual|vision|projector"
    is_frozen = {name for name in before if re.search(frozen, name)}
    assert is_frozen
    assert changed == before.keys() - is_frozen
    _, info = AutoModelForImageTextToText.from_pretrained(final, output_loading_info=True)
    assert not any(info.values())


def test_a_run_without_a_recipe_finds_the_pictures(trained: Callable[[str], Trained]) -> None:
    run = trained("gemma3")
    out = run.folder / "by-rows"
    words = ["--model", run.model, "--data", run.rows, f"output_dir={out}", "log.samples=0"]
    assert invoke("train", *words, "train.duration=1 steps").code == 0
    assert load_recipe(out / "config.yaml").model.vision is True
    assert holds((out / "log.txt").read_text(), "12 pictures")
