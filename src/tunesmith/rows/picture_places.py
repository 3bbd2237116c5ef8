"""Reading of the pictures of a row and of their positions in its texts.

The position of a picture is a content part of type image, or the placeholder `<image>` in a text. A
part can contain its picture. Each part without a picture, and each `<image>`, takes the next
picture of the row's column `images`. If the column is empty, `<image>` is ordinary text.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

from tunesmith.config.row_formats import PICTURE_NAMES, ROW_FORMATS
from tunesmith.errors import DataError
from tunesmith.host.shell import shell_word
from tunesmith.rows.columns import is_absent, plain
from tunesmith.rows.row_reader import RowReader
from tunesmith.rows.samples import PICTURE_MARK, Conversation, Message, Picture
from tunesmith.rows.source.table import json_type
from tunesmith.units import count_of

# Types of content parts that are pictures, in the APIs of OpenAI, Anthropic and Hugging Face.
PICTURE_PARTS = ("image", "image_url", "input_image")
_OTHER_MEDIA = frozenset(("video", "videos", "audio", "audios"))
# Keys whose value is base64 text in the APIs of Anthropic and OpenAI, or bytes in files of the Hub.
_IN_BASE64 = ("base64", "data", "bytes")
# Keys that hold the picture in a content part, or in an object nested in the part.
PICTURE_KEYS = ("image", "image_url", "url", "source", "path", *_IN_BASE64)
# Keys of a content part that are ignored without a warning.
_HARMLESS_PART_KEYS = ("type", "text", "index", "cache_control")

PICTURE_TEXT_MARK = "<image>"
# Types of values that are never a picture. A column `image` can contain a count or a bool, and a
# bool is an int in Python.
_NUMBER = (int, float)
_NETWORK = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# Maximum length of a path on Linux. A longer text is not a path, but the picture itself in base64.
_MAX_PATH = 4096


def read_picture_part(row: RowReader, part: Mapping[str, object], role: str, at: str) -> str:
    """Add the picture of a content part to `row.pictures`, and return the placeholder for the text.

    Raise DataError if the part is not in a user's turn.
    """
    if role != "user":
        raise row.error(
            f"a message of the {role} has a picture",
            fix="move the picture into a turn of the user, or remove the part",
            at=at,
        )
    at = f"{at} picture {len(row.pictures) + 1}"
    value = _value_in(row, part, at)
    index = part.get("index")
    if value is None and isinstance(index, int) and index != row.pictures.count(None):
        raise row.error(
            f"the index of a picture is {index}",
            why="the parts must use the pictures of the column images in order, from index 0",
            fix="sort the pictures",
            at=at,
        )
    picture = _picture(row, value, at) if value is not None else None
    row.pictures.append(picture)
    for key, part_value in part.items():
        if key not in (*PICTURE_KEYS, *_HARMLESS_PART_KEYS) and not is_absent(part_value):
            row.unread.add(f"image.{key}")
    return PICTURE_MARK


def read_column_pictures(row: RowReader) -> tuple[Picture, ...]:
    """Return the pictures of the row's column `images`, which holds one picture or a list of
    pictures.
    """
    value = row.optional("images")
    is_count = "images" not in row.source.columns and isinstance(value, _NUMBER)
    if value is None or is_count:
        return ()
    # A cell of a CSV file holds a list or an object as JSON text.
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = row.json(value, "images")
    values = value if isinstance(value, list) else [value]
    if all(map(is_absent, values)):
        return ()
    return tuple(_picture(row, item, f"picture {n}") for n, item in enumerate(values, 1))


def names_pictures(row: object) -> bool:
    """Return whether a row has pictures in a column, or in a content part of a message."""
    if isinstance(row, list):
        return any(map(names_pictures, row))
    if not isinstance(row, Mapping):
        return False
    if row.get("type") in PICTURE_PARTS or not all(is_absent(row.get(n)) for n in PICTURE_NAMES):
        return True
    return any(map(names_pictures, row.values()))


def check_media(row: RowReader) -> None:
    """Raise DataError for videos, sound, and pictures in a format that does not support them."""
    # The format text reads only one column. Media in other columns raise no error, because these
    # columns are reported as unread.
    if row.source.format == "text":
        return
    unread = row.unread_columns()
    # Return early: nearly all rows have no unread columns and no pictures.
    if not unread and not row.pictures:
        return
    takes_pictures = "images" in ROW_FORMATS[row.source.format].columns
    for column, value in unread.items():
        if plain(column) in _OTHER_MEDIA:
            raise row.error(
                f"the row has the column {column}",
                why="only texts and pictures can be trained on",
                fix=f"delete the column {column}, or delete these rows",
            )
        if isinstance(value, Mapping) and {"ref", "bbox"} & value.keys():
            raise row.error(
                f"the row has boxes of a picture in the column {column}",
                why="the model would learn <bbox> and <ref-object> as words",
                fix="write the names and the coordinates into the texts, in the form of the model",
            )
        is_picture = plain(column) in PICTURE_NAMES and not isinstance(value, _NUMBER)
        if is_picture and not takes_pictures:
            raise _no_place(row, f"the row has {column}: {json_type(value)}")
    if row.pictures and not takes_pictures:
        raise _no_place(row, "a message has a part of type image")


def _no_place(row: RowReader, what: str) -> DataError:
    return row.error(
        what,
        why=f"format {row.source.format} does not support pictures yet",
        fix=f"delete the pictures, or use {row.setting(method='sft')} with the format"
        " prompt-completion, messages or sharegpt",
    )


def with_pictures(row: RowReader, sample: Conversation) -> Conversation:
    """Return the conversation with the row's pictures, and with PICTURE_MARK at their positions.

    Raise DataError if the number of pictures differs from the number of positions, or if a text
    already contains the character PICTURE_MARK.
    """
    if not row.pictures and not row.column_pictures:
        return sample
    # Count PICTURE_MARK in the string form of messages and tools, because this includes every text.
    if f"{sample.messages}{sample.tools}".count(PICTURE_MARK) != len(row.pictures):
        raise row.error(
            "a text has the character U+FFFC",
            why="in a row with pictures this character represents a picture",
            fix="delete the character",
        )
    places = row.pictures or _mark_texts(row, sample.messages)
    free = places.count(None)
    if free != len(row.column_pictures):
        pictures_text = count_of(len(row.column_pictures), "picture")
        places_text = count_of(free, "place")
        raise row.error(
            f"the row has {pictures_text} in its column images, but {places_text} for pictures",
            why=f"a place is a text {PICTURE_TEXT_MARK}, or a content part without a picture",
            fix=f"write {PICTURE_TEXT_MARK} at the position of each picture, or write the path of"
            " the picture into the part",
        )
    column_pictures = iter(row.column_pictures)
    given = [picture or next(column_pictures) for picture in places]
    pictures = [picture._replace(place=f"picture {n}") for n, picture in enumerate(given, 1)]
    # Set `instruction` to None, because the Alpaca template does not support pictures.
    return replace(sample, instruction=None, pictures=tuple(pictures))


def _mark_texts(row: RowReader, messages: list[Message]) -> list[Picture | None]:
    """Replace each `<image>` in the messages by PICTURE_MARK.

    If there is no `<image>`, add one PICTURE_MARK for each picture of the column `images` at the
    start of the first question.

    Returns:
        A list with one None for each mark. None means that the picture comes from the column
        `images`.
    """
    marks = 0
    for n, message in enumerate(messages, 1):
        count = message["content"].count(PICTURE_TEXT_MARK)
        if count and message["role"] != "user":
            raise row.error(
                f"a message of the {message['role']} has {PICTURE_TEXT_MARK}",
                fix="move the picture into a turn of the user",
                at=f"message {n}",
            )
        message["content"] = message["content"].replace(PICTURE_TEXT_MARK, PICTURE_MARK)
        marks += count
    if not marks:
        marks = len(row.column_pictures)
        question = next(message for message in messages if message["role"] == "user")
        question["content"] = PICTURE_MARK * marks + question["content"]
    return [None] * marks


def _value_in(row: RowReader, holder: Mapping[str, object], at: str) -> object:
    """Return the value of the key in `holder` that contains a picture, or None if no key does.

    Raise DataError if several keys can contain the picture.
    """
    found = {key: holder[key] for key in PICTURE_KEYS if not is_absent(holder.get(key))}
    if "bytes" in found:
        found.pop("path", None)  # Hub data sets store the original file name next to the bytes.
    if len(found) > 1:
        raise row.error(
            f"a picture has the keys {' and '.join(found)}",
            fix="keep one of them and delete the others",
            at=at,
        )
    for key, value in found.items():
        if key in _IN_BASE64 and isinstance(value, str) and not value.startswith("data:"):
            return _from_base64(row, value, at)
        return value
    return None


def _picture(row: RowReader, value: object, at: str) -> Picture:
    """Convert bytes, a path, a data URI or an object that contains one of these to a `Picture`."""
    if isinstance(value, Mapping):
        value = _value_in(row, value, at)
        if isinstance(value, Mapping):  # OpenAI's form is {"image_url": {"url": ...}}.
            value = _value_in(row, value, at)
    if isinstance(value, bytes):
        return Picture(at, data=value)
    if not isinstance(value, str) or not value.strip():
        what = "an empty text" if isinstance(value, str) else json_type(value)
        raise row.error(
            f"{at} is {what}, not a picture",
            fix='write the path of a picture, or {"bytes": ..., "path": ...}',
        )
    if value.startswith("data:"):
        return Picture(at, data=_from_base64(row, value.partition(",")[2], at))
    if len(value) > _MAX_PATH:
        return Picture(at, data=_from_base64(row, value, at))
    if _NETWORK.match(value):
        raise row.error(
            f"{at} is the address {value:.200}",
            why="pictures are not downloaded from the network",
            fix="download the pictures and write the paths of the files",
        )
    return Picture(at, path=_path(row, value, at))


def _path(row: RowReader, text: str, at: str) -> Path:
    """Return the path of a picture file. A relative path starts in the folder of the data file."""
    name = unquote(text.removeprefix("file://")) if text.startswith("file://") else text
    path = Path(name)
    if path.is_absolute():
        return path
    if row.folder is None:
        raise row.error(
            f"{at} is the file {text} of a data set on the Hub",
            why="only the rows of the data set are downloaded, not its other files",
            fix=f"hf download {shell_word(row.source.source)} --repo-type dataset --local-dir DIR"
            "   # then train on the data file in this folder",
        )
    return row.folder / path


def _from_base64(row: RowReader, text: str, at: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise row.error(
            f"{at} is not valid base64",
            str(error),
            "encode the picture again, or write the path of a file",
        ) from None
