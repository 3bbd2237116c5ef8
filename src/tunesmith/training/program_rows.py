"""Rows that a program passes to `train`, written to the run directory, so that the run resumes."""

import base64
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any, Protocol, runtime_checkable

from tunesmith.checkpoint.claim import is_run, program_rows_file
from tunesmith.config.row_formats import PICTURE_NAMES
from tunesmith.data.rows.picture_places import PICTURE_KEYS, PICTURE_PARTS
from tunesmith.errors import DataError, TunesmithError
from tunesmith.host.files import write_atomically

_ROWS_ARGUMENT = "train(rows=...)"
# Colours of PIL's pictures that a PNG file may have.
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


# By what they can do: neither package is imported for the sake of a check.
@runtime_checkable
class _NumpyValue(Protocol):
    """An array, or one number."""

    def tolist(self) -> Any: ...


@runtime_checkable
class _PilImage(Protocol):
    """A picture as `datasets` or a program opens it."""

    mode: str

    def convert(self, mode: str) -> "_PilImage": ...

    def getexif(self) -> Any: ...


@contextmanager
def kept_rows(rows: object, output_dir: Path) -> Iterator[Path]:
    """The file of `keep_rows`, for a start of a run.

    An error in the block names a row as the program knows it, `rows[3]`; where no run begins,
    nothing of the file is left.
    """
    missing = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    earlier = set((output_dir / "data").glob("*"))
    file = keep_rows(rows, output_dir)
    try:
        yield file
    except BaseException as error:
        if isinstance(error, TunesmithError):
            for name in ("what", "where", "why", "fix"):
                text = vars(error)[name]
                vars(error)[name] = _in_program(text, file)
        if file not in earlier and not is_run(output_dir):
            file.unlink(missing_ok=True)
            with suppress(OSError):
                for folder in (file.parent, *missing):
                    folder.rmdir()
        raise


def _in_program(text: str, file: Path) -> str:
    """A text without the file of the rows: `rows[3]` for its line 4."""
    name = rf"[^\s\"']*{re.escape(file.name)}"
    text = re.sub(rf"{name}:(\d+)", lambda match: f"rows[{int(match[1]) - 1}]", text)
    return re.sub(name, "rows", text)


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
            lines.append(json.dumps(_kept(row), ensure_ascii=False, allow_nan=False) + "\n")
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
    file = program_rows_file(output_dir, hashlib.sha256(text.encode()).hexdigest()[:12])
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


def _kept(row: Mapping[str, object]) -> object:
    """A row as JSON has it, whose pictures are found from any folder."""
    values = {}
    for column, value in row.items():
        values[column] = _from_here(value) if column in PICTURE_NAMES else value
    return _plain(values)


def _from_here(value: object) -> object:
    """A picture or a list of them, by whole paths: a program's are from the folder where it works,
    and those in a file of rows from the folder of this file.
    """
    if isinstance(value, PurePath) or (isinstance(value, str) and os.path.isfile(value)):
        return os.path.abspath(value)
    if isinstance(value, list | tuple):
        return [_from_here(each) for each in value]
    if isinstance(value, Mapping):
        return {key: _from_here(v) if key in PICTURE_KEYS else v for key, v in value.items()}
    return value


def _plain(value: object) -> object:
    """Return a value as JSON has it: numbers of numpy as Python's, NaN as null, as data frames have
    it for a missing value, and pictures as data URIs.
    """
    # Most values, before the slower checks.
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        of_part = value.get("type") in PICTURE_PARTS
        return {
            str(key): _plain(_from_here(each) if of_part and key in PICTURE_KEYS else each)
            for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, _NumpyValue):
        return _plain(value.tolist())
    if isinstance(value, _PilImage):
        value = _as_png(value)
    if isinstance(value, bytes):
        return f"data:image/*;base64,{base64.b64encode(value).decode()}"
    return value


def _as_png(image: Any) -> bytes:
    """A picture of PIL as a file of it has it, turned as its EXIF says: PNG keeps none."""
    from PIL import ImageOps

    if image.mode in ("F", "I"):
        raise TypeError(f"a picture of mode {image.mode}, and nothing says which number is white")
    image = ImageOps.exif_transpose(image)
    if image.mode not in _PNG_MODES:
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
