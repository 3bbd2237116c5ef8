"""Tokens of rows and of documents, in one process and from the cache."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from errors import holds, refuses
from rows import Simple, alpaca
from tunesmith.config.schema import Data, Source
from tunesmith.errors import DataError
from tunesmith.rows.compare.splits import read_splits
from tunesmith.rows.source import text_files
from tunesmith.rows.source.open_source import open_splits, read_rows
from tunesmith.tokens.contract import check_tokens
from tunesmith.tokens.token_set import TokenSet
from tunesmith.tokens.tokenize import tokenize


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
    assert tokens.lengths.tolist() == [len(e.ids) for e in tokens]
    counts = tokens.counts
    assert (counts.rows, counts.kept, counts.prompts) == (5, 5, 5)
    assert counts.supervised == sum(6 + i for i in range(5))
    assert tokens.where(4).endswith("rows0.jsonl:5")
    # `eval` tokenises by a template that was loaded without the recipe.
    text = simple.tokenizer.decode(make(alpaca(1), system="Be.")[0].ids)
    assert text.startswith("<|im_start|>system\nBe.<|im_end|>")


def test_the_cache_is_used_and_gives_the_same(make, simple: Simple, tmp_path: Path) -> None:
    plain = make(alpaca(30), seq_len=256)
    made = make(alpaca(30), seq_len=256, cache=tmp_path / "c")
    assert simple.encoded == 60
    taken = make(alpaca(30), seq_len=256, cache=tmp_path / "c")
    assert simple.encoded == 60  # nothing was tokenised again
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
        ("ids.bin", "flipped"), ("trained.bin", "torn"), ("offsets.bin", "torn"), ("cut.bin", "lost"),
        ("meta.json", "lost"), ("meta.json", "flipped"),
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
            data[at] ^= 1
        (entry / file).write_bytes(data[: len(data) // 2] if damage == "torn" else data)
    with caplog.at_level(logging.WARNING):
        again = make(alpaca(20), seq_len=256, cache=tmp_path / "c")
    assert "damaged" in caplog.text
    assert simple.encoded == 60
    assert equal(whole, again)
    make(alpaca(20), seq_len=256, cache=tmp_path / "c")
    assert simple.encoded == 60  # and now it is whole


def test_a_cache_that_cannot_be_written_costs_a_warning(
    make, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **keys: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "a").write_text("a file where the folder should be")
    assert len(make(alpaca(7), seq_len=256, cache=tmp_path / "a")) == 7
    assert holds(caplog.text, tmp_path / "a")
    monkeypatch.setattr(Path, "rename", full)
    assert len(make(alpaca(7), seq_len=256, cache=tmp_path / "c")) == 7
    assert os.strerror(errno.ENOSPC) in caplog.text
    assert list((tmp_path / "c").iterdir()) == [], "no torn entry"


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


def test_sources_keep_their_places_and_weights(make) -> None:
    rows = alpaca(6, letters=lambda i: 200 if i % 2 else 5)
    keys = {"seq_len": 100, "too_long": "drop"}
    tokens = make(rows, alpaca(2), weights=(2.0, 0.5), **keys)
    places = [tokens.where(i).rpartition("/")[2] for i in (1, 2, 3, 4)]
    assert places == ["rows0.jsonl:3", "rows0.jsonl:5", "rows1.jsonl:1", "rows1.jsonl:2"]
    assert tokens.repeats.tolist() == [2.0, 2.0, 2.0, 0.5, 0.5]
    # The digest is of what is trained on.
    digest = make(alpaca(4), seq_len=256).counts.digest
    assert digest == make(alpaca(4), seq_len=512).counts.digest
    assert digest != make(alpaca(4), seq_len=256, train_on="all").counts.digest
    assert tokens.counts.digest != make(rows, alpaca(2), **keys).counts.digest


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


@pytest.mark.parametrize("has_bos", [False, True])
@pytest.mark.parametrize("length", [1, 7, 8, 15])
def test_each_token_of_a_document_but_the_first_is_supervised_once(
    text_tokens, simple: Simple, length: int, has_bos: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part begins with a BOS where the tokenizer writes one."""
    if has_bos:
        simple.tokenizer.bos_token = "<|im_start|>"
        pieces, bos = simple.pieces, ("<|im_start|>", False)
        monkeypatch.setattr(simple, "pieces", lambda sample: [bos, *pieces(sample)])
    text = "".join(chr(97 + i % 26) for i in range(length))
    tokens = text_tokens([text, "ab", text])
    end, first = simple.tokenizer.eos_token_id, simple.tokenizer.bos_token_id
    document = [*[first] * has_bos, *simple.tokenizer.encode(text, add_special_tokens=False), end]
    for row in (0, 2):
        assert predicted(tokens, row) == list(itertools.pairwise(document))
    assert not has_bos or {int(example.ids[0]) for example in tokens} == {first}
    assert tokens.lengths.max() <= 8
    assert sum(int(example.ids[-1]) == end for example in tokens) == 3
    assert not any(end in example.ids[:-1] for example in tokens)
    counts = tokens.counts
    assert (counts.kept_rows, counts.cut, counts.dropped, counts.lost_share) == (3, 0, 0, 0)
    contract = check_tokens(tokens, simple, vocab_size=len(simple.tokenizer), split="train")
    assert not contract.broken


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


