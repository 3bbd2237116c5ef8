"""Rows that a program passes to `train`. They are stored in the run directory for resumed runs."""

import base64
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from PIL import Image, ImageOps

from tunesmith.config.row_formats import PICTURE_NAMES
from tunesmith.errors import DataError
from tunesmith.host.files import write_atomically
from tunesmith.rows.picture_places import PICTURE_KEYS, PICTURE_PARTS

_ROWS_ARGUMENT = "train(rows=...)"
# Pillow's image modes that the PNG format supports.
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def keep_rows(rows: object, output_dir: Path) -> Path:
    """Write rows as JSON lines into a folder of the run directory. Return the file.

    The file's name contains a hash of its content. Therefore a later call with the same rows gives
    the same file and resumes the run. A call with other rows writes a different file, and the run
    in this folder then rejects the changed data.

    Args:
        rows: mappings, a data frame of pandas or polars, or a `datasets.Dataset`.

    Raises:
        DataError: the rows have another type, or JSON does not support a value.
    """
    lines = []
    for index, row in enumerate(mappings(rows, _ROWS_ARGUMENT)):
        try:
            values = {name: _plain(value, name in PICTURE_NAMES) for name, value in row.items()}
            lines.append(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")
        # OSError is raised if a picture cannot be decoded.
        except (TypeError, ValueError, OSError) as error:
            raise DataError(
                f"rows[{index}] has a value that JSON does not support: {error}",
                where=_ROWS_ARGUMENT,
                fix="convert the value to text or a number",
            ) from error
    if not lines:
        raise DataError("no rows were passed", where=_ROWS_ARGUMENT, fix="pass at least one row")
    text = "".join(lines)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    file = output_dir / "data" / f"rows-{digest}.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    return file


def mappings(rows: object, argument: str) -> Iterator[Mapping[Any, Any]]:
    """Yield each row of a list or a data set as a mapping.

    Args:
        argument: name of the argument that has the rows, for errors.
    """
    if type(rows).__name__ == "DataFrame":
        # A frame of polars or pandas.
        frame: Any = rows
        rows = frame.to_dicts() if hasattr(frame, "to_dicts") else frame.to_dict("records")
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise DataError(
            f"expected a list of rows, but got a value of type {type(rows).__name__}",
            where=argument,
            fix="pass a list of mappings, a data frame or a datasets.Dataset; to use a file, pass "
            "its path as a string",
        )
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(
                f"rows[{index}] is {type(row).__name__}, not a mapping of columns",
                where=argument,
                fix=f"use rows such as [{{'prompt': {str(row)!r:.60}}}]",
            )
        yield row


def _plain(value: Any, is_picture: bool) -> object:
    """Convert a value to types that JSON supports.

    numpy's numbers become Python numbers. NaN becomes null, because data frames use it for missing
    values. Pictures become data URIs.

    Args:
        is_picture: whether the value may be the path of a picture. Such paths become absolute,
            because paths in `rows` are relative to the working directory, but paths in the written
            file are relative to the file's folder.
    """
    # Check the most frequent types first.
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, str | PurePath) and is_picture and os.path.isfile(value):
        return os.path.abspath(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        has_picture = is_picture or value.get("type") in PICTURE_PARTS
        return {
            str(key): _plain(each, has_picture and key in PICTURE_KEYS)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(each, is_picture) for each in value]
    if hasattr(value, "tolist"):  # an array or a scalar of numpy or torch
        return _plain(value.tolist(), is_picture)
    if isinstance(value, Image.Image):
        value = _as_png(value)
    if isinstance(value, bytes):
        return f"data:image/*;base64,{base64.b64encode(value).decode()}"
    return value


def _as_png(image: Image.Image) -> bytes:
    """Encode a picture as PNG. First rotate it as its EXIF data says, because EXIF data is not
    saved.
    """
    if image.mode in ("F", "I"):
        raise TypeError(f"images of mode {image.mode} are not supported")
    image = ImageOps.exif_transpose(image)
    if image.mode not in _PNG_MODES:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
