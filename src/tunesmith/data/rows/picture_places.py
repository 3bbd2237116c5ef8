"""The pictures of a row, and where they stand in its texts: parts of a content, or `<image>`.

A part holds its picture, or takes the next one of the row's column `images`, as `<image>` does.
Where a row has no picture in a column, `<image>` is a text like any other.
"""

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

from tunesmith.config.row_formats import PICTURE_NAMES, ROW_FORMATS
from tunesmith.data.rows.row_reader import RowReader, is_absent, plain
from tunesmith.data.rows.samples import PICTURE_MARK, Conversation, Message, Picture
from tunesmith.data.source.table import json_type
from tunesmith.errors import DataError
from tunesmith.units import count_of

# What OpenAI's two interfaces, Anthropic and Hugging Face call a part that is a picture.
PICTURE_PARTS = ("image", "image_url", "input_image")
_OTHER_MEDIA = frozenset(("video", "videos", "audio", "audios"))
# Where a picture stands in a part, or in an object that one of these names holds. Anthropic's and
# OpenAI's interfaces have text in base64, the Hub's files bytes beside the name that they had.
_IN_BASE64 = ("base64", "data", "bytes")
PICTURE_KEYS = ("image", "image_url", "url", "source", "path", *_IN_BASE64)
# Other keys of a part that change nothing.
_HARMLESS_PART_KEYS = ("type", "text", "index", "cache_control")

