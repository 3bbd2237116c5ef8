"""Recall and false alarms of what `tunesmith data` says of rows, on planted ones; seconds for many.

    python benchmarks/rows/planted.py quality ROWS.json --json docs/measurements/planted-rows.json
    python benchmarks/rows/planted.py seconds --rows 100000

ROWS.json is a file of real rows in alpaca's format. Near-duplicates of its rows are planted among
them, one kind of edit at a time; recall is the share of copies that are found with their original.
False alarms are rows that are joined with another row although they say something else: rows of
templates whose blanks differ. Everything is seeded.
"""

import argparse
import json
import random
import re
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tunesmith.data.near_duplicates import find_near_duplicates
from tunesmith.data.row_checks import find_faults
from tunesmith.data.row_texts import RowText

COPIES = 200
LETTERS = "bcdfghjklmnprstvz"
Rows = list[RowText]


def row(prompt: str, answer: str) -> RowText:
    return RowText(prompt, answer, is_answered=True, answer_length=len(answer))


def read_alpaca(path: Path) -> Rows:
    rows = []
    for values in json.loads(path.read_text(encoding="utf-8")):
        prompt = f"{values['instruction']}\n{values['input']}".strip()
        rows.append(row(prompt, values["output"]))
    return rows


# Edits ------------------------------------------------------------------------------------------


def replaced(text: str, rng: random.Random, words: list[str], count: int = 1) -> str:
    """The text with some of its words replaced by others; numbers stay."""
    parts = re.split(r"(\W+)", text)
    places = [i for i, part in enumerate(parts) if part.isalpha()]
    for i in rng.sample(places, min(count, len(places))):
        parts[i] = rng.choice(words)
    return "".join(parts)


def case_and_punctuation(r: RowText, rng: random.Random, words: list[str]) -> RowText:
    prompt = re.sub(r"[.,!?;:]", lambda m: rng.choice(["", " ", m[0] * 2]), r.prompt)
    return row(rng.choice([str.upper, str.lower, str.title])(prompt), r.answer.rstrip("."))


def white_space(r: RowText, rng: random.Random, words: list[str]) -> RowText:
    return row(r.prompt.replace(" ", "  ") + "\n", r.answer.replace("\n", " "))


def one_word(r: RowText, rng: random.Random, words: list[str]) -> RowText:
    return row(replaced(r.prompt, rng, words), r.answer)


def two_words(r: RowText, rng: random.Random, words: list[str]) -> RowText:
    return row(replaced(r.prompt, rng, words, 2), r.answer)


def word_left_out(r: RowText, rng: random.Random, words: list[str]) -> RowText:
    parts = r.prompt.split(" ")
    del parts[rng.randrange(len(parts))]
    return row(" ".join(parts), r.answer)


def politely(r: RowText, rng: random.Random, words: list[str]) -> RowText:
    first = rng.choice(["Please ", "Hi! ", "Could you ", "I would like you to "])
    return row(f"{first}{r.prompt[:1].lower()}{r.prompt[1:]}", r.answer)


def answer_too(r: RowText, rng: random.Random, words: list[str]) -> RowText:
    return row(replaced(r.prompt, rng, words), replaced(r.answer, rng, words))


Edit = Callable[[RowText, random.Random, list[str]], RowText]
# Each with the fewest words of a prompt that it is tried on.
EDITS: dict[str, tuple[Edit, int]] = {
    "case and punctuation": (case_and_punctuation, 3),
    "white space": (white_space, 3),
    "one word of 6 and more replaced": (one_word, 6),
    "two words of 12 and more replaced": (two_words, 12),
    "a word of 6 and more left out": (word_left_out, 6),
    "please, hi, could you": (politely, 6),
    "one word of question and answer": (answer_too, 6),
}


# Templates --------------------------------------------------------------------------------------


def made_word(rng: random.Random) -> str:
    return "".join(rng.choice(LETTERS) + rng.choice("aeiou") for _ in range(rng.randint(2, 4)))


def made_names(rng: random.Random, n: int) -> list[str]:
    """Words that all differ."""
    names: dict[str, None] = {}
    while len(names) < n:
        names[made_word(rng)] = None
    return list(names)


def sentence(rng: random.Random, words: list[str], low: int = 8, high: int = 20) -> str:
    return " ".join(rng.choices(words, k=rng.randint(low, high)))


def sums(rng: random.Random, words: list[str], n: int) -> Rows:
    pairs = rng.sample([(a, b) for a in range(2, 99) for b in range(2, 99)], n)
    return [row(f"What is {a} + {b}?", str(a + b)) for a, b in pairs]


