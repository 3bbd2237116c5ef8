"""Detection of pictures that a row mentions or contains, but that tunesmith does not read.

Such a row has a placeholder (`<image>`) in a text, or a picture in a column that is not read. A
warning is necessary, because the model would learn to answer about a picture that it does not see.
Texts about markup or about the usage of a program contain similar words and are not reported.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from tunesmith.config.paths import PICTURE_SUFFIXES
from tunesmith.rows.samples import PICTURE_MARK, Sample, pictures_of, texts_by_role

# First bytes of PNG, JPEG, GIF and TIFF files.
_FIRST_BYTES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
# First characters of a data URI, and of PNG and JPEG files in base64.
_FIRST_CHARACTERS = ("data:image/", "iVBORw0KGgo", "/9j/4AAQ")
# Placeholders for a picture. The pattern does not match next to quotes, a closing tag, or a word
# such as "tag", because such a text is about markup.
_MARK = re.compile(
    r"""(?<![`"'])(?:
    <(?P<mark>\|?(?:(?:image|IMAGE|video|audio)(?:[ _-]?\d+|_pad|_placeholder|_soft_token)?
        |img_?\d+|start_of_image|IMG_CONTEXT|ImageHere)\|?)>(?!.{0,500}</(?P=mark)>)
    |\[(?:IMG|IMAGE)\](?!\()
    )(?!\s*(?:tags?|elements?|nodes?)\b|[`"'])""",
    re.VERBOSE | re.DOTALL,
)

# Pictures with their path: as Qwen VL's tools write them, in HTML and in Markdown. Most texts with
# HTML or Markdown are about something else, so these forms only count if the file exists, or if the
# model accepts pictures and the row has none.
_WRITTEN_PICTURE = re.compile(
    r"""(?ix)
    <(?P<tag>img|image|picture)>\s*(?P<path>[^<>]{1,4096}?)\s*</(?P=tag)>
    |<ima?ge?\s[^<>]*?\bsrc\s*=\s*["']?(?P<source>[^"'<>\s]+)
    |!\[[^\]\n]*\]\(\s*<?(?P<target>[^()<>\s]+)
    """
)


def find_unread_pictures(
    row: Mapping[str, object], sample: Sample, where: str, *, sees: bool
) -> Iterator[tuple[str, str]]:
    """Find the placeholders and columns of a row whose pictures are not read.

    Args:
        row: the row from which `sample` was made.
        sample: the converted row.
        where: file and line of the row. Paths in the row are relative to the file's folder.
        sees: whether the model accepts pictures as input. If True, each placeholder in a user's
            text requires a picture.

    Yields:
        The warning's name in ROW_WARNINGS, and the name of the column or the placeholder.
    """
    has_pictures = bool(pictures_of(sample))
    for column, value in row.items():
        if not has_pictures and is_picture(value, where):
            yield "picture_column", column
    for role, text in texts_by_role(sample):
        if role == "assistant":
            continue
        needs_picture = sees and not has_pictures and role == "user"
        for match in _WRITTEN_PICTURE.finditer(text):
            # In a block of code, it is a part of the code.
            is_code = text.count("```", 0, match.start()) % 2
            path = match["path"] or match["source"] or match["target"]
            if not is_code and (needs_picture or is_picture(path, where)):
                yield "picture_mark", match[0]
        for match in _MARK.finditer(text):
            start = match.start()
            before = text[max(0, start - 9) : start].rstrip(" \t")
            # In `docker run <image>` the word is ordinary text. A real placeholder starts a line,
            # or follows a sentence, another picture or a token such as <|vision_start|>.
            is_apart = before[-1:] in f"\n:?.!(：。？！{PICTURE_MARK}" or before.endswith("|>")
            if is_apart or needs_picture:
                yield "picture_mark", match[0]


def is_picture(value: object, where: str) -> bool:
    """Return whether the value is a picture: bytes, base64 text or the path of an existing file."""
    # Check only the first 8 values of a list, because the list can be long.
    values = value[:8] if isinstance(value, list) else [value]
    folder = getattr(where, "folder", None) or Path()
    for item in values:
        for part in item.values() if isinstance(item, Mapping) else [item]:
            if isinstance(part, bytes) and (part.startswith(_FIRST_BYTES) or part[8:12] == b"WEBP"):
                return True
            if isinstance(part, str) and part.startswith(_FIRST_CHARACTERS):
                return True
            if isinstance(part, str) and part[-5:].lower().endswith(PICTURE_SUFFIXES):
                # `is_file` raises an error if the name is longer than the file system allows.
                with suppress(OSError, ValueError):
                    if (folder / part.removeprefix("file://")).is_file():
                        return True
    return False
