"""Ranks share the examples of a step; pairs share the tokens that both sequences begin with."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes import built_model, make_run
from rows import schedule_of
from tunesmith.batches.batch import IGNORE, Batch, collate
from tunesmith.batches.layout import Layout
from tunesmith.batches.loader import GlobalBatch, Loader
from tunesmith.batches.schedule import BatchSchedule
from tunesmith.config.schema import Data, Source, Train
from tunesmith.planning.run_plan import shares_prompts
from tunesmith.tokens.text.example import Example
from tunesmith.units import Size

SEQ = 64


class Numbered:
    """What a loader asks of tokens; every token of example i is i + 1, so that a batch tells whose
    it is.
    """

    def __init__(self, lengths: list[int], *, pairs: bool = False) -> None:
        self.lengths = np.array(lengths, np.int64)
        random = np.random.default_rng(0)
        self.examples = [
            Example(
                np.full(n, i + 1, np.int32),
                random.random(n) < 0.7,
                (n // 2, n - n // 2) if pairs else (),
            )
            for i, n in enumerate(lengths)
        ]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Example:
        return self.examples[i]


def schedule(lengths: list[int], batch: str, *, pack: bool, pairs: bool = False) -> BatchSchedule:
    data = Data(train=(Source(source="x"),), seq_len=SEQ, pack=pack)
    longest = [n - n // 2 if pairs else n for n in lengths]
    return schedule_of(
        lengths,
        data,
        Train(global_batch=Size.parse(batch)),
        sequences=2 if pairs else 1,
        sequence_lengths=np.array(longest),
    )


def all_ranks(
    tokens: Any, course: BatchSchedule, world: int, step: int = 0, **layout: Any
) -> list[GlobalBatch]:
    """The step's batch as each data rank has it."""
    return [
        Loader(tokens, course, pad_id=0, share=(r, world), **layout).batch(step)
        for r in range(world)
    ]


def examples_of(micro: Batch) -> list[tuple[int, int]]:
    """(example, tokens) of each document without padding."""
    ids, edges = micro.input_ids.flatten(), micro.cu_seqlens.tolist()
    return [(int(ids[a]) - 1, b - a) for a, b in pairwise(edges) if ids[a] != 0]


lengths_of_examples = st.lists(st.integers(4, SEQ), min_size=1, max_size=40)
layouts = st.sampled_from(
    [
        {"micro_batch": Size(64, "tokens")},
        {"micro_batch": Size(200, "tokens"), "multiple": 8, "max_document": SEQ},
        {"micro_batch": Size(3, "examples")},
        {"micro_batch": Size(128, "tokens"), "row_length": 128},
        {"micro_batch": Size(4, "examples"), "row_length": 96, "max_document": 80},
    ]
)


