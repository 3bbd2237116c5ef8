"""Synthetic preference pairs with one rule: if both answers are right, the short one is better.

    What is a kettle for?
    chosen:   A kettle is for boiling water.
    rejected: A kettle is for boiling water. <two more sentences that answer nothing>

Both answers begin with the same sentence, so a model can learn only where to stop. No word of an
answer states the rule. Held-out pairs ask about things that are in no training pair.

The seed is fixed, so the files have the same bytes every time. They contain the pairs, the answers
labeled as good or bad, and only the questions.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

TRAIN_PAIRS, HELD_OUT_PAIRS = 300, 60

# The use of each thing, by the place where people keep the thing.
THINGS = {
    "kitchen": (
        "kettle: boiling water|colander: draining pasta|whisk: beating eggs|ladle: serving soup|"
        "grater: shredding cheese|toaster: browning bread|rolling pin: flattening dough|"
        "corkscrew: opening bottles|saucepan: heating sauces|peeler: taking the skin off potatoes|"
        "oven mitt: holding hot dishes|chopping board: cutting vegetables on|sieve: sifting flour|"
        "teapot: brewing tea|spatula: turning pancakes|mortar: grinding spices"
    ),
    "garden": (
        "rake: gathering leaves|wheelbarrow: carrying soil|watering can: watering plants|"
        "spade: digging holes|hedge trimmer: cutting hedges|trowel: planting seedlings|"
        "hose: spraying water|flowerpot: growing herbs|greenhouse: keeping plants warm|"
        "lawn mower: cutting grass|compost bin: turning scraps into soil|pitchfork: lifting hay|"
        "bird feeder: feeding birds|garden bench: sitting outside|trellis: holding up vines|"
        "pair of pruning shears: trimming branches"
    ),
    "workshop": (
        "hammer: driving nails|saw: cutting wood|spirit level: checking that a shelf is straight|"
        "drill: making holes|screwdriver: turning screws|vise: holding parts still|"
        "chisel: carving wood|tape measure: measuring lengths|wrench: tightening bolts|"
        "paintbrush: painting walls|ladder: reaching high places|toolbox: carrying tools|"
        "sheet of sandpaper: smoothing wood|soldering iron: joining wires|file: smoothing edges|"
        "pair of pliers: gripping small parts"
    ),
    "office": (
        "stapler: joining sheets of paper|hole punch: making holes in paper|ruler: drawing lines|"
        "desk lamp: lighting a desk|envelope: sending letters|paper clip: holding papers together|"
        "notebook: writing down ideas|bookshelf: storing books|printer: putting text on paper|"
        "calculator: adding up numbers|calendar: keeping track of dates|eraser: removing pencil|"
        "filing cabinet: sorting documents|shredder: destroying old papers|globe: finding countries|"
        "pencil sharpener: sharpening pencils"
    ),
    "hallway": (
        "umbrella: keeping off the rain|doormat: wiping shoes|coat rack: hanging coats|"
        "shoehorn: putting on shoes|doorbell: telling that a guest is there|mirror: seeing yourself|"
        "suitcase: packing clothes|scarf: keeping the neck warm|backpack: carrying books|"
        "flashlight: seeing in the dark|key ring: keeping keys together|broom: sweeping floors|"
        "bucket: carrying water|laundry basket: collecting clothes|clothes iron: smoothing shirts|"
        "vacuum cleaner: removing dust"
    ),
}
# Questions, each with the sentence that answers it.
QUESTIONS = (
    ("What is {a} for?", "{A} is for {use}."),
    ("Where do people usually keep {a}?", "People usually keep {a} in the {place}."),
    ("What would I need for {use}?", "You would need {a}."),
    ("Is {a} of any use for {other}?", "No, {a} is for {use}, not for {other}."),
    ("My neighbor gave me {a}. What do I do with it?", "You can use {a} for {use}."),
)
# Sentences that make an answer longer. They are true of any thing and answer no question. They are
# so common that, by the mean log-probability per token, a base model prefers neither the short nor
# the long answers.
COMMONPLACE = (
    "It comes in many different sizes and styles.",
    "If you have any other questions, please feel free to ask.",
    "It is important to choose the one that is right for you.",
    "It is a simple and effective tool.",
    "It can also be a great gift for a friend.",
    "There are many different types to choose from.",
)


def pairs(things: list[tuple[str, str, str]], seed: int) -> list[dict[str, Any]]:
    """Return a pair for every question about every thing, in random order.

    Args:
        things: the name, the use and the place of each thing.
    """
    draw = random.Random(seed)
    rows = []
    for name, use, place in things:
        others = [other for _, other, _ in things if other != use]
        article = "an" if name[0] in "aeiou" else "a"
        for question, answer in QUESTIONS:
            words = {
                "a": f"{article} {name}",
                "A": f"{article.capitalize()} {name}",
                "use": use,
                "place": place,
                "other": draw.choice(others),
            }
            short = answer.format(**words)
            more = draw.sample(COMMONPLACE, 2)
            rows.append(
                {
                    "prompt": [{"role": "user", "content": question.format(**words)}],
                    "chosen": [{"role": "assistant", "content": short}],
                    "rejected": [{"role": "assistant", "content": " ".join([short, *more])}],
                }
            )
    draw.shuffle(rows)
    return rows


def labeled(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return each answer of each pair as a row with a label, in random order."""
    answers = []
    for row in rows:
        for column in ("chosen", "rejected"):
            is_good = column == "chosen"
            answers.append({"prompt": row["prompt"], "completion": row[column], "label": is_good})
    random.Random(seed).shuffle(answers)
    return answers


def write(folder: Path) -> None:
    """Write pairs.jsonl, held-out-pairs.jsonl, answers.jsonl, held-out-answers.jsonl and
    questions.jsonl."""
    things = []
    for place, text in THINGS.items():
        for thing in text.split("|"):
            name, _, use = thing.partition(": ")
            things.append((name, use, place))
    random.Random(1).shuffle(things)
    count = TRAIN_PAIRS // len(QUESTIONS)
    train = pairs(things[:count], seed=2)
    held_out = pairs(things[count : count + HELD_OUT_PAIRS // len(QUESTIONS)], seed=3)
    assert (len(train), len(held_out)) == (TRAIN_PAIRS, HELD_OUT_PAIRS)
    files = {
        "pairs": train,
        "held-out-pairs": held_out,
        "answers": labeled(train, seed=4),
        "held-out-answers": labeled(held_out, seed=5),
        "questions": [{"messages": row["prompt"]} for row in held_out],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Write the synthetic pairs as files of JSON lines."
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "data")
    write(parser.parse_args().folder)
