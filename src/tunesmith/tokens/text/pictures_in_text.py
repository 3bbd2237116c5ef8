"""Pictures of a row, and the placeholder text that represents them in the rendered conversation.

A chat template writes one token per picture, but the model requires one placeholder token per image
feature, with special tokens around the placeholders. All these tokens are inserted before the text
is tokenized.
"""

from collections.abc import Iterator, Mapping
from operator import ne
from typing import TYPE_CHECKING, NamedTuple

from tunesmith.errors import DataError, first_line
from tunesmith.rows.pictures import (
    picture_digest,
    picture_place,
    picture_size,
    read_picture,
    scaled_size,
)
from tunesmith.rows.samples import Conversation, Sample, pictures_of
from tunesmith.tokens.text.answer_ends import any_of

if TYPE_CHECKING:
    from tunesmith.tokens.text.placeholders import PictureProcessor


class SeenPictures(NamedTuple):
    """Pictures of a row, each represented by its placeholder text.

    Attributes:
        digests: 63-bit digest of each picture's bytes.
        scaled: number of pictures that were scaled down.
    """

    texts: tuple[str, ...] = ()
    digests: tuple[int, ...] = ()
    scaled: int = 0


def see_pictures(sample: Sample, processor: "PictureProcessor | None", where: str) -> SeenPictures:
    """Read the pictures of the row at `where`.

    Each picture is decoded once, and the pixels are not kept.

    Raises:
        DataError: a picture cannot be read or processed, or the text of the row contains a special
            token of pictures.
    """
    pictures = pictures_of(sample)
    if processor is None:
        if not pictures:
            return SeenPictures()
        raise DataError(
            "the row has pictures, but model.vision is false",
            why="the pictures would be ignored",
            fix="set model.vision=true, or remove the pictures",
        )
    if isinstance(sample, Conversation):
        for text in texts_in([sample.messages, sample.tools]):
            if found := any_of(processor.tokens).search(text):
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
    # Processors raise many types of exceptions for picture sizes that they do not support.
    except Exception as error:
        shown = ", ".join(f"{width} x {height}" for width, height in scaled)
        raise DataError(
            f"the model's image processor does not support pictures of this size: {shown} pixels",
            why=first_line(error),
            fix="scale or crop the pictures, or delete the row",
        ) from error
    return SeenPictures(texts, tuple(digests), sum(map(ne, scaled, sizes)))


def literal_placeholder(token: str) -> DataError:
    """Build the error for a row whose text already contains a special token of pictures."""
    return DataError(
        f"the row's own text has {token}, a special token of pictures",
        why="the model would look for a picture there",
        fix=f"remove {token} from the text, or put a space into it",
    )


def texts_in(value: object) -> Iterator[str]:
    """Yield all texts in messages and tools. The names of keys are not yielded."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | Mapping):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from texts_in(item)