@pytest.mark.slow
@settings(max_examples=60)
@given(
    lengths_of_examples,
    st.integers(1, 16),
    layouts,
    st.sampled_from(["8 examples", "40 examples", "256 tokens"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.05]),
)
def test_ranks_share_a_step(
    lengths: list[int],
    world: int,
    layout: dict[str, Any],
    size: str,
    pack: bool,
    pairs: bool,
    weight: float,
) -> None:
    tokens, course = Numbered(lengths, pairs=pairs), schedule(lengths, size, pack=pack, pairs=pairs)
    ranks = all_ranks(tokens, course, world, **layout, attention_weight=weight)
    alone = Loader(tokens, course, pad_id=0, **layout).batch(0)
    micro = [m for batch in ranks for m in batch.micro]

    # Each example once and whole, its sequences side by side in their order.
    found = [document for m in micro for document in examples_of(m)]
    whole = [[(i, n) for n in tokens[i].sequences or (len(tokens[i].ids),)] for i in alone.indices]
    assert sorted(found) == sorted(document for example in whole for document in example)
    for m in micro:
        inside = examples_of(m)
        assert [
            d for i in dict.fromkeys(i for i, _ in inside) for d in whole[alone.indices.index(i)]
        ] == inside

    # All ranks know the same counts, and they are those of what the ranks hold.
    for batch in ranks:
        for name in ("step", "epoch", "tokens", "supervised", "examples", "indices"):
            assert getattr(batch, name) == getattr(alone, name), name
        assert batch.idle_share == ranks[0].idle_share
    for name in ("tokens", "supervised", "examples"):
        assert sum(getattr(m, name) for m in micro) == getattr(alone, name), name

    # Equally many micro batches, as few as make room for those of one rank, with numbers of their
    # own.
    count = -(-len(alone.micro) // world)
    assert {len(batch.micro) for batch in ranks} == {count}
    assert sorted(b.first_micro + k for b in ranks for k in range(count)) == list(
        range(count * world)
    )
    check_limits(micro, layout, pack, longest=max(lengths))


def check_limits(micro: list[Batch], layout: dict[str, Any], pack: bool, longest: int) -> None:
    size, row_length, multiple = (
        layout["micro_batch"],
        layout.get("row_length"),
        layout.get("multiple", 1),
    )
    for m in micro:
        rows, length = m.input_ids.shape
        if size.unit == "examples":
            assert m.examples <= size.amount
        elif pack:
            assert m.tokens <= max(size.amount, longest)
        elif m.examples > 1 and row_length is None:
            assert rows * (length - multiple) < size.amount
        assert length == row_length if row_length else length % multiple == 0
        assert m.examples or row_length or (rows, length) == (1, multiple), "the least padding"
        assert m.tokens > 0 or m.supervised == 0
    if row_length is not None:
        assert len({m.input_ids.shape for m in micro}) == 1


def ranks_of(lengths: list[int], world: int, room: int, **layout: Any) -> list[GlobalBatch]:
    """The ranks of one packed step of all examples."""
    course = schedule(lengths, f"{len(lengths)} examples", pack=True)
    layout = {"micro_batch": Size(room, "tokens"), **layout}
    return all_ranks(Numbered(lengths), course, world, **layout)


def test_idle_share_is_what_the_costs_of_all_ranks_say() -> None:
    """Two micro steps on two ranks: 60 and 50, then 40 and 35 tokens, so 15 of 200 are idle."""
    ranks = ranks_of([60, 50, 40, 35], 2, 60)
    assert [[m.tokens for m in batch.micro] for batch in ranks] == [[60, 35], [50, 40]]
    assert ranks[0].idle_share == pytest.approx(15 / 200)


def test_ranks_without_an_example_have_a_micro_batch_all_the_same() -> None:
    ranks = ranks_of([8, 8], 5, 64, multiple=4)
    assert [b.micro[0].examples for b in ranks] == [1, 1, 0, 0, 0]
    assert [tuple(b.micro[0].input_ids.shape) for b in ranks] == [(1, 8)] * 2 + [(1, 4)] * 3
    assert [b.idle_share for b in ranks] == pytest.approx([3 / 5] * 5)


def test_a_micro_batch_without_an_example_adds_nothing(tiny: Path, tmp_path: Path) -> None:
    model = built_model(make_run(tiny, tmp_path, adapter={"kind": "none"}), tiny)
    made = model(collate([[]], length=1, pad_id=0))
    made.loss.backward()
    assert float(made.loss.detach()) == made.denominator == 0
    assert all(p.grad is None or not p.grad.any() for _, p in model.trained_parameters())


# --- batches of examples that stand in no schedule

ROOM = 60


def examples(sequences: int) -> list[Example]:
    random = np.random.default_rng(0)
    made = []
    for number in range(40):
        lengths = tuple(random.integers(2, 30, sequences).tolist())
        ids = np.full(sum(lengths), number, np.int32)
        trained = random.random(len(ids)) < 0.5
        made.append(Example(ids, trained, lengths if sequences > 1 else ()))
    return made


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("is_packed", [True, False])
def test_each_example_is_in_one_batch(is_packed: bool, sequences: int, ranks: int) -> None:
    rows = examples(sequences)
    of_ranks = []
    for rank in range(ranks):
        layout = Layout(0, is_packed, multiple=4, share=(rank, ranks))
        of_ranks.append(list(layout.batches(rows, ROOM)))
    assert len({len(batches) for batches in of_ranks}) == 1
    taken = [i for batches in of_ranks for indices, _ in batches for i in indices]
    assert sorted(taken) == list(range(len(rows)))
    for indices, batch in (entry for batches in of_ranks for entry in batches):
        height, width = batch.input_ids.shape
        assert batch.examples == len(indices)
        assert batch.supervised == sum(rows[i].supervised for i in indices)
        assert width % 4 == 0
        assert len(indices) < 2 or height * (width - 3) <= ROOM
        # Documents of a batch in the order of its examples, each in a row of its own or in one.
        assert height == (1 if is_packed else max(1, sequences * len(indices)))
        if indices and not is_packed:
            assert batch.input_ids[::sequences, 0].tolist() == indices


# --- pairs in packed rows that hold once what both sequences begin with


def pair(first: str, second: str) -> Example:
    """A letter is a token, a capital one supervised."""
    ids = np.frombuffer((first + second).lower().encode(), np.uint8).astype(np.int32)
    trained = np.array([letter.isupper() for letter in first + second])
    return Example(ids, trained, (len(first), len(second)))


def test_what_is_shared_has_no_target() -> None:
    for first, second, shared in (
        ("abcXY", "abcZ", 2),  # the last token of the prompt predicts another answer in each
        ("abcXY", "abcXZ", 2),  # the beginning of the answers too has targets
        ("aBcXY", "abcZ", 0),  # an answer in the prompt that one row trains on
        ("abc", "abcdX", 2),  # a sequence that is the beginning of the other keeps a token
    ):
        assert pair(first, second).count_shared() == shared


def test_the_second_sequence_goes_on_behind_what_it_shares() -> None:
    example = pair("abcXY", "abcZ")._replace(shared=2)
    batch = collate([[example]], length=9, pad_id=0)
    a, b, c, x, y, z = b"abcxyz"
    assert batch.input_ids.tolist() == [[a, b, c, x, y, c, z, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3, 0, 1]]
    nothing = IGNORE
    assert batch.targets.tolist() == [[nothing, nothing, x, y, nothing, z] + [nothing] * 3]
    assert batch.cu_seqlens.tolist() == [0, 5, 9, 11]
    assert batch.whole is not None
    assert batch.whole.places.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8]
    assert (batch.tokens, batch.max_seqlen) == (9, 5)
    assert (batch.supervised, batch.chosen_tokens) == (3, 2)


def test_which_runs_hold_a_prompt_once(tmp_path: Path) -> None:
    def shares(method: str, *recurrent: str, **data: Any) -> bool:
        form = "prompt-completion" if method == "sft" else "preference"
        data["train"] = {"source": str(tmp_path / "rows.jsonl"), "format": form}
        run = make_run(tmp_path, tmp_path, held=False, method=method, data=data)
        return shares_prompts(run, recurrent)

    assert shares("dpo")
    assert not shares("dpo", "Lfm2ShortConv"), "a state would run into the rejected answer"
    assert not shares("dpo", pack=False)
    assert not shares("sft")
