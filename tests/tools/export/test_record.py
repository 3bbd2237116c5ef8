"""The record beside a GGUF file, as `push` reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from errors import refuses
from tunesmith.errors import UsageError
from tunesmith.tools.export.record import gguf_to_push

RECORD = {"kind": "GGUF, f16", "bytes": 4, "check": None, "card": "# m\n\nText.\n\nThe license."}


def write_pair(folder: Path, record: object) -> Path:
    file = folder / "m.gguf"
    file.write_bytes(b"GGUF")
    file.with_name("m.gguf.json").write_text(json.dumps(record))
    return file


def test_a_record_needs_no_more_than_the_card_is_written_from(tmp_path: Path) -> None:
    sent = gguf_to_push(write_pair(tmp_path, RECORD))
    assert sent is not None
    card = sent["README.md"]
    assert isinstance(card, bytes)
    assert b"| `m.gguf` | GGUF, f16 |" in card


@pytest.mark.parametrize("key", ["kind", "check", "card"])
def test_a_record_that_lacks_a_key_says_so(key: str, tmp_path: Path) -> None:
    shortened = {name: value for name, value in RECORD.items() if name != key}
    with refuses(UsageError, where="m.gguf", names=[f"lacks {key}"]) as error:
        gguf_to_push(write_pair(tmp_path, shortened))
    assert "bytes" not in error.value.why


@pytest.mark.parametrize("record", [[], {}, {"bytes": "4"}, 3])
def test_a_record_that_is_none_is_refused(record: object, tmp_path: Path) -> None:
    with refuses(UsageError, where="m.gguf", names=["m.gguf"]):
        gguf_to_push(write_pair(tmp_path, record))
