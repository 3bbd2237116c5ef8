"""Pictures as tokens: placeholders by size, masks, refusals, cuts, the cache and what is told."""

from __future__ import annotations

import json
import os
import pickle
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from errors import holds, refuses
from recipes import make_run
from tunesmith.config.schema import Data, Source
from tunesmith.data.batches import pixels
from tunesmith.data.batches.layout import Layout
from tunesmith.data.batches.loader import Loader
from tunesmith.data.prepare import TrainingData, prepare_data
from tunesmith.data.rows.pictures import picture_digest, scaled_size
from tunesmith.data.rows.samples import (
    PICTURE_MARK,
    Completion,
    Conversation,
    Message,
    Picture,
    pictures_of,
)
from tunesmith.data.text.example import Pixels
from tunesmith.data.text.placeholders import PictureProcessor
from tunesmith.data.text.select_template import select_template
from tunesmith.data.text.template import Template
from tunesmith.data.tokens.token_set import SourceTokens, find_repeats
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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_processor(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def load(folder: Path, max_pixels: int | None = None) -> PictureProcessor:
    from transformers import AutoConfig

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
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def picture(folder: Path, size: tuple[int, int], seed: int = 0) -> Picture:
    file = folder / f"{size[0]}x{size[1]}-{seed}.png"
    draw(size, seed).save(file)
    return Picture(file.name, path=file)


def conversation(*turns: str, pictures: tuple[Picture, ...] = ()) -> Conversation:
    """Turns of a user and an assistant; # stands for a picture."""
    messages: list[Message] = []
    for n, text in enumerate(turns):
        role = "assistant" if n % 2 else "user"
        messages.append({"role": role, "content": text.replace("#", PICTURE_MARK)})
    return Conversation(messages, pictures=pictures)


def learnt(template: Template, sample: Any, train_on: Any = "response") -> tuple[str, str]:
    """(all of the text, what of it is learnt)"""
    example = template.encode(sample, train_on, where="row 1")
    decode = template.tokenizer.decode
    return decode(example.ids), decode(example.ids[example.trained])


# --- tokens of a picture


def features(model: Any, pixels: Pixels) -> int:
    """How many the vision part makes of the pictures of a row."""
    import torch

    inputs = {name: torch.from_numpy(values) for name, values in pixels.inputs.items()}
    with torch.no_grad():
        made = model.get_image_features(**inputs).pooler_output
    parts = made if isinstance(made, list | tuple) else [made]
    return sum(part.numel() for part in parts) // model.config.text_config.hidden_size


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_has_as_many_placeholders_as_the_model_makes_features(
    family: str, folders: dict[str, Path]
) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    processor = load(folders[family])
    config = AutoConfig.from_pretrained(folders[family])
    model = AutoModelForImageTextToText.from_config(config).eval()
    rows = [((57, 43),), ((640, 480), (120, 101)), ((33, 200), (200, 33), (64, 64)), ((500, 99),)]
    for sizes in rows:
        texts = processor.expand(sizes)
        tokens = sum(text.count(processor.token) for text in texts)
        pixels = processor.pixels([draw(size) for size in sizes])
        assert tokens == features(model, pixels), (family, sizes)
        if len(pixels.grids):
            counts = [text.count(processor.token) for text in texts]
            assert pixels.grids.prod(1).tolist() == counts
        assert all(len(values) for values in pixels.inputs.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_size_alone_gives_the_text_that_the_pixels_give(
    family: str, folders: dict[str, Path]
) -> None:
    processor = load(folders[family])
    draws = np.random.default_rng(5)
    for n in range(200):
        # Sides of 1 too; tests' smallest Pixtral takes no long ones.
        count = 1 if n % 4 else 3
        sizes = [tuple(map(int, draws.integers(1, 300, 2))) for _ in range(count)]
        sizes = [(w, h) for w, h in sizes if max(w, h) <= 50 * min(w, h)] or [(1, 1)]
        output = processor._process([draw(size) for size in sizes])
        replaced = [one["replacement"] for one in output["text_replacement_offsets"][0]]
        assert list(processor.expand(tuple(sizes))) == replaced, sizes
        ids = list(output["input_ids"][0])
        assert ids.count(processor.token_id) == sum(t.count(processor.token) for t in replaced)


def test_a_processor_is_the_same_in_another_process(folders: dict[str, Path]) -> None:
    processor = load(folders["qwen2_5_vl"], 5000)
    again = pickle.loads(pickle.dumps(processor))
    assert again.digest == processor.digest
    assert again.expand(((300, 200),)) == processor.expand(((300, 200),))
    assert again.max_pixels == 5000
    assert load(folders["qwen2_5_vl"], 5001).digest != processor.digest
    assert load(folders["glm4v"], 5000).digest != processor.digest


def test_a_processor_leaves_the_recipes_tokenizer_as_it_is(folders: dict[str, Path]) -> None:
    from transformers import AutoConfig

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


def test_processors_that_do_not_work_are_refused_by_name(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    qwen = folders["qwen2_5_vl"]
    name = "processor_config.json"
    unknown = changed(qwen, name, tmp_path / "unknown", processor_class="NoSuchProcessor")
    with refuses(ModelError, where=str(unknown), names=["NoSuchProcessor"], fix=["model.vision"]):
        load(unknown)
    # No class of processors at all, whatever a file says.
    other = changed(qwen, name, tmp_path / "other", processor_class="pipeline")
    with refuses(ModelError, where=str(other), names=["pipeline"]):
        load(other)
    smol = changed(folders["idefics3"], name, tmp_path / "smol", processor_class="SmolVLMProcessor")
    with refuses(ModelError, where=str(smol), names=["SmolVLMProcessor", "num2words"]):
        load(smol)
    file = "preprocessor_config.json"
    llama = changed(qwen, file, tmp_path / "l", image_processor_type="Llama4ImageProcessor")
    with refuses(ModelError, where=str(llama), names=["Qwen2_5_VLProcessor", "torchvision"]):
        load(llama)
    crops = changed(folders["gemma3"], file, tmp_path / "crops", do_pan_and_scan=True)
    with refuses(ModelError, where=str(crops / file), names=["do_pan_and_scan"]):
        load(crops)
    torn = changed(qwen, file, tmp_path / "torn")
    (torn / file).write_text("{")
    with refuses(ModelError, where=str(torn)):
        load(torn)
    none = changed(qwen, file, tmp_path / "none")
    (none / file).unlink()
    with refuses(ModelError, where=str(none)):
        load(none)
    wrong = changed(qwen, "config.json", tmp_path / "wrong", image_token_id=65)
    with refuses(ModelError, where=str(wrong), names=["Qwen2_5_VLProcessor"]):
        load(wrong)


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


def expanded(template: Template, image: str, sizes: list[tuple[int, int]], *turns: str) -> str:
    """The text of a conversation with what stands for its pictures typed in; `image` is what the
    template writes for one.
    """
    assert template.pictures is not None
    texts = iter(template.pictures.expand(tuple(sizes)))
    written = ""
    for n, turn in enumerate(turns):
        pieces = turn.split("#")
        for piece in pieces[1:]:
            pieces[0] += image.replace(template.pictures.placeholder, next(texts)) + piece
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


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_the_text_with_its_placeholders_typed_in(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    template = template_of(folders[family])
    assert template.pictures is not None
    sizes = [(57, 43), (90, 120), (64, 64)]
    pictures = [picture(tmp_path, size) for size in sizes]
    for turns in PLACES:
        count = "".join(turns).count("#")
        sample = conversation(*turns, pictures=tuple(pictures[:count]))
        text, supervised = learnt(template, sample)
        expected = expanded(template, FAMILIES[family].image, sizes[:count], *turns)
        assert text == expected
        assert supervised == "".join(f"{answer}<|im_end|>" for answer in turns[1::2])
        example = template.encode(sample, "response", where="row 1")
        typed_in = template.tokenizer(expected, add_special_tokens=False)["input_ids"]
        assert example.ids.tolist() == typed_in
        paths = [one.path for one in pictures[:count] if one.path]
        assert example.digests == tuple(picture_digest(path.read_bytes()) for path in paths)
        assert example.scaled == 0
        # Generation begins with the same tokens.
        prompt = template.prompt(sample)
        last = example.trained.nonzero()[0][0] if len(turns) == 2 else len(prompt)
        assert prompt == example.ids[:last].tolist()
        # Trained as a whole, no token of a picture is.
        every = template.encode(sample, "all", where="row 1")
        is_picture = np.isin(every.ids, template.pictures.ids)
        assert not every.trained[is_picture].any()
        assert every.trained[1:].sum() == (~is_picture[1:]).sum()


def test_answers_are_the_same_beside_pictures(folders: dict[str, Path], tmp_path: Path) -> None:
    template = template_of(folders["qwen2_5_vl"])
    pictures = (picture(tmp_path, (57, 43)), picture(tmp_path, (64, 64)))
    sample = conversation("#What?", "Blue.", "#And?", "Red.", pictures=pictures)
    assert template.answer(sample) == "Red.<|im_end|>"[: -len("<|im_end|>")]
    assert template.first_answer(sample, "response") == "Blue."
    assert learnt(template, sample, "last")[1] == "Red.<|im_end|>"
    left_out = replace(sample, untrained=frozenset({1}))
    assert learnt(template, left_out)[1] == "Red.<|im_end|>"


def test_a_mark_without_pictures_is_a_text(folders: dict[str, Path]) -> None:
    template = template_of(folders["qwen2_5_vl"])
    text, supervised = learnt(template, conversation("a # b", "# c"))
    assert f"a {PICTURE_MARK} b<|im_end|>" in text
    assert supervised == f"{PICTURE_MARK} c<|im_end|>"


def test_a_template_may_read_lists_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    template = template_of(folders["llava_onevision"], jinja=LISTS_ONLY)
    assert template.pictures is not None
    sample = conversation("What is\n#\nhere?", "Blue.", pictures=(picture(tmp_path, (57, 43)),))
    text, supervised = learnt(template, sample)
    [tokens] = template.pictures.expand(((57, 43),))
    assert text.startswith(f"<|im_start|>user\n{tokens}\nWhat is\n\nhere?<|im_end|>")
    assert supervised == "Blue.<|im_end|>"
    assert learnt(template, conversation("So?", "Yes."))[1] == "Yes.<|im_end|>"


def test_the_processors_template_serves_a_tokenizer_without_one(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(folders["qwen2_5_vl"], "config.json", tmp_path / "older")
    jinja = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": jinja.read_text()}))
    jinja.unlink()
    tokenizer = tokenizer_of(folder)
    assert tokenizer.chat_template is None
    assert template_of(folder).name == "chat"


def test_large_pictures_are_scaled_down_first(folders: dict[str, Path], tmp_path: Path) -> None:
    template = template_of(folders["qwen2_5_vl"], max_pixels=5000)
    assert template.pictures is not None
    sample = conversation("#?", "Blue.", pictures=(picture(tmp_path, (112, 112)),))
    example = template.encode(sample, "response", where="row 1")
    tokens = np.count_nonzero(example.ids == template.pictures.token_id)
    assert example.scaled == 1
    assert tokens == template.pictures.count_tokens(scaled_size((112, 112), 5000))
    assert tokens < load(folders["qwen2_5_vl"]).count_tokens((112, 112))


# --- refusals


def test_a_row_with_pictures_needs_a_model_that_sees(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    sample = conversation("#?", "Blue.", pictures=(picture(tmp_path, (57, 43)),))
    template = template_of(folders["qwen2_5_vl"])
    template.pictures = None
    with refuses(DataError, where="row 1", fix=["model.vision"]):
        template.encode(sample, "response", where="row 1")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_row_that_spells_a_token_of_pictures_is_refused(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    template = template_of(folders[family])
    assert template.pictures is not None
    seen = (picture(tmp_path, (57, 43)),)
    for token in template.pictures.tokens:
        for sample in (
            conversation(f"# {token}", "Blue.", pictures=seen),
            conversation("#", f"Blue. {token}", pictures=seen),
            conversation(f"a {token} b", "Blue."),
        ):
            with refuses(DataError, where="row 1", names=[token]):
                template.encode(sample, "response", where="row 1")
    # No text but a conversation's is searched: its tokens are counted.
    token = template.pictures.token
    raw = Template(
        template.tokenizer, template.end_ids, jinja=None, name="raw", pictures=template.pictures
    )
    with refuses(DataError, where="row 1", names=[token]):
        raw.encode(Completion(f"a {token} b", "c"), "response", where="row 1")


def test_line_breaks_are_no_tokens_of_pictures(tmp_path: Path) -> None:
    """Gemma 3 has tokens of line breaks among the added ones, and writes some around a picture."""
    folder = write_processor(tmp_path / "model", "gemma3")
    tokenizer = tokenizer_of(folder)
    tokenizer.add_tokens(["\n", "\n\n"])
    tokenizer.save_pretrained(folder)
    template = template_of(folder)
    assert template.pictures is not None
    assert not any(token.isspace() for token in template.pictures.tokens)
    seen = (picture(tmp_path, (57, 43)),)
    for sample in (conversation("a\n\nb", "c\nd"), conversation("a\n\n#", "c\n", pictures=seen)):
        _, answer = learnt(template, sample)
        assert answer.startswith("c\n")


def test_a_template_without_pictures_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    jinja = tokenizer_of(folders["qwen2_5_vl"]).chat_template
    jinja = jinja.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
    template = template_of(folders["qwen2_5_vl"], jinja=jinja)
    sample = conversation("What?#", "Blue.", pictures=(picture(tmp_path, (57, 43)),))
    with refuses(DataError, where="row 1", names=["<|image_pad|>", 0, 1]):
        template.encode(sample, "response", where="row 1")


def test_a_size_that_a_processor_refuses_is_an_error_of_the_row(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    # The tests' Pixtral has at most 112 pixels a side: 1 of 200 is scaled to none.
    template = template_of(folders["mistral3"])
    sample = conversation("#", "Blue.", pictures=(picture(tmp_path, (200, 1)),))
    with refuses(DataError, where="row 1", names=["200 x 1"]):
        template.encode(sample, "response", where="row 1")
    missing = conversation("#", "Blue.", pictures=(Picture("1", path=tmp_path / "none.png"),))
    with refuses(DataError, where="row 1, 1", names=["none.png"]):
        template.encode(missing, "response", where="row 1")


# --- rows of a file


def row(folder: Path, file: str, question: str, answer: str) -> dict[str, Any]:
    parts = [{"type": "image", "image": str(folder / file)}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def prepared(
    folder: Path, tmp_path: Path, rows: list[dict[str, Any]], **changes: Any
) -> TrainingData:
    """The rows as `train` and `data` have them."""
    file = tmp_path / "pictures.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": {"source": str(file), "format": "messages"}, **changes}
    run = make_run(folder, tmp_path, held=False, model={"vision": True}, data=data)
    tokenizer = tokenizer_of(folder)
    return prepare_data(
        run,
        tokenizer,
        {tokenizer.eos_token_id},
        320,
        cache=tmp_path / "cache",
        pictures=load(folder, run.data.image_max_pixels),
    )


def test_pictures_are_stored_and_read_again(folders: dict[str, Path], tmp_path: Path) -> None:
    for n in range(2):
        picture(tmp_path, (57 + 30 * n, 43), n)
    rows = [
        row(tmp_path, "57x43-0.png", "What?", "Blue."),
        {"messages": [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "Ja."}]},
        row(tmp_path, "87x43-1.png", "What?", "Red."),
    ]
    data = prepared(folders["qwen2_5_vl"], tmp_path, rows)
    tokens = data.train
    digests = [
        picture_digest((tmp_path / name).read_bytes()) for name in ("57x43-0.png", "87x43-1.png")
    ]
    assert [example.digests for example in tokens] == [(digests[0],), (), (digests[1],)]
    assert [example.digests for example in tokens.first(1)] == [(digests[0],)]
    part = tokens.parts[0]
    assert part.arrays.part(1, 3).example(1).digests == (digests[1],)
    assert [one.path for one in pictures_of(part.sample(2))] == [tmp_path / "87x43-1.png"]
    assert pictures_of(part.sample(1)) == ()
    assert part.counts.pictures == 2
    # A reader of pixels gets the rows that have some.
    asked = []

    class Reader:
        def of(self, part: SourceTokens, at: int, digests: tuple[int, ...]) -> Any:
            asked.append((at, digests))
            return "pixels"

    tokens.pictures = Reader()
    assert [example.pictures for example in tokens.first(3)] == ["pixels", None, "pixels"]
    assert asked == [(0, (digests[0],)), (2, (digests[1],))]


def test_the_rows_of_a_step_are_read_in_the_order_of_their_file(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Parquet is read on from the last row, and from its start for one before it."""
    for n in range(12):
        picture(tmp_path, (57, 43), n)
    rows = [row(tmp_path, f"57x43-{n}.png", "What?", "Blue.") for n in range(12)]
    data = prepared(folders["qwen2_5_vl"], tmp_path, rows)
    begun: list[int] = []

    class Recorded:
        def __init__(self, at: int, pictures: Any) -> None:
            self.at, self.of, self.token_id = at, pictures, pictures.token_id

        def begin(self) -> None:
            begun.append(self.at)

        def pixels(self) -> Pixels:
            assert len(begun) in (8, 12)
            return self.of.pixels()

    reader = data.train.pictures

    class Source:
        def of(self, part: SourceTokens, at: int, digests: tuple[int, ...]) -> Any:
            assert reader is not None
            return Recorded(at, reader.of(part, at, digests))

    data.train.pictures = Source()
    loader = Loader(data.train, data.schedule, pad_id=0, micro_batch=Size.parse("2 examples"))
    batch = loader.batch(0)
    assert batch.indices != sorted(batch.indices)
    assert begun == sorted(batch.indices)
    begun.clear()
    [_] = Layout(0, packed=True).batches(data.train, 4096)
    assert begun == list(range(12))


@pytest.mark.parametrize(
    ("bound", "ranks", "gpu", "workers"),
    [
        pytest.param(12, 8, True, 3, id="srun binds each rank to cores of its own"),
        pytest.param(96, 8, True, 3, id="torchrun"),
        pytest.param(2, 1, True, 1, id="few cores with a GPU"),
        pytest.param(2, 1, False, 0, id="few cores that compute"),
        pytest.param(96, 1, True, 8, id="many cores"),
    ],
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
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = []

    class Slow(WorkerPool[Any, Any]):
        def __init__(self, *args: Any) -> None:
            time.sleep(0.1)
            pools.append(self)
            super().__init__(*args)

    monkeypatch.setattr(pixels, "WorkerPool", Slow)
    reader = pixels.PixelReader(load(folders["qwen2_5_vl"]), workers=1)
    waits: list[Any] = []
    threads = [
        threading.Thread(target=lambda: waits.append(reader.submit(pixels.PixelTask(()))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pools[0].close()
    assert len(pools) == 1


def test_a_picture_that_was_changed_becomes_tokens_again(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "57x43-0.png"
    picture(tmp_path, (57, 43))
    rows = [row(tmp_path, file.name, "What?", "Blue.")]
    first = prepared(folders["qwen2_5_vl"], tmp_path, rows)
    [entry] = (tmp_path / "cache").iterdir()
    written = (entry / "meta.json").stat().st_mtime_ns
    prepared(folders["qwen2_5_vl"], tmp_path, rows)
    assert (entry / "meta.json").stat().st_mtime_ns == written
    draw((57, 43), 1).save(file)
    os.utime(file, ns=(written + 10**9, written + 10**9))
    second = prepared(folders["qwen2_5_vl"], tmp_path, rows)
    assert second.train[0].digests != first.train[0].digests
    assert second.train[0].ids.tolist() == first.train[0].ids.tolist()
    assert second.digest != first.digest
    # Another file in its place may bring an older time along.
    draw((57, 43), 2).save(tmp_path / "new.png")
    os.utime(tmp_path / "new.png", ns=(1, 1))
    (tmp_path / "new.png").rename(file)
    third = prepared(folders["qwen2_5_vl"], tmp_path, rows)
    assert third.train[0].digests != second.train[0].digests
    file.unlink()
    with refuses(DataError, names=[file.name]):
        prepared(folders["qwen2_5_vl"], tmp_path, rows)


def test_what_makes_tokens_of_pictures_names_the_entry(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    picture(tmp_path, (112, 112))
    rows = [row(tmp_path, "112x112-0.png", "What?", "Blue.")]
    whole = prepared(folders["qwen2_5_vl"], tmp_path, rows)
    scaled = prepared(folders["qwen2_5_vl"], tmp_path, rows, image_max_pixels=5000)
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert scaled.train.lengths[0] < whole.train.lengths[0]
    assert (whole.train.counts.scaled_pictures, scaled.train.counts.scaled_pictures) == (0, 1)
    assert any(
        holds(figure, 1, "data.image_max_pixels", 5000)
        for figure in source_figures(scaled, scaled.train.parts[0])
    )


def test_one_question_about_two_pictures_is_no_repeat(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for n in range(2):
        picture(tmp_path, (57, 43), n)
    rows = [row(tmp_path, f"57x43-{n}.png", "What is it?", "It is blue.") for n in (0, 1, 0)]
    data = prepared(folders["qwen2_5_vl"], tmp_path, rows)
    assert data.train[0].ids.tolist() == data.train[1].ids.tolist()
    assert data.duplicates.count == 1
    assert find_repeats(data.train, chosen=True).count == 1


TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}


def test_a_model_that_sees_refuses_rows_whose_pictures_nothing_reads(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    picture(tmp_path, (57, 43))
    read = row(tmp_path, "57x43-0.png", "What?", "Blue.")
    marked = json.loads(json.dumps(TALK).replace("Hi", "<image>What?"))
    named = {**TALK, "img": "57x43-0.png"}
    for bad, found in ((marked, "<image>"), (named, "img")):
        with refuses(DataError, where=f"{tmp_path}/pictures.jsonl:2", names=[found]):
            prepared(folders["gemma3"], tmp_path, [read, bad])


def test_a_model_that_sees_says_that_no_row_has_a_picture(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    picture(tmp_path, (57, 43))
    read = row(tmp_path, "57x43-0.png", "What?", "Blue.")
    for rows, is_told in (([TALK], True), ([TALK, read], False)):
        lines = data_warnings(prepared(folders["gemma3"], tmp_path, rows))
        assert any("model.vision=false" in line for line in lines) == is_told


def test_no_picture_is_cut(folders: dict[str, Path], tmp_path: Path) -> None:
    picture(tmp_path, (112, 112))
    text_row = {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "A."}]
    }
    rows = [row(tmp_path, "112x112-0.png", "What?", "Blue. " * 20), text_row]

    def kept(seq_len: int, **more: Any) -> TrainingData:
        more = {"seq_len": seq_len, "allow_cut_answers": True, **more}
        return prepared(folders["qwen2_5_vl"], tmp_path, rows, **more)

    whole = kept(512)
    ids = whole.train[0].ids
    assert whole.template.pictures is not None
    last = int(np.flatnonzero(ids == whole.template.pictures.token_id)[-1])
    answer = int(whole.train[0].trained.argmax())
    for seq_len, expected in {
        answer + 5: (2, 0, 0),
        last + 1: (1, 0, 1),
        last: (1, 1, 0),
    }.items():
        counts = kept(seq_len).train.counts
        assert (counts.kept, counts.dropped, counts.emptied) == expected
        if expected[0] == 1:
            assert counts.dropped_tokens == len(ids)
    assert kept(answer + 5).train.counts.cut == 1
    assert kept(answer + 5, too_long="drop").train.counts.dropped == 1
    with refuses(DataError, names=[len(ids)]):
        kept(last, too_long="error")


def test_all_tokens_of_a_row_may_be_trained_but_those_of_its_pictures(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """What stands before a picture is supervised then, and is no answer that lacks its end."""
    draw((56, 56)).save(tmp_path / "a.png")
    folder = folders["gemma3"]
    rows = [row(tmp_path, "a.png", "What is it?", "Noise.")]
    data = prepared(folder, tmp_path, rows, train_on="all")
    [example] = data.train
    processor = load(folder)
    assert np.array_equal(~example.trained[1:], np.isin(example.ids[1:], processor.ids))


@pytest.mark.parametrize("name", ["nul\0.png", "half\ud800.png"])
def test_a_name_that_no_file_can_have_is_refused(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with refuses(DataError, where=f"{tmp_path}/pictures.jsonl:1, picture 1"):
        prepared(folders["gemma3"], tmp_path, [row(tmp_path, name, "What?", "Blue.")])


def test_a_picture_that_is_broken_inside_is_left_out_before_training(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    file = picture(tmp_path, (57, 43)).path
    assert file is not None
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "broken.png").write_bytes(data)
    rows = [row(tmp_path, name, "What?", "Blue.") for name in ("57x43-0.png", "broken.png")]
    with refuses(DataError, where=f"{tmp_path}/pictures.jsonl:2, picture 1"):
        prepared(folders["gemma3"], tmp_path, rows)
    counts = prepared(folders["gemma3"], tmp_path, rows, bad_rows="skip").train.counts
    assert (counts.kept, counts.bad) == (1, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_data_tells_what_the_smallest_picture_costs(
    family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    for size in ((1, 1), (1, 7)):
        picture(tmp_path, size)
        rows = [row(tmp_path, f"{size[0]}x{size[1]}-0.png", "What?", "Blue.")]
        data = prepared(folders[family], tmp_path, rows, seq_len=1024)
        assert any(
            figure.endswith(" picture") for figure in source_figures(data, data.train.parts[0])
        )


def test_data_tells_what_pictures_cost(folders: dict[str, Path], tmp_path: Path) -> None:
    picture(tmp_path, (112, 112))
    picture(tmp_path, (57, 43))
    rows = [row(tmp_path, f"{size}-0.png", "What?", "Blue.") for size in ("112x112", "57x43")]
    data = prepared(folders["qwen2_5_vl"], tmp_path, rows)
    [part] = data.train.parts
    assert part.counts.pictures == 2
    assert part.counts.placeholders == 20
    share = f"{20 / part.counts.tokens:.1%}"
    assert any(holds(figure, 2, share) for figure in source_figures(data, part))
    assert any(holds(figure, 10, "per picture") for figure in source_figures(data, part))
