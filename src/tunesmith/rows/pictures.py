"""Decoding of pictures: their size, their digest, and their pixels, rotated as EXIF requires.

Each picture is decoded once during tokenization. If a picture is unusable, an error with the file
and line of its row is therefore raised before training starts. Pictures are never downloaded.
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

from tunesmith.errors import DataError, first_line
from tunesmith.host.shell import shell_path
from tunesmith.rows.samples import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

# Maximum size of a picture file. The limit exists because a row can contain the path of a large
# file that is no picture.
MAX_PICTURE_BYTES = 256 << 20
# Maximum number of pixels. The limit exists because a file of a few kilobytes can declare so many
# pixels that decoding it needs more memory than the machine has.
MAX_PICTURE_PIXELS = 100_000_000
# Maximum aspect ratio (long side / short side). The processors of Qwen's models reject larger
# ratios.
MAX_PICTURE_RATIO = 200
# File formats of photos, screenshots and scans. Pillow's readers for other formats can start
# programs or read videos.
_PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
# EXIF tag of the orientation. _TURNS maps its value to the member of Pillow's `Image.Transpose`
# that shows the picture upright.
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
# Pillow's image modes whose pixels are plain numbers without a defined black and white.
_NUMBER_MODES = ("I;16S", "I;32", "F")
# Text of the fix in errors about pictures that cannot be decoded or used for training.
_CONVERT = "save the picture as a PNG or JPEG file of one frame, or delete the row"


def picture_place(picture: Picture, where: str) -> str:
    """Return the location of a picture for error messages, such as "rows.jsonl:3, picture 2"."""
    return f"{where}, {picture.place}" if where else picture.place


def read_picture(picture: Picture, where: str) -> bytes:
    """Return the bytes of a picture. Raise DataError if its file cannot be read or is empty.

    Args:
        where: file and line of the picture's row.
    """
    place = picture_place(picture, where)
    path = picture.path
    data = picture.data if path is None else _read_file(path, place)
    if not data:
        raise DataError(
            f"{path or 'the picture'} is empty",
            where=place,
            fix="save the picture again, or delete the row",
        )
    return data


def _read_file(path: Path, place: str) -> bytes:
    why = "paths in a file of rows are relative to the folder of this file"
    # `is_file` raises OSError if the name is longer than the file system allows.
    try:
        if path.is_file():
            size = path.stat().st_size
            if size <= MAX_PICTURE_BYTES:
                # Do not read files of size 0, because files in /proc have this size and can be
                # endless.
                return path.read_bytes() if size else b""
            why = f"a picture can have at most {MAX_PICTURE_BYTES >> 20} MiB"
    except (OSError, ValueError) as error:
        why = first_line(error)
    raise DataError(
        f"{path} is not a picture file",
        where=place,
        why=why,
        fix=f"add this picture, correct its path (`ls -l {shell_path(path)}`), or delete the row",
    )


def picture_digest(data: bytes) -> int:
    """Return the first 63 bits of the SHA-256 of a picture's bytes. 63 bits fit into an int64."""
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") >> 1


def picture_size(data: bytes, where: str = "") -> tuple[int, int]:
    """Return the width and height of a picture after the rotation that its EXIF data requires.

    Args:
        data: the bytes of the picture file.
        where: the place of the picture, see `picture_place`.

    Raises:
        DataError: the picture cannot be decoded, or cannot be trained on.
    """
    image = _open(data, where)
    width, height = image.size
    if _turn_of(image) > 4:
        width, height = height, width
    # Decode a JPEG at 1/8 of its size. This checks all bytes and takes a third of the time.
    image.draft("RGB", (1, 1))
    _load(image, where)
    return width, height


def open_picture(data: bytes, where: str = "", max_pixels: int | None = None) -> Image:
    """Decode a picture to RGB, rotate it as its EXIF data requires, and scale it down.

    Transparent pixels become white.

    Args:
        data: the bytes of the picture file.
        where: the place of the picture, see `picture_place`.
        max_pixels: the maximum number of pixels (`data.image_max_pixels`). None: do not scale.

    Raises:
        DataError: the picture cannot be decoded, or cannot be trained on.
    """
    image = _open(data, where)
    turn = _turn_of(image)
    _load(image, where)
    try:
        image = _to_rgb(image)
        if turn in _TURNS:
            image = image.transpose(_pil().Transpose[_TURNS[turn]])
        size = scaled_size(image.size, max_pixels)
        if size != image.size:
            image = image.resize(size, _pil().Resampling.BICUBIC)
    except (OSError, ValueError) as error:
        raise _unreadable_picture(error, where) from error
    return image


