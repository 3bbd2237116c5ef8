"""YAML 1.2 as its core schema says (yaml.org, 1.2.2, section 10.3.2), with places."""

from __future__ import annotations

import json
import math
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from errors import refuses
from tunesmith.config.tree import Node, read_file, read_value, scalar
from tunesmith.errors import RecipeError

FACTS = {
    "3e-4": 3e-4, "1E5": 1e5, "1.": 1.0, ".5": 0.5, "-1.5e+3": -1500.0, "0": 0, "-7": -7, "+7": 7, "007": 7, "0o17": 15,
    "0xFF": 255, "0b11": "0b11", "1_000": "1_000", "12:30:45": "12:30:45", "2026-01-31": "2026-01-31", "on": "on",
    "off": "off", "yes": "yes", "No": "No", "y": "y", "true": True, "True": True, "FALSE": False, "tRue": "tRue",
    "null": None, "~": None, "Null": None, "none": "none", ".inf": math.inf, "-.INF": -math.inf, "inf": "inf", "nan": "nan",
    "3 %": "3 %", "train[:95%]": "train[:95%]", "e5": "e5", "1e": "1e", ".": ".", "=": "=",
}  # fmt: skip


def test_scalars() -> None:
    for text, expected in FACTS.items():
        for value in (scalar(text), read_value(text, where="", base=Path()).value):
            assert (value, type(value)) == (expected, type(expected)), text
        for quoted in (f'"{text}"', f"'{text}'"):
            assert read_value(quoted, where="", base=Path()).value == text
    assert math.isnan(scalar(".nan"))  # type: ignore[arg-type]


def test_every_key_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "# head\na:\n  b: 1\n  c:\n    - x\n    - y: 2\nd: {e: 3,\n    f: 4}\ng: |\n  long\n  text\nh:\n  1\n"
    )
    found = {key: place.removeprefix(f"{path}:") for key, place in read_file(path).places()}
    lines = "a 2 a.b 3 a.c 4 a.c.0 5 a.c.1 6 a.c.1.y 6 d 7 d.e 7 d.f 8 g 9 h 12".split()
    assert found == dict(zip(lines[::2], lines[1::2], strict=True))


def test_anchors(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: *a\nd: &d [1, 2]\ne: [*d, *d]\n")
    tree = read_file(path)
    both = {"x": 1, "y": 2}
    assert tree.plain() == {"a": both, "b": both, "d": [1, 2], "e": [[1, 2], [1, 2]]}
    assert dict(tree.places())["b"] == f"{path}:2"  # where it is used, not where it was marked


def test_a_pair_of_surrogates_is_one_character(tmp_path: Path) -> None:
    """JSON, which is YAML too, writes an emoji so; half of a pair is no character."""
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"a": "\N{GRINNING FACE}"}))
    assert read_file(path).plain() == {"a": "\N{GRINNING FACE}"}
    path.write_text('{"a": 1,\n "b": "\\ud83d"}')
    with refuses(RecipeError, where="r.json:2"):
        read_file(path)


def test_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    tree = read_file(path)
    assert tree.plain() == {"a": 1, "b": 2}
    assert dict(tree.places())["b"] == f"{path}:2"


@settings(max_examples=40)
@given(st.text(max_size=60) | st.text("[]{}:,-&*!|>'\"%@`# \n\tax0?~<=", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert isinstance(read_value(text, where="here", base=Path()), Node)
    except RecipeError as refused:
        assert refused.where == "here"  # noqa: PT017
        assert refused.fix  # noqa: PT017
