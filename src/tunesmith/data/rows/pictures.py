"""A picture's bytes -> its size, its digest, and its pixels, rotated as EXIF says.

Each picture is decoded once while rows become tokens. A picture that cannot be trained on is an
error there, which names its row, so that it does not stop the run later. Nothing is fetched from
the network.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.data.rows.samples import Picture
from tunesmith.errors import DataError, first_line
from tunesmith.host.shell import shell_path

if TYPE_CHECKING:
    from PIL.Image import Image

# Of a file that a row names; a data set may be named by mistake.
MAX_PICTURE_BYTES = 256 << 20
# A file of some kilobytes may say that it has more, and would fill the memory.
MAX_PICTURE_PIXELS = 100_000_000
# Of its sides; the processors of Qwen's models refuse more.
MAX_PICTURE_RATIO = 200
# Those of photos, screens and scans; other readers of PIL start programs, or hold films.
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# EXIF's tag 274, as any reader of pictures shows it: the turns of `Image.Transpose`.
_ORIENTATION = 274
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
# Modes of pixels that are numbers.
_NUMBER_MODES = ("I;16S", "I;32", "F")
_CONVERT = "write it again as a PNG or JPEG file of one frame, or delete the row"


def picture_place(picture: Picture, where: str) -> str:
    """The place of a picture in the row at `where`, which errors about the row begin with."""
    return f"{where}, {picture.place}" if where else picture.place


def read_picture(picture: Picture, where: str) -> bytes:
    """The bytes of a picture of the row at `where`; DataError where there are none."""
    place = picture_place(picture, where)
    data = picture.data if picture.path is None else _read_file(picture.path, place)
    if not data:
        what = f"{picture.path or 'the picture'} is empty"
        raise DataError(what, where=place, fix="write the picture again, or delete the row")
    return data


def _read_file(path: Path, place: str) -> bytes:
    why = "paths in a file of rows are relative to the folder of this file"
    # An OSError of `is_file` is one too: a name may be longer than the file system allows.
    try:
        if path.is_file():
            size = path.stat().st_size
            if size <= MAX_PICTURE_BYTES:
                # Files of /proc have the size 0, and reading one may never end.
                return path.read_bytes() if size else b""
            why = f"a picture has at most {MAX_PICTURE_BYTES >> 20} MiB"
    except (OSError, ValueError) as error:
        why = first_line(error)
    fix = f"ls -l {shell_path(path)}   # put the picture there, fix the path, or delete the row"
    raise DataError(f"{path} is not a picture's file", where=place, why=why, fix=fix)


def picture_digest(data: bytes) -> int:
    """63 bits of the sha256 of a picture's bytes."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


def picture_size(data: bytes, where: str = "") -> tuple[int, int]:
    """Return width and height of a picture as it is shown.

    Args:
        where: the place of the picture, see `picture_place`.

    Raises:
        DataError: the picture cannot be decoded, or cannot be trained on.
    """
    image = _open(data, where)
    width, height = image.size
    if _turn_of(image) > 4:
        width, height = height, width
    # A JPEG is decoded at an eighth of its size: all bytes are read, in a third of the time.
    image.draft("RGB", (1, 1))
    _load(image, where)
    return width, height


def open_picture(data: bytes, where: str = "", max_pixels: int | None = None) -> Image:
    """A picture in RGB as it is shown, scaled down to `data.image_max_pixels`.

    Transparent pictures stand on white. DataError as `picture_size`.
    """
    image = _open(data, where)
    turn = _turn_of(image)
    _load(image, where)
    try:
        image = _to_rgb(image)
        if turn in _TURNS:
            image = image.transpose(_pil().Transpose[_TURNS[turn]])
        size = scaled_size(image.size, max_pixels)
        return image if size == image.size else image.resize(size, _pil().Resampling.BICUBIC)
    except (OSError, ValueError) as error:
        raise _unreadable_picture(error, where) from error


def scaled_size(size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    """Width and height of a picture once it is scaled down to at most so many pixels."""
    if max_pixels is None or size[0] * size[1] <= max_pixels:
        return size
    scale = math.sqrt(max_pixels / (size[0] * size[1]))
    short = max(1, int(min(size) * scale))
    # Rounding must not make a long picture one that processors refuse.
    long = min(int(max(size) * scale), MAX_PICTURE_RATIO * short, max_pixels // short)
    return (long, short) if size[0] > size[1] else (short, long)


@cache
def _pil() -> Any:
    """PIL's module, with the readers of the formats; commands without pictures do not load it."""
    from PIL import Image

    Image.init()
    # It would warn of pictures that are within the limit here.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return Image


def _open(data: bytes, where: str) -> Image:
    """A picture whose header is read, and can be trained on."""
    pil = _pil()
    formats = [name for name in _PICTURE_FORMATS if name in pil.OPEN]
    try:
        image: Image = pil.open(io.BytesIO(data), formats=formats)
        # Phones write a second view of a photo behind it (MPO).
        is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception as error:
        # Its readers raise whatever broken bytes lead to.
        raise _unreadable_picture(error, where) from error
    width, height = image.size
    why = ""
    if width * height > MAX_PICTURE_PIXELS:
        why = f"a picture may have {MAX_PICTURE_PIXELS:,} pixels"
    elif max(image.size) > MAX_PICTURE_RATIO * min(image.size):
        why = f"one side may be {MAX_PICTURE_RATIO} times the other"
    elif image.mode.startswith(_NUMBER_MODES) or (image.mode, image.format) == ("I", "TIFF"):
        why = "its pixels are numbers, and nothing says which of them is white"
    elif is_animated:
        why = "a picture is one frame, and this one is animated or has several pages"
    if why:
        what = f"a {image.format} picture of {width} x {height} pixels (mode {image.mode})"
        raise DataError(f"{what} is not trained on", where=where, why=why, fix=_CONVERT)
    return image


def _unreadable_picture(error: Exception, where: str) -> DataError:
    what = "the picture cannot be read"
    return DataError(what, where=where, why=first_line(error), fix=_CONVERT)


def _load(image: Image, where: str) -> None:
    """Decode a picture; DataError where it is cut off or broken."""
    try:
        image.load()
    except Exception as error:
        # As in `_open`.
        raise _unreadable_picture(error, where) from error


def _turn_of(image: Image) -> int:
    """EXIF's orientation of a picture that is not decoded yet."""
    # PIL turns the pixels of a TIFF file itself, and its size in the header.
    if image.format == "TIFF":
        return 1
    # The class's own method decodes a PNG picture, in case that EXIF stands behind the pixels.
    try:
        turn = _pil().Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:
        return 1  # broken EXIF beside a whole picture, which viewers ignore too
    return turn if turn in _TURNS else 1


def _to_rgb(image: Image) -> Image:
    """The pixels of a decoded picture as a screen shows them on white."""
    if image.mode.startswith("I"):
        # 16 bits: PIL would cut off what is above 255.
        image = _pil().fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = _pil().new("RGBA", image.size, "white")
    return _pil().alpha_composite(white, image).convert("RGB")
