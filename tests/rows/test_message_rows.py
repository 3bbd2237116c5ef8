"""Rows of `message_rows.jsonl`: the messages that each gives, or where it is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from tunesmith.config.schema import Source
from tunesmith.errors import DataError
from tunesmith.rows.formats import convert_row
from tunesmith.rows.samples import Conversation
from tunesmith.tokens.text.row_warnings import row_warnings

LINES = Path(__file__).with_name("message_rows.jsonl").read_text(encoding="utf-8").splitlines()
CASES = {case["case"]: case for case in map(json.loads, LINES)}


@pytest.mark.parametrize("name", CASES)
def test_messages_are_read_or_refused(name: str) -> None:
    case: dict[str, Any] = CASES[name]
    source = Source(source="x", format=case.get("format", "messages"))
    unread: set[str] = set()
    if "refused" in case:
        where = ", ".join(filter(None, ("row 1", case["refused"])))
        with refuses(DataError, where=where, names=case.get("names", ())):
            convert_row(case["row"], source, where="row 1")
        return
    [sample] = convert_row(case["row"], source, where="row 1", unread=unread).samples
    assert isinstance(sample, Conversation)
    assert sample.messages == case["gives"]
    assert sample.untrained == set(case.get("untrained", ()))
    assert unread == set(case.get("unread", ()))
    assert list(row_warnings(sample, raw=False)) == case.get("warned", [])
