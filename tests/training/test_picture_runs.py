"""Whole runs of vision-language models on rows with pictures, from tokens to final/."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import os
import re
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor

from errors import error_in, holds, refuses
from figures import QUESTION
from picture_runs import (
    FAMILIES,
    picture_recipe,
    picture_run,
    write_mixed,
    write_vision_model,
)
from tunesmith.config.load import load_recipe
from tunesmith.data.batches import pixels
from tunesmith.data.batches.pixels import PixelReader, PixelTask, make_pixels
from tunesmith.data.compare.splits import read_splits
from tunesmith.data.rows.samples import Picture, pictures_of
from tunesmith.data.text.example import Example
from tunesmith.data.tokens.token_set import TokenSet
from tunesmith.data.tokens.tokenize import tokenize
from tunesmith.errors import DataError, MachineError, RunError, StoppedError
from tunesmith.hub.model_files import read_model_files
from tunesmith.inference import decoding
from tunesmith.inference.load_run import load_run
from tunesmith.metrics.record import StepRecord, read_records
from tunesmith.tools.evaluate import chat
from tunesmith.training.result import Result
from tunesmith.training.run import train
from tunesmith.training.trainer import Trainer
from waiting import wait_for
from warm import Warm

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
    """A finished run, and what it is made of."""

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
        """Another run on the same rows."""
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


@QWEN_FIRST
def test_the_loss_is_of_the_pictures(family: str, trained: Callable[[str], Trained]) -> None:
    """The same rows beside other pictures have another loss."""
    run = trained(family)
    folders = [run.folder / name for name in ("same", "others")]
    for folder in folders:
        shutil.copytree(run.folder / "pictures", folder / "pictures")
        shutil.copy(run.rows, folder)
    files = sorted((run.folder / "others/pictures").glob("0-*"))
    first = files[0].read_bytes()
    for here, there in pairwise(files):
        here.write_bytes(there.read_bytes())
    files[-1].write_bytes(first)
    # All files are there before the first of these rows become tokens.
    one = {"train": {"duration": "1 steps"}}
    same, others = (
        train(picture_run(run.model, folder / run.rows.name, **one), quiet=True).records[0].loss
        for folder in folders
    )
    assert same == run.losses[0]
    assert abs(others - same) > 1e-4


def type_command(*words: object) -> int:
    from tunesmith.cli.main import main

    return main([*map(str, words)])


def written_recipe(folder: Path, values: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values))
    return path


def bad_recipes(run: Trained, tiny: Path, folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Words of a command -> what its error names."""
    pairs, video = (folder / f"{name}.jsonl" for name in ("pairs", "video"))
    image = str(run.folder / "pictures/0-0-0.png")
    question = [{"role": "user", "content": "<image>What is it?"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in "ab")
    pair = {"prompt": question, "chosen": good, "rejected": bad, "images": [image]}
    pairs.write_text(json.dumps(pair))
    video.write_text(json.dumps({"messages": question + good, "video": "a.mp4"}))
    train = ["train", str(folder / "recipe.yaml"), f"output_dir={folder / 'out'}"]
    return {
        "pairs": (
            [*train, f"data.train.source={pairs}", "data.train.format=preference", "method=dpo"],
            ["images", "format preference"],
        ),
        "a text model": (
            [*train, f"model.name={tiny}"],
            ["model.vision is true", "model.vision=false"],
        ),
        "no vision": ([*train, "model.vision=false"], ["model.vision", "model.vision=true"]),
        "tensor": (
            ["plan", train[1], "parallel.tensor=2", "--on", "1x2xh100"],
            ["vision encoder", "parallel.tensor=1"],
        ),
        "a video": ([*train, f"data.train.source={video}"], ["video"]),
    }


def test_what_is_refused(trained, tiny, tmp_path, capsys):
    run = trained("qwen2_5_vl")
    written_recipe(tmp_path, picture_recipe(run.model, run.rows))
    for name, (words, named) in bad_recipes(run, tiny, tmp_path).items():
        assert type_command(*words) == 2, name
        shown = capsys.readouterr().err
        error = error_in(shown)
        assert holds(f"{error.what}\n{error.why}\n{error.fix}", *named), shown
    assert not (tmp_path / "out").exists()


def makers_of(run: Trained) -> tuple[Any, list[PixelTask]]:
    """The processor of a run's pictures, and a task for each row that has one."""
    recipe = picture_run(run.model, run.rows)
    processor = read_model_files(run.model, recipe.model).pictures
    tasks = []
    for n, line in enumerate(run.rows.read_text().splitlines(), 1):
        images = json.loads(line)["images"]
        if images:
            pictures = tuple(Picture("picture 1", path=run.folder / name) for name in images)
            tasks.append(PixelTask(pictures, where=f"{run.rows}:{n}"))
    return processor, tasks


def children() -> set[int]:
    """Processes that this one has started and not collected."""
    return {process.pid for process in psutil.Process().children()}


@NIGHTLY
def test_other_processes_make_the_same_pixels(trained: Callable[[str], Trained]) -> None:
    """Errors are those of the thread too; one that is killed is said; none is left behind."""
    processor, tasks = makers_of(trained("qwen2_5_vl"))
    expected = [make_pixels(processor, task) for task in tasks]
    before = children()
    reader = PixelReader(processor, workers=2)
    waits = [reader.submit(task) for task in tasks]
    for wait, pixels_here in zip(waits, expected, strict=True):
        made = wait()
        assert made.inputs.keys() == pixels_here.inputs.keys()
        assert (made.grids == pixels_here.grids).all()
        for name, array in pixels_here.inputs.items():
            assert made.inputs[name].dtype == array.dtype
            assert made.inputs[name].tobytes() == array.tobytes()
    with refuses(DataError, where=f"{tasks[1].where}, picture 1"):
        reader.submit(replace(tasks[1], digests=(1,)))()
    workers = children() - before
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    with refuses(MachineError, where=tasks[0].where, names=["SIGKILL"]):
        reader.submit(tasks[0])()
    del reader, waits
    assert children() == before


def lines_of(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def test_a_run_that_is_stopped_goes_on_bit_for_bit(trained: Callable[[str], Trained]) -> None:
    """A process that is killed: `test_resume.py`."""
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


def two_workers() -> None:
    """Before a command: it prepares pictures in two other processes, as on a larger machine."""
    pixels.available_cores = lambda: 2 * pixels.CORES_PER_WORKER  # type: ignore[assignment]


def workers_of(pid: int) -> set[int]:
    """The processes that prepare pictures for another."""
    found = set()
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.Error):
            if "tunesmith.data.workers" in child.cmdline():
                found.add(child.pid)
    return found


@NIGHTLY
def test_no_process_outlives_its_run(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    """One that is stopped: a killed run's processes read the end of their standard input."""
    run = trained("gemma3")
    values = picture_recipe(
        run.model, run.rows, train={"duration": "900 steps"}, output_dir=str(tmp_path / "run")
    )
    recipe = written_recipe(tmp_path, values)
    process = Warm(["train", recipe], prepare=two_workers)
    workers: set[int] = set()

    def has_workers() -> bool:
        workers.update(workers_of(process.pid))
        return len(workers) >= 2

    wait_for(has_workers, process)
    wait_for(lambda: lines_of(tmp_path / "run"), process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 75
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


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
    forced = Path(shutil.copytree(start.output_dir, tmp_path / "forced"))
    checkpoint = replace(start.checkpoint, resume="force")
    train(replace(start, output_dir=str(forced), checkpoint=checkpoint), quiet=True)
    # Another run takes it as it is now, and the first one goes on with the old one.
    few = {"duration": "1 steps"}
    train(picture_run(run.model, rows, train=few, output_dir=str(tmp_path / "new")), quiet=True)
    picture.write_bytes(first)
    assert train(start, quiet=True).records[-1].loss == run.losses[-1]


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids of each prompt that a command answers, as they reach the model."""
    seen: list[list[int]] = []
    answer = decoding.answer_batch

    def kept(model: Any, tokenizer: Any, prompts: Any, *words: Any, **options: Any) -> Any:
        seen.extend(map(list, prompts))
        return answer(model, tokenizer, prompts, *words, **options)

    monkeypatch.setattr(decoding, "answer_batch", kept)
    monkeypatch.setattr(chat, "answer_batch", kept)
    return seen


def tokens_of(run: Trained, split: str) -> TokenSet:
    """The rows of a split as training had them."""
    loaded = load_run(run.folder / "run", device="cpu")
    assert loaded.run is not None
    data = loaded.run.data
    train_rows, held_rows = read_splits(data, 0)
    rows = train_rows if split == "train" else held_rows
    return tokenize(rows, data, loaded.template, cache=None, what="test")


def held_tokens(run: Trained) -> TokenSet:
    return tokens_of(run, "validation")


def prompt_ids(example: Example) -> list[int]:
    """Up to the first supervised token."""
    return example.ids[: int(np.flatnonzero(example.trained)[0])].tolist()


@QWEN_FIRST
def test_a_run_is_scored_and_asked_by_the_command_line(
    family, trained, prompts, tmp_path, monkeypatch, capsys
):
    run = trained(family)
    expected = list(map(prompt_ids, held_tokens(run)))
    folder = run.folder / "run"
    assert type_command("eval", folder, "--json") == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["tuned"]["loss"] == pytest.approx(run.result.records[-1].val_loss, rel=1e-6)
    answers = {}
    for batch in (1, 6):
        out = tmp_path / f"{batch}.jsonl"
        words = ["--input", run.held, "--output", out, "--batch-size", batch]
        assert type_command("generate", folder, *words, "--max-new-tokens", "6") == 0
        assert sorted(prompts) == sorted(expected)
        prompts.clear()
        answers[batch] = [json.loads(line)["output"] for line in out.read_text().splitlines()]
    # What shares a batch changes no answer.
    assert answers[1] == answers[6]
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\nReally?\n"))
    picture = run.folder / "pictures/1-0-0.png"
    assert type_command("chat", folder, "--image", picture, "--max-new-tokens", "6") == 0
    assert prompts[0] == expected[0]
    assert prompts[1][: len(expected[0])] == expected[0]
    assert capsys.readouterr().out.splitlines()[0] == answers[1][0]


def loss_in_transformers(model: Any, run: Trained) -> float:
    """Of the held-out rows, one by one, by the public forward of the whole model."""
    tokens, total, count = held_tokens(run), 0.0, 0
    processor, _ = makers_of(run)
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
    assert type_command("merge", run.folder / "run", "--output", merged) == 0
    model, info = AutoModelForImageTextToText.from_pretrained(
        merged, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    assert loss_in_transformers(model.eval(), run) == pytest.approx(expected, rel=1e-5)
    for folder in (final, merged):
        for name in ("preprocessor_config.json", "processor_config.json"):
            assert (folder / name).read_bytes() == (run.model / name).read_bytes()
    if family == "gemma3":  # Transformers' way to the processors of others needs torchvision
        processor = AutoProcessor.from_pretrained(final)
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
        ]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        image = Image.open(run.folder / "pictures/1-0-0.png")
        made = processor(images=[[image]], text=[text])
        assert made["input_ids"][0] == prompt_ids(held_tokens(run)[0])


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
    assert type_command("train", *words, "train.duration=1 steps") == 0
    assert load_recipe(out / "config.yaml").model.vision is True
    assert holds((out / "log.txt").read_text(), "12 pictures")


@NIGHTLY
def test_rows_without_pictures_compile_no_further_graph(
    tmp_path, eager_compiler, varlen_on_cpu, monkeypatch
):
    """A graph that only such rows need would be compiled in mid-run, when the first comes."""
    graphs = torch._dynamo.utils.counters["stats"]
    model = write_vision_model(tmp_path / "gemma3", "gemma3")
    compiled = []
    step = Trainer.train_step

    def counted(self: Trainer, batch: Any) -> Any:
        output = step(self, batch)
        compiled.append((bool(batch.micro[0].pictures), graphs["unique_graphs"]))
        return output

    monkeypatch.setattr(Trainer, "train_step", counted)
    rows = write_mixed(tmp_path, 6, "PPTTPT")
    steps = {"duration": "3 steps", "global_batch": "2 examples", "compile": "on"}
    train(
        picture_run(
            model, rows, data={"shuffle": False}, train=steps, checkpoint={"every": None},
            output_dir=str(tmp_path / "run"),
        ),
        quiet=True,
    )  # fmt: skip
    (first, graphs_of_first), (second, graphs_of_second), _ = compiled
    assert (first, second) == (True, False)
    assert graphs_of_second == graphs_of_first > 0
