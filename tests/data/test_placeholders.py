"""Pictures as tokens: placeholders by size, masks, cuts, the cache, refusals and costs."""

from __future__ import annotations

import json
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from chat_table import turns
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from errors import holds, refuses
from recipes import make_run
from tunesmith.config.schema import Data, Source
from tunesmith.data.batches import pixels
from tunesmith.data.batches.layout import Layout
from tunesmith.data.batches.loader import Loader
from tunesmith.data.prepare import TrainingData, prepare_data
from tunesmith.data.rows.pictures import picture_digest, scaled_size
from tunesmith.data.rows.samples import PICTURE_MARK, Completion, Conversation, Picture, pictures_of
from tunesmith.data.text.example import Pixels
from tunesmith.data.text.placeholders import PictureProcessor
from tunesmith.data.text.select_template import select_template
from tunesmith.data.text.template import Template
from tunesmith.data.tokens.token_set import find_repeats
from tunesmith.data.workers import WorkerPool
from tunesmith.errors import DataError, MachineError, ModelError
from tunesmith.presentation.data import data_warnings, source_figures
from tunesmith.units import Size
from vision import FAMILIES, takes_pictures, write_processor

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
    monkeypatch.setattr("tunesmith.data.text.select_template.try_template", lambda *_: None)


class Folders(dict[str, Path]):
    """The folder of each family's model, written when it is first asked for."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self.factory = factory

    def __missing__(self, family: str) -> Path:
        self[family] = write_processor(self.factory.mktemp(family), family)
        return self[family]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory)


@pytest.fixture(scope="module")
def qwen(folders: dict[str, Path]) -> Path:
    return folders[QWEN]


def tokenizer_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def load(folder: Path, max_pixels: int | None = None) -> PictureProcessor:
    config = AutoConfig.from_pretrained(folder)
    return PictureProcessor.load(folder, tokenizer_of(folder), config, max_pixels)


def template_of(folder: Path, max_pixels: int | None = None, jinja: str | None = None) -> Template:
    tokenizer = tokenizer_of(folder)
    if jinja is not None:
        tokenizer.chat_template = jinja
    data = Data(train=(Source(source="rows.jsonl", format="messages"),))
    return select_template(data, tokenizer, {tokenizer.eos_token_id}, load(folder, max_pixels))


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
def test_a_picture_has_as_many_placeholders_as_the_model_makes_features(
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
        assert all(len(values) for values in made.inputs.values())


@pytest.mark.parametrize("family", BY_FAMILY)
def test_the_size_alone_gives_the_text_that_the_pixels_give(
    family: str, folders: dict[str, Path]
) -> None:
    processor = load(folders[family])
    draws = np.random.default_rng(5)
    for n in range(40):
        # Sides of 1 too; tests' smallest Pixtral takes no long ones.
        sizes = [tuple(map(int, draws.integers(1, 300, 2))) for _ in range(1 if n % 4 else 3)]
        sizes = [(w, h) for w, h in sizes if max(w, h) <= 50 * min(w, h)] or [(1, 1)]
        output = processor._process([draw(size) for size in sizes])
        replaced = [one["replacement"] for one in output["text_replacement_offsets"][0]]
        assert list(processor.expand(tuple(sizes))) == replaced, sizes
        ids = list(output["input_ids"][0])
        assert ids.count(processor.token_id) == sum(t.count(processor.token) for t in replaced)


@pytest.mark.slow
def test_a_processor_is_the_same_in_another_process(folders: dict[str, Path]) -> None:
    processor = load(folders[QWEN], 5000)
    again = pickle.loads(pickle.dumps(processor))
    assert (again.digest, again.max_pixels) == (processor.digest, 5000)
    assert again.expand(((300, 200),)) == processor.expand(((300, 200),))
    others = load(folders[QWEN], 5001), load(folders["glm4v"], 5000)
    assert len({processor.digest, *(other.digest for other in others)}) == 3


def test_a_processor_leaves_the_recipes_tokenizer_as_it_is(folders: dict[str, Path]) -> None:
    folder = folders["gemma4"]
    tokenizer = tokenizer_of(folder)
    before = tokenizer.backend_tokenizer.to_str()
    PictureProcessor.load(folder, tokenizer, AutoConfig.from_pretrained(folder), None)
    assert tokenizer.backend_tokenizer.to_str() == before


def changed(folder: Path, file: str, to: Path, **changes: Any) -> Path:
    """A copy of a folder with another setting in a file."""
    to.mkdir()
    for source in folder.iterdir():
        (to / source.name).write_bytes(source.read_bytes())
    values = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps({**values, **changes}))
    return to


PROCESSOR, IMAGES = "processor_config.json", "preprocessor_config.json"


@pytest.mark.parametrize(
    ("family", "file", "changes", "names"),
    [
        (QWEN, PROCESSOR, {"processor_class": "NoSuchOne"}, ["NoSuchOne"]),
        # No class of processors at all, whatever a file says.
        (QWEN, PROCESSOR, {"processor_class": "pipeline"}, ["pipeline"]),
        ("idefics3", PROCESSOR, {"processor_class": "SmolVLMProcessor"}, ["num2words"]),
        (QWEN, IMAGES, {"image_processor_type": "Llama4ImageProcessor"}, ["torchvision"]),
        ("gemma3", IMAGES, {"do_pan_and_scan": True}, ["do_pan_and_scan"]),
        (QWEN, "config.json", {"image_token_id": 65}, ["Qwen2_5_VLProcessor"]),
    ],
)
def test_a_processor_that_does_not_work_is_refused_by_name(
    family: str, file: str, changes: Any, names: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(folders[family], file, tmp_path / "model", **changes)
    where = str(folder / file if "do_pan_and_scan" in changes else folder)
    with refuses(ModelError, where=where, names=names):
        load(folder)


def test_an_older_transformers_is_refused_with_the_command_that_updates_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on the lowest version that is supported, where all other tests of pictures skip."""
    if takes_pictures():
        monkeypatch.setattr(transformers, "__version__", "5.17.0")
    nothing: Any = None
    fix = ["pip install 'transformers>=5.18,<6'", "model.vision=false"]
    with refuses(MachineError, where="model.vision", names=["Transformers 5.18"], fix=fix) as error:
        PictureProcessor.load(tmp_path, nothing, nothing, None)
    assert transformers.__version__ in error.value.why


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
    ("#What is it?", "Blue."),
    ("What is it?#", "Blue."),
    ("What is\n#\nhere?", "Blue."),
    ("#", "Blue."),
    ("# #\nWhich one?", "The second."),
    ("One: #, two: #.", "Yes.", "And now?", "No.", " # this? ", "Three."),
]


