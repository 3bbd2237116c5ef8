"""Pictures of rows: their sizes and pixels, the forms that rows have for them, and refusals."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

from errors import check_error, refuses
from tunesmith.config.schema import Source
from tunesmith.data.compare.row_checks import find_faults
from tunesmith.data.compare.row_texts import row_text
from tunesmith.data.rows.detect import detect
from tunesmith.data.rows.formats import convert_row
from tunesmith.data.rows.pictures import (
    MAX_PICTURE_RATIO,
    open_picture,
    picture_digest,
    picture_size,
    read_picture,
    scaled_size,
)
from tunesmith.data.rows.samples import PICTURE_MARK, Completion, Conversation, Picture, pictures_of
from tunesmith.data.rows.unread_pictures import find_unread_pictures
from tunesmith.data.source.open_source import count_characters, read_rows
from tunesmith.data.source.table import Place
from tunesmith.errors import DataError
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


@pytest.mark.parametrize("form", MODES)
def test_the_size_of_the_header_is_that_of_the_pixels(form: str) -> None:
    for mode in MODES[form]:
        for size in ((30, 20), (1, 1), (1, 7), (199, 1)):
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
        size = (30, 20) if turn in (0, 1, 2, 3, 4, 9) else (20, 30)
        assert picture_size(data) == picture.size == shown.size == size
        assert np.array_equal(np.asarray(picture), np.asarray(shown.convert("RGB")))


def test_what_is_transparent_is_white() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    half.putpixel((1, 0), (255, 0, 0, 255))
    pixels = np.asarray(open_picture(encoded(half))).reshape(-1, 3).tolist()
    assert pixels == [[255] * 3, [255, 0, 0]]
    palette = Image.new("RGB", (1, 1), "red").convert("P")
    red = palette.getpixel((0, 0))
    assert open_picture(encoded(palette)).getpixel((0, 0)) == (255, 0, 0)
    assert open_picture(encoded(palette, transparency=red)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_shades(form: str) -> None:
    grey = Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16))
    assert np.asarray(open_picture(encoded(grey, form)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_exif_behind_the_pixels_turns_neither_the_size_nor_the_pixels() -> None:
    data = encoded(noise(), exif=turned(6))
    start = data.index(b"eXIf") - 4
    end = start + int.from_bytes(data[start : start + 4], "big") + 12
    rest = data[:start] + data[end:]
    moved = rest[:-12] + data[start:end] + rest[-12:]
    assert Image.open(io.BytesIO(moved)).getexif()[274] == 6
    assert picture_size(moved) == open_picture(moved).size == (30, 20)


def test_a_photo_with_a_second_view_or_bytes_behind_it_is_one_picture() -> None:
    views = encoded(noise(), "MPO", save_all=True, append_images=[noise()])
    for data in (views, encoded(noise(), "JPEG") + b"\xff\xda more \xff"):
        assert picture_size(data) == open_picture(data).size == (30, 20)


def frames(form: str) -> bytes:
    return encoded(noise(), form, save_all=True, append_images=[noise("L").convert("RGB")])


def bomb() -> bytes:
    """A PNG of some bytes with 20,000 x 20,000 pixels in its header."""
    data = bytearray(RED)
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def damaged() -> bytes:
    """A PNG that begins and ends as it should, with another byte in its pixels."""
    data = bytearray(encoded(noise()))
    data[len(data) // 2] ^= 1
    return bytes(data)


REFUSED: list[tuple[str, bytes, list[object]]] = [
    ("a page", b"<html><body>404</body></html>", ["identify"]),
    ("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ["identify"]),
    ("a bomb", bomb(), ["bomb"]),
    *((f"frames of {form}", frames(form), [form, "frame"]) for form in ("GIF", "PNG", "WEBP", "TIFF")),
    ("broken inside", damaged(), []),
    ("a line", encoded(Image.new("L", (201, 1))), ["201 x 1", "200"]),
    ("floats", encoded(Image.new("F", (3, 3)), "TIFF"), ["TIFF", "F"]),
    ("a header alone", RED[:20], []),
    *((f"torn {form}", encoded(noise(), form)[:-40], []) for form in MODES if form != "PPM"),
    ("half PPM", encoded(noise(), "PPM")[:900], []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "data", "names"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_is_no_picture_is_refused_by_its_place(name: str, data: bytes, names: Any) -> None:
    for read in (picture_size, open_picture):
        with refuses(DataError, where="rows.jsonl:3, picture 2", names=names, fix=["delete"]):
            read(data, "rows.jsonl:3, picture 2")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_never_raise_another_error() -> None:
    rng = np.random.default_rng(1)
    for form in MODES:
        whole = encoded(noise(), form)
        for _ in range(30):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), 4):
                data[at] = rng.integers(256)
            with suppress(DataError):
                size = picture_size(bytes(data))
                assert open_picture(bytes(data)).size == size


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    # Reading some files of /proc waits for ever: their size is 0.
    paths = ["absent.png", "empty.png", "folder", "pipe", "/proc/self/status", "/dev/zero"]
    for path in [*paths, "a" * 300, "nul\0"]:
        names = [path] if len(path) < 20 else []
        with refuses(DataError, where="rows.jsonl:3, picture 1", names=names):
            read_picture(Picture("picture 1", path=tmp_path / path), "rows.jsonl:3")
    with refuses(DataError, where="r, picture 1"):
        read_picture(Picture("picture 1", data=b""), "r")
    # A file of rows is not read as a picture.
    monkeypatch.setattr("tunesmith.data.rows.pictures.MAX_PICTURE_BYTES", 10)
    (tmp_path / "a.png").write_bytes(RED)
    with refuses(DataError, names=[tmp_path / "a.png"]):
        read_picture(Picture("picture 1", path=tmp_path / "a.png"), "r")


@pytest.mark.parametrize("max_pixels", [1, 50, 1000])
def test_a_scaled_size_is_within_its_limit(max_pixels: int) -> None:
    rng = np.random.default_rng(2)
    for _ in range(200):
        short = int(rng.integers(1, 300))
        size = (short, int(rng.integers(short, 200 * short + 1)))
        for width, height in (size, size[::-1]):
            scaled = scaled_size((width, height), max_pixels)
            assert min(scaled) >= 1
            assert scaled[0] * scaled[1] <= max_pixels
            assert max(scaled) <= MAX_PICTURE_RATIO * min(scaled)
            assert (scaled[0] > scaled[1]) <= (width > height)
            if width * height <= max_pixels:
                assert scaled == (width, height)


def test_a_picture_is_scaled_to_that_size() -> None:
    assert scaled_size((4000, 3000), 120_000) == (400, 300)
    assert scaled_size((9, 9), None) == (9, 9)
    data = encoded(noise("RGB", (64, 48)))
    scaled = open_picture(data, max_pixels=192)
    assert scaled.size == scaled_size(picture_size(data), 192) == (16, 12)
    assert 0 <= picture_digest(RED) < 1 << 63


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


def sample(row: Row, **columns: str) -> Conversation:
    source = Source(source="rows.jsonl", format=form_of(row), columns=columns)
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
    "Anthropic's base64": (
        chat(user(image(source={"type": "base64", "media_type": "image/png", "data": RED64}, cache_control={"type": "x"}))), [M, A], [BYTES],
    ),
    "base64": (chat(user(image(base64=RED64[:40] + "\n" + RED64[40:]))), [M, A], [BYTES]),
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
    "a long base64": (chat(f"<image>{Q}", images="A" * 5000), [M + Q, A], [(None, b"\0" * 3750)]),
    "one column by two names": (chat(f"<image>{Q}", image="a", images="a"), [M + Q, A], [file("a")]),
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
    places = [f"picture {n + 1}" for n in range(len(pictures))]
    assert [picture.place for picture in found.pictures] == places
    assert found.instruction is None


@pytest.mark.parametrize("nothing", [None, "", [], {}, [None], [{}], 3, False])
def test_a_row_without_a_picture_is_a_text(nothing: Any) -> None:
    """Rows of texts alone were read with a column that counts pictures."""
    row = {"prompt": "<image> is a tag, \ufffc a character", "completion": A, "images": nothing}
    [found] = convert_row(row, Source(source="x", format=form_of(row)), where="r").samples
    assert found == Completion(row["prompt"], A)


def test_the_rows_of_the_docs_are_read() -> None:
    page = Path(__file__).parents[2] / "docs/formats.md"
    section = page.read_text(encoding="utf-8").split("\n## Pictures\n")[1].split("\n## ")[0]
    rows = [json.loads(text) for text in re.findall(r"^```json\n(.*?)\n```", section, re.M)]
    assert [len(sample(row).pictures) for row in rows] == [2, 1]


def test_what_nothing_reads_beside_pictures_is_named() -> None:
    row = chat(user(image(path="a", max_pixels=9, detail=None), Q))
    texts = [{"text": "a", column: "https://a.b/c"} for column in ("image", "videos")]
    for each, expected in ((row, "image.max_pixels"), (texts[0], "image"), (texts[1], "videos")):
        unread: set[str] = set()
        source = Source(source="x", format=form_of(each))
        convert_row(each, source, where="r", unread=unread)
        assert unread == {expected}


TWO = "rows.jsonl:3, message 1"
HTTP = "https://example.com/a.png"
PAIR = {"chosen": "b", "rejected": "c", "prompt": "a"}

# A row, where it is wrong, names of the error, and of its fix.
BAD: dict[str, tuple[Row, str, tuple[object, ...], tuple[str, ...]]] = {
    "more pictures than marks": (chat("<image>", images=["a", "b"]), "", (2, 1), ("<image>",)),
    "fewer pictures than marks": (chat("<image>", ANSWER, "<image>", images=["a"]), "", (1, 2), ("<image>",)),
    "a part alone": (chat(user(image(), Q)), "", ("image", "images"), ("path",)),
    "an index out of order": (chat(user(image(index=1), image(index=0)), images=["a", "b"]), f"{TWO} picture 1", (1,), ()),
    "a picture in a system column": (chat(Q, system=[image(path="a")]), "rows.jsonl:3, system", ("system",), ("user",)),
    "a picture of an answer": (chat(Q, {"role": "assistant", "content": [image(path="a")]}), "rows.jsonl:3, message 2", ("assistant",), ("user",)),
    "a mark in an answer": (pairs(Q, "<image>", image="a"), "rows.jsonl:3, message 2", ("assistant", "<image>"), ("user",)),
    "the mark itself": (chat("a \ufffc b <image>", images=["a"]), "", ("U+FFFC",), ("delete",)),
    "a film in a part": (chat(user({"type": "video", "video": "a.mp4"})), TWO, ("video",), ("part",)),
    "a column of films": (chat(Q, videos=["a.mp4"]), "", ("videos",), ("videos",)),
    "a key of a turn": (chat({"role": "user", "content": Q, "images": ["a"]}), "", ("images",), ("part",)),
    "a URL": (chat(user(image(url=HTTP))), "", (HTTP, "network"), ("download",)),
    "URLs in a column": (chat("<image><image>", images=["a", HTTP]), "", ("picture 2", HTTP), ("download",)),
    "a null among pictures": (chat("<image><image>", images=["a", None]), "", ("picture 2", "null"), ("path",)),
    "an object without a picture": (chat(user(image(source={"type": "file", "file_id": "f"}))), "", ("null",), ("path",)),
    "broken base64": (chat(user(image(base64="A"))), "", ("base64",), ("again",)),
    "a data URI of text": (chat("<image>", image="data:image/svg+xml,<svg/>"), "", ("base64",), ("path",)),
    "a list as Python prints it": ({"prompt": Q, "completion": A, "images": "['a', 'b']"}, "", ("images",), ("to_json",)),
    "two columns": (chat(Q, image="a", images=["b"]), "", ("image", "images"), ("columns",)),
    "a pair": ({**PAIR, "image": "a"}, "", ("image", "preference"), ("delete",)),
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
    assert all(len(text) < 1000 for text in refused.value.text().splitlines())


# --- pictures that nothing reads

NAMED = "![A square](pictures/red.png)"
CALL = {"id": "1", "type": "function", "function": {"name": "shoot", "arguments": {}}}
SHOT = (
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "<image>"},
    ANSWER,
)
# A row -> the warnings of a text model, and the errors of a model that sees.
LOST: dict[str, tuple[Row, dict[str, str], dict[str, str]]] = {
    name: (row, *([found[0], found[0]] if len(found) == 1 else found))
    for name, row, *found in [
        ("a mark", chat("<image>\nWhat is it?"), {"picture_mark": "<image>"}),
        ("a mark and no pictures", chat("Picture 1: <image>\nColor?", images=[]), {"picture_mark": "<image>"}),
        ("a mark in a text", {"text": "<image>\nA red square"}, {"picture_mark": "<image>"}),
        ("InternVL's mark", chat("<img><IMG_CONTEXT></img>\nColor?"), {}, {"picture_mark": "<IMG_CONTEXT>"}),
        ("Pixtral's mark", chat("[IMG]Color?"), {"picture_mark": "[IMG]"}),
        ("a nested file", chat(Q, meta={"img": "pictures/red.png"}), {"picture_column": "meta"}),
        ("a screenshot of a tool", chat(Q, *SHOT), {"picture_mark": "<image>"}),
        ("a mark of an answer", chat("Draw it", {"role": "assistant", "content": "<image>"}), {}),
        ("a mark beside a part", chat(user(image(path="pictures/red.png"), "<image>\nColor?")), {"picture_mark": "<image>"}),
        *(
            (f"{form} bytes", chat(Q, photo={"bytes": encoded(noise(), form), "path": None}), {"picture_column": "photo"})
            for form in ("WEBP", "GIF", "TIFF")
        ),
        ("a column of files", chat(Q, path="pictures/red.png"), {"picture_column": "path"}),
        ("a column of structs", chat(Q, jpg={"bytes": RED, "path": "a.png"}), {"picture_column": "jpg"}),
        ("a deep column", chat(Q, meta=json.loads("[" * 900 + "]" * 900)), {}),
        ("a long name", chat(Q, path="a" * 5000 + ".png"), {}),
        ("sound", chat(Q, sound={"bytes": b"RIFF....WAVE", "path": "a.wav"}), {}),
        ("a picture that is read", chat("<image>Color?", images=["pictures/red.png"], path="pictures/red.png"), {}),
        ("a tag of SVG", chat("What does the <image> tag do?", ANSWER, "And `<image>`?"), {}),
        ("a program's usage", pairs("How do I start it?", "docker run <image>"), {}),
        ("a document", {"text": f"# A\n{NAMED}\ndocker run <image>"}, {}),
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


def seen(path: Path, **columns: str) -> list[bytes]:
    """The bytes of all pictures of a file or folder, as `train` finds them."""
    source = Source(source=str(path), columns=columns)
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
    # The folder that holds both.
    assert seen(folder) == [RED, BLUE]
    assert read_rows(Source(source=str(folder))).skipped == ""
    (folder / "a.csv").write_text("path,question,answer\n,Hi,Ho\npictures/red.png,Color?,red\n")
    assert seen(folder / "a.csv", images="path") == [RED]


def test_paths_are_relative_to_the_part_of_a_data_set_that_names_them(folder: Path) -> None:
    for name, picture in (("train", RED), ("other", BLUE)):
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes(picture)
        row = {"prompt": Q, "completion": name, "image": "a.png"}
        (folder / name / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert seen(folder) == [BLUE, RED]
    (folder / "a.jsonl").write_text(json.dumps(chat(Q, image="red.png")) + "\n")
    with refuses(DataError, where=f"{folder}/a.jsonl:1, picture 1", names=[folder / "red.png"]):
        seen(folder / "a.jsonl")


@pytest.mark.parametrize("many", [False, True])
def test_parquet_as_the_hub_has_it(folder: Path, many: bool) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    blue = {"bytes": None, "path": "pictures/blue.png"}
    values: list[Any] = [{"bytes": RED, "path": "x.png"}, blue, None]
    column = pa.array([[v] if v and many else v for v in values], pa.list_(kind) if many else kind)
    texts = {"question": [Q] * 3, "answer": ["red", "blue", "none"]}
    table = pa.table({"images" if many else "image": column, **texts})
    pq.write_table(table, folder / "rows.parquet")
    assert seen(folder / "rows.parquet") == [RED, BLUE]
    rows = read_rows(Source(source=str(folder / "rows.parquet")))
    assert count_characters(rows[0]) == len("x.png") + len(Q) + len("red")
    for value in (URI, {"base64": RED64}, {"type": "base64", "data": RED64}, RED):
        assert count_characters({"image": value, "text": "four"}) == 4


def test_a_data_set_of_the_hub_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pictures nor JSON."""
    turn = {"role": datasets.Value("string"), "content": datasets.Json()}
    features = {
        "messages": datasets.List(turn),
        "tools": datasets.Json(),
        "prompt": datasets.Json(),
        "image": datasets.Image(),
        "images": datasets.List(datasets.Image()),
        "nested": datasets.List({"of": datasets.Image()}),
    }
    picture = {"bytes": RED, "path": "x.png"}
    messages = [{"role": "user", "content": 5}, {"role": "user", "content": [{"text": "a"}]}]
    row = {"messages": messages, "tools": [{"name": "f"}], "prompt": "a text"}
    row |= {"image": picture, "images": [picture, picture], "nested": [{"of": picture}]}
    table = datasets.Dataset.from_list([row], features=datasets.Features(features))
    loaded = datasets.DatasetDict(train=table)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keys: loaded)
    read = read_rows(Source(source="someone/pictures"))
    assert read[0] == row
    # A file of such a data set is not here.
    source = Source(source="someone/pictures", format="messages")
    with refuses(DataError, where="someone/pictures train row 1", fix=["someone/pictures"]):
        convert_row(chat(Q, image="a.png"), source, where=read.where(0))