def word_problems(rng: random.Random, words: list[str], n: int) -> Rows:
    text = (
        "Anna has {} apples and buys {} more at the market on Saturday. She gives none away and "
        "eats none of them. How many apples does she have on Sunday?"
    )
    return [row(text.format(r.prompt[8:-1], ""), r.answer) for r in sums(rng, words, n)]


def labels(rng: random.Random, words: list[str], n: int) -> Rows:
    text = (
        "Is the following name that of a place? Answer with yes or no, in one word only and without"
        " punctuation. Name: {}"
    )
    return [row(text.format(name), rng.choice(["yes", "no"])) for name in made_names(rng, n)]


def facts(rng: random.Random, words: list[str], n: int) -> Rows:
    countries = made_names(rng, n)
    return [row(f"What is the capital of {name}?", made_word(rng)) for name in countries]


def reviews(rng: random.Random, words: list[str], n: int) -> Rows:
    text = (
        "You are given a review of a product. Decide whether its writer is content with it. Consider"
        " irony, and do not be misled by single words. Answer `positive` or `negative` and nothing"
        " else, without an explanation.\n\nReview: {}\n\nAnswer:"
    )
    answers = ["positive", "negative"]
    return [row(text.format(sentence(rng, words)), rng.choice(answers)) for _ in range(n)]


