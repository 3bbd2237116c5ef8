"""Pictures of rows: their sizes and pixels, the forms that rows have for them, and refusals."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from errors import check_error, refuses
from tunesmith.config.schema import Source
from tunesmith.errors import DataError
from tunesmith.rows.compare.row_checks import find_faults
from tunesmith.rows.compare.row_texts import row_text
from tunesmith.rows.detect import detect
from tunesmith.rows.formats import convert_row
from tunesmith.rows.pictures import (
    open_picture,
    picture_size,
    read_picture,
    scaled_size,
)
from tunesmith.rows.samples import PICTURE_MARK, Conversation, Picture, pictures_of
from tunesmith.rows.source.open_source import count_characters, read_rows
from tunesmith.rows.source.table import Place
from tunesmith.rows.unread_pictures import find_unread_pictures
from tunesmith.training.program_rows import keep_rows

Row = dict[str, Any]
M = PICTURE_MARK


def noise(mode: str = "RGB", size: tuple[int, int] = (30, 20)) -> Image.Image:
    """A picture whose corners differ, so that a turned one is another."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, form: str = "PNG", **keys: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **keys)
    return file.getvalue()


def turned(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = turn
    return exif


RED = encoded(Image.new("RGB", (4, 3), "red"))
BLUE = encoded(Image.new("RGB", (4, 3), "blue"))
RED64 = base64.b64encode(RED).decode()
URI = f"data:image/png;base64,{RED64}"

# --- files

MODES = {
    "PNG": ("L", "LA", "RGB", "RGBA", "P", "1", "I;16"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P",),
    "BMP": ("RGB",),
    "PPM": ("RGB",),
    "TIFF": ("RGB", "I;16", "CMYK"),
}


def test_the_size_of_the_header_is_that_of_the_pixels() -> None:
    for form, modes in MODES.items():
        for mode in modes:
            for size in ((30, 20), (1, 7)):
                data = encoded(noise(mode, size), form)
                picture = open_picture(data)
                assert picture_size(data) == picture.size == size
                assert picture.mode == "RGB"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_exif_says(form: str) -> None:
    for turn in range(10):
        data = encoded(noise(), form, exif=turned(turn))
        shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        picture = open_picture(data)
        assert picture_size(data) == picture.size == shown.size
        assert np.array_equal(np.asarray(picture), np.asarray(shown.convert("RGB")))


def test_what_is_transparent_is_white_and_grey_keeps_its_shades() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    half.putpixel((1, 0), (255, 0, 0, 255))
    pixels = np.asarray(open_picture(encoded(half))).reshape(-1, 3).tolist()
    assert pixels == [[255] * 3, [255, 0, 0]]
    # 16 bits of grey keep their shades.
    grey = Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16))
    assert np.asarray(open_picture(encoded(grey)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_what_is_no_picture_is_refused_by_its_place() -> None:
    for data, names in (
        (b"<html><body>404</body></html>", ["identify"]),
        (encoded(noise(), "GIF", save_all=True, append_images=[noise("L")]), ["GIF", "frame"]),
        (encoded(Image.new("L", (201, 1))), ["201 x 1", "200"]),
        (encoded(Image.new("F", (3, 3)), "TIFF"), ["TIFF", "F"]),
        *((encoded(noise(), form)[:-40], []) for form in MODES if form != "PPM"),
    ):
        for read in (picture_size, open_picture):
            with refuses(DataError, where="rows.jsonl:3, picture 2", names=names, fix=["delete"]):
                read(data, "rows.jsonl:3, picture 2")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    # Reading some files of /proc waits for ever: their size is 0.
    paths = ["absent.png", "empty.png", "folder", "pipe", "/proc/self/status", "/dev/zero"]
    for path in [*paths, "a" * 300, "nul\0"]:
        names = [path] if len(path) < 20 else []
        with refuses(DataError, where="rows.jsonl:3, picture 1", names=names):
            read_picture(Picture("picture 1", path=tmp_path / path), "rows.jsonl:3")


def test_a_picture_is_scaled_to_that_size() -> None:
    assert scaled_size((4000, 3000), 120_000) == (400, 300)
    assert scaled_size((9, 9), None) == (9, 9)
    data = encoded(noise("RGB", (64, 48)))
    scaled = open_picture(data, max_pixels=192)
    assert scaled.size == scaled_size(picture_size(data), 192) == (16, 12)


# --- rows

Q, A = "What is it?", "A cat."
ANSWER = {"role": "assistant", "content": A}


def user(*content: Any) -> Row:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {"role": "user", "content": parts}


def image(**keys: Any) -> Row:
    return {"type": "image", **keys}


def chat(*turns: Any, **columns: Any) -> Row:
    messages = [{"role": "user", "content": t} if isinstance(t, str) else t for t in turns]
    return {"messages": [*messages, ANSWER], **columns}


def pairs(*values: str, **columns: Any) -> Row:
    names = ("human", "gpt")
    turns = [{"from": names[i % 2], "value": v} for i, v in enumerate(values)]
    return {"conversations": turns, **columns}


def form_of(row: Row) -> Any:
    columns = {"conversations": "sharegpt", "chosen": "preference", "label": "feedback"}
    columns |= {"instruction": "alpaca", "prompt": "prompt-completion", "text": "text"}
    return next((form for column, form in columns.items() if column in row), "messages")


def sample(row: Row) -> Conversation:
    source = Source(source="rows.jsonl", format=form_of(row))
    unread: set[str] = set()
    place = Place("rows.jsonl:3", Path("/data"))
    [found] = convert_row(row, source, where=place, unread=unread).samples
    assert isinstance(found, Conversation)
    assert unread == set()
    return found


def file(name: str) -> tuple[Path, None]:
    return Path(f"/data/{name}"), None


BYTES = (None, RED)

# A row, the contents of its messages, and its pictures.
GOOD: dict[str, tuple[Row, list[str], list[tuple[Path | None, bytes | None]]]] = {
    "a path in a part": (chat(user(image(path="a.png"), Q)), [M + Q, A], [file("a.png")]),
    "the Hub's struct in a part": (chat(user(image(image={"bytes": RED, "path": "a.png"}))), [M, A], [BYTES]),
    "a data URI": (chat(user({"type": "image_url", "image_url": {"url": URI, "detail": "low"}})), [M, A], [BYTES]),
    "Anthropic's base64": (chat(user(image(source={"type": "base64", "media_type": "image/png", "data": RED64}))), [M, A], [BYTES]),
    "parts by a column": (
        chat(user(image(index=0, text=None), Q), ANSWER, user(image(index=1), "And?"), images=["a", URI]),
        [M + Q, A, f"{M}And?", A], [file("a"), BYTES],
    ),
    "marks in texts": (
        chat("<image>\nOne.", ANSWER, "Two: <image><image>", images=["a", "b", {"path": "c"}]),
        [f"{M}\nOne.", A, f"Two: {M}{M}", A], [file("a"), file("b"), file("c")],
    ),
    "no mark": (chat({"role": "system", "content": "S"}, Q, ANSWER, "And?", images=["a", "b"]), ["S", M * 2 + Q, A, "And?", A], [file("a"), file("b")]),
    "bytes in a column": (chat(f"<image>{Q}", image={"bytes": RED, "path": None}), [M + Q, A], [BYTES]),
    "LLaVA": (pairs(f"{Q}\n<image>", A, image="coco/1.jpg"), [f"{Q}\n{M}", A], [file("coco/1.jpg")]),
    "a completion": ({"prompt": Q, "completion": A, "image": "a"}, [M + Q, A], [file("a")]),
    "alpaca without a mark": ({"instruction": Q, "output": A, "history": [["p", "q"]], "image": "a"}, [f"{M}p", "q", Q, A], [file("a")]),
    "a cell of a csv": ({"prompt": "<image><image>", "completion": A, "images": '["a", "b"]'}, [M + M, A], [file("a"), file("b")]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_the_pictures_of_a_row(name: str) -> None:
    row, contents, pictures = GOOD[name]
    found = sample(row)
    assert [message["content"] for message in found.messages] == contents
    assert [(picture.path, picture.data) for picture in found.pictures] == pictures


HTTP = "https://example.com/a.png"

# A row, where it is wrong, names of the error, and of its fix.
BAD: dict[str, tuple[Row, str, tuple[object, ...], tuple[str, ...]]] = {
    "more pictures than marks": (chat("<image>", images=["a", "b"]), "", (2, 1), ("<image>",)),
    "fewer pictures than marks": (chat("<image>", ANSWER, "<image>", images=["a"]), "", (1, 2), ("<image>",)),
    "a part alone": (chat(user(image(), Q)), "", ("image", "images"), ("path",)),
    "a picture of an answer": (chat(Q, {"role": "assistant", "content": [image(path="a")]}), "rows.jsonl:3, message 2", ("assistant",), ("user",)),
    "a mark in an answer": (pairs(Q, "<image>", image="a"), "rows.jsonl:3, message 2", ("assistant", "<image>"), ("user",)),
    "a film in a part": (chat(user({"type": "video", "video": "a.mp4"})), "rows.jsonl:3, message 1", ("video",), ("part",)),
    "a URL": (chat(user(image(url=HTTP))), "", (HTTP, "network"), ("download",)),
    "broken base64": (chat(user(image(base64="A"))), "", ("base64",), ("again",)),
    "a list as Python prints it": ({"prompt": Q, "completion": A, "images": "['a', 'b']"}, "", ("images",), ("to_json",)),
    "a pair": ({"chosen": "b", "rejected": "c", "prompt": "a", "image": "a"}, "", ("image", "preference"), ("delete",)),
    "a labeled answer": ({"prompt": "a", "completion": "b", "label": True, "images": ["a"]}, "", ("images", "feedback"), ("delete",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_is_refused(name: str) -> None:
    row, where, names, fix = BAD[name]
    with pytest.raises(DataError) as refused:
        sample(row)
    assert refused.value.where.startswith("rows.jsonl:3")
    check_error(refused.value, where=where or None, names=names)
    assert all(word in refused.value.fix for word in fix), refused.value.fix


# --- pictures that nothing reads

RED_PATH = "pictures/red.png"
# A row -> the warnings of a text model, and the errors of a model that sees.
LOST: dict[str, tuple[Row, dict[str, str], dict[str, str]]] = {
    name: (row, *([found[0], found[0]] if len(found) == 1 else found))
    for name, row, *found in [
        ("a mark", chat("<image>\nWhat is it?"), {"picture_mark": "<image>"}),
        ("a mark of an answer", chat("Draw it", {"role": "assistant", "content": "<image>"}), {}),
        ("bytes", chat(Q, photo={"bytes": encoded(noise(), "WEBP"), "path": None}), {"picture_column": "photo"}),
        ("a column of files", chat(Q, path="pictures/red.png"), {"picture_column": "path"}),
        ("a picture that is read", chat("<image>Color?", images=["pictures/red.png"], path="pictures/red.png"), {}),
        ("a tag of SVG", chat("What does the <image> tag do?", ANSWER, "And `<image>`?"), {}),
        *(
            (f"a written picture: {mark}", chat(f"{mark}{end}"), {} if path != RED_PATH else {"picture_mark": mark}, {"picture_mark": mark})
            for path in (RED_PATH, "none/a.png", "https://x.org/a.png")
            for mark, end in (
                (f"<img>{path}</img>", "What color?"), (f"<image>{path}</image>", "\nWhat color?"), (f'<img alt="x" src="{path}', '"/> What color?'),
                (f"![x]({path}", ") What color?"),
            )
        ),
        ("Qwen's numbered pictures", chat("Picture 1: <img>a.png</img>\nWhat color?"), {}, {"picture_mark": "<img>a.png</img>"}),
        ("HTML in code", chat("Mend it:\n```html\n<img src='a.png'>\n```"), {}),
        ("Markdown in an answer", chat(Q, {"role": "assistant", "content": "![x](a.png)"}), {}),
        ("a program's usage", pairs("How do I start it?", "docker run <image>"), {}),
    ]
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_a_picture_that_nothing_reads(name: str, folder: Path) -> None:
    row, *expected = LOST[name]
    place = Place("rows.jsonl:3", folder)
    source = Source(source="rows.jsonl", format=form_of(row))
    [found] = convert_row(row, source, where=place).samples
    for sees in (False, True):
        assert dict(find_unread_pictures(row, found, place, sees=sees)) == expected[sees]


# --- files of rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "red.png").write_bytes(RED)
    (tmp_path / "pictures" / "blue.png").write_bytes(BLUE)
    return tmp_path


def seen(path: Path) -> list[bytes]:
    """The bytes of all pictures of a file or folder, as `train` finds them."""
    source = Source(source=str(path))
    rows = read_rows(source)
    layout = detect(rows, source)
    assert layout.has_pictures
    source = Source(source=str(path), format=layout.format, columns=layout.renamed)
    found = []
    for i in range(len(rows)):
        for each in convert_row(rows[i], source, where=rows.where(i)).samples:
            found += [read_picture(picture, rows.where(i)) for picture in pictures_of(each)]
    return found


def test_a_csv_beside_a_folder_of_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a.csv").write_text(
        "image,question,answer\npictures/red.png,Color?,red\npictures/blue.png,Color?,blue\n,Hi,Ho\n"
    )
    monkeypatch.chdir("/")
    assert seen(folder / "a.csv") == [RED, BLUE]
    assert seen(folder) == [RED, BLUE], "the folder that holds both"
    # Paths are relative to the part of a data set that names them.
    (folder / "a.csv").unlink()
    for name, picture in (("train", RED), ("other", BLUE)):
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes(picture)
        row = {"prompt": Q, "completion": name, "image": "a.png"}
        (folder / name / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert seen(folder) == [BLUE, RED]


def test_parquet_as_the_hub_has_it(folder: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    blue = {"bytes": None, "path": "pictures/blue.png"}
    column = pa.array([[{"bytes": RED, "path": "x.png"}], [blue], None], pa.list_(kind))
    texts = {"question": [Q] * 3, "answer": ["red", "blue", "none"]}
    pq.write_table(pa.table({"images": column, **texts}), folder / "rows.parquet")
    assert seen(folder / "rows.parquet") == [RED, BLUE]


def asked(picture: Any) -> Row:
    return chat(f"<image>{Q}", images=[picture])


def test_rows_of_a_program_keep_pictures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photo = encoded(noise(size=(40, 20)), "JPEG", exif=turned(6))
    values = [RED, {"bytes": RED}, *(Image.open(io.BytesIO(data)) for data in (RED, photo))]
    found = seen(keep_rows([asked(value) for value in values], folder))
    assert found[:2] == [RED, RED]
    assert open_picture(found[2]).getpixel((0, 0)) == (255, 0, 0)
    assert open_picture(found[3]).size == (20, 40)
    with refuses(DataError, names=["rows[0]"]):
        keep_rows([asked(Image.new("F", (3, 2)))], folder)
    # Names start from the working directory.
    monkeypatch.chdir(folder)
    name = "pictures/red.png"
    rows = [asked(name), asked({"path": Path(name)}), chat(user(image(path=name), Q))]
    assert seen(keep_rows(rows, folder / "run")) == [RED] * 3


# --- rows that are compared


def test_rows_about_different_pictures_are_different(folder: Path) -> None:
    rows = [("red.png", "It is red."), ("blue.png", "It is blue."), (BLUE, "It is red.")]
    source = Source(source="x", format="prompt-completion")
    texts = []
    for name, answer in rows:
        picture = {"bytes": name} if isinstance(name, bytes) else str(folder / "pictures" / name)
        asked = {"prompt": "Which color has the large square?", "completion": answer}
        texts.append(row_text({**asked, "image": picture}, source))
    found = find_faults(texts)
    assert (found.near_duplicates, found.contradictions) == ([[1, 2]], [[1, 2]])


@pytest.mark.parametrize(
    "value",
    [URI, {"base64": RED64}, {"type": "base64", "data": RED64}, {"bytes": RED}, RED],
    ids=["URI", "base64", "typed", "bytes in a mapping", "bytes"],
)
def test_a_picture_has_no_characters(value: Any) -> None:
    assert count_characters({"image": value, "text": "four"}) == 4