@pytest.mark.parametrize("family", [QWEN, *BY_FAMILY[1:]])
def test_masks_are_those_of_the_text_with_its_placeholders_typed_in(
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
        paths = [one.path for one in pictures[:count] if one.path]
        assert example.digests == tuple(picture_digest(path.read_bytes()) for path in paths)
        assert example.scaled == 0
        # Generation begins with the same tokens.
        prompt = template.prompt(sample)
        last = example.trained.nonzero()[0][0] if len(texts) == 2 else len(prompt)
        assert prompt == example.ids[:last].tolist()
        # Trained as a whole, no token of a picture is.
        every = template.encode(sample, "all", where="row 1")
        is_picture = np.isin(every.ids, template.pictures.ids)
        assert every.trained.tolist() == [False, *~is_picture[1:]]


def test_answers_are_the_same_beside_pictures(qwen: Path, tmp_path: Path) -> None:
    template = template_of(qwen)
    pictures = (picture(tmp_path), picture(tmp_path, (64, 64)))
    sample = conversation("#What?", "Blue.", "#And?", "Red.", pictures=pictures)
    assert template.answer(sample) == "Red."
    assert template.first_answer(sample, "response") == "Blue."
    assert learnt(template, sample, "last")[1] == "Red.<|im_end|>"
    left_out = replace(sample, untrained=frozenset({1}))
    assert learnt(template, left_out)[1] == "Red.<|im_end|>"
    # A mark without pictures is a text.
    text, supervised = learnt(template, conversation("a # b", "# c"))
    assert f"a {PICTURE_MARK} b<|im_end|>" in text
    assert supervised == f"{PICTURE_MARK} c<|im_end|>"


def test_a_template_may_read_lists_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    template = template_of(folders["llava_onevision"], jinja=LISTS_ONLY)
    assert template.pictures is not None
    sample = conversation("What is\n#\nhere?", "Blue.", pictures=(picture(tmp_path),))
    text, supervised = learnt(template, sample)
    [tokens] = template.pictures.expand((SIZE,))
    assert text.startswith(f"<|im_start|>user\n{tokens}\nWhat is\n\nhere?<|im_end|>")
    assert supervised == "Blue.<|im_end|>"
    assert learnt(template, conversation("So?", "Yes."))[1] == "Yes.<|im_end|>"


@pytest.mark.slow
def test_line_breaks_are_no_tokens_of_pictures(tmp_path: Path) -> None:
    """Gemma 3 has tokens of line breaks among the added ones, and writes some around a picture."""
    folder = write_processor(tmp_path / "model", "gemma3")
    tokenizer = tokenizer_of(folder)
    tokenizer.add_tokens(["\n", "\n\n"])
    tokenizer.save_pretrained(folder)
    template = template_of(folder)
    assert template.pictures is not None
    assert not any(token.isspace() for token in template.pictures.tokens)
    seen = (picture(tmp_path),)
    for sample in (conversation("a\n\nb", "c\nd"), conversation("a\n\n#", "c\n", pictures=seen)):
        assert learnt(template, sample)[1].startswith("c\n")


# --- refusals


def check_refused(template: Template, sample: Any, where: str = "row 1", **keys: Any) -> None:
    with refuses(DataError, where=where, **keys):
        template.encode(sample, "response", where="row 1")


@pytest.mark.parametrize("family", [QWEN, "gemma3"])
def test_a_row_that_spells_a_token_of_pictures_is_refused(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    template = template_of(folders[family])
    assert template.pictures is not None
    seen = (picture(tmp_path),)
    for token in template.pictures.tokens:
        for sample in (
            conversation(f"# {token}", "Blue.", pictures=seen),
            conversation("#", f"Blue. {token}", pictures=seen),
            conversation(f"a {token} b", "Blue."),
        ):
            check_refused(template, sample, names=[token])
    # No text but a conversation's is searched: its tokens are counted.
    token, ends = template.pictures.token, template.end_ids
    raw = Template(template.tokenizer, ends, jinja=None, name="raw", pictures=template.pictures)
    check_refused(raw, Completion(f"a {token} b", "c"), names=[token])


@pytest.mark.slow
def test_pictures_that_cannot_become_tokens_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    sample = conversation("What?#", "Blue.", pictures=(picture(tmp_path),))
    template = template_of(folders[QWEN])
    template.pictures = None
    check_refused(template, sample, fix=["model.vision"])
    jinja = tokenizer_of(folders[QWEN]).chat_template
    jinja = jinja.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
    check_refused(template_of(folders[QWEN], jinja=jinja), sample, names=["<|image_pad|>", 0, 1])
    # The tests' Pixtral has at most 112 pixels a side: 1 of 200 is scaled to none.
    template = template_of(folders["mistral3"])
    sample = conversation("#", "Blue.", pictures=(picture(tmp_path, (200, 1)),))
    check_refused(template, sample, names=["200 x 1"])
    missing = conversation("#", "Blue.", pictures=(Picture("1", path=tmp_path / "none.png"),))
    check_refused(template, missing, "row 1, 1", names=["none.png"])


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


def test_pictures_are_stored_and_read_again(qwen: Path, tmp_path: Path) -> None:
    files = ("57x43-0.png", "87x43-1.png")
    picture(tmp_path), picture(tmp_path, (87, 43), 1)
    tokens = prepared(
        qwen, tmp_path, [row(tmp_path, files[0]), TALK, row(tmp_path, files[1])]
    ).train
    digests = [picture_digest((tmp_path / name).read_bytes()) for name in files]
    assert [example.digests for example in tokens] == [(digests[0],), (), (digests[1],)]
    assert [example.digests for example in tokens.first(1)] == [(digests[0],)]
    part = tokens.parts[0]
    assert part.arrays.part(1, 3).example(1).digests == (digests[1],)
    assert [one.path for one in pictures_of(part.sample(2))] == [tmp_path / files[1]]
    assert pictures_of(part.sample(1)) == ()
    assert part.counts.pictures == 2
    # A reader of pixels gets the rows that have some.
    asked = []

    class Reader:
        def of(self, part: Any, at: int, digests: tuple[int, ...]) -> Any:
            asked.append((at, digests))
            return "pixels"

    tokens.pictures = Reader()
    assert [example.pictures for example in tokens.first(3)] == ["pixels", None, "pixels"]
    assert asked == [(0, (digests[0],)), (2, (digests[1],))]


@pytest.mark.slow
def test_the_rows_of_a_step_are_read_in_the_order_of_their_file(qwen: Path, tmp_path: Path) -> None:
    """Parquet is read on from the last row, and from its start for one before it."""
    for n in range(12):
        picture(tmp_path, seed=n)
    data = prepared(qwen, tmp_path, [row(tmp_path, f"57x43-{n}.png") for n in range(12)])
    begun: list[int] = []

    class Recorded:
        def __init__(self, at: int, pictures: Any) -> None:
            self.at, self.of, self.token_id = at, pictures, pictures.token_id

        def begin(self) -> None:
            begun.append(self.at)

        def pixels(self) -> Pixels:
            assert len(begun) in (8, 12)
            return self.of.pixels()

    reader: Any = data.train.pictures

    class Reader:
        def of(self, part: Any, at: int, digests: tuple[int, ...]) -> Any:
            return Recorded(at, reader.of(part, at, digests))

    data.train.pictures = Reader()
    loader = Loader(data.train, data.schedule, pad_id=0, micro_batch=Size.parse("2 examples"))
    batch = loader.batch(0)
    assert batch.indices != sorted(batch.indices)
    assert begun == sorted(batch.indices)
    begun.clear()
    [_] = Layout(0, packed=True).batches(data.train, 4096)
    assert begun == list(range(12))


@pytest.mark.parametrize(
    ("bound", "ranks", "gpu", "workers"),
    # srun binds each rank to cores of its own, torchrun does not; few cores, with a GPU or without
    [(12, 8, True, 3), (96, 8, True, 3), (2, 1, True, 1), (2, 1, False, 0), (96, 1, True, 8)],
)
def test_pictures_have_processes_by_the_cores_of_a_rank(
    bound: int, ranks: int, gpu: bool, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "available_cores", lambda: bound)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert pixels.default_workers() == workers


def test_held_out_rows_and_training_rows_share_processes(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = []

    class Slow(WorkerPool[Any, Any]):
        def __init__(self, *args: Any) -> None:
            time.sleep(0.1)
            pools.append(self)
            super().__init__(*args)

    monkeypatch.setattr(pixels, "WorkerPool", Slow)
    reader = pixels.PixelReader(load(qwen), workers=1)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(reader.submit, [pixels.PixelTask(())] * 2))
    pools[0].close()
    assert len(pools) == 1


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
    # Another file in its place may bring an older time along.
    draw(SIZE, 2).save(tmp_path / "new.png")
    os.utime(tmp_path / "new.png", ns=(1, 1))
    (tmp_path / "new.png").rename(file)
    assert prepared(qwen, tmp_path, rows).train[0].digests != second.train[0].digests
    file.unlink()
    with refuses(DataError, names=[file.name]):
        prepared(qwen, tmp_path, rows)


@pytest.mark.slow
def test_the_limit_of_pixels_names_the_entry_and_the_cost_is_told(
    qwen: Path, tmp_path: Path
) -> None:
    picture(tmp_path, (112, 112))
    rows = [row(tmp_path, "112x112-0.png")]
    whole = prepared(qwen, tmp_path, rows)
    scaled = prepared(qwen, tmp_path, rows, image_max_pixels=5000)
    tokens = load(qwen, 5000).count_tokens(scaled_size((112, 112), 5000))
    assert scaled.train.parts[0].counts.placeholders == tokens
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert scaled.train.lengths[0] < whole.train.lengths[0]
    assert (whole.train.counts.scaled_pictures, scaled.train.counts.scaled_pictures) == (0, 1)
    figures = source_figures(scaled, scaled.train.parts[0])
    assert any(holds(figure, 1, "data.image_max_pixels", 5000) for figure in figures)
    [part] = whole.train.parts
    assert (part.counts.pictures, part.counts.placeholders) == (1, 16)
    figures = source_figures(whole, part)
    assert any(holds(figure, 1, f"{16 / part.counts.tokens:.1%}") for figure in figures)
    assert any(holds(figure, 16, "picture") for figure in figures)


def test_one_question_about_two_pictures_is_no_repeat(qwen: Path, tmp_path: Path) -> None:
    picture(tmp_path), picture(tmp_path, seed=1)
    rows = [row(tmp_path, f"57x43-{n}.png", "It is blue.") for n in (0, 1, 0)]
    data = prepared(qwen, tmp_path, rows)
    assert data.train[0].ids.tolist() == data.train[1].ids.tolist()
    assert data.duplicates.count == 1
    assert find_repeats(data.train, chosen=True).count == 1


@pytest.mark.slow
def test_rows_whose_pictures_nothing_reads(folders: dict[str, Path], tmp_path: Path) -> None:
    picture(tmp_path)
    marked = json.loads(json.dumps(TALK).replace("Hi", "<image>What?"))
    for bad, found in ((marked, "<image>"), ({**TALK, "img": "57x43-0.png"}, "img")):
        with refuses(DataError, where=f"{tmp_path}/pictures.jsonl:2", names=[found]):
            prepared(folders["gemma3"], tmp_path, [row(tmp_path), bad])
    # A model that sees says that no row has a picture.
    for rows, is_told in (([TALK], True), ([TALK, row(tmp_path)], False)):
        lines = data_warnings(prepared(folders["gemma3"], tmp_path, rows))
        assert any("model.vision=false" in line for line in lines) == is_told


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
        assert counts.dropped_tokens == (len(ids) if expected[0] == 1 else 0)
    assert kept(answer + 5).train.counts.cut == 1
    assert kept(answer + 5, too_long="drop").train.counts.dropped == 1
    with refuses(DataError, names=[len(ids)]):
        kept(last, too_long="error")


@pytest.mark.parametrize("name", ["nul\0.png", "half\ud800.png", "broken.png"])
def test_a_picture_that_cannot_be_read_is_found_before_training(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    file = picture(tmp_path).path
    assert file is not None
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "broken.png").write_bytes(data)
    rows = [row(tmp_path), row(tmp_path, name)]
    with refuses(DataError, where=f"{tmp_path}/pictures.jsonl:2, picture 1"):
        prepared(folders["gemma3"], tmp_path, rows)
    counts = prepared(folders["gemma3"], tmp_path, rows, bad_rows="skip").train.counts
    assert (counts.kept, counts.bad) == (1, 1)