PICTURE_TEXT_MARK = "<image>"
# Types of columns that count pictures, or say whether there are any.
_FIGURE = (int, float)
_NETWORK = re.compile(r"(?!file:)[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# Linux has no longer paths: a longer text is the picture itself.
_MAX_PATH = 4096


def read_picture_part(row: RowReader, part: Mapping[str, object], role: str, at: str) -> str:
    """The mark of a part that is a picture, which is noted; DataError where it is not a user's."""
    if role != "user":
        why = "pictures are trained on in what a user says"
        fix = "move it into a turn of the user, or remove the part"
        raise row.error(f"a picture in a message of the {role}", why, fix, at)
    at = f"{at} picture {len(row.pictures) + 1}"
    value = _value_in(row, part, at)
    index = part.get("index")
    if value is None and isinstance(index, int) and index != row.pictures.count(None):
        why = "parts take the pictures of the column images in order, from 0"
        raise row.error(f"the index of a picture is {index}", why, "sort the pictures", at)
    row.pictures.append(None if value is None else _picture(row, value, at))
    for key, of_part in part.items():
        if key not in (*PICTURE_KEYS, *_HARMLESS_PART_KEYS) and not is_absent(of_part):
            row.unread.add(f"image.{key}")
    return PICTURE_MARK


def read_column_pictures(row: RowReader) -> tuple[Picture, ...]:
    """The pictures of the row's column `images`: one, or a list of them."""
    value = row.optional("images")
    if value is None or ("images" not in row.source.columns and isinstance(value, _FIGURE)):
        return ()
    # A list in a cell of a csv file.
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = row.json(value, "images")
    values = value if isinstance(value, list) else [value]
    if all(map(is_absent, values)):
        return ()
    return tuple(_picture(row, item, f"picture {n}") for n, item in enumerate(values, 1))


def names_pictures(row: object) -> bool:
    """Tell whether a row has pictures in a column, or in a part of a message."""
    if isinstance(row, list):
        return any(map(names_pictures, row))
    if not isinstance(row, Mapping):
        return False
    if row.get("type") in PICTURE_PARTS:
        return True
    in_column = any(not is_absent(row.get(name)) for name in PICTURE_NAMES)
    return in_column or any(map(names_pictures, row.values()))


def check_media(row: RowReader) -> None:
    """DataError for pictures in a row whose format has no place for them, videos and sound."""
    # A text is trained on as a whole, whatever stands beside it: what nothing reads is named.
    if row.source.format == "text":
        return
    unread = row.unread_columns()
    # Nearly all rows.
    if not unread and not row.pictures:
        return
    takes_pictures = "images" in ROW_FORMATS[row.source.format].columns
    for column, value in unread.items():
        if plain(column) in _OTHER_MEDIA:
            why = "texts and pictures are trained on"
            fix = f"delete the column {column}, or these rows"
            raise row.error(f"the row has {column}", why, fix)
        if plain(column) in PICTURE_NAMES and not takes_pictures and not isinstance(value, _FIGURE):
            raise _no_place(row, f"the row has {column}: {json_type(value)}")
    if row.pictures and not takes_pictures:
        raise _no_place(row, "a message has a part of type image")


def _no_place(row: RowReader, what: str) -> DataError:
    why = "pictures in pairs and in labeled answers are not trained yet"
    fix = "format: prompt-completion, messages or sharegpt; or delete the pictures"
    return row.error(what, f"format {row.source.format}: {why}", fix)


def with_pictures(row: RowReader, sample: Conversation) -> Conversation:
    """The conversation with the row's pictures, a mark where each of them stands.

    DataError where they are not as many as their places, or another text has the mark.
    """
    if not row.pictures and not row.column_pictures:
        return sample
    # As Python prints it, a text shows the character.
    marked = f"{sample.messages}{sample.tools}".count(PICTURE_MARK)
    if marked != len(row.pictures):
        what = "a text has the character U+FFFC"
        why = "in a row with pictures it stands for one"
        raise row.error(what, why, "delete the character")
    places = row.pictures or _mark_texts(row, sample.messages)
    free = places.count(None)
    if free != len(row.column_pictures):
        what = f"the row has {count_of(len(row.column_pictures), 'picture')} in its column images,"
        why = f"{PICTURE_TEXT_MARK}, or a part without a picture, is a place"
        fix = f"write {PICTURE_TEXT_MARK} where each picture stands, or its path into the part"
        raise row.error(f"{what} and {count_of(free, 'place')} for them", why, fix)
    of_column = iter(row.column_pictures)
    pictures = []
    for n, given in enumerate(places, 1):
        picture = given or next(of_column)
        pictures.append(picture._replace(place=f"picture {n}"))
    # Alpaca's own text has no place for them.
    return replace(sample, instruction=None, pictures=tuple(pictures))


def _mark_texts(row: RowReader, messages: list[Message]) -> list[Picture | None]:
    """Put the mark of a picture in place of each `<image>`, or else in front of the first question.

    Returns:
        None for each mark: a picture of the column `images`.
    """
    marks = 0
    for n, message in enumerate(messages, 1):
        count = message["content"].count(PICTURE_TEXT_MARK)
        if count and message["role"] != "user":
            what = f"a message of the {message['role']} has {PICTURE_TEXT_MARK}"
            why = "pictures are trained on in what a user says"
            raise row.error(what, why, "move it into a turn of the user", f"message {n}")
        message["content"] = message["content"].replace(PICTURE_TEXT_MARK, PICTURE_MARK)
        marks += count
    if not marks:
        marks = len(row.column_pictures)
        question = next(message for message in messages if message["role"] == "user")
        question["content"] = PICTURE_MARK * marks + question["content"]
    return [None] * marks


def _value_in(row: RowReader, holder: Mapping[str, object], at: str) -> object:
    """The picture of a part or an object, under one of its names; None where there is none."""
    found = {key: holder[key] for key in PICTURE_KEYS if not is_absent(holder.get(key))}
    if "bytes" in found:
        found.pop("path", None)  # the name that they had
    if len(found) > 1:
        what = f"a picture has {' and '.join(found)}"
        raise row.error(what, "it is one of them", "delete the others", at)
    for key, value in found.items():
        if key in _IN_BASE64 and isinstance(value, str) and not value.startswith("data:"):
            return _from_base64(row, value, at)
        return value
    return None


def _picture(row: RowReader, value: object, at: str) -> Picture:
    """A picture that is bytes, a path, a data URI or an object that holds one of these."""
    if isinstance(value, Mapping):
        value = _value_in(row, value, at)
        if isinstance(value, Mapping):  # {"image_url": {"url": ...}}
            value = _value_in(row, value, at)
    if isinstance(value, bytes):
        return Picture(at, data=value)
    if not isinstance(value, str) or not value.strip():
        fix = 'write the path of a picture, or {"bytes": ..., "path": ...}'
        what = "an empty text" if isinstance(value, str) else json_type(value)
        raise row.error(f"{at} is {what}, not a picture", fix=fix)
    if value.startswith("data:"):
        return Picture(at, data=_from_base64(row, value.partition(",")[2], at))
    if len(value) > _MAX_PATH:
        return Picture(at, data=_from_base64(row, value, at))
    if _NETWORK.match(value):
        why = "pictures are not fetched from the network"
        raise row.error(f"{at} is {value:.200}", why, "download them and name the files")
    return Picture(at, path=_path(row, value, at))


def _path(row: RowReader, text: str, at: str) -> Path:
    """The path of a file; one that is relative is in the folder of the row's file."""
    path = Path(unquote(text.removeprefix("file://")) if text.startswith("file://") else text)
    if path.is_absolute():
        return path
    if row.folder is None:
        name = row.source.source
        raise row.error(
            f"{at} is the file {text} of a data set on the Hub",
            "its rows alone are downloaded",
            f"hf download {name} --repo-type dataset --local-dir DIR   # and name the file of rows"
            " in it",
        )
    return row.folder / path


def _from_base64(row: RowReader, text: str, at: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise row.error(f"{at} is not base64", str(error), "write it again, or its path") from None
