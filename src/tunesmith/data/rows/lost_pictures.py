"""Pictures that a row refers to and nothing reads: marks in its texts, and files in its columns.

Such a row is trained as a text, so the model learns to answer about a picture that it does not see.
Texts about markup or about the usage of a program have such marks, too, and are not reported.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from tunesmith.data.rows.samples import PICTURE_MARK, Completion, Conversation, Sample, pictures_of

_SUFFIXES = tuple(".png .jpg .jpeg .webp .gif .bmp .tif .tiff .avif .jp2 .jfif .ppm".split())
# First bytes of PNG, JPEG, GIF and TIFF files.
_FIRST_BYTES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"II*\0", b"MM\0*")
# First characters of a data URI, and of PNG and JPEG files in base64.
_FIRST_CHARACTERS = ("data:image/", "iVBORw0KGgo", "/9j/4AAQ")
# A tag that is closed, quotes, or a word such as "tag" after it show that a text is about the mark.
_MARK = re.compile(
    r"""(?<![`"'])(?:
    <(?P<mark>\|?(?:(?:image|IMAGE|video|audio)(?:[ _-]?\d+|_pad|_placeholder|_soft_token)?
        |img_?\d+|start_of_image|IMG_CONTEXT|ImageHere)\|?)>(?!.{0,500}</(?P=mark)>)
    |\[(?:IMG|IMAGE)\](?!\()
    )(?!\s*(?:tags?|elements?|nodes?)\b|[`"'])""",
    re.VERBOSE | re.DOTALL,
)


def find_lost_pictures(
    row: Mapping[str, object], sample: Sample, where: str, *, sees: bool
) -> Iterator[tuple[str, str]]:
    """Find the parts of a row that refer to a picture that nothing reads.

    Args:
        row: the row from which `sample` was made.
        where: the row's place; paths in the row are relative to its folder.
        sees: whether the model takes pictures. If so, each mark needs its picture.

    Yields:
        A name in ROW_WARNINGS, and the column or the mark.
    """
    has_pictures = bool(pictures_of(sample))
    for column, value in row.items():
        if not has_pictures and is_picture(value, where):
            yield "picture_column", column
    for role, text in _texts_of(sample):
        for match in _MARK.finditer(text) if role != "assistant" else ():
            before = text[max(0, match.start() - 9) : match.start()].rstrip(" \t")
            # In `docker run <image>` the mark is text. That of a picture begins a line or follows
            # a sentence, another picture or a token such as <|vision_start|>.
            is_apart = before[-1:] in f"\n:?.!(：。？！{PICTURE_MARK}" or before.endswith("|>")
            needs_picture = sees and not has_pictures and role == "user"
            if is_apart or needs_picture:
                yield "picture_mark", match[0]


def _texts_of(sample: Sample) -> list[tuple[str, str]]:
    """Return the texts of a sample, each with the role of its speaker."""
    if isinstance(sample, Conversation):
        return [(turn["role"], turn["content"]) for turn in sample.messages]
    if isinstance(sample, Completion):
        return [("user", sample.prompt), ("assistant", sample.completion)]
    return [("text", sample.text)]


def is_picture(value: object, where: str) -> bool:
    """Return whether a value is a picture: its bytes, its text in base64, or an existing file."""
    # The first values of a long list are enough.
    values = value[:8] if isinstance(value, list) else [value]
    folder = getattr(where, "folder", None) or Path()
    for item in values:
        parts = item.values() if isinstance(item, Mapping) else [item]
        for part in parts:
            if isinstance(part, bytes) and (part.startswith(_FIRST_BYTES) or part[8:12] == b"WEBP"):
                return True
            if not isinstance(part, str):
                continue
            if part.startswith(_FIRST_CHARACTERS):
                return True
            # The name may be longer than the file system allows.
            with suppress(OSError, ValueError):
                is_name = part[-5:].lower().endswith(_SUFFIXES)
                if is_name and (folder / part.removeprefix("file://")).is_file():
                    return True
    return False
