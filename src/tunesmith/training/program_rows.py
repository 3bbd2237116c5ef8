"""Rows that a program passes to `train`, written to the run directory, so that the run resumes."""

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
from tunesmith.data.rows.picture_places import PICTURE_KEYS, PICTURE_PARTS
from tunesmith.errors import DataError
from tunesmith.host.files import write_atomically

_ROWS_ARGUMENT = "train(rows=...)"
# Colours of PIL's pictures that a PNG file may have.
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def keep_rows(rows: object, output_dir: Path) -> Path:
    """Write rows as JSON lines below a run directory; returns the file.

    The file is named after its content: the same rows resume a run, and others are refused by it,
    with the rows of before still there.

    rows: mappings, or a `datasets.Dataset`.

    Raises:
        DataError: they are none of these, or a value is nothing that JSON has.
    """
    lines = []
    for index, row in enumerate(mappings(rows, _ROWS_ARGUMENT)):
        try:
            values = {name: _plain(value, name in PICTURE_NAMES) for name, value in row.items()}
            lines.append(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n")
        # A picture that cannot be decoded: OSError.
        except (TypeError, ValueError, OSError) as error:
            raise DataError(
                f"rows[{index}] has a value that JSON does not support: {error}",
                where=_ROWS_ARGUMENT,
                fix="convert it to text or a number",
            ) from error
    if not lines:
        raise DataError("there are no rows", where=_ROWS_ARGUMENT, fix="pass at least one")
    text = "".join(lines)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    file = output_dir / "data" / f"rows-{digest}.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text)
    return file


def mappings(rows: object, argument: str) -> Iterator[Mapping[Any, Any]]:
    """Yield the rows of a list or a data set as mappings.

    argument: the argument that errors name.
    """
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise DataError(
            f"a value of the type {type(rows).__name__} is not a list of rows",
            where=argument,
            fix="pass a list of mappings or a datasets.Dataset; a file is named by its path",
        )
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(
                f"rows[{index}] is {type(row).__name__}, not a mapping of columns",
                where=argument,
                fix='use rows such as [{"prompt": "Hello", "completion": "Hi"}]; of a data frame, '
                "pandas' frame.to_dict('records') or polars' frame.to_dicts()",
            )
        yield row


def _plain(value: Any, is_picture: bool) -> object:
    """Return a value as JSON has it: numbers of numpy as Python's, NaN as null, as data frames have
    it for a missing value, and pictures as data URIs.

    Args:
        is_picture: whether the value may name picture files. Their paths become absolute: those of
            a program are relative to its working directory, and those in a file of rows to the
            folder of the file.
    """
    # Most values, before the slower checks.
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
    if hasattr(value, "tolist"):  # an array, or one number of it
        return _plain(value.tolist(), is_picture)
    if isinstance(value, Image.Image):
        value = _as_png(value)
    if isinstance(value, bytes):
        return f"data:image/*;base64,{base64.b64encode(value).decode()}"
    return value


def _as_png(image: Image.Image) -> bytes:
    """Encode a picture as PNG, turned as its EXIF data says, which PNG does not keep."""
    if image.mode in ("F", "I"):
        raise TypeError(f"a picture of mode {image.mode}, and nothing says which number is white")
    image = ImageOps.exif_transpose(image)
    if image.mode not in _PNG_MODES:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
