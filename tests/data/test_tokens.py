"""Tokens of rows and of documents, in one process and from the cache."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errors import holds, refuses
from rows import Simple, alpaca
from tunesmith.config.schema import Data, Source
from tunesmith.data.compare.splits import read_splits
from tunesmith.data.rows.samples import Text
from tunesmith.data.source import text_files
from tunesmith.data.source.open_source import open_splits, read_rows
from tunesmith.data.text.example import Example
from tunesmith.data.tokens import cache as disk
from tunesmith.data.tokens.cache import TokenWriter
from tunesmith.data.tokens.contract import check_tokens
from tunesmith.data.tokens.documents import DocumentSplitter
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_memory_does_not_grow_with_what_was_written(simple: Simple, tmp_path: Path) -> None:
    writer = disk.TokenWriter(tmp_path)
    text = simple.encode(Text("text"), "all")
    for i in range(10_000):
        writer.add(text, i, False)
    assert 10_000 * 4 * len(text.ids) - os.path.getsize(tmp_path / "ids.bin") < 1 << 18
    arrays = writer.arrays()
    assert simple.tokenizer.decode(arrays.ids[arrays.offsets[9_999] :]) == "text<|im_end|>"


# --- documents: none of their tokens is lost, and each is predicted once


@pytest.fixture
def text_tokens(simple: Simple, tmp_path: Path) -> Callable[..., TokenSet]:
    """Texts as JSON lines, or a path -> TokenSet."""

    def build(texts: Sequence[str] | Path, **keys: Any) -> TokenSet:
        path = texts
        if not isinstance(path, Path):
            path = tmp_path / "texts.jsonl"
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        data = Data(train=(Source(source=str(path), format="text"),), **{"seq_len": 8, **keys})
        rows, _ = read_splits(data, 0)
        return tokenize(rows, data, simple, cache=None, what="train")

    return build


def predicted(tokens: TokenSet, row: int) -> list[tuple[int, int]]:
    """(the token before it, token) of every supervised token of a row, in order."""
    pairs = []
    for i in range(len(tokens)):
        if int(tokens.parts[0].arrays.rows[i]) == row:
            ids = tokens[i].ids.tolist()
            for at in np.flatnonzero(tokens[i].trained).tolist():
                pairs.append((ids[at - 1], ids[at]))
    return pairs


@pytest.mark.parametrize("length", [1, 6, 7, 8, 14, 15, 100])
def test_each_token_of_a_document_but_the_first_is_supervised_once(
    text_tokens, simple: Simple, length: int
) -> None:
    text = "".join(chr(97 + i % 26) for i in range(length))
    tokens = text_tokens([text, "ab", text])
    end = simple.tokenizer.eos_token_id
    document = [*simple.tokenizer.encode(text, add_special_tokens=False), end]
    for row in (0, 2):
        assert predicted(tokens, row) == list(itertools.pairwise(document))
    assert tokens.lengths.max() <= 8
    assert sum(int(example.ids[-1]) == end for example in tokens) == 3
    assert not any(end in example.ids[:-1] for example in tokens)
    counts = tokens.counts
    assert (counts.kept_rows, counts.cut, counts.dropped, counts.lost_share) == (3, 0, 0, 0)
    assert counts.supervised == 2 * length + 2
    assert counts.split == (2 if length > 7 else 0)
    contract = check_tokens(tokens, simple, vocab_size=len(simple.tokenizer), split="train")
    assert not contract.broken


def test_the_example_of_the_page(text_tokens, simple: Simple) -> None:
    shown = []
    for example in text_tokens(["Once upon a time."]):
        first, *others = example.ids.tolist()
        assert example.trained.tolist() == [False, *[True] * len(others)]
        shown.append(f"{simple.tokenizer.decode([first])}⟦{simple.tokenizer.decode(others)}⟧")
    page = Path(__file__).parents[2] / "docs/formats.md"
    assert "```text\n" + "\n".join(shown) + "\n```" in page.read_text(encoding="utf-8")


def test_each_part_begins_with_a_bos_where_the_tokenizer_writes_one(
    text_tokens, simple: Simple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma predicts nothing useful without; its context token is not supervised either."""
    simple.tokenizer.bos_token = "<|im_start|>"
    bos = simple.tokenizer.bos_token_id
    pieces = simple.pieces
    monkeypatch.setattr(simple, "pieces", lambda sample: [("<|im_start|>", False), *pieces(sample)])
    text = "".join(chr(97 + i % 26) for i in range(30))
    tokens = text_tokens([text])
    assert [int(example.ids[0]) for example in tokens] == [bos] * len(tokens)
    document = [bos, *simple.tokenizer.encode(text), simple.tokenizer.eos_token_id]
    assert predicted(tokens, 0) == list(itertools.pairwise(document))
    assert tokens.counts.supervised == len(document) - 1
    contract = check_tokens(tokens, simple, vocab_size=len(simple.tokenizer), split="train")
    assert not contract.broken


