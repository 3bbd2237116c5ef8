"""The pictures of a row, and the text that stands for them in its rendering.

A chat template writes one token for a picture. The model wants as many as it has features of it,
between tokens of its own: these are put in before the text is tokenized.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
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
from tunesmith.data.text.example import SeenPicture
from tunesmith.errors import DataError, first_line

if TYPE_CHECKING:
    from tunesmith.data.text.placeholders import PictureProcessor


class SeenPictures(NamedTuple):
    """The pictures of a row, each with the text that stands for it.

    Attributes:
        digests: of their bytes, 63 bits.
        pictures: what their headers tell.
    """

    texts: tuple[str, ...] = ()
    digests: tuple[int, ...] = ()
    pictures: tuple[SeenPicture, ...] = ()


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
        for text in texts_in([sample.messages, sample.tools]):
            for token in processor.tokens:
                if token in text:
                    raise literal_placeholder(token)
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
    seen = []
    for size, new_size, text in zip(sizes, scaled, texts, strict=True):
        seen.append(SeenPicture(size, new_size != size, text.count(processor.token)))
    return SeenPictures(texts, tuple(digests), tuple(seen))


def put_placeholders(
    text: str, spans: Sequence[CharSpan], mark: str, texts: Sequence[str]
) -> tuple[str, list[CharSpan]]:
    """The text with `texts` in the places of the marks, of which there are as many; and the spans,
    none of which ends in a mark.
    """
    pieces = text.split(mark)
    # Where marks end, and by how much what follows is moved.
    ends = []
    shifts = [0]
    at = 0
    for piece, put in zip(pieces, texts, strict=False):
        at += len(piece) + len(mark)
        ends.append(at)
        shifts.append(shifts[-1] + len(put) - len(mark))

    def moved(edge: int) -> int:
        # A span without an end token has -1.
        return edge + shifts[bisect_right(ends, edge)] if edge >= 0 else edge

    joined = pieces[0] + "".join(chain.from_iterable(zip(texts, pieces[1:], strict=True)))
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
