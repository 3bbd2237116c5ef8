"""Drawn figures with what there is to say of them: a task of pictures that takes no download."""

from __future__ import annotations

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 30, 30), "green": (20, 150, 40), "blue": (40, 60, 220), "yellow": (235, 205, 20),
}  # fmt: skip
SHAPES = ("square", "circle", "triangle")
COUNTS = ("one", "two", "three")
SIDE = 56  # pixels of a picture
QUESTION = "?"


def draw_figures(rng: random.Random) -> tuple[Image.Image, str]:
    """A picture of a few equal figures at random places, and its description."""
    colour = rng.choice(list(COLOURS))
    shape = rng.choice(SHAPES)
    count = rng.randrange(len(COUNTS)) + 1
    image = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(image)
    # A quarter each, so that no figure covers another.
    half = SIDE // 2
    for quarter in rng.sample(range(4), count):
        size = rng.randint(20, 24)
        x = quarter % 2 * half + rng.randint(2, half - size - 2)
        y = quarter // 2 * half + rng.randint(2, half - size - 2)
        box = (x, y, x + size, y + size)
        if shape == "square":
            draw.rectangle(box, COLOURS[colour])
        elif shape == "circle":
            draw.ellipse(box, COLOURS[colour])
        else:
            corners = [(x, y + size), (x + size, y + size), (x + size // 2, y)]
            draw.polygon(corners, COLOURS[colour])
    return image, f"{COUNTS[count - 1]} {colour} {shape}"


def write_figures(folder: Path, count: int, *, seed: int = 0) -> Path:
    """Write pictures, and rows of messages that ask for them; the file of the rows."""
    rng = random.Random(seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    file = folder / f"figures-{seed}.jsonl"
    with file.open("w", encoding="utf-8") as rows:
        for n in range(count):
            image, text = draw_figures(rng)
            name = f"pictures/{seed}-{n}-0.png"
            image.save(folder / name)
            messages = [
                {"role": "user", "content": f"<image>{QUESTION}"},
                {"role": "assistant", "content": text},
            ]
            rows.write(json.dumps({"messages": messages, "images": [name]}) + "\n")
    return file