def test_what_is_not_split_is_counted_in_tokens(text_tokens) -> None:
    texts = ["a" * 99, *["b" * 7] * 10]
    for too_long, cut, dropped in (("truncate", 92, 0), ("drop", 0, 100)):
        counts = text_tokens(texts, too_long=too_long).counts
        assert (counts.cut_tokens, counts.dropped_tokens) == (cut, dropped)
        assert counts.lost_share == (cut + dropped) / 180
    with refuses(DataError, names=["100 tokens", 8], fix=["data.seq_len=100"]):
        text_tokens(texts, too_long="error")


def test_answers_are_not_split(make) -> None:
    rows = alpaca(20, letters=lambda i: 4 if i else 200)
    for train_on in ("response", "all"):
        counts = make(rows, seq_len=100, train_on=train_on).counts
        assert (counts.split, counts.cut, counts.kept) == (0, 1, 20)


# --- text files and folders


def test_a_text_file_is_a_document(text_tokens, simple: Simple, write) -> None:
    path = write("a.md", b"\xef\xbb\xbf# One\r\n\r\ntwo")
    tokens = text_tokens(Path(path), seq_len=64)
    assert [simple.tokenizer.decode(example.ids) for example in tokens] == [
        "# One\n\ntwo<|im_end|>"
    ]
    assert tokens.where(0) == path


def test_a_folder_is_a_set_of_documents_in_the_order_of_their_names(
    text_tokens, simple: Simple, tmp_path: Path
) -> None:
    names = ["b.txt", "a/z.md", "a/deep/x.TXT", "c.text"]
    for name in (*names, ".hidden.txt", ".git/d.txt", "__pycache__/e.txt"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "texts" / "blank.txt").write_text("\n")
    (tmp_path / "texts" / "d.docx").write_text("zip")
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "texts")
    tokens = text_tokens(tmp_path / "texts", seq_len=64)
    texts = [simple.tokenizer.decode(example.ids[:-1]) for example in tokens]
    assert texts == sorted(names)
    assert [tokens.where(i) for i in range(4)] == [str(tmp_path / "texts" / n) for n in texts]
    rows = tokens.parts[0].rows
    assert rows.are_documents
    assert holds(rows.skipped, "1 file", "1 .docx", f"{tmp_path}/texts/d.docx")
    before = rows.digest()
    (tmp_path / "texts" / "b.txt").write_text("other")
    assert read_rows(Source(source=str(tmp_path / "texts"), format="text")).digest() != before
    with refuses(DataError, where=f"{tmp_path}/texts/b.txt"):
        rows.check_unchanged()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("b.jsonl", "a.jsonl", "README.md", "dataset_info.json"), {"train": 2}),
        (
            ("data/train-00000-of-00002.jsonl", "data/test-0.jsonl", "more.jsonl"),
            {"train": 2, "test": 1},
        ),
        (("train/a.txt", "train/b.txt", "dev/c.txt"), {"train": 2, "validation": 1}),
        (("docs/a.txt", "dev/c.txt", "test.txt"), {"train": 3}),
    ],
)
def test_splits_of_a_folder(
    tmp_path: Path, names: tuple[str, ...], expected: dict[str, int]
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    found = open_splits(Source(source=str(tmp_path)))
    assert {split: len(table) for split, table in found.items()} == expected


def test_files_of_rows_in_a_folder_are_one_set(write, tmp_path: Path) -> None:
    for part in (2, 1):
        lines = "\n\n".join(json.dumps({"text": f"{part} {i}"}) for i in range(100))
        write(f"part-{part}.jsonl", lines)
    rows = read_rows(Source(source=str(tmp_path)))
    assert [rows[i]["text"] for i in range(200)] == [f"{p} {i}" for p in (1, 2) for i in range(100)]
    assert rows.where(199) == f"{tmp_path}/part-2.jsonl:199"
    assert not any(rows.continues(i) for i in range(200))


LONG_TEXTS = {
    "paragraphs": "".join(f"Line {i}.\nAnd ä more.\n\n" for i in range(300)),
    "lines": "".join(f"Line {i} and ä more.\n" for i in range(300)),
    "crlf": "".join(f"Line {i}.\r\n\r\n" for i in range(300)),
    "letters": "ä" * 4000,
}


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_a_large_text_is_read_in_blocks_and_trained_on_as_one(
    text_tokens, simple: Simple, write, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = LONG_TEXTS[name]
    path = Path(write("a.txt", text))
    whole = text_tokens(path, seq_len=50)
    monkeypatch.setattr(text_files, "DOCUMENT_BYTES", 2000)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 701)
    tokens = text_tokens(path, seq_len=50)
    rows = tokens.parts[0].rows
    assert len(rows) > 5
    assert holds(rows.layout, "1 file", "blocks")
    assert [row["text"] for row in map(rows.__getitem__, range(len(rows)))] != [text]
    assert "".join(rows[i]["text"] for i in range(len(rows))) == text.replace("\r\n", "\n")
    # A byte is a token here: where blocks are cut changes none.
    assert [example.ids.tolist() for example in tokens] == [e.ids.tolist() for e in whole]
    assert [example.trained.tolist() for example in tokens] == [e.trained.tolist() for e in whole]
    if name == "paragraphs":
        assert all(rows[i]["text"].endswith(".\n\n") for i in range(len(rows)))
        last = int(tokens.where(len(tokens) - 1).rpartition(":")[2])
        assert text.splitlines()[last - 1] == rows[len(rows) - 1]["text"].splitlines()[0]


def test_a_block_that_is_held_out_leaves_no_end_in_the_middle(
    text_tokens, simple: Simple, write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "DOCUMENT_BYTES", 2000)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 701)
    path = write("a.txt", LONG_TEXTS["lines"])
    rows = read_rows(Source(source=path, format="text"))
    kept = rows.take([0, 1, *range(3, len(rows))])
    source = Source(source=path, format="text")
    data = Data(train=(source,), seq_len=50)
    tokens = tokenize([(source, kept)], data, simple, cache=None, what="train")
    end = simple.tokenizer.eos_token_id
    assert [i for i, e in enumerate(tokens) if end in e.ids.tolist()] == [len(tokens) - 1]
    contract = check_tokens(tokens, simple, vocab_size=len(simple.tokenizer), split="train")
    assert not contract.broken
    # The last token before the gap is no context of the first one behind it.
    gap = rows[2]["text"]
    supervised = sum(example.supervised for example in tokens)
    total = len(simple.tokenizer.encode(LONG_TEXTS["lines"])) - len(simple.tokenizer.encode(gap))
    assert supervised == total + 1 - 2