def test_a_folder_is_a_sorted_set_of_documents(text_tokens, simple: Simple, tmp_path: Path) -> None:
    names = ["b.txt", "a/z.md", "a/deep/x.TXT", "c.text"]
    for name in (*names, ".hidden.txt", ".git/d.txt"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "texts" / "d.docx").write_text("zip")
    tokens = text_tokens(tmp_path / "texts", seq_len=64)
    texts = [simple.tokenizer.decode(example.ids[:-1]) for example in tokens]
    assert texts == sorted(names)
    assert [tokens.where(i) for i in range(4)] == [str(tmp_path / "texts" / n) for n in texts]
    rows = tokens.parts[0].rows
    assert holds(rows.skipped, "1 .docx", f"{tmp_path}/texts/d.docx")
    (tmp_path / "texts" / "b.txt").write_text("other")
    with refuses(DataError, where=f"{tmp_path}/texts/b.txt"):
        rows.check_unchanged()


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("b.jsonl", "a.jsonl", "README.md", "dataset_info.json"), {"train": ["a", "b"]}),
        (("data/train-00000-of-00002.jsonl", "data/test-0.jsonl"), {"train": ["train-00000-of-00002"], "test": ["test-0"]}),
        (("train/a.txt", "train/b.txt", "dev/c.txt"), {"train": ["a", "b"], "validation": ["c"]}),
    ],
)  # fmt: skip
def test_splits_of_a_folder(
    tmp_path: Path, names: tuple[str, ...], expected: dict[str, list[str]]
) -> None:
    for name in names:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.stem if file.suffix == ".txt" else json.dumps({"text": file.stem}))
    found = open_splits(Source(source=str(tmp_path)))
    texts = {
        split: [table.row(i)["text"] for i in range(len(table))] for split, table in found.items()
    }
    assert texts == expected


LONG_TEXTS = {
    "paragraphs": "".join(f"Line {i}.\nAnd ä more.\n\n" for i in range(300)),
    "crlf": "".join(f"Line {i}.\r\n\r\n" for i in range(300)),
    "letters": "ä" * 2000,
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
    assert "".join(rows[i]["text"] for i in range(len(rows))) == text.replace("\r\n", "\n")
    # A byte is a token here: where blocks are cut changes none.
    assert [example.ids.tolist() for example in tokens] == [e.ids.tolist() for e in whole]
    assert [example.trained.tolist() for example in tokens] == [e.trained.tolist() for e in whole]


def test_a_block_that_is_held_out_leaves_no_end_in_the_middle(
    text_tokens, simple: Simple, write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "DOCUMENT_BYTES", 2000)
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 701)
    path = write("a.txt", LONG_TEXTS["paragraphs"])
    rows = read_rows(Source(source=path, format="text"))
    kept = rows.take([0, 1, *range(3, len(rows))])
    source = Source(source=path, format="text")
    data = Data(train=(source,), seq_len=50)
    tokens = tokenize([(source, kept)], data, simple, cache=None, what="train")
    end = simple.tokenizer.eos_token_id
    assert [i for i, e in enumerate(tokens) if end in e.ids.tolist()] == [len(tokens) - 1]
    # The last token before the gap is no context of the first one behind it.
    gap = rows[2]["text"]
    supervised = sum(example.supervised for example in tokens)
    total = len(LONG_TEXTS["paragraphs"].encode()) - len(gap.encode())
    assert supervised == total + 1 - 2


def test_batches_for_the_tokenizer_end_at_a_size(
    simple: Simple, write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.tokens.tokenize._BATCH_CHARACTERS", 100)
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


def test_examples_of_several_sources_stand_one_after_the_other(make) -> None:
    rows = [alpaca(n, letters=lambda i, n=n: 1 + 3 * n + i) for n in (2, 3, 1)]
    alone = [make(text) for text in rows]
    expected = [part[i].ids.tolist() for part in alone for i in range(len(part))]
    tokens = make(*rows)
    assert [tokens[i].ids.tolist() for i in range(len(tokens))] == expected
    assert len({*map(tuple, expected)}) == 6
