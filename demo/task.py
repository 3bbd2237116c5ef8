"""Make the rows of the demo's task: turn an order in one line of English into `key: value` fields.

    Three striped mugs in teal for Mara Quill, please, to Tucson by Friday.
    name: Mara Quill | item: striped mugs | colour: teal | quantity: 3 | city: Tucson | day: Friday

The rows are drawn from the lists below with a fixed seed. The held-out rows use names, items,
colours and cities that no training row contains. A model that only memorises answers therefore
scores 0: it must learn to find the fields and to write them in this format. The base model does not
know the format and scores 0.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

TRAIN_ROWS, HELD_OUT_ROWS = 300, 40

FIRST = (
    "Mara Jonas Priya Tomas Elif Hugo Nadia Felix Ingrid Omar Clara Pavel Sofia Henrik Leila Marco Greta Anton Yuki "
    "Rosa Viktor Amina Lucas Petra Diego Hanna Samir Olga Bruno Freya Karim Julia Stefan Noor Emil Lucia Ravi Astrid "
    "Milan Teresa Walter Zoe Arthur Mina Oscar Vera Simon Dalia Edgar Livia"
).split()
LAST = (
    "Quill Harper Novak Lindqvist Okafor Brandt Moreau Castell Whitlock Tanaka Fischer Delgado Marsh Petrov Hollis "
    "Varga Keller Santos Byrne Ekström Rossi Adeyemi Wolfe Duarte Jansen Frost Mehta Larkin Bauer Sorensen Pryce "
    "Ferrari Kovac Ashby Nilsen Romero Thorne Weber Salazar Finch Hartley Osei Granger Vance Barlow Costa Lund Meyer"
).split()
LOOK = (
    "striped wooden folding padded woven ceramic waterproof vintage oval quilted tall round glazed soft narrow heavy "
    "light square dotted polished knitted compact sturdy plain"
).split()
THING = (
    "mugs lamps chairs blankets baskets plates jackets clocks mirrors cushions vases tables bowls scarves shelves "
    "kettles rugs candles curtains stools trays pillows frames bottles towels benches aprons teapots"
).split()
COLOUR = (
    "teal red navy white green black yellow grey orange brown pink blue cream purple charcoal ivory crimson lavender amber "
    "beige coral indigo khaki lilac magenta mint mustard ochre peach plum ruby russet salmon sand scarlet tan umber"
).split()
CITY = (
    "Tucson|Oslo|Bristol|Lyon|Denver|Kyoto|Porto|Hamburg|Austin|Leeds|Geneva|Madrid|Toronto|Krakow|Lisbon|Dublin|Turin|"
    "Boston|Vienna|Perth|Bergen|Dallas|Prague|Seville|Ottawa|Zurich|Naples|Chicago|Antwerp|Glasgow|Phoenix|Malmo|"
    "Cardiff|Houston|Athens|Rotterdam|Bilbao|Sydney"
).split("|")
DAY = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
NUMBER = "two three four five six seven eight nine ten eleven twelve".split()

NEW_FIRST = "Selma Otto Beatriz Nils Carmen Idris Flora Gustav Naomi Rafael Sigrid Tariq Paula Edwin Mirela".split()
NEW_LAST = "Carver Lindgren Abbott Moretti Stanek Holloway Nakano Becker Ramsey Ortega Dahl Winters Pereira".split()
NEW_LOOK = "carved leather slim painted marble foldable thick rustic".split()
NEW_THING = "lanterns desks jugs hammocks drawers saucers sofas wallets umbrellas ladders".split()
NEW_COLOUR = "violet silver maroon olive gold turquoise".split()
NEW_CITY = "Munich|Seattle|Valencia|Helsinki|Brighton|Atlanta|Florence|Melbourne|Ghent|Montreal|Salzburg|Nairobi".split(
    "|"
)

ASKED = (
    "{Number} {item} in {colour} for {name}, please, to {city} by {day}.",
    "Please send {number} {item} in {colour} to {name} in {city}, no later than {day}.",
    "{name} from {city} would like {number} {item} in {colour}, and needs them on {day}.",
    "Hi, this is {name}. I need {number} {colour} {item} delivered to {city} on {day}.",
    "Order for {day}: {number} {item}, colour {colour}, going to {city}, customer {name}.",
    "Could you ship {number} {colour} {item} to {city}? The name is {name}, and {day} would be fine.",
    "By {day} we must get {number} {item} to {name}. They should be {colour}. The address is in {city}.",
    "{city} again: {name} wants {number} more {item}, all in {colour}, for {day}.",
)
ANSWER = (
    "name: {name} | item: {item} | colour: {colour} | quantity: {count} | city: {city} | day: {day}"
)


@dataclass(frozen=True)
class Words:
    """The word lists from which the rows of one split are drawn."""

    first: list[str]
    last: list[str]
    look: list[str]
    thing: list[str]
    colour: list[str]
    city: list[str]


TRAIN = Words(FIRST, LAST, LOOK, THING, COLOUR, CITY)
HELD_OUT = Words(NEW_FIRST, NEW_LAST, NEW_LOOK, NEW_THING, NEW_COLOUR, NEW_CITY)


def rows(words: Words, count: int, seed: int) -> list[dict[str, object]]:
    """Return `count` different rows with `messages`: the user's line and the expected answer."""
    draw = random.Random(seed)
    seen: dict[str, str] = {}
    while len(seen) < count:
        number = draw.randrange(len(NUMBER))
        parts = {
            "name": f"{draw.choice(words.first)} {draw.choice(words.last)}",
            "item": f"{draw.choice(words.look)} {draw.choice(words.thing)}",
            "colour": draw.choice(words.colour),
            "city": draw.choice(words.city),
            "day": draw.choice(DAY),
            "number": NUMBER[number],
            "Number": NUMBER[number].capitalize(),
            "count": str(number + 2),
        }
        seen[draw.choice(ASKED).format(**parts)] = ANSWER.format(**parts)
    return [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in seen.items()
    ]


def write(folder: Path) -> tuple[Path, Path]:
    """Write train.jsonl and held-out.jsonl, always with the same bytes, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, words, count, seed in (
        ("train", TRAIN, TRAIN_ROWS, 1),
        ("held-out", HELD_OUT, HELD_OUT_ROWS, 2),
    ):
        path = folder / f"{name}.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows(words, count, seed)]
        path.write_text("".join(lines), encoding="utf-8")
        paths.append(path)
    return paths[0], paths[1]


if __name__ == "__main__":
    for written in write(Path(__file__).parent / "data"):
        print(written)
