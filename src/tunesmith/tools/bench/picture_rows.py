"""Rows with a drawn picture each, of sizes around a given one, in place of a recipe's own rows."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tunesmith.config.check import METHOD_FORMATS
from tunesmith.config.schema import Run, Source
from tunesmith.data.rows.pictures import MAX_PICTURE_PIXELS, scaled_size
from tunesmith.errors import UsageError
from tunesmith.hub import fetch
from tunesmith.hub.model_files import read_picture_processor
from tunesmith.model.tokenizer import load_tokenizer

# They are repeated where the steps take more. Their files stay in the host's memory: what a slow
# disk costs is not measured.
DRAWN_ROWS = 32
# The sides of a picture are the given ones times a factor from 1 - SIZE_SPREAD to 1 + SIZE_SPREAD:
# photos of a folder differ too, and a GPU may need time for each new size.
SIZE_SPREAD = 0.25
CELL_PIXELS = 16  # side of a field of one color, before they are blended
# Tokens that a row may have beside its picture: template, question, answer.
TEXT_TOKENS = 128


def use_drawn_pictures(run: Run, size: tuple[int, int], folder: Path) -> Run:
    """The recipe on rows with a picture each, which are written to an existing folder.

    Args:
        size: width and height around which the sizes of the pictures are drawn.

    Raises:
        UsageError: the recipe does not train on pictures, or such a picture does not fit.
    """
    if not run.model.vision:
        raise UsageError(
            "--picture requires a recipe that trains on pictures",
            where="model.vision",
            why="it is false: the model is built without its vision part",
            fix="model.vision=true, or bench without --picture",
        )
    if run.method.name in METHOD_FORMATS:
        raise UsageError(
            f"--picture with method: {run.method.name}, which does not train on pictures",
            where="method",
            fix="method=sft",
        )
    source = Source(source=str(folder / "drawn.jsonl"), format="messages")
    data = replace(run.data, train=(source,), validation=(), hold_out=None, leave_out=())
    run = replace(run, data=data)
    sizes = draw_sizes(size)
    _check_length(run, max(sizes), "{} x {}".format(*size))
    write_drawn_rows(folder, sizes)
    return run


def draw_sizes(size: tuple[int, int]) -> list[tuple[int, int]]:
    """Draw DRAWN_ROWS sizes with the aspect ratio of `size`, up to MAX_PICTURE_PIXELS."""
    width, height = size
    largest = min(1 + SIZE_SPREAD, (MAX_PICTURE_PIXELS / (width * height)) ** 0.5)
    factors = np.random.default_rng(0).uniform(1 - SIZE_SPREAD, largest, DRAWN_ROWS)
    return [(max(1, int(width * factor)), max(1, int(height * factor))) for factor in factors]


def _check_length(run: Run, size: tuple[int, int], asked: str) -> None:
    """Raise UsageError if a picture of this size leaves no room for text.

    asked: the size that the option names.
    """
    folder = fetch.fetch_for_tokens(run.model)
    tokenizer = load_tokenizer(fetch.tokenizer_folder(run.model, folder), run.model)
    processor = read_picture_processor(folder, tokenizer, run)
    assert processor is not None
    tokens = processor.count_tokens(scaled_size(size, processor.max_pixels))
    if tokens >= run.data.seq_len:
        raise UsageError(
            f"a picture of {size[0]} x {size[1]} has {tokens:,} tokens, and data.seq_len is "
            f"{run.data.seq_len:,}",
            where="--picture",
            why=f"the sizes are drawn around {asked}, and a picture is never cut",
            fix=f"data.seq_len={tokens + TEXT_TOKENS}, or a smaller picture",
        )


def write_drawn_rows(folder: Path, sizes: Sequence[tuple[int, int]]) -> None:
    """Write the pictures, as JPEG as most photos are, and the rows that ask for their colors."""
    from PIL import Image

    random = np.random.default_rng(0)
    rows = []
    for number, (width, height) in enumerate(sizes):
        cells = (height // CELL_PIXELS + 1, width // CELL_PIXELS + 1, 3)
        colors = random.integers(0, 256, cells, dtype=np.uint8)
        picture = Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.jpg", quality=90)
        answer = f"Red {colors[0, 0, 0]}, green {colors[0, 0, 1]}, blue {colors[0, 0, 2]}."
        messages = [
            {
                "role": "user",
                "content": f"<image>Picture {number}: which color is at the top left?",
            },
            {"role": "assistant", "content": answer},
        ]
        rows.append(json.dumps({"messages": messages, "images": [f"{number}.jpg"]}) + "\n")
    (folder / "drawn.jsonl").write_text("".join(rows), encoding="utf-8")
