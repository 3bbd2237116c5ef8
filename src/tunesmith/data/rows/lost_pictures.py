"""Pictures that a row refers to and nothing reads: marks in its texts, and files in its columns.

Such a row is trained as a text, so the model learns to answer about a picture that it does not see.
Texts about markup or about the usage of a program have such marks, too, and are not reported.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from tunesmith.data.rows.picture_places import PICTURE_KEYS
from tunesmith.data.rows.samples import Completion, Conversation, Sample, pictures_of

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2")
_FIRST_BYTES = (b"\x89PNG", b"\xff\xd8\xff")  # of PNG and JPEG files
# Quotes, a closing tag, or a word such as "tag" after it show that a text is about the mark itself.
# The pattern begins with the first characters of all marks, which makes it six times as fast.
_MARK = re.compile(
    r"""[<!](?<![`"'].)(?:
    (?P<place>\|?(?P<name>(?:image|IMAGE)(?:[ _-]?\d+|_pad|_placeholder|_soft_token)?)\|?>
        |start_of_image>|ImageHere>)(?!.{0,500}</(?P=name)>)
    |(?P<object>(?P<kind>bbox|ref-object)>(?!.{0,500}</(?P=kind)>))
    |img>(?P<tag>[^<>\n]{1,500})</img>
    |\[[^\]\n]{0,500}\]\(<?(?P<link>[^)\s>]+)
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
        for match in _MARK.finditer(text):
            named = match["tag"] or match["link"]
            before = text[max(0, match.start() - 9) : match.start()].rstrip(" \t")
            if match["object"]:
                yield "grounding", match[0]
            elif has_pictures or role not in ("user", "text"):
                continue
            elif named:
                if role == "user" and (sees or is_picture(named.strip(), where)):
                    yield "picture_mark", named
            # In `docker run <image>` the mark is text. That of a picture begins a line or follows
            # a sentence.
            elif before[-1:] in "\n:?.!(：。？！" or (sees and role == "user"):
                yield "picture_mark", match[0]


def _texts_of(sample: Sample) -> list[tuple[str, str]]:
    """Return the texts of a sample, each with the role of its speaker."""
    if isinstance(sample, Conversation):
        return [(turn["role"], turn["content"]) for turn in sample.messages]
    if isinstance(sample, Completion):
        return [("user", sample.prompt), ("assistant", sample.completion)]
    return [("text", sample.text)]


def is_picture(value: object, where: str) -> bool:
    """Return whether a value is a picture: its bytes, or the name of a file that exists."""
    if isinstance(value, list):
        value = next(iter(value), None)
    parts = [value.get(key) for key in PICTURE_KEYS] if isinstance(value, Mapping) else [value]
    folder = getattr(where, "folder", None) or Path()
    for part in parts:
        if isinstance(part, bytes) and part.startswith(_FIRST_BYTES):
            return True
        # The name may be longer than the file system allows.
        with suppress(OSError, ValueError):
            is_name = isinstance(part, str) and part[-5:].lower().endswith(_SUFFIXES)
            if is_name and (folder / str(part)).is_file():
                return True
    return False