def scaled_size(size: tuple[int, int], max_pixels: int | None) -> tuple[int, int]:
    """Return the width and height of a picture of size `size` after it is scaled down to at most
    `max_pixels` pixels.
    """
    width, height = size
    if max_pixels is None or width * height <= max_pixels:
        return size
    scale = math.sqrt(max_pixels / (width * height))
    short = max(1, int(min(size) * scale))
    # Limit the long side, so that rounding does not make the aspect ratio larger than processors
    # accept.
    long = min(int(max(size) * scale), MAX_PICTURE_RATIO * short, max_pixels // short)
    return (long, short) if width > height else (short, long)


@cache
def _pil() -> Any:
    """Return Pillow's `Image` module with its file formats.

    It is imported only when it is needed.
    """
    from PIL import Image

    Image.init()
    # Disable Pillow's warning about large pictures, because `_open` checks MAX_PICTURE_PIXELS
    # instead.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    return Image


def _open(data: bytes, where: str) -> Image:
    """Open a picture and read its header. Raise DataError if it cannot be trained on."""
    pil = _pil()
    formats = [name for name in _PICTURE_FORMATS if name in pil.OPEN]
    try:
        image: Image = pil.open(io.BytesIO(data), formats=formats)
        # An MPO file has several frames but is not animated: phones add a second view of the photo.
        is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
    except Exception as error:
        # Pillow raises many types of exceptions for broken bytes.
        raise _unreadable_picture(error, where) from error
    width, height = image.size
    why = ""
    if width * height > MAX_PICTURE_PIXELS:
        why = f"a picture can have at most {MAX_PICTURE_PIXELS:,} pixels"
    elif max(image.size) > MAX_PICTURE_RATIO * min(image.size):
        why = f"one side can be at most {MAX_PICTURE_RATIO} times as long as the other"
    elif image.mode.startswith(_NUMBER_MODES) or (image.mode, image.format) == ("I", "TIFF"):
        why = "the file does not define which of its pixel values is white"
    elif is_animated:
        why = "pictures must have one frame, but this picture is animated or has several pages"
    if why:
        what = f"a {image.format} picture of {width} x {height} pixels (mode {image.mode})"
        raise DataError(f"{what} cannot be used for training", where=where, why=why, fix=_CONVERT)
    return image


def _unreadable_picture(error: Exception, where: str) -> DataError:
    return DataError("the picture cannot be read", where=where, why=first_line(error), fix=_CONVERT)


def _load(image: Image, where: str) -> None:
    """Decode the pixels. Raise DataError if the file is truncated or broken."""
    try:
        image.load()
    except Exception as error:
        # Pillow raises many types of exceptions for broken bytes.
        raise _unreadable_picture(error, where) from error


def _turn_of(image: Image) -> int:
    """Return the EXIF orientation (1 to 8) of a picture. Its pixels must not be decoded yet."""
    # Pillow already rotates the size and the pixels of a TIFF file.
    if image.format == "TIFF":
        return 1
    # Call `getexif` of the base class: for a PNG file, the method of the subclass decodes all
    # pixels, because EXIF data can follow the pixels.
    try:
        turn = _pil().Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:
        return 1  # Ignore broken EXIF data, as image viewers do: the pixels can still be valid.
    return turn if turn in _TURNS else 1


def _to_rgb(image: Image) -> Image:
    """Convert a decoded picture to RGB. Transparent pixels are blended with white."""
    if image.mode.startswith("I"):
        # Keep the high byte of 16-bit pixels, because Pillow's conversion clips values above 255.
        pixels = np.clip(np.asarray(image) >> 8, 0, 255)
        image = _pil().fromarray(pixels.astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = _pil().new("RGBA", image.size, "white")
    return _pil().alpha_composite(white, image).convert("RGB")
