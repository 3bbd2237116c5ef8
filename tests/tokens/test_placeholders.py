"""Pictures as tokens: placeholders by size, masks, cuts, the cache, refusals and costs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from chat_table import turns
from errors import refuses
from recipes import make_run
from tunesmith.batches import pixels
from tunesmith.batches.training_data import TrainingData
from tunesmith.config.schema import Data, Source
from tunesmith.errors import DataError, ModelError
from tunesmith.rows.pictures import picture_digest, scaled_size
from tunesmith.rows.samples import PICTURE_MARK, Conversation, Picture, pictures_of
from tunesmith.start.prepare import prepare_data
from tunesmith.tokens.text.placeholders import PictureProcessor
from tunesmith.tokens.text.select_template import select_template
from tunesmith.tokens.text.template import Template
from vision import FAMILIES, write_processor

# What Transformers' LLaVA templates do: lists of parts alone, pictures before all text.
LISTS_ONLY = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content | selectattr('type', 'equalto', 'image') %}<image>\n{% endfor %}"
    "{% for part in message.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}"
    "{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN = "qwen2_5_vl"
# One of each way to count: by size, fixed, with breaks between rows, and in parts.
COMMON = (QWEN, "gemma3", "mistral3", "idefics3")
BY_FAMILY = [
    pytest.param(family, marks=pytest.mark.slow if family in COMMON else pytest.mark.nightly)
    for family in FAMILIES
]
SIZE = (57, 43)


@pytest.fixture(autouse=True)
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial takes a process of its own."""
    monkeypatch.setattr("tunesmith.tokens.text.select_template.try_template", lambda *_: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each family's model, written when it is first asked for."""

    class Folders(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            self[family] = write_processor(tmp_path_factory.mktemp(family), family)
            return self[family]

    return Folders()


@pytest.fixture(scope="module")
def qwen(folders: dict[str, Path]) -> Path:
    return folders[QWEN]


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def load(folder: Path, max_pixels: int | None = None) -> PictureProcessor:
    config = AutoConfig.from_pretrained(folder)
    return PictureProcessor.load(folder, tokenizer_of(folder), config, max_pixels)


def template_of(folder: Path, jinja: str | None = None) -> Template:
    tokenizer = tokenizer_of(folder)
    if jinja is not None:
        tokenizer.chat_template = jinja
    data = Data(train=(Source(source="rows.jsonl", format="messages"),))
    return select_template(data, tokenizer, {tokenizer.eos_token_id}, load(folder))


def draw(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def picture(folder: Path, size: tuple[int, int] = SIZE, seed: int = 0) -> Picture:
    file = folder / f"{size[0]}x{size[1]}-{seed}.png"
    draw(size, seed).save(file)
    return Picture(file.name, path=file)


def conversation(*texts: str, pictures: tuple[Picture, ...] = ()) -> Conversation:
    """Turns of a user and an assistant; # stands for a picture."""
    marked = [text.replace("#", PICTURE_MARK) for text in texts]
    return Conversation(turns(*marked), pictures=pictures)


def learnt(template: Template, sample: Any, train_on: Any = "response") -> tuple[str, str]:
    """(all of the text, what of it is learnt)"""
    example = template.encode(sample, train_on, where="row 1")
    decode = template.tokenizer.decode
    return decode(example.ids), decode(example.ids[example.trained])


# --- processors


@pytest.mark.parametrize("family", BY_FAMILY)
def test_a_picture_has_a_placeholder_for_each_feature(
    family: str, folders: dict[str, Path]
) -> None:
    processor = load(folders[family])
    config = AutoConfig.from_pretrained(folders[family])
    model = AutoModelForImageTextToText.from_config(config).eval()
    for sizes in ((SIZE,), ((640, 480), (120, 101)), ((33, 200), (200, 33), (64, 64))):
        counts = [text.count(processor.token) for text in processor.expand(sizes)]
        made = processor.pixels([draw(size) for size in sizes])
        inputs = {name: torch.from_numpy(values) for name, values in made.inputs.items()}
        with torch.no_grad():
            found = model.get_image_features(**inputs).pooler_output
        parts = found if isinstance(found, list | tuple) else [found]
        width = config.text_config.hidden_size
        assert sum(counts) == sum(part.numel() for part in parts) // width, sizes
        if len(made.grids):
            assert made.grids.prod(1).tolist() == counts
    # The text of the pixels' own processor; sides of 1 too.
    draws = np.random.default_rng(5)
    for n in range(20):
        sizes = [tuple(map(int, draws.integers(1, 300, 2))) for _ in range(1 if n % 4 else 3)]
        sizes = [(w, h) for w, h in sizes if max(w, h) <= 50 * min(w, h)] or [(1, 1)]
        output = processor._process([draw(size) for size in sizes])
        replaced = [one["replacement"] for one in output["text_replacement_offsets"][0]]
        assert list(processor.expand(tuple(sizes))) == replaced, sizes


def test_a_processor_that_does_not_work_is_refused_by_name(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for n, (family, file, changes, name) in enumerate([
        (QWEN, "processor_config.json", {"processor_class": "NoSuchOne"}, "NoSuchOne"),
        ("idefics3", "processor_config.json", {"processor_class": "SmolVLMProcessor"}, "num2words"),
        ("gemma3", "preprocessor_config.json", {"do_pan_and_scan": True}, "do_pan_and_scan"),
        (QWEN, "config.json", {"image_token_id": 65}, "Qwen2_5_VLProcessor"),
    ]):  # fmt: skip
        folder = shutil.copytree(folders[family], tmp_path / str(n))
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, **changes}))
        with refuses(ModelError, names=[name]):
            load(folder)


# --- masks


def expanded(template: Template, image: str, sizes: list[tuple[int, int]], *texts: str) -> str:
    """The text of a conversation with what stands for its pictures typed in; `image` is what the
    template writes for one.
    """
    assert template.pictures is not None
    shown = iter(template.pictures.expand(tuple(sizes)))
    written = ""
    for n, text in enumerate(texts):
        pieces = text.split("#")
        for piece in pieces[1:]:
            pieces[0] += image.replace(template.pictures.placeholder, next(shown)) + piece
        written += f"<|im_start|>{'assistant' if n % 2 else 'user'}\n{pieces[0]}<|im_end|>\n"
    return written


PLACES = [
    ("What is it?#", "Blue."),
    ("What is\n#\nhere?", "Blue."),
    ("# #\nWhich one?", "The second."),
    ("One: #, two: #.", "Yes.", "And now?", "No.", " # this? ", "Three."),
]


@pytest.mark.parametrize("family", [QWEN, *BY_FAMILY[1:]])
def test_masks_are_those_of_typed_text(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    template = template_of(folders[family])
    assert template.pictures is not None
    sizes = [SIZE, (90, 120), (64, 64)]
    pictures = [picture(tmp_path, size) for size in sizes]
    for texts in PLACES:
        count = "".join(texts).count("#")
        sample = conversation(*texts, pictures=tuple(pictures[:count]))
        expected = expanded(template, FAMILIES[family].image, sizes[:count], *texts)
        supervised = "".join(f"{answer}<|im_end|>" for answer in texts[1::2])
        assert learnt(template, sample) == (expected, supervised)
        example = template.encode(sample, "response", where="row 1")
        typed_in = template.tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert example.ids.tolist() == typed_in
        # Generation begins with the same tokens.
        prompt = template.prompt(sample)
        last = example.trained.nonzero()[0][0] if len(texts) == 2 else len(prompt)
        assert prompt == example.ids[:last].tolist()
        # Trained as a whole, no token of a picture is.
        every = template.encode(sample, "all", where="row 1")
        is_picture = np.isin(every.ids, template.pictures.ids)
        assert every.trained.tolist() == [False, *~is_picture[1:]]


def test_a_template_may_read_lists_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    template = template_of(folders["llava_onevision"], jinja=LISTS_ONLY)
    assert template.pictures is not None
    sample = conversation("What is\n#\nhere?", "Blue.", pictures=(picture(tmp_path),))
    text, supervised = learnt(template, sample)
    [tokens] = template.pictures.expand((SIZE,))
    assert text.startswith(f"<|im_start|>user\n{tokens}\nWhat is\n\nhere?<|im_end|>")
    assert supervised == "Blue.<|im_end|>"


# --- refusals


@pytest.mark.parametrize("family", [QWEN, "gemma3"])
def test_a_spelled_token_is_refused(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    template = template_of(folders[family])
    assert template.pictures is not None
    seen = (picture(tmp_path),)
    for token in template.pictures.tokens:
        for sample in (
            conversation("#", f"Blue. {token}", pictures=seen),
            conversation(f"a {token} b", "Blue."),
        ):
            with refuses(DataError, where="row 1", names=[token]):
                template.encode(sample, "response", where="row 1")
    # Nor does a model without vision take pictures.
    template.pictures = None
    with refuses(DataError, where="row 1", fix=["model.vision"]):
        template.encode(conversation("#", "Blue.", pictures=seen), "response", where="row 1")


# --- rows of a file


def row(folder: Path, file: str = "57x43-0.png", answer: str = "Blue.") -> dict[str, Any]:
    parts = [{"type": "image", "image": str(folder / file)}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


TALK = {"messages": turns("Hi", "Ho")}


def prepared(
    folder: Path, tmp_path: Path, rows: list[dict[str, Any]], **changes: Any
) -> TrainingData:
    """The rows as `train` and `data` have them."""
    file = tmp_path / "pictures.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": {"source": str(file), "format": "messages"}, **changes}
    run = make_run(folder, tmp_path, held=False, model={"vision": True}, data=data)
    tokenizer = tokenizer_of(folder)
    pictures = load(folder, run.data.image_max_pixels)
    ends, cache = {tokenizer.eos_token_id}, tmp_path / "cache"
    return prepare_data(run, tokenizer, ends, 320, cache=cache, pictures=pictures)


def test_pictures_are_stored_and_tell_rows_apart(qwen: Path, tmp_path: Path) -> None:
    picture(tmp_path), picture(tmp_path, seed=1)
    files = [f"57x43-{n}.png" for n in (0, 1, 0)]
    data = prepared(qwen, tmp_path, [*(row(tmp_path, file) for file in files), TALK])
    digests = [picture_digest((tmp_path / name).read_bytes()) for name in files]
    assert [example.digests for example in data.train] == [*((each,) for each in digests), ()]
    part = data.train.parts[0]
    assert [one.path for one in pictures_of(part.sample(1))] == [tmp_path / files[1]]
    assert part.counts.pictures == 3
    # One question about two pictures is no repeat.
    assert data.train[0].ids.tolist() == data.train[1].ids.tolist()
    assert data.duplicates.count == 1


@pytest.mark.parametrize(
    ("bound", "ranks", "gpu", "workers"),
    # srun binds each rank to cores of its own, torchrun does not; few cores, with a GPU or without
    [(12, 8, True, 3), (96, 8, True, 3), (2, 1, True, 1), (2, 1, False, 0)],
)
def test_pictures_have_processes_by_the_cores_of_a_rank(
    bound: int, ranks: int, gpu: bool, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "available_cores", lambda: bound)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert pixels.default_workers() == workers


@pytest.mark.slow
def test_a_picture_that_was_changed_becomes_tokens_again(qwen: Path, tmp_path: Path) -> None:
    file = tmp_path / "57x43-0.png"
    picture(tmp_path)
    rows = [row(tmp_path)]
    first = prepared(qwen, tmp_path, rows)
    [entry] = (tmp_path / "cache").iterdir()
    written = (entry / "meta.json").stat().st_mtime_ns
    prepared(qwen, tmp_path, rows)
    assert (entry / "meta.json").stat().st_mtime_ns == written
    draw(SIZE, 1).save(file)
    os.utime(file, ns=(written + 10**9, written + 10**9))
    second = prepared(qwen, tmp_path, rows)
    assert second.train[0].digests != first.train[0].digests
    assert second.train[0].ids.tolist() == first.train[0].ids.tolist()
    assert second.digest != first.digest
    file.unlink()
    with refuses(DataError, names=[file.name]):
        prepared(qwen, tmp_path, rows)


@pytest.mark.slow
def test_the_limit_of_pixels_names_the_entry(qwen: Path, tmp_path: Path) -> None:
    picture(tmp_path, (112, 112))
    rows = [row(tmp_path, "112x112-0.png")]
    whole = prepared(qwen, tmp_path, rows)
    scaled = prepared(qwen, tmp_path, rows, image_max_pixels=5000)
    tokens = load(qwen, 5000).count_tokens(scaled_size((112, 112), 5000))
    assert scaled.train.parts[0].counts.placeholders == tokens
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert scaled.train.lengths[0] < whole.train.lengths[0]
    assert (whole.train.counts.scaled_pictures, scaled.train.counts.scaled_pictures) == (0, 1)


@pytest.mark.slow
def test_no_picture_is_cut(qwen: Path, tmp_path: Path) -> None:
    picture(tmp_path, (112, 112))
    rows = [row(tmp_path, "112x112-0.png", "Blue. " * 20), {"messages": turns("?", "A.")}]

    def kept(seq_len: int, **more: Any) -> TrainingData:
        return prepared(qwen, tmp_path, rows, seq_len=seq_len, allow_cut_answers=True, **more)

    whole = kept(512)
    ids = whole.train[0].ids
    assert whole.template.pictures is not None
    last = int(np.flatnonzero(ids == whole.template.pictures.token_id)[-1])
    answer = int(whole.train[0].trained.argmax())
    for seq_len, *expected in ((answer + 5, 2, 0, 0), (last + 1, 1, 0, 1), (last, 1, 1, 0)):
        counts = kept(seq_len).train.counts
        assert [counts.kept, counts.dropped, counts.emptied] == expected
    with refuses(DataError, names=[len(ids)]):
        kept(last, too_long="error")


@pytest.mark.slow
def test_a_bad_picture_is_found_before_training(folders: dict[str, Path], tmp_path: Path) -> None:
    file = picture(tmp_path).path
    assert file is not None
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "broken.png").write_bytes(data)
    unread = {**TALK, "img": "57x43-0.png"}
    marked = {"messages": turns("<image>What?", "Ho")}
    for bad in (row(tmp_path, "half\ud800.png"), row(tmp_path, "broken.png"), marked, unread):
        rows = [row(tmp_path), bad]
        with refuses(DataError) as refused:
            prepared(folders["gemma3"], tmp_path, rows)
        assert refused.value.where.startswith(f"{tmp_path}/pictures.jsonl:2")
        counts = prepared(folders["gemma3"], tmp_path, rows, bad_rows="skip").train.counts
        assert (counts.kept, counts.bad) == (1, 1)