class BlockRows:
    """What a splitter asks of rows: which of them go on with a document."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.last = [i == len(blocks) - 1 for blocks in documents for i in range(len(blocks))]

    def ends_document(self, i: int) -> bool:
        return self.last[i]

    def continues(self, i: int) -> bool:
        return not self.last[i]


@settings(max_examples=40)
@given(
    documents=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), max_size=4),
    seq_len=st.integers(2, 12),
    has_bos=st.booleans(),
)
def test_of_any_documents_in_any_blocks_each_token_is_supervised_once(
    documents: list[list[int]], seq_len: int, has_bos: bool
) -> None:
    """documents: the tokens of each block. Tokens count up, so that one tells its place."""
    bos, end, next_id, row = 1, 2, 10, 0
    template: Any = SimpleNamespace(
        tokenizer=SimpleNamespace(bos_token_id=bos if has_bos else None), end_ids=frozenset({end})
    )
    writer = TokenWriter(None)
    rows: Any = BlockRows(documents)
    splitter = DocumentSplitter(writer, rows, seq_len, template)
    expected = []
    for blocks in documents:
        document = [bos] * has_bos
        for size in blocks:
            ids = list(range(next_id, next_id + size))
            next_id += size
            document += ids
            whole = np.array([*[bos] * has_bos, *ids, end], np.int32)
            trained = np.arange(len(whole)) > 0
            splitter.add(Example(whole, trained), row)
            row += 1
        expected += list(itertools.pairwise([*document, end]))
    arrays = writer.arrays()
    pairs = []
    for i in range(len(arrays.rows)):
        ids, trained = arrays.example(i)[:2]
        assert 2 <= len(ids) <= seq_len
        assert not trained[0]
        assert (int(ids[-1]) == end) == (not arrays.continued[i])
        assert not has_bos or seq_len == 2 or int(ids[0]) == bos
        pairs += [(int(ids[at - 1]), int(ids[at])) for at in np.flatnonzero(trained)]
    assert pairs == expected
    assert (np.diff(arrays.rows) >= 0).all()
