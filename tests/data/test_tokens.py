"""The cache gives what tokenising gives, and only when it is whole; what is left out is counted."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from errors import holds, refuses
from rows import Simple, alpaca
from tunesmith.config.schema import Data, Source
from tunesmith.data.rows.samples import Text
from tunesmith.data.source.open_source import read_rows
from tunesmith.data.tokens import cache as disk
from tunesmith.data.tokens.token_set import TokenSet
from tunesmith.data.tokens.tokenize import tokenize
from tunesmith.errors import DataError
from tunesmith.host.files import ABANDONED


def equal(a: TokenSet, b: TokenSet) -> bool:
    return (
        len(a) == len(b)
        and [p.counts for p in a.parts] == [p.counts for p in b.parts]
        and all(
            np.array_equal(x.ids, y.ids) and np.array_equal(x.trained, y.trained)
            for x, y in zip(a, b, strict=True)
        )
    )


def test_examples_are_those_of_the_template(make, simple: Simple) -> None:
    tokens = make(alpaca(5), seq_len=256)
    text = simple.tokenizer.decode(tokens[1].ids)
    assert text == "<|im_start|>user\nsay 1<|im_end|>\n<|im_start|>assistant\nxxxxxx<|im_end|>\n"
    assert simple.tokenizer.decode(tokens[1].ids[tokens[1].trained]) == "xxxxxx<|im_end|>"
    assert tokens[1].ids.dtype == np.int32
    assert tokens[1].trained.dtype == np.bool_
    assert tokens.lengths.tolist() == [len(e.ids) for e in tokens]
    counts = tokens.counts
    assert (counts.rows, counts.kept, counts.prompts) == (5, 5, 5)
    assert counts.supervised == sum(6 + i for i in range(5))
    assert tokens.where(4).endswith("rows0.jsonl:5")
    with pytest.raises(IndexError):
        tokens[5]


def test_the_recipes_system_message_is_in_the_tokens_whoever_made_the_template(
    make, simple: Simple
) -> None:
    """`eval` tokenises by a template that was loaded without the recipe."""
    text = simple.tokenizer.decode(make(alpaca(1), system="Be.")[0].ids)
    assert text.startswith("<|im_start|>system\nBe.<|im_end|>")


def test_the_cache_is_used_and_gives_the_same(make, simple: Simple, tmp_path: Path) -> None:
    plain = make(alpaca(300), seq_len=256)
    made = make(alpaca(300), seq_len=256, cache=tmp_path / "c")
    assert simple.encoded == 600
    taken = make(alpaca(300), seq_len=256, cache=tmp_path / "c")
    assert simple.encoded == 600  # nothing was tokenised again
    assert isinstance(taken.parts[0].arrays.ids.base, np.memmap)
    assert equal(plain, made)
    assert equal(plain, taken)
    assert [p.name for p in (tmp_path / "c").iterdir() if p.name.startswith(".")] == []


def test_what_shapes_the_tokens_names_the_entry(make, simple: Simple, tmp_path: Path) -> None:
    folder = tmp_path / "c"

    def entries(*contents: str, **keys: Any) -> int:
        make(*(contents or (alpaca(4),)), **{"seq_len": 256, "cache": folder, **keys})
        return len(list(folder.iterdir()))

    assert entries() == 1
    assert entries(weights=(2.0,)) == 1  # how often rows are seen does not shape them
    assert entries(alpaca(5)) == 2
    assert entries(seq_len=255) == 3
    assert entries(too_long="drop") == 4
    assert entries(train_on="all") == 5
    assert entries(system="S") == 6
    simple.name = "another"
    assert entries() == 7
    simple.end_ids = frozenset({1})
    assert entries() == 8
    del simple.tokenizer_hash
    simple.tokenizer.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    assert entries() == 9


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("ids.bin", "lost"), ("ids.bin", "flipped"), ("trained.bin", "torn"), ("trained.bin", "flipped"),
        ("offsets.bin", "torn"), ("rows.bin", "flipped"), ("cut.bin", "lost"), ("cut.bin", "flipped"),
        ("meta.json", "lost"), ("meta.json", "torn"), ("meta.json", "flipped"),
    ],
)  # fmt: skip
def test_a_damaged_entry_is_made_again(
    make, simple: Simple, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str, damage: str
) -> None:
    whole = make(alpaca(20), seq_len=256)
    make(alpaca(20), seq_len=256, cache=tmp_path / "c")
    [entry] = (tmp_path / "c").iterdir()
    data = bytearray((entry / file).read_bytes())
    if damage == "lost":
        (entry / file).unlink()
    else:
        if damage == "flipped":
            at = data.index(b'"supervised": ') + 14 if file == "meta.json" else len(data) - 1
            data[at] = ord("x") if file == "meta.json" else data[at] ^ 1
        (entry / file).write_bytes(data[: len(data) // 2] if damage == "torn" else data)
    with caplog.at_level(logging.WARNING):
        again = make(alpaca(20), seq_len=256, cache=tmp_path / "c")
    assert "damaged" in caplog.text
    assert simple.encoded == 60
    assert equal(whole, again)
    make(alpaca(20), seq_len=256, cache=tmp_path / "c")
    assert simple.encoded == 60  # and now it is whole


def test_what_a_killed_process_left_in_the_cache_is_removed(make, tmp_path: Path) -> None:
    old, new = (tmp_path / "c" / name / "entry" for name in (".0123-killed", ".4567-at-work"))
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "ids.bin").write_bytes(b"half")
    long_ago = time.time() - ABANDONED - 1
    os.utime(old.parent, (long_ago, long_ago))
    make(alpaca(7), seq_len=256, cache=tmp_path / "c")
    assert not old.parent.exists()
    assert (new / "ids.bin").read_bytes() == b"half"


def test_a_cache_that_cannot_be_written_costs_a_warning(
    make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "c").write_text("a file where the folder should be")
    tokens = make(alpaca(7), seq_len=256, cache=tmp_path / "c")
    assert len(tokens) == 7
    assert holds(caplog.text, tmp_path / "c")


def test_a_full_disk_leaves_no_torn_entry(
    make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **keys: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", full)
    tokens = make(alpaca(7), seq_len=256, cache=tmp_path / "c")
    assert len(tokens) == 7
    assert os.strerror(errno.ENOSPC) in caplog.text
    assert list((tmp_path / "c").iterdir()) == []


def test_too_long(make) -> None:
    rows = alpaca(3, letters=lambda i: 4 + 40 * i)  # 30, 70, 110 tokens
    lengths = make(rows, seq_len=256).lengths.tolist()
    assert lengths == [30, 70, 110]
    cut = make(rows, seq_len=75)
    assert cut.lengths.tolist() == [30, 70, 75]
    counts = cut.counts
    assert (counts.cut, counts.dropped, counts.emptied, counts.longest) == (1, 0, 0, 110)
    assert cut.parts[0].arrays.truncated.tolist() == [False, False, True]
    dropped = make(rows, seq_len=75, too_long="drop")
    assert dropped.lengths.tolist() == [30, 70]
    assert (dropped.counts.kept, dropped.counts.cut, dropped.counts.dropped) == (2, 0, 1)
    with refuses(DataError, where="rows0.jsonl:3", names=["110 tokens"], fix=["data.seq_len=110"]):
        make(rows, seq_len=75, too_long="error")
    prompts = make(rows, seq_len=24)  # nothing supervised is left
    assert (len(prompts), prompts.counts.emptied, prompts.counts.dropped) == (0, 3, 0)


def test_rows_keep_their_place_when_others_are_left_out(make) -> None:
    tokens = make(
        alpaca(10, letters=lambda i: 200 if i % 2 else 5), alpaca(2), seq_len=100, too_long="drop"
    )
    assert [tokens.where(i).rpartition("/")[2] for i in (1, 4, 5, 6)] == [
        "rows0.jsonl:3", "rows0.jsonl:9", "rows1.jsonl:1", "rows1.jsonl:2",
    ]  # fmt: skip


def test_sources_and_weights(make) -> None:
    tokens = make(alpaca(3), alpaca(2), weights=(2.0, 0.5), seq_len=256)
    assert tokens.repeats.tolist() == [2.0, 2.0, 2.0, 0.5, 0.5]
    alike = make(alpaca(3), alpaca(2), weights=(1.0, 1.0), seq_len=256).repeats
    assert (alike.tolist(), alike.strides) == ([1.0] * 5, (0,)), "one number is in memory"
    assert [part.counts.kept for part in tokens.parts] == [3, 2]
    assert tokens.counts.digest != make(alpaca(3), alpaca(2), seq_len=256).counts.digest


def test_the_digest_is_of_what_is_trained_on(make) -> None:
    base = make(alpaca(4), seq_len=256).counts.digest
    assert base == make(alpaca(4), seq_len=512).counts.digest
    for rows, keys in ((alpaca(4), {"train_on": "all"}), (alpaca(5), {})):
        assert base != make(rows, seq_len=256, **keys).counts.digest


def test_the_first_n(make) -> None:
    tokens = make(alpaca(3), alpaca(4), seq_len=256)
    some = tokens.first(5)
    assert len(some) == 5
    assert [some.where(i) for i in range(5)] == [tokens.where(i) for i in range(5)]
    assert some.counts.tokens == int(tokens.lengths[:5].sum())
    # It says that it is a part
    assert equal(tokens.first(99), make(alpaca(3), alpaca(4), seq_len=256)) is False
    assert len(tokens.first(99)) == 7


def test_batches_for_the_tokenizer_end_at_a_size(
    simple: Simple, write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.data.tokens.tokenize._BATCH_CHARACTERS", 100)
    sizes: list[int] = []
    encode_many = simple.encode_many

    def counted(samples: Any, *args: Any, **keys: Any) -> Any:
        sizes.append(sum(len(sample.text) for sample in samples))
        return encode_many(samples, *args, **keys)

    monkeypatch.setattr(simple, "encode_many", counted)
    texts = ["a" * n for n in (40, 40, 40, 300, 5, 95, 1)]
    path = write("a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = Source(source=path, format="text")
    data = Data(train=(source,), seq_len=512)
    tokens = tokenize([(source, read_rows(source))], data, simple, cache=None, what="train")
    assert sizes == [80, 40, 300, 100, 1]
    assert tokens.lengths.tolist() == [len(text) + 1 for text in texts]


def test_memory_does_not_grow_with_what_was_written(simple: Simple, tmp_path: Path) -> None:
    writer = disk.TokenWriter(tmp_path)
    text = simple.encode(Text("text"), "all")
    for i in range(10_000):
        writer.add(text, i, False)
    assert 10_000 * 4 * len(text.ids) - os.path.getsize(tmp_path / "ids.bin") < 1 << 18
    arrays = writer.arrays()
    assert simple.tokenizer.decode(arrays.ids[arrays.offsets[9_999] :]) == "text<|im_end|>"