def mixture(rng: random.Random, words: list[str], n: int) -> Rows:
    """Thirty rows of each template, of which each has an instruction of its own."""
    rows = []
    for _ in range(n // 30):
        text = f"{sentence(rng, words, 20, 60)}: {{}}. {sentence(rng, words, 0, 8)}"
        names = made_names(rng, 30)
        rows += [row(text.format(name), rng.choice(["yes", "no"])) for name in names]
    return rows


TEMPLATES: dict[str, Callable[[random.Random, list[str], int], Rows]] = {
    "sums": sums,
    "word problems": word_problems,
    "yes or no of one word": labels,
    "facts of one word": facts,
    "reviews": reviews,
    "mixture of templates": mixture,
}


# Figures ----------------------------------------------------------------------------------------


def recall(rows: Rows, edit: Edit, fewest_words: int, rng: random.Random, words: list[str]) -> dict:
    able = [i for i, r in enumerate(rows) if len(r.prompt.split()) >= fewest_words and r.answer]
    chosen = rng.sample(able, min(COPIES, len(able)))
    copies = [edit(rows[i], rng, words) for i in chosen]
    group_of = {}
    for number, group in enumerate(find_near_duplicates(rows + copies)):
        for i in group:
            group_of[i] = number
    found = 0
    for number, i in enumerate(chosen, len(rows)):
        found += number in group_of and group_of[number] == group_of.get(i)
    return {"planted": len(chosen), "found": found, "recall": round(found / len(chosen), 3)}


def false_alarms(rows: Rows, others: Rows) -> dict:
    groups = find_near_duplicates([*others, *rows])
    first = len(others)
    joined = sum(max(0, sum(i >= first for i in group) - 1) for group in groups)
    return {"rows": len(rows), "joined": joined, "share": round(joined / len(rows), 4)}


def clusters(rows: Rows, seeds: int, each: int, rng: random.Random, words: list[str]) -> dict:
    """Of each seed a question and its rewordings, as where a model wrote variants of few rows."""
    able = [r for r in rows if 8 <= len(r.prompt.split()) <= 40 and len(r.answer.split()) >= 5]
    made = []
    for r in rng.sample(able, seeds):
        made += [r, *(two_words(r, rng, words) for _ in range(each - 1))]
    order = list(range(len(made)))
    rng.shuffle(order)
    together = 0
    mixed = 0
    for group in find_near_duplicates([made[i] for i in order]):
        of_seeds = [order[i] // each for i in group]
        most = max(map(of_seeds.count, set(of_seeds)))
        together += most
        mixed += len(group) - most
    return {"rows": len(made), "with their seed": round(together / len(made), 3), "mixed": mixed}


def other_faults(rows: Rows, rng: random.Random) -> Iterator[tuple[str, dict]]:
    """Contradictions, cut answers and foreign rows planted; before, those that the rows have."""
    clean = find_faults(rows)
    planted: Rows = []
    kinds: dict[str, range] = {}

    def plant(kind: str, made: Rows) -> None:
        start = len(rows) + len(planted)
        kinds[kind] = range(start, start + len(made))
        planted.extend(made)

    short = [r for r in rows if 0 < len(r.answer.split()) <= 8 and len(r.prompt.split()) > 3]
    plant("contradictions", [row(f" {r.prompt} ", "another answer") for r in short[:40]])
    long = [r for r in rows if len(r.answer.split()) >= 30 and "```" not in r.answer]
    made = []
    for number, r in enumerate(rng.sample(long, 40)):
        parts = r.answer.split()
        made.append(row(f"{r.prompt} Variant {number}.", " ".join(parts[: len(parts) // 2])))
    plant("answers cut at half", made)
    cut = [
        row(f"{r.prompt} {n} times.", r.answer[:400])
        for n, r in enumerate(long)
        if len(r.answer) > 400
    ]
    texts = {
        "German": "Die Katze sitzt am Fenster und sieht den Vögeln zu, die im Garten nach Futter suchen.",
        "Spanish": "El gato se sienta junto a la ventana y mira los pájaros que buscan comida en el jardín.",
        "Russian": "Кошка сидит у окна и смотрит на птиц, которые ищут корм в саду.",
        "Chinese": "猫坐在窗边，看着在花园里找食物的鸟儿，一整个下午都没有离开。",
    }
    made = []
    for text in texts.values():
        made += [row(f"What does the cat do on day {n}?", f"{text} {n}.") for n in range(3)]
    plant("foreign rows", made)
    found = find_faults([*rows, *planted])
    flagged = {
        "contradictions": {i for group in found.contradictions for i in group},
        "answers cut at half": set(found.unfinished),
        "foreign rows": {i for of in found.languages.values() for i in of},
    }
    before = {
        "contradictions": sum(map(len, clean.contradictions)),
        "answers cut at half": len(clean.unfinished),
        "foreign rows": sum(map(len, clean.languages.values())),
    }
    for kind, indices in kinds.items():
        hits = len(flagged[kind].intersection(indices))
        count = len(indices)
        share = round(hits / count, 3)
        yield kind, {"planted": count, "found": hits, "recall": share, "unplanted": before[kind]}
    whole = [r for r in rows if len(r.answer) < 400]
    found = find_faults([*whole, *cut])
    hits = sum(i >= len(whole) for i in found.unfinished)
    yield (
        "answers cut at 400 characters",
        {"planted": len(cut), "found": hits, "recall": round(hits / len(cut), 3)},
    )


def quality(rows: Rows) -> dict[str, Any]:
    rng = random.Random(0)
    words = sorted({word for r in rows for word in re.findall("[a-z]{3,}", r.prompt)})
    figures: dict[str, Any] = {"recall": {}, "false alarms": {}, "clusters": {}, "others": {}}
    for name, (edit, fewest_words) in EDITS.items():
        figures["recall"][name] = recall(rows, edit, fewest_words, rng, words)
    for name, make in TEMPLATES.items():
        for count in (6, 30, 300, 3000):
            made = make(rng, words, count)
            if not made:
                continue
            figures["false alarms"][f"{count:,} {name}, alone"] = false_alarms(made, [])
            if count < 3000:
                figures["false alarms"][f"{count:,} {name}, among others"] = false_alarms(
                    made, rows
                )
    for seeds, each in ((100, 3), (50, 10), (20, 50), (20, 500)):
        figures["clusters"][f"{seeds} x {each}"] = clusters(rows, seeds, each, rng, words)
    figures["others"] = dict(other_faults(rows, rng))
    return figures


def many_rows(count: int) -> Iterator[RowText]:
    """Short chats of made words, as frequent as words of a language are."""
    rng = random.Random(0)
    words = [made_word(rng) for _ in range(30_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    texts = iter(rng.choices(words, weights, k=120 * count))

    def text(length: int) -> str:
        return " ".join(word for word, _ in zip(texts, range(length), strict=False))

    for _ in range(count):
        yield row(f"{text(rng.randint(5, 30))}?", f"{text(rng.randint(5, 120))}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["quality", "seconds"])
    parser.add_argument("file", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures: dict[str, Any]
    if args.what == "quality":
        figures = quality(read_alpaca(args.file))
    else:
        rows = list(many_rows(args.rows))
        start = time.perf_counter()
        cpu = time.process_time()
        find_faults(rows)
        figures = {
            "rows": args.rows,
            "words": sum(len(f"{r.prompt} {r.answer}".split()) for r in rows),
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        }
    text = json.dumps(figures, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
