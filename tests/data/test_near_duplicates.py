"""Which rows are near-duplicates, and which are rows of one template."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tunesmith.data.compare.near_duplicates import Groups, find_near_duplicates, words_of
from tunesmith.data.compare.row_texts import RowText

WORDS = (
    "harbor window lantern copper meadow engine pillow thunder basket ribbon marble candle orchard"
    " saddle velvet anchor timber pepper castle mirror puzzle button hammer garden silver tunnel"
).split()


def row(prompt: str, answer: str = "") -> RowText:
    return RowText(prompt, answer, is_answered=True)


def text(content: str) -> RowText:
    return RowText("", content, is_answered=False, is_plain=True)


def made(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(4))


def unlike(count: int) -> list[RowText]:
    """Rows that say different things."""
    rng = random.Random(7)
    lengths = (10, 9)
    return [
        row(*[" ".join(made(rng) for _ in range(length)) for length in lengths])
        for _ in range(count)
    ]


QUESTION = "Which of the two lanterns in the harbor window was lit first, and by whom?"
ANSWER = "The copper one, by the keeper's daughter."


@pytest.mark.parametrize(
    "other",
    [
        row(QUESTION, ANSWER),
        row(QUESTION.upper().replace(",", ""), ANSWER.lower()),
        row(f"  {QUESTION}\n".replace(" ", "  "), ANSWER),
        row(QUESTION.replace("lit", "kindled"), ANSWER),
        row(QUESTION.replace("lit first", "kindled"), ANSWER),
        row(f"Please tell me: {QUESTION}", ANSWER),
        row(QUESTION, ANSWER.replace("daughter", "child")),
        row("Which of the two lanterns in the window was lit first?", ANSWER),
    ],
)
@pytest.mark.slow
def test_a_row_that_is_reworded_a_little_is_a_near_duplicate(other: RowText) -> None:
    rows = [*unlike(5), row(QUESTION, ANSWER), other]
    assert find_near_duplicates(rows) == [[5, 6]]
    # So many rows are not compared all with all, but by MinHash.
    rows = [*unlike(90), row(QUESTION, ANSWER), other]
    assert find_near_duplicates(rows) == [[90, 91]]


@pytest.mark.parametrize(
    "rows",
    [
        [row("What is 12 + 7?", "19"), row("What is 12 + 9?", "21")],
        [row("What is 12 + 7?", "19"), row("What is 12 - 7?", "5")],
        [row("What is 12 - 7?", "5"), row("What is 7 - 12?", "-5")],
        [row("What is the capital of France?", "Paris"), row("What is the capital of Spain?", "Madrid")],
        [row(QUESTION, ANSWER), row(QUESTION, "Nobody knows that any more, since the book is lost.")],
        [row("How do I reset my phone?", ANSWER * 3), row("Where does the tram stop?", ANSWER * 3)],
        [row("yes please", ""), row("no please", "")],
        [text("On day 3 the ship had 12 men aboard."), text("On day 4 the ship had 11 men aboard.")],
        [row("", ""), row("", "")],
        [None, None],
    ],
)  # fmt: skip
def test_rows_that_say_something_else_are_none(rows: list[RowText | None]) -> None:
    assert find_near_duplicates(rows) == []
    assert find_near_duplicates([*rows, *unlike(90)]) == []


@pytest.mark.parametrize("question", [QUESTION, QUESTION.replace("lit", "kindled")])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"is_good": True}, {"is_good": False}),
        ({"chosen": "The copper one."}, {"chosen": "The keeper's daughter."}),
        ({"given": "[1]"}, {"given": "[2]"}),
    ],
)
def test_rows_that_teach_something_else_are_none(
    question: str, one: dict[str, Any], other: dict[str, Any]
) -> None:
    rows = [row(QUESTION, ANSWER)._replace(**one), row(question, ANSWER)._replace(**other)]
    assert find_near_duplicates(rows) == []
    rows[1] = row(question, ANSWER)._replace(**one)
    assert find_near_duplicates(rows) == [[0, 1]]


def test_a_word_in_another_script() -> None:
    chinese = "猫坐在窗边看着在花园里找食物的鸟儿一整个下午都没有离开"
    rows = [
        text(chinese),
        text(chinese.replace("下午", "上午")),
        text("狗在院子里跑来跑去追着自己的尾巴玩耍"),
    ]
    assert find_near_duplicates(rows) == [[0, 1]]
    assert words_of("Ｗｈａｔ ＩＳ it?") == ["what", "is", "it"]


def labels(count: int) -> list[RowText]:
    """A long instruction, a blank of one word and one of two labels."""
    rng = random.Random(3)
    instruction = (
        "Is the following name that of a place? Answer with yes or no, in one word only, and without"
        " any punctuation or explanation. Name:"
    )
    names = {made(rng): None for _ in range(count)}
    return [row(f"{instruction} {name}", rng.choice(["yes", "no"])) for name in names]


@pytest.mark.parametrize(
    ("count", "others"), [(4, 0), (40, 0), pytest.param(200, 300, marks=pytest.mark.slow)]
)
def test_rows_of_a_template_are_not_near_duplicates(count: int, others: int) -> None:
    assert find_near_duplicates([*labels(count), *unlike(others)]) == []


def test_a_repeated_text_in_a_template_is_found() -> None:
    instruction = (
        "You are given a review. Decide whether its writer is content, and answer with one word."
        " Consider irony. Do not explain. Review:"
    )
    rng = random.Random(5)
    rows = [row(f"{instruction} {' '.join(rng.choices(WORDS, k=12))}", "yes") for _ in range(120)]
    reworded = rows[17].prompt.split()
    reworded[-4] = "umbrella"
    rows.append(row(" ".join(reworded), "yes"))
    assert find_near_duplicates(rows) == [[17, 120]]


def test_many_rewordings_of_few_rows_are_one_group_each() -> None:
    """Also where more rows than 50 have the words of a row."""
    rng = random.Random(11)
    rows = []
    for seed in range(4):
        prompt = " ".join(made(rng) for _ in range(16)).split()
        for _ in range(70):
            words = list(prompt)
            words[rng.randrange(16)] = made(rng)
            rows.append((seed, row(" ".join(words), "so it is")))
    rng.shuffle(rows)
    groups = find_near_duplicates([r for _, r in rows])
    assert len(groups) == 4
    # MinHash misses a row now and then.
    assert sum(map(len, groups)) >= 276
    assert all(len({rows[i][0] for i in group}) == 1 for group in groups)


def test_what_most_rows_of_a_source_have_does_not_count() -> None:
    """A system prompt of one source, and its rows in another source without it."""
    system = "You are the keeper of a harbor and answer in the manner of an old sailor, briefly."
    plain = unlike(30)
    with_system = [r._replace(prompt=f"{system}\n{r.prompt}") for r in plain]
    assert find_near_duplicates([*plain, *with_system], [30, 30]) == [
        [i, i + 30] for i in range(30)
    ]


def test_groups_join_over_others() -> None:
    groups = Groups()
    for one, other in [(5, 3), (8, 9), (3, 1), (9, 2)]:
        groups.join(one, other)
    assert groups.joined_groups() == [[1, 3, 5], [2, 8, 9]]
    assert groups.are_joined(5, 1)
    assert not groups.are_joined(5, 8)
    assert not groups.are_joined(7, 8)
