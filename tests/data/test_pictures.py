"""Pictures: sizes by headers, pixels as shown, rows in all forms, and what is refused by its row."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
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
from transformers import Gemma3Config

from errors import check_error, refuses
from tunesmith.config.schema import Data, Source
from tunesmith.data.compare.row_checks import find_faults
from tunesmith.data.compare.row_texts import row_text
from tunesmith.data.compare.splits import read_checked_splits
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
from tunesmith.data.rows.samples import PICTURE_MARK, Conversation, Picture, pictures_of
from tunesmith.data.rows.unread_pictures import find_unread_pictures
from tunesmith.data.source.open_source import count_characters, read_rows
from tunesmith.data.source.table import Place
from tunesmith.errors import DataError
from tunesmith.hub import fetch
from tunesmith.stages.draft import draft_recipe
from tunesmith.training.make_recipe import make_recipe
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


RED = encoded(Image.new("RGB", (4, 3), "red"))
BLUE = encoded(Image.new("RGB", (4, 3), "blue"))
RED64 = base64.b64encode(RED).decode()
URI = f"data:image/png;base64,{RED64}"

# Files --------------------------------------------------------------------------------------------

FORMS = [
    ("PNG", mode) for mode in ("L", "LA", "RGB", "RGBA", "P", "1", "I;16")
] + [
    ("JPEG", mode) for mode in ("L", "RGB", "CMYK", "YCbCr")
] + [
    ("WEBP", "RGB"), ("WEBP", "RGBA"), ("GIF", "P"), ("BMP", "RGB"), ("PPM", "RGB"), ("TIFF", "RGB"), ("TIFF", "I;16"), ("TIFF", "CMYK"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "mode"), FORMS)
@pytest.mark.parametrize("size", [(30, 20), (1, 1), (1, 7), (199, 1)])
def test_the_size_of_the_header_is_that_of_the_pixels(
    form: str, mode: str, size: tuple[int, int]
) -> None:
    data = encoded(noise(mode, size), form)
    picture = open_picture(data)
    assert picture_size(data) == picture.size == size
    assert picture.mode == "RGB"


@pytest.mark.parametrize("turn", range(10))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_exif_says(form: str, turn: int) -> None:
    exif = Image.Exif()
    exif[274] = turn
    data = encoded(noise(), form, exif=exif)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    picture = open_picture(data)
    assert (
        picture_size(data)
        == picture.size
        == shown.size
        == ((30, 20) if turn in (0, 1, 2, 3, 4, 9) else (20, 30))
    )
    assert np.array_equal(np.asarray(picture), np.asarray(shown.convert("RGB")))


def test_exif_behind_the_pixels_turns_neither_the_size_nor_the_pixels() -> None:
    exif = Image.Exif()
    exif[274] = 6
    data = encoded(noise(), exif=exif)
    start = data.index(b"eXIf") - 4
    length = int.from_bytes(data[start : start + 4], "big") + 12
    chunk, rest = data[start : start + length], data[:start] + data[start + length :]
    moved = rest[:-12] + chunk + rest[-12:]
    assert Image.open(io.BytesIO(moved)).getexif()[274] == 6
    assert picture_size(moved) == open_picture(moved).size == (30, 20)


def test_what_is_transparent_is_white() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    half.putpixel((1, 0), (255, 0, 0, 255))
    assert [*np.asarray(open_picture(encoded(half))).reshape(-1, 3).tolist()] == [
        [255] * 3,
        [255, 0, 0],
    ]
    palette = Image.new("RGB", (1, 1), "red").convert("P")
    red = palette.getpixel((0, 0))
    assert open_picture(encoded(palette)).getpixel((0, 0)) == (255, 0, 0)
    assert open_picture(encoded(palette, transparency=red)).getpixel((0, 0)) == (255, 255, 255)


def test_grey_of_16_bits_keeps_its_shades() -> None:
    grey = Image.fromarray(np.array([[0, 256, 32768, 65535]], np.uint16))
    assert np.asarray(open_picture(encoded(grey)))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert np.asarray(open_picture(encoded(grey, "TIFF")))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_photo_with_a_second_view_is_one_picture() -> None:
    data = encoded(noise(), "MPO", save_all=True, append_images=[noise()])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert picture_size(data) == open_picture(data).size == (30, 20)


def test_a_photo_with_bytes_behind_it_is_whole() -> None:
    data = encoded(noise(), "JPEG") + b"\xff\xda more \xff"
    assert picture_size(data) == open_picture(data).size


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


REFUSED: dict[str, tuple[bytes, tuple[object, ...]]] = {
    "text": (b"not a picture", ("identify",)),
    "a page": (b"<html><body>404</body></html>", ("identify",)),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ("identify",)),
    "a bomb": (bomb(), ("bomb",)),
    "a film": (frames("GIF"), ("GIF", "frame")),
    "a moving PNG": (frames("PNG"), ("PNG", "frame")),
    "a moving WEBP": (frames("WEBP"), ("WEBP", "frame")),
    "pages": (frames("TIFF"), ("TIFF", "frame")),
    "broken inside": (damaged(), ()),
    "a line": (encoded(Image.new("L", (201, 1))), ("201 x 1", "200")),
    "floats": (encoded(Image.new("F", (3, 3)), "TIFF"), ("TIFF", "F")),
    "a header alone": (RED[:20], ()),
    **{f"torn {form}": (encoded(noise(), form)[:-40], ()) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")},
    **{f"half {form}": ((data := encoded(noise(), form))[: len(data) // 2], ()) for form in ("PNG", "JPEG", "WEBP", "PPM")},
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_refused_by_its_place(name: str) -> None:
    data, names = REFUSED[name]
    for read in (picture_size, open_picture):
        with pytest.raises(DataError) as refused:
            read(data, "rows.jsonl:3, picture 2")
        check_error(refused.value, where="rows.jsonl:3, picture 2", names=names, fix=["delete"])


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_never_raise_another_error() -> None:
    rng = np.random.default_rng(1)
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        whole = encoded(noise(), form)
        for _ in range(60):
            data = bytearray(whole)
            for at in rng.integers(0, len(data), 4):
                data[at] = rng.integers(256)
            with suppress(DataError):
                size = picture_size(bytes(data))
                assert open_picture(bytes(data)).size == size


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    # Reading some files of /proc waits for ever: their size is 0.
    paths = ["absent.png", "empty.png", "folder", "pipe", "/proc/self/status", "/dev/zero"]
    paths += ["a" * 300, "nul\0"]
    for path in paths:
        picture = Picture("picture 1", path=tmp_path / path)
        with refuses(
            DataError, where="rows.jsonl:3, picture 1", names=[path[:20]] if len(path) < 20 else []
        ):
            read_picture(picture, "rows.jsonl:3")
    with refuses(DataError, where="r, picture 1"):
        read_picture(Picture("picture 1", data=b""), "r")


def test_a_file_of_rows_is_not_read_as_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.data.rows.pictures.MAX_PICTURE_BYTES", 10)
    (tmp_path / "a.png").write_bytes(RED)
    with refuses(DataError, names=[tmp_path / "a.png"]):
        read_picture(Picture("picture 1", path=tmp_path / "a.png"), "r")


def test_a_digest_is_of_the_bytes() -> None:
    assert picture_digest(RED) == picture_digest(bytes(RED)) != picture_digest(BLUE)
    assert 0 <= picture_digest(RED) < 1 << 63


@pytest.mark.parametrize("max_pixels", [1, 3, 50, 1000, 1 << 20])
def test_a_scaled_size_is_within_its_limit(max_pixels: int) -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
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
    assert scaled_size((4000, 3000), 120_000) == (400, 300)
    assert scaled_size((9, 9), None) == (9, 9)


def test_a_picture_is_scaled_to_that_size() -> None:
    data = encoded(noise("RGB", (64, 48)))
    assert (
        open_picture(data, max_pixels=192).size == scaled_size(picture_size(data), 192) == (16, 12)
    )


def test_preparing_data_imports_no_processor_before_a_model_sees() -> None:
    script = "import sys, tunesmith.data.prepare; print({'transformers', 'torch'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert done.stdout.strip() == b"set()"


# Rows ---------------------------------------------------------------------------------------------

Q, A = "What is it?", "A cat."
ANSWER = {"role": "assistant", "content": A}


def user(*content: Any) -> Row:
    return {
        "role": "user",
        "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content],
    }


def image(**keys: Any) -> Row:
    return {"type": "image", **keys}


def chat(*turns: Any, **columns: Any) -> Row:
    return {
        "messages": [
            *({"role": "user", "content": t} if isinstance(t, str) else t for t in turns),
            ANSWER,
        ],
        **columns,
    }


def pairs(*values: str, **columns: Any) -> Row:
    names = ("human", "gpt")
    return {
        "conversations": [{"from": names[i % 2], "value": v} for i, v in enumerate(values)],
        **columns,
    }


def sample(row: Row, form: str = "messages", **columns: str) -> Conversation:
    source = Source(source="rows.jsonl", format=form, columns=columns)  # type: ignore[arg-type]
    unread: set[str] = set()
    [found] = convert_row(
        row, source, where=Place("rows.jsonl:3", Path("/data")), unread=unread
    ).samples
    assert isinstance(found, Conversation)
    assert unread == set()
    return found


def file(name: str) -> tuple[Path, None]:
    return Path(f"/data/{name}"), None


BYTES = (None, RED)

# A row, its format, the contents of its messages, and its pictures.
GOOD: dict[str, tuple[Row, str, list[str], list[tuple[Path | None, bytes | None]]]] = {
    "a path in a part": (chat(user(image(path="a.png"), Q)), "messages", [M + Q, A], [file("a.png")]),
    "a part behind the text": (chat(user(Q, image(image="b/a.png"))), "messages", [Q + M, A], [file("b/a.png")]),
    "parts between texts": (
        chat(user("A ", image(path="a"), " or ", image(path="/x/b"), "?")), "messages", [f"A {M} or {M}?", A], [file("a"), (Path("/x/b"), None)],
    ),
    "bytes in a part": (chat(user(image(bytes=RED), Q)), "messages", [M + Q, A], [BYTES]),
    "the Hub's struct in a part": (chat(user(image(image={"bytes": RED, "path": "a.png"}))), "messages", [M, A], [BYTES]),
    "a data URI": (chat(user({"type": "image_url", "image_url": {"url": URI, "detail": "low"}})), "messages", [M, A], [BYTES]),
    "a data URI alone": (chat(user({"type": "input_image", "image_url": URI})), "messages", [M, A], [BYTES]),
    "Anthropic's base64": (
        chat(user(image(source={"type": "base64", "media_type": "image/png", "data": RED64}, cache_control={"type": "x"}))), "messages", [M, A], [BYTES],
    ),
    "base64": (chat(user(image(base64=RED64[:40] + "\n" + RED64[40:]))), "messages", [M, A], [BYTES]),
    "a URL of a file": (chat(user(image(image="file:///x/a%20b.png"))), "messages", [M, A], [(Path("/x/a b.png"), None)]),
    "parts by a column": (
        chat(user(image(index=0, text=None), Q), ANSWER, user(image(index=1), "And?"), images=["a", URI]),
        "messages", [M + Q, A, f"{M}And?", A], [file("a"), BYTES],
    ),
    "a mark without a column": (chat("<image>\nWhat is this tag?", user(image(path="a"), "<image>")), "messages", ["<image>\nWhat is this tag?", f"{M}<image>", A], [file("a")]),
    "marks in texts": (
        chat("<image>\nOne.", ANSWER, "Two: <image><image>", images=["a", "b", {"path": "c"}]), "messages",
        [f"{M}\nOne.", A, f"Two: {M}{M}", A], [file("a"), file("b"), file("c")],
    ),
    "no mark": (chat({"role": "system", "content": "S"}, Q, ANSWER, "And?", images=["a", "b"]), "messages", ["S", M * 2 + Q, A, "And?", A], [file("a"), file("b")]),
    "one text for a list": (chat(f"<image>{Q}", images="a.jpg"), "messages", [M + Q, A], [file("a.jpg")]),
    "bytes in a column": (chat(f"<image>{Q}", image={"bytes": RED, "path": None}), "messages", [M + Q, A], [BYTES]),
    "raw bytes": (chat(f"<image>{Q}", images=[RED]), "messages", [M + Q, A], [BYTES]),
    "a long base64": (chat(f"<image>{Q}", images="A" * 5000), "messages", [M + Q, A], [(None, b"\0" * 3750)]),
    "one column by two names": (chat(f"<image>{Q}", image="a", images="a"), "messages", [M + Q, A], [file("a")]),
    "LLaVA": (pairs(f"{Q}\n<image>", A, image="coco/1.jpg"), "sharegpt", [f"{Q}\n{M}", A], [file("coco/1.jpg")]),
    "LLaVA with two": (pairs("<image><image>\nSame?", "No.", image=["a", "b"]), "sharegpt", [f"{M}{M}\nSame?", "No."], [file("a"), file("b")]),
    "a completion": ({"prompt": Q, "completion": A, "image": "a"}, "prompt-completion", [M + Q, A], [file("a")]),
    "a completion with its mark": ({"prompt": f"{Q} <image>", "completion": A, "images": ["a"]}, "prompt-completion", [f"{Q} {M}", A], [file("a")]),
    "a completion with a system": ({"prompt": Q, "completion": A, "system": "S", "image": "a"}, "prompt-completion", ["S", M + Q, A], [file("a")]),
    "messages to complete": (
        {"prompt": [user(image(), Q)], "completion": [ANSWER], "images": ["a"]}, "prompt-completion", [M + Q, A], [file("a")],
    ),
    "alpaca": ({"instruction": Q, "input": "<image> here", "output": A, "image": "a"}, "alpaca", [f"{Q}\n{M} here", A], [file("a")]),
    "alpaca without a mark": ({"instruction": Q, "output": A, "history": [["p", "q"]], "image": "a"}, "alpaca", [f"{M}p", "q", Q, A], [file("a")]),
    "a cell of a csv": ({"prompt": "<image><image>", "completion": A, "images": '["a", "b"]'}, "prompt-completion", [M + M, A], [file("a"), file("b")]),
    "JSON text of messages": ({"messages": json.dumps(chat(user(image(path="a"), Q))["messages"])}, "messages", [M + Q, A], [file("a")]),
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_the_pictures_of_a_row(name: str) -> None:
    row, form, contents, pictures = GOOD[name]
    found = sample(row, form)
    assert [message["content"] for message in found.messages] == contents
    assert [(picture.path, picture.data) for picture in found.pictures] == pictures
    assert [picture.place for picture in found.pictures] == [
        f"picture {n + 1}" for n in range(len(pictures))
    ]
    assert found.instruction is None


def test_the_rows_of_the_docs_are_read() -> None:
    page = Path(__file__).parents[2] / "docs/formats.md"
    section = page.read_text(encoding="utf-8").split("\n## Pictures\n")[1].split("\n## ")[0]
    rows = [json.loads(text) for text in re.findall(r"^```json\n(.*?)\n```", section, re.M)]
    found = [sample(row, "messages" if "messages" in row else "sharegpt") for row in rows]
    assert [len(each.pictures) for each in found] == [2, 1]


@pytest.mark.parametrize("nothing", [None, "", [], {}, [None], [{}]])
def test_a_row_without_a_picture_is_a_text(nothing: Any) -> None:
    found = sample(chat("<image> is a tag, \ufffc a character", images=nothing))
    assert (found.messages[0]["content"], found.pictures) == (
        "<image> is a tag, \ufffc a character",
        (),
    )


@pytest.mark.parametrize("column", ["image", "videos"])
def test_a_text_is_trained_on_alone_and_what_stands_beside_it_named(column: str) -> None:
    unread: set[str] = set()
    source = Source(source="x", format="text")
    row: Row = {"text": "a", column: "https://a.b/c"}
    [read] = convert_row(row, source, where="r", unread=unread).samples
    assert not pictures_of(read)
    assert unread == {column}


@pytest.mark.parametrize("figure", [3, 0.5, False])
def test_a_count_of_pictures_is_none(figure: Any) -> None:
    """Rows of texts alone were read with such a column."""
    rows: dict[str, Row] = {
        "text": {"text": "a"},
        "prompt-completion": {"prompt": "a", "completion": "b"},
        "preference": {"prompt": "a", "chosen": "b", "rejected": "c"},
    }
    for form, row in rows.items():
        source = Source(source="x", format=form)  # type: ignore[arg-type]
        for column in ("images", "picture"):
            read = convert_row({**row, column: figure}, source, where="r").samples
            assert not any(map(pictures_of, read))
    named = Source(source="x", format="prompt-completion", columns={"images": "n"})
    with refuses(DataError, where="r"):
        convert_row({**rows["prompt-completion"], "n": figure}, named, where="r")


def test_a_column_of_another_name() -> None:
    assert sample(chat(Q, photo="a"), images="photo").pictures[0].path == Path("/data/a")
    row = chat(Q, image="a", photo="b")
    [found] = convert_row(row, Source(source="x", columns={"images": "photo"}), where="r").samples
    assert [picture.path for picture in pictures_of(found)] == [Path("b")]


def test_keys_of_a_part_that_nothing_reads_are_told() -> None:
    unread: set[str] = set()
    row = chat(user(image(path="a", max_pixels=9, detail=None), Q))
    convert_row(row, Source(source="x"), where="r", unread=unread)
    assert unread == {"image.max_pixels"}


def test_a_row_of_a_program_has_paths_from_here() -> None:
    [found] = convert_row(chat(Q, image="a.png"), Source(source="x"), where="rows row 1").samples
    assert isinstance(found, Conversation)
    assert found.pictures[0].path == Path("a.png")


TWO = "rows.jsonl:3, message 1"
SYSTEM = {"role": "system", "content": [image(path="a")]}
TOOL = {
    "role": "user",
    "content": [{"type": "tool_result", "tool_use_id": "1", "content": [image(path="a")]}],
}
HTTP = "https://example.com/a.png"
PAIR = {"chosen": "b", "rejected": "c", "prompt": "a"}

# A row, its format, where it is wrong, names of the error, and of its fix.
BAD: dict[str, tuple[Row, str, str, tuple[object, ...], tuple[str, ...]]] = {
    "more pictures than marks": (chat("<image>", images=["a", "b"]), "messages", "", (2, 1), ("<image>",)),
    "fewer pictures than marks": (chat("<image>", ANSWER, "<image>", images=["a"]), "messages", "", (1, 2), ("<image>",)),
    "parts that have no picture": (chat(user(image(), image()), images=["a"]), "messages", "", (1, 2), ("<image>",)),
    "own pictures beside a column": (chat(user(image(path="b")), images=["a"]), "messages", "", (1, 0), ("<image>",)),
    "a part alone": (chat(user(image(), Q)), "messages", "", ("image", "images"), ("path",)),
    "an index out of order": (chat(user(image(index=1), image(index=0)), images=["a", "b"]), "messages", f"{TWO} picture 1", (1,), ()),
    "a picture twice": (chat(user(image(path="a", url=URI))), "messages", "", ("path", "url"), ()),
    "a picture of the system": (chat(SYSTEM, Q), "messages", TWO, ("system",), ("user",)),
    "a picture in a system column": (chat(Q, system=[image(path="a")]), "messages", "rows.jsonl:3, system", ("system",), ("user",)),
    "a picture of an answer": (chat(Q, {"role": "assistant", "content": [image(path="a")]}), "messages", "rows.jsonl:3, message 2", ("assistant",), ("user",)),
    "a picture of a tool": (chat(Q, ANSWER, TOOL), "messages", "rows.jsonl:3, message 3", ("tool",), ("user",)),
    "a mark in an answer": (pairs(Q, "<image>", image="a"), "sharegpt", "rows.jsonl:3, message 2", ("assistant", "<image>"), ("user",)),
    "a mark in a system text": (chat({"role": "system", "content": "<image>"}, Q, image="a"), "messages", TWO, ("system",), ("user",)),
    "the mark itself": (chat("a \ufffc b <image>", images=["a"]), "messages", "", ("U+FFFC",), ("delete",)),
    "the mark beside a part": (chat(user(image(path="a"), "\ufffc")), "messages", "", ("U+FFFC",), ("delete",)),
    "the mark in an answer": (pairs("<image>", "\ufffc", image="a"), "sharegpt", "", ("U+FFFC",), ("delete",)),
    "a film in a part": (chat(user({"type": "video", "video": "a.mp4"})), "messages", TWO, ("video",), ("part",)),
    "sound in a part": (chat(user({"type": "input_audio", "input_audio": {}})), "messages", TWO, ("input_audio",), ("part",)),
    "a column of films": (chat(Q, videos=["a.mp4"]), "messages", "", ("videos",), ("videos",)),
    "a column of sound": (pairs(Q, A, audio={"path": "a.wav"}), "sharegpt", "", ("audio",), ("audio",)),
    "a key of a turn": (chat({"role": "user", "content": Q, "images": ["a"]}), "messages", "", ("images",), ("part",)),
    "a URL": (chat(user(image(url=HTTP))), "messages", "", (HTTP, "network"), ("download",)),
    "a URL of OpenAI's": (chat(user({"type": "image_url", "image_url": {"url": HTTP}})), "messages", "", (HTTP,), ("download",)),
    "a URL of Anthropic's": (chat(user(image(source={"type": "url", "url": HTTP}))), "messages", "", (HTTP,), ("download",)),
    "URLs in a column": (chat("<image><image>", images=["a", HTTP]), "messages", "", ("picture 2", HTTP), ("download",)),
    "a bucket": (pairs("<image>", A, image="s3://b/a.png"), "sharegpt", "", ("s3://b/a.png",), ("download",)),
    "a number": (chat("<image>", images=[7]), "messages", "", ("picture 1",), ("path",)),
    "a null among pictures": (chat("<image><image>", images=["a", None]), "messages", "", ("picture 2", "null"), ("path",)),
    "a list of lists": (chat("<image>", images=[["a"]]), "messages", "", ("picture 1",), ("path",)),
    "an object without a picture": (chat(user(image(source={"type": "file", "file_id": "f"}))), "messages", "", ("null",), ("path",)),
    "broken base64": (chat(user(image(base64="A"))), "messages", "", ("base64",), ("again",)),
    "a broken data URI": (chat("<image>", image="data:image/png;base64,A*B="), "messages", "", ("picture 1", "base64"), ("again",)),
    "a data URI of text": (chat("<image>", image="data:image/svg+xml,<svg/>"), "messages", "", ("base64",), ("path",)),
    "a list as Python prints it": ({"prompt": Q, "completion": A, "images": "['a', 'b']"}, "prompt-completion", "", ("images",), ("to_json",)),
    "two columns": (chat(Q, image="a", images=["b"]), "messages", "", ("image", "images"), ("columns",)),
    "a pair": ({**PAIR, "image": "a"}, "preference", "", ("image", "preference"), ("delete",)),
    "a pair of messages": (
        {"prompt": [user(image(path="a"))], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "B"}]}, "preference", "", ("image", "preference"), ("delete",),
    ),
    "a labeled answer": ({"prompt": "a", "completion": "b", "label": True, "images": ["a"]}, "feedback", "", ("images", "feedback"), ("delete",)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_is_refused(name: str) -> None:
    row, form, where, names, fix = BAD[name]
    with pytest.raises(DataError) as refused:
        sample(row, form)
    assert refused.value.where.startswith("rows.jsonl:3")
    check_error(refused.value, where=where or None, names=names)
    assert all(word in refused.value.fix for word in fix), refused.value.fix
    assert all(len(text) < 1000 for text in refused.value.text().splitlines())


# Pictures that nothing reads ----------------------------------------------------------------------

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
        ("a mark behind the question", chat("What is it? <image>", images=None), {"picture_mark": "<image>"}),
        ("a mark and no pictures", chat("Picture 1: <image>\nColor?", images=[]), {"picture_mark": "<image>"}),
        ("a mark and null", chat("Hi", ANSWER, "<image>", images=[None]), {"picture_mark": "<image>"}),
        ("a mark in a completion", {"prompt": "<image>Color?", "completion": "red"}, {"picture_mark": "<image>"}),
        ("a mark in a text", {"text": "<image>\nA red square"}, {"picture_mark": "<image>"}),
        ("a mark within a sentence", chat("Is <image> red?"), {}, {"picture_mark": "<image>"}),
        ("a numbered mark", chat("<image 1> Color?"), {"picture_mark": "<image 1>"}),
        ("Phi's mark", chat("<|image_1|>\nColor?"), {"picture_mark": "<|image_1|>"}),
        ("InternLM's mark", chat("<ImageHere>Color?"), {"picture_mark": "<ImageHere>"}),
        ("a mark in Chinese", chat("图片：<image> 是什么？"), {"picture_mark": "<image>"}),
        ("a picture elsewhere in XML", chat("<image>absent.png</image>\nColor?"), {}),
        ("InternVL's mark", chat("<img><IMG_CONTEXT></img>\nColor?"), {}, {"picture_mark": "<IMG_CONTEXT>"}),
        ("Qwen2-VL's mark", chat("<|vision_start|><|image_pad|><|vision_end|>Color?"), {"picture_mark": "<|image_pad|>"}),
        ("Pixtral's mark", chat("[IMG]Color?"), {"picture_mark": "[IMG]"}),
        ("a link that is named so", chat("[IMG](https://a.b) Color?"), {}),
        ("Phi's other mark", chat("<|img_1|>\nColor?"), {"picture_mark": "<|img_1|>"}),
        ("a video", chat("<video>\nWhat happens?"), {"picture_mark": "<video>"}),
        ("a video in HTML", chat("<video><source src='a.mp4'></video> plays nothing. Why?"), {}),
        ("sounds", chat("<|audio|>\nWhat is said?"), {"picture_mark": "<|audio|>"}),
        ("a nested file", chat(Q, meta={"img": "pictures/red.png"}), {"picture_column": "meta"}),
        ("a mark of the system", chat({"role": "system", "content": "Look: <image>"}, Q), {"picture_mark": "<image>"}),
        ("a screenshot of a tool", chat(Q, *SHOT), {"picture_mark": "<image>"}),
        ("a mark that the system explains", chat({"role": "system", "content": "A picture is written <image> here"}, Q), {}),
        ("a mark of an answer", chat("Draw it", {"role": "assistant", "content": "<image>"}), {}),
        ("a mark beside a part", chat(user(image(path="pictures/red.png"), "<image>\nColor?")), {"picture_mark": "<image>"}),
        ("a mark that is explained beside a picture", chat(user(image(path="pictures/red.png"), "Is <image> a tag?")), {}),
        ("a column of URIs", chat(Q, photo=URI), {"picture_column": "photo"}),
        ("a column of base64", chat(Q, photo=RED64), {"picture_column": "photo"}),
        ("a second file", chat(Q, photos=["", "file:pictures/red.png", "pictures/red.png"]), {"picture_column": "photos"}),
        ("a file's URI", chat(Q, photo="file://pictures/red.png"), {"picture_column": "photo"}),
        *(
            (f"{form} bytes", chat(Q, photo={"bytes": encoded(noise(), form), "path": None}), {"picture_column": "photo"})
            for form in ("WEBP", "GIF", "TIFF")
        ),
        ("a column of files", chat(Q, path="pictures/red.png"), {"picture_column": "path"}),
        ("a list of files", chat(Q, photos=["pictures/red.png"]), {"picture_column": "photos"}),
        ("a column of structs", chat(Q, jpg={"bytes": RED, "path": "a.png"}), {"picture_column": "jpg"}),
        ("a column of bytes", chat(Q, jpg=encoded(noise(), "JPEG")), {"picture_column": "jpg"}),
        ("an image folder", {"file_name": "pictures/blue.png", "text": "blue"}, {"picture_column": "file_name"}),
        ("a URL of another picture", chat(Q, url="https://a.b/pictures/red.png"), {}),
        ("a file that is not there", chat(Q, path="absent.png"), {}),
        ("another file", chat(Q, path="pictures"), {}),
        ("a deep column", chat(Q, meta=json.loads("[" * 900 + "]" * 900)), {}),
        ("a long name", chat(Q, path="a" * 5000 + ".png"), {}),
        ("sound", chat(Q, sound={"bytes": b"RIFF....WAVE", "path": "a.wav"}), {}),
        ("a picture that is read", chat("<image>Color?", images=["pictures/red.png"], path="pictures/red.png"), {}),
        ("HTML", chat('Why is <img src="pictures/red.png"> not shown? <img>'), {}),
        ("a tag of SVG", chat("What does the <image> tag do?", ANSWER, "And `<image>`?"), {}),
        ("XML", chat("<rss>\n<image>\n<url>https://a.b</url>\n</image>\n<bbox>1 2</bbox></rss>"), {}),
        ("a program's usage", pairs("How do I start it?", "docker run <image>"), {}),
        ("a generic type", chat("List<Image> list;\n<Image>"), {}),
        ("a document", {"text": f"# A\n{NAMED}\ndocker run <image>"}, {}),
    ]
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_a_picture_that_nothing_reads(name: str, folder: Path) -> None:
    row, *expected = LOST[name]
    form = next(form for form in ("messages", "conversations", "prompt", "text") if form in row)
    form = {"conversations": "sharegpt", "prompt": "prompt-completion"}.get(form, form)
    source = Source(source="rows.jsonl", format=form)  # type: ignore[arg-type]
    place = Place("rows.jsonl:3", folder)
    [found] = convert_row(row, source, where=place).samples
    for sees in (False, True):
        assert dict(find_unread_pictures(row, found, place, sees=sees)) == expected[sees]


# Files of rows ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "red.png").write_bytes(RED)
    (tmp_path / "pictures" / "blue.png").write_bytes(BLUE)
    return tmp_path


def seen(path: Path, form: str = "", **columns: str) -> list[bytes]:
    """The bytes of all pictures of a file or folder, as `train` finds them."""
    source = Source(source=str(path), columns=columns)
    rows = read_rows(source)
    layout = detect(rows, source)
    assert form in ("", layout.format)
    assert layout.has_pictures
    source = Source(source=str(path), format=layout.format, columns=layout.renamed)
    found = []
    for i in range(len(rows)):
        for each in convert_row(rows[i], source, where=rows.where(i)).samples:
            found += [read_picture(picture, rows.where(i)) for picture in pictures_of(each)]
    return found


def test_a_csv_beside_a_folder_of_pictures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "image,question,answer\npictures/red.png,Color?,red\npictures/blue.png,Color?,blue\n,Hi,Ho\n"
    (folder / "answers.csv").write_text(rows)
    monkeypatch.chdir("/")
    assert seen(folder / "answers.csv", "prompt-completion") == [RED, BLUE]
    # The folder that holds both.
    assert seen(folder) == [RED, BLUE]
    assert read_rows(Source(source=str(folder))).skipped == ""


def test_a_column_of_another_name_with_pictures(folder: Path) -> None:
    (folder / "a.csv").write_text("path,question,answer\n,Hi,Ho\npictures/red.png,Color?,red\n")
    (folder / "b.csv").write_text("file_name,text\npictures/red.png,red\n")
    assert seen(folder / "a.csv", "prompt-completion", images="path") == [RED]
    with pytest.raises(DataError) as refused:
        seen(folder / "b.csv", images="file_name")
    assert "=file_name" not in refused.value.fix


def test_paths_are_relative_to_the_part_of_a_data_set_that_names_them(folder: Path) -> None:
    for name, picture in (("train", RED), ("other", BLUE)):
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes(picture)
        (folder / name / "metadata.jsonl").write_text(
            json.dumps({"prompt": Q, "completion": name, "image": "a.png"}) + "\n"
        )
    assert seen(folder) == [BLUE, RED]


def test_the_place_of_a_missing_picture(folder: Path) -> None:
    (folder / "a.jsonl").write_text(json.dumps(chat(Q, image="red.png")) + "\n")
    with refuses(DataError, where=f"{folder}/a.jsonl:1, picture 1", names=[folder / "red.png"]):
        seen(folder / "a.jsonl")


PICTURE_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize("many", [False, True])
def test_parquet_as_the_hub_has_it(folder: Path, many: bool) -> None:
    values: list[Any] = [
        {"bytes": RED, "path": "x.png"},
        {"bytes": None, "path": "pictures/blue.png"},
        None,
    ]
    kind = pa.list_(PICTURE_STRUCT) if many else PICTURE_STRUCT
    column = pa.array([[v] if v and many else v for v in values], kind)
    table = pa.table(
        {
            "images" if many else "image": column,
            "question": [Q] * 3,
            "answer": ["red", "blue", "none"],
        }
    )
    pq.write_table(table, folder / "rows.parquet")
    assert seen(folder / "rows.parquet") == [RED, BLUE]
    rows = read_rows(Source(source=str(folder / "rows.parquet")))
    assert count_characters(rows[0]) == len("x.png") + len(Q) + len("red")


def test_parquet_of_messages_whose_parts_have_the_pictures(folder: Path) -> None:
    part = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", PICTURE_STRUCT)])
    turn = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
    turns = [
        user(image(image={"bytes": RED, "path": None}), Q),
        {"role": "assistant", "content": [{"type": "text", "text": A}]},
    ]
    pq.write_table(
        pa.table({"messages": pa.array([turns], pa.list_(turn))}), folder / "rows.parquet"
    )
    assert seen(folder / "rows.parquet", "messages") == [RED]


def test_a_picture_of_a_data_set_on_the_hub_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "images": datasets.List(datasets.Image()),
            "q": datasets.Value("string"),
        }
    )
    picture = {"bytes": RED, "path": "x.png"}
    rows = [{"image": picture, "images": [picture, picture], "q": Q}]
    loaded = datasets.DatasetDict(train=datasets.Dataset.from_list(rows, features=features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keys: loaded)
    read = read_rows(Source(source="someone/pictures"))
    assert read[0] == rows[0]
    assert isinstance(read.where(0), Place)


def test_json_of_a_data_set_on_the_hub_is_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {
        "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Json()}),
        "tools": datasets.Json(),
        "prompt": datasets.Json(),
        "images": datasets.List({"of": datasets.Image()}),
    }
    messages = [{"role": "user", "content": 5}, {"role": "user", "content": [{"text": "a"}]}]
    row = {"messages": messages, "tools": [{"name": "f"}], "prompt": "a text"}
    row["images"] = [{"of": {"bytes": RED, "path": "x.png"}}]
    loaded = datasets.DatasetDict(
        train=datasets.Dataset.from_list([row], features=datasets.Features(features))
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **keys: loaded)
    assert read_rows(Source(source="someone/rows"))[0] == row


def test_a_file_of_a_data_set_on_the_hub_is_not_here() -> None:
    source = Source(source="someone/pictures", format="messages")
    with refuses(DataError, where="someone/pictures train row 1", fix=["someone/pictures"]):
        convert_row(chat(Q, image="a.png"), source, where=Place("someone/pictures train row 1"))


def test_rows_of_a_program_keep_their_pictures(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (2, 2))
    rows = [
        chat(f"<image>{Q}", images=[value])
        for value in (RED, {"bytes": RED}, Image.open(io.BytesIO(RED)), cmyk)
    ]
    found = seen(keep_rows(rows, tmp_path))
    assert found[:2] == [RED, RED]
    assert open_picture(found[2]).getpixel((0, 0)) == (255, 0, 0)
    assert open_picture(found[3]).size == (2, 2)


def test_rows_of_a_program_name_pictures_from_its_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    name = next(file.relative_to(folder) for file in sorted(folder.rglob("*.png")))
    data = name.read_bytes()
    rows = [
        chat(f"<image>{Q}", images=str(name)),
        chat(f"<image>{Q}", images=[{"path": name}]),
        chat(user(image(path=str(name)), Q)),
    ]
    assert seen(keep_rows(rows, folder / "run")) == [data] * 3
    tool = {"arguments": {"path": str(name), "image": str(name)}}
    kept = read_rows(Source(source=str(keep_rows([tool], folder / "run"))))[0]
    assert kept == tool


def test_an_opened_photo_of_a_program_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    photo = Image.open(io.BytesIO(encoded(noise(size=(40, 20)), "JPEG", exif=exif)))
    [found] = seen(keep_rows([chat(f"<image>{Q}", images=[photo])], tmp_path))
    assert open_picture(found).size == (20, 40)


@pytest.mark.parametrize("mode", ["YCbCr", "LAB", "HSV", "PA", "RGBa", "RGBX"])
def test_a_picture_of_a_program_may_have_any_colours(mode: str, tmp_path: Path) -> None:
    image = Image.new(mode, (3, 2))
    [found] = seen(keep_rows([chat(f"<image>{Q}", images=[image])], tmp_path))
    assert open_picture(found).size == (3, 2)


def test_a_picture_of_a_program_that_is_numbers_or_broken_is_refused(tmp_path: Path) -> None:
    torn = Image.open(io.BytesIO(encoded(noise(size=(40, 20)))[:200]))
    for image in (Image.new("F", (3, 2)), Image.new("I", (3, 2)), torn):
        with refuses(DataError, names=["rows[0]"]):
            keep_rows([chat(f"<image>{Q}", images=[image])], tmp_path)


@pytest.mark.parametrize(
    "value", [URI, {"base64": RED64}, {"type": "base64", "data": RED64}, {"bytes": RED}, RED]
)
def test_a_picture_has_no_characters(value: Any) -> None:
    assert count_characters({"image": value, "text": "four"}) == 4


# Rows that are compared ---------------------------------------------------------------------------


def about(picture: Any, answer: str, question: str = "Which color has the large square?") -> Row:
    return {"prompt": question, "completion": answer, "image": picture}


def faults(*rows: Row) -> Any:
    source = Source(source="x", format="prompt-completion")
    return find_faults([row_text(row, source) for row in rows])


def test_rows_about_different_pictures_are_different(folder: Path) -> None:
    red, blue = (str(folder / "pictures" / name) for name in ("red.png", "blue.png"))
    found = faults(
        about(red, "It is red."), about(blue, "It is blue."), about({"bytes": BLUE}, "It is red.")
    )
    assert (found.contradictions, found.near_duplicates) == ([[1, 2]], [[1, 2]])
    same = faults(
        about(red, "It is red."), about(blue, "It is red."), about({"bytes": RED}, "It is red!")
    )
    assert (same.near_duplicates, same.shared) == ([[0, 2]], [[0, 2]])
    lost = faults(
        about("/absent/a", "It is red."),
        about("/absent/b", "It is blue."),
        about("/absent/a", "It is red."),
    )
    assert (lost.near_duplicates, lost.contradictions) == ([[0, 2]], [])


def test_rows_of_files_are_compared_by_their_pictures(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNESMITH_CACHE", str(folder / "cache"))
    rows = [
        about(f"pictures/{name}.png", "It is one of the usual colors.") for name in ("red", "blue")
    ] * 2
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(source=str(folder / "rows.jsonl"), format="prompt-completion")
    splits = read_checked_splits(Data(train=(source,)), seed=0)
    assert splits.findings is not None
    assert splits.findings.near_duplicates == [[0, 2], [1, 3]]


# Recipes ------------------------------------------------------------------------------------------


def test_a_recipe_for_rows_with_pictures_has_a_model_that_sees(folder: Path) -> None:
    rows = "image,question,answer\npictures/red.png,Color?,red\n,Hi,Ho\n"
    (folder / "a.csv").write_text(rows)
    look = draft_recipe("someone/model", str(folder / "a.csv"))
    assert look.chosen["model.vision"] is True
    assert look.run.model.vision
    assert look.chosen["data.train.columns"] == {
        "prompt": "question",
        "completion": "answer",
        "images": "image",
    }
    look = draft_recipe("someone/model", str(folder / "a.csv"), ["model.vision=false"])
    assert "model.vision" not in look.chosen
    assert not look.run.model.vision
    (folder / "b.csv").write_text("question,answer\nHi,Ho\n")
    assert "model.vision" not in draft_recipe("someone/model", str(folder / "b.csv")).chosen


def test_the_recipe_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a.csv").write_text("image,question,answer\npictures/red.png,Color?,red\n")
    monkeypatch.chdir(folder)
    config = json.loads(Gemma3Config().to_json_string(use_diff=False))
    monkeypatch.setattr(fetch, "config_in_package", lambda model: config)
    made = make_recipe("someone/sees", "a.csv", on_paper=True)
    assert made.run.model.vision
    lines = made.text.splitlines()
    [at] = [n for n, line in enumerate(lines) if "vision:" in line]
    assert "pictures" in "".join(lines[at - 1 : at + 1])