def asked(picture: Any) -> Row:
    return chat(f"<image>{Q}", images=[picture])


def test_rows_of_a_program_keep_their_pictures(tmp_path: Path) -> None:
    photo = encoded(noise(size=(40, 20)), "JPEG", exif=turned(6))
    values = [RED, {"bytes": RED}, *(Image.open(io.BytesIO(data)) for data in (RED, photo))]
    found = seen(keep_rows([asked(value) for value in values], tmp_path))
    assert found[:2] == [RED, RED]
    assert open_picture(found[2]).getpixel((0, 0)) == (255, 0, 0)
    assert open_picture(found[3]).size == (20, 40)
    modes = ("CMYK", "YCbCr", "LAB", "HSV", "PA", "RGBa", "RGBX")
    found = seen(keep_rows([asked(Image.new(mode, (3, 2))) for mode in modes], tmp_path))
    assert [open_picture(data).size for data in found] == [(3, 2)] * len(modes)
    torn = Image.open(io.BytesIO(encoded(noise(size=(40, 20)))[:200]))
    for refused in (Image.new("F", (3, 2)), Image.new("I", (3, 2)), torn):
        with refuses(DataError, names=["rows[0]"]):
            keep_rows([asked(refused)], tmp_path)


def test_rows_of_a_program_name_pictures_from_its_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    name = "pictures/red.png"
    rows = [asked(name), asked({"path": Path(name)}), chat(user(image(path=name), Q))]
    assert seen(keep_rows(rows, folder / "run")) == [RED] * 3
    tool = {"arguments": {"path": name, "image": name}}
    assert read_rows(Source(source=str(keep_rows([tool], folder / "run"))))[0] == tool


# --- rows that are compared


@pytest.mark.parametrize(
    ("rows", "near", "contradicting"),
    [
        ([("red.png", "It is red."), ("blue.png", "It is blue."), (BLUE, "It is red.")], [[1, 2]], [[1, 2]]),
        ([("red.png", "It is red."), ("blue.png", "It is red."), (RED, "It is red!")], [[0, 2]], []),
        ([("a", "It is red."), ("b", "It is blue."), ("a", "It is red.")], [[0, 2]], []),
    ],
)  # fmt: skip
def test_rows_about_different_pictures_are_different(
    folder: Path, rows: list[tuple[Any, str]], near: list[list[int]], contradicting: list[list[int]]
) -> None:
    source = Source(source="x", format="prompt-completion")
    texts = []
    for name, answer in rows:
        picture = {"bytes": name} if isinstance(name, bytes) else str(folder / "pictures" / name)
        asked = {"prompt": "Which color has the large square?", "completion": answer}
        texts.append(row_text({**asked, "image": picture}, source))
    found = find_faults(texts)
    assert (found.near_duplicates, found.contradictions) == (near, contradicting)
