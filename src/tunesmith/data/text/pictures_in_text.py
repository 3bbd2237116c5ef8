"""The pictures of a row, and the text that stands for them in its rendering.

A chat template writes one token for a picture. The model wants as many as it has features of it,
between tokens of its own: these are put in before the text is tokenized.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from operator import ne
from typing import TYPE_CHECKING, NamedTuple

from tunesmith.data.rows.pictures import (
    picture_digest,
    picture_place,
    picture_size,
    read_picture,
    scaled_size,
)
from tunesmith.data.rows.samples import Conversation, Sample, pictures_of
from tunesmith.data.text.align import CharSpan
from tunesmith.data.text.answer_ends import any_of
from tunesmith.errors import DataError, first_line

if TYPE_CHECKING:
    from tunesmith.data.text.placeholders import PictureProcessor


class SeenPictures(NamedTuple):
    """The pictures of a row, each with the text that stands for it.

    Attributes:
        digests: of their bytes, 63 bits.
        scaled: how many of them were scaled down.
    """

    texts: tuple[str, ...] = ()
    digests: tuple[int, ...] = ()
    scaled: int = 0


def see_pictures(sample: Sample, processor: "PictureProcessor | None", where: str) -> SeenPictures:
    """Read the pictures of the row at `where`; each is decoded once, and its pixels are not kept.

    Raises:
        DataError: one cannot be read, no processor takes them, or the row spells its tokens.
    """
    pictures = pictures_of(sample)
    if processor is None:
        if not pictures:
            return SeenPictures()
        raise DataError(
            "the row has pictures, and model.vision is false",
            why="they would be ignored",
            fix="model.vision=true, or remove the pictures",
        )
    if isinstance(sample, Conversation):
        spelled = any_of(processor.tokens)
        for text in texts_in([sample.messages, sample.tools]):
            found = spelled.search(text)
            if found is not None:
                raise literal_placeholder(found[0])
    if not pictures:
        return SeenPictures()
    digests = []
    sizes = []
    for picture in pictures:
        data = read_picture(picture, where)
        digests.append(picture_digest(data))
        sizes.append(picture_size(data, picture_place(picture, where)))
    scaled = tuple(scaled_size(size, processor.max_pixels) for size in sizes)
    try:
        texts = processor.expand(scaled)
    # Processors raise many kinds for sizes that they cannot work with.
    except Exception as error:
        shown = ", ".join(f"{width} x {height}" for width, height in scaled)
        raise DataError(
            f"the model's processor takes no pictures of {shown} pixels",
            why=first_line(error),
            fix="scale or crop them, or delete the row",
        ) from error
    is_scaled = map(ne, scaled, sizes)
    return SeenPictures(texts, tuple(digests), sum(is_scaled))


def put_placeholders(
    text: str, spans: Sequence[CharSpan], mark: str, texts: Sequence[str]
) -> tuple[str, list[CharSpan]]:
    """The text with `texts` in the places of the marks, of which there are as many; and the spans,
    none of which ends in a mark.
    """
    ends = [match.end() for match in re.finditer(re.escape(mark), text)]
    growths = [len(put) - len(mark) for put in texts]

    def moved(edge: int) -> int:
        # The -1 of a span without an end token is before all marks.
        return edge + sum(growths[: bisect_right(ends, edge)])

    next_texts = iter(texts)
    joined = re.sub(re.escape(mark), lambda _: next(next_texts), text)
    return joined, [CharSpan(*map(moved, span)) for span in spans]


def literal_placeholder(token: str) -> DataError:
    """The error for a row whose own text has a token of pictures."""
    return DataError(
        f"the row's own text has {token}, a token of pictures",
        why="the model would look for a picture there",
        fix="remove it, or put a space into it",
    )


def texts_in(value: object) -> Iterator[str]:
    """All texts in messages and tools, but for names of keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from texts_in(item)
