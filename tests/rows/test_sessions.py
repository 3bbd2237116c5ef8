"""Sessions of coding agents as rows, from files of four forms."""

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from errors import refuses
from rows import Simple
from tunesmith.config.schema import Data, Source
from tunesmith.errors import DataError
from tunesmith.rows.formats import convert_row
from tunesmith.rows.source import sessions
from tunesmith.rows.source.open_source import Rows, read_rows
from tunesmith.rows.source.secrets import secrets_in
from tunesmith.rows.source.table import Table
from tunesmith.tokens.tokenize import tokenize

Line = dict[str, Any]


def claude(*lines: Line) -> list[Line]:
    """Lines of Claude Code: each follows the one before it, unless its `after` names another."""
    made = []
    for i, line in enumerate(lines):
        before = line.get("after", i - 1)
        parent = None if before is None or before < 0 else f"u{before}"
        about = {"uuid": f"u{i}", "parentUuid": parent, "sessionId": "s", "isSidechain": False}
        made.append(about | {key: line[key] for key in line if key != "after"})
    return made


def asked(content: object, **keys: Any) -> Line:
    return {"type": "user", "message": {"role": "user", "content": content}, **keys}


def answered(name: str, *content: Line, stop: str | None = None, **keys: Any) -> Line:
    message = {"role": "assistant", "content": list(content), "id": name, "stop_reason": stop}
    return {"type": "assistant", "message": message, **keys}


def call(name: str, **arguments: object) -> Line:
    return {"type": "tool_use", "id": name, "name": "Read", "input": arguments}


def result(name: str, content: object = "ok") -> Line:
    return {"type": "tool_result", "tool_use_id": name, "content": content}


def text(words: str) -> Line:
    return {"type": "text", "text": words}


def show(row: Line) -> str:
    """A row in one line: u user, s system, a answer, (a) untrained answer, t result, > calls."""
    shown = []
    for message in row["messages"]:
        content = message["content"].replace("\n", "/")
        letter = message["role"][0]
        if message.get("train") is False:
            letter = "(a)"
        for called in message.get("tool_calls", ()):
            content += f" >{called['id']}"
        if letter == "t":
            content = f"{message['tool_call_id']}={content}"
        shown.append(f"{letter}:{content.strip()}")
    return " | ".join(shown)


def boundary(last: int, **keys: object) -> Line:
    about = {"subtype": "compact_boundary", "logicalParentUuid": f"u{last}"}
    return {"type": "system", "after": None, **about, **keys}


CLAUDE = claude(asked("Hi"), answered("m1", text("Hello.")))
CLAUDE_PARALLEL = claude(
    asked("Read both"),
    answered("m", {"type": "thinking", "thinking": "Two files.", "signature": "x"}),
    answered("m", text("I read.")),
    answered("m", call("a")),
    answered("m", call("b")),
    asked([result("a")], after=3),
    asked([result("b", [text("1"), text("2")])], after=4),
    answered("m2", text("Done.")),
)
CLAUDE_AGENT = [{**line, "isSidechain": True, "agentId": "a1"} for line in CLAUDE]
CLAUDE_BRANCH = claude(
    asked("Name one"),
    answered("m1", text("Bad.")),
    asked("No"),
    answered("m2", text("Worse.")),
    answered("m3", text("Good."), after=0),
)


def codex(*items: Line, **about: object) -> list[Line]:
    meta = {"id": "c", "base_instructions": {"text": "Be brief."}, "source": "cli", **about}
    lines = [{"type": "session_meta", "payload": meta}, {"type": "turn_context", "payload": {}}]
    for item in items:
        if item["type"] in ("compacted", "event_msg"):
            lines.append(item)
        else:
            lines.append({"type": "response_item", "payload": item})
        if item.get("role") == "user":
            lines.append({"type": "event_msg", "payload": {"type": "user_message"}})
    return lines


def say(role: str, words: str) -> Line:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": words}]}


def item(name: str, **arguments: object) -> Line:
    arguments_text = json.dumps(arguments)
    return {"type": "function_call", "name": "shell", "call_id": name, "arguments": arguments_text}


def output(name: str, value: object = "ok") -> Line:
    return {"type": "function_call_output", "call_id": name, "output": value}


def event(kind: str, **keys: object) -> Line:
    return {"type": "event_msg", "payload": {"type": kind, **keys}}


def compacted(message: str, history: list[Line] | None = None) -> Line:
    return {"type": "compacted", "payload": {"message": message, "replacement_history": history}}


PARALLEL_ITEMS = (
    say("user", "Look"),
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Look twice."}]},
    say("assistant", "I look."),
    item("a", cmd="ls"),
    item("b"),
    output("b", [{"type": "input_text", "text": "x"}]),
    output("a"),
    say("assistant", "Done."),
)
THIRD = (say("user", "C"), say("assistant", "3."))
TWICE = (say("user", "A"), say("assistant", "1."), say("user", "B"), say("assistant", "2."))


def chat(role: str, content: object, **keys: object) -> Line:
    return {"role": role, "content": content, **keys}


def chat_call(name: str) -> Line:
    return {"id": name, "type": "function", "function": {"name": "ls", "arguments": '{"a": 1}'}}


CHAT = (
    chat("user", "Look"),
    chat("assistant", None, tool_calls=[chat_call("a"), chat_call("b")], reasoning="Twice."),
    chat("tool", "ok", tool_call_id="a", tool_name="ls"),
    chat("tool", "no", tool_call_id="b", tool_name="ls"),
    chat("assistant", "Done."),
)
CHAT_SHOWN = "u:Look | a:<think>/Twice./</think> >a >b | t:a=ok | t:b=no | a:Done."


BRANCHES = "lines of other branches, left out"

# Name -> the lines of a file, its rows, and what of it is counted.
FILES: dict[str, tuple[list[Line], list[str], dict[str, int]]] = {
    "claude parallel, repeated lines": (
        [*CLAUDE_PARALLEL, *CLAUDE_PARALLEL[2:5]],
        ["u:Read both | a:<think>/Two files./</think>//I read. >a >b | t:a=ok | t:b=1//2 | a:Done."], {"repeated lines, left out": 3},
    ),
    # The result of the first call is written before the second call, and the session goes on from it.
    "claude parallel, mixed": (
        claude(
            asked("Read both"), answered("m", call("a")), asked([result("a")]),
            answered("m", call("b"), after=1), asked([result("b")]), answered("m2", text("Done."), after=2),
        ),
        ["u:Read both | a:>a >b | t:a=ok | t:b=ok | a:Done."], {},
    ),
    "claude compacted": (
        claude(
            asked("Start"), answered("m1", text("Started.")), boundary(1),
            asked("Summary: started.", isCompactSummary=True), asked("Go on"), answered("m2", text("Went on.")),
        ),
        ["u:Start | a:Started.", "u:Summary: started.//Go on | a:Went on."],
        {"compactions": 1, "lines of type system, left out": 1},
    ),
    # The last question and answer are kept, so the conversation continues before the compaction.
    "claude messages kept": (
        claude(
            asked("Start"), answered("m1", text("Started.")), asked("Keep"), answered("m2", text("Kept.")),
            boundary(3, compactMetadata={"preservedMessages": {"anchorUuid": "u5", "uuids": ["u2", "u3"]}}),
            asked("Summary: started.", isCompactSummary=True), asked("Go on", after=3), answered("m3", text("Went on.")),
        ),
        ["u:Start | a:Started. | u:Keep | a:Kept. | u:Go on | a:Went on."], {BRANCHES: 1},
    ),
    # The copies have other ids, but the id of the answer.
    "claude copied lines": (
        claude(asked("Hi"), answered("m1", text("Hello.")), asked("Hi"), answered("m1", text("Hello.")), asked("Go on"), answered("m2", text("Yes."))),
        ["u:Hi | a:Hello. | u:Go on | a:Yes."], {"repeated lines, left out": 1, BRANCHES: 1},
    ),
    "claude sidechain": (
        claude(
            asked("Delegate"), answered("m1", call("task")), asked("Count files", after=None, isSidechain=True),
            answered("m2", text("3 files."), isSidechain=True), asked([result("task", "3 files.")], after=1),
            answered("m3", text("There are 3.")),
        ),
        ["u:Delegate | a:>task | t:task=3 files. | a:There are 3.", "u:Count files | a:3 files."],
        {"subagents": 1},
    ),
    "claude branch": (CLAUDE_BRANCH, ["u:Name one | a:Good."], {BRANCHES: 3}),
    "claude API error": (
        claude(
            asked("Hi"), answered("", text("API Error: 529"), isApiErrorMessage=True),
            asked("Again"), answered("m1", text("Hello.")),
        ),
        ["u:Hi//Again | a:Hello."], {"API errors and other texts in place of an answer, left out": 1},
    ),
    "claude cut": (
        claude(
            asked("Hi"), answered("m1", text("Hel"), stop="max_tokens"),
            asked("Go on"), answered("m2", text("Hello."), stop="end_turn"),
        ),
        ["u:Hi | (a):Hel | u:Go on | a:Hello."], {"parts of answers that were cut off, not trained": 1},
    ),
    "codex parallel": (
        codex(*PARALLEL_ITEMS),
        ["s:Be brief. | u:Look | a:<think>/Look twice./</think>//I look. >a >b | t:b=x | t:a=ok | a:Done."], {},
    ),
    "codex custom tool": (
        codex(
            say("user", "Patch"), {"type": "custom_tool_call", "name": "apply_patch", "call_id": "p", "input": "*** Begin"},
            {"type": "custom_tool_call_output", "call_id": "p", "output": "ok"}, say("assistant", "Done."),
        ),
        ["s:Be brief. | u:Patch | a:>p | t:p=ok | a:Done."], {},
    ),
    "codex compacted": (
        codex(*TWICE, compacted("Summary."), *THIRD),
        ["s:Be brief. | u:A | a:1. | u:B | a:2.", "s:Be brief. | u:A//B//Summary.//C | a:3."], {"compactions": 1},
    ),
    "codex history replaced": (
        codex(*TWICE, compacted("", [say("user", "B"), say("assistant", "2."), {"type": "compaction"}]), *THIRD),
        ["s:Be brief. | u:A | a:1. | u:B | a:2.", "s:Be brief. | u:B | (a):2. | u:C | a:3."],
        {"compactions": 1, "lines of type compaction, left out": 1},
    ),
    "codex rolled back": (
        codex(*TWICE, event("thread_rolled_back", num_turns=1), *THIRD), ["s:Be brief. | u:A | a:1. | u:C | a:3."], {BRANCHES: 2},
    ),
    "codex of 2025": (
        [
            {"id": "c", "timestamp": "2025-06-01", "instructions": None}, {"record_type": "state"}, say("user", "Look"), item("a"), output("a"),
            {"record_type": "state"}, say("assistant", "Done."),
        ],
        ["u:Look | a:>a | t:a=ok | a:Done."], {"rows of OpenAI Agents sessions": 1},
    ),
    "codex rolled back by nothing": (codex(*TWICE, event("thread_rolled_back", num_turns=0)), ["s:Be brief. | u:A | a:1. | u:B | a:2."], {}),
    "messages": (list(CHAT), [CHAT_SHOWN], {}),
}  # fmt: skip


def write(path: Path, lines: list[Line], more: str = "") -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + more, encoding="utf-8")
    return path


def rows_of(path: Path) -> Rows:
    return read_rows(Source(source=str(path), format="messages"))


def notes_of(rows: Rows) -> dict[str, int]:
    notes = (note.rsplit(": ", 1) for note in rows.layout.split("; "))
    return {what: int(count) for what, count in notes}


@pytest.mark.parametrize("name", FILES)
def test_sessions_become_rows(name: str, tmp_path: Path) -> None:
    lines, shown, counted = FILES[name]
    rows = rows_of(write(tmp_path / "s.jsonl", lines))
    assert [show(rows[i]) for i in range(len(rows))] == shown
    assert counted.items() <= notes_of(rows).items()


# Made up: none of them opens anything. They are joined here, so that no scanner finds them.
GITHUB, AWS = "ghp" + "_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8", "AKIA" + "ABCDEFGHIJKLMNOP"
SECRETS = {
    "sk-" + "proj-a1B2c3D4e5F6g7H8i9J0k1L2": "an OpenAI or Anthropic key",
    # The arguments of a call are a JSON text.
    "export X=1\\n" + GITHUB: "a GitHub token",
    "hf" + "_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH": "a Hugging Face token",
    "。" + AWS: "an AWS key",
    "-----BEGIN OPENSSH " + "PRIVATE KEY-----": "a private key",
    "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0In0.abcdefghijkl_mn": "a JSON web token",
    "postgres://joe" + ":hunter22@db.example.com/x": "a password in an address",
    "WANDB_API_" + "KEY=0123456789abcdef0123456789abcdef01234567": "a key",
    "Authorization: " + "Bearer abcdef0123456789ABCDEF": "a bearer token",
    "Authorization: " + "Basic dXNlcjpwYXNz": "an authorization header",
    "aws_secret_access_" + "key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYzz12345678": "a key",
    "client_" + "secret: a8f5f167f44f4964e6c998dee827110c": "a secret",
    "refresh_" + "token=1//0a0AfH6SMBx1234567890": "an access token",
    "DB_" + "PASSWORD=hunter22": "a password",
    "wandb " + "login --relogin 0123456789abcdef0123456789abcdef01234567": "a Weights & Biases key",
    'password = os.environ["P1"], password=make_pw2(x), password: str = Field(min_length=8)': "",
    "password=$DB_PASSWORD1 password=<password1> password must have 8 characters": "",
    "Bearer $TOKEN, Bearer YOUR_TOKEN_HERE_PLEASE, max_tokens=4096, api_key=args.api_key": "",
    "a task-force-with-a-long-name-2025 and risk-1234567890123456789012": "",
    "postgres://user:password@host/db and https://$USER:$PASSWORD@host": "",
    "hf_hub_download(repo_id, filename) and ghp_short": "",
}


def test_a_second_result_of_a_call_is_left_out(tmp_path: Path) -> None:
    results = asked([result("a")]), asked([result("a", "again")])
    lines = claude(asked("Hi"), answered("m1", call("a")), *results, answered("m2", text("Done.")))
    rows = rows_of(write(tmp_path / "s.jsonl", lines))
    assert "again" not in show(rows[0])
    assert notes_of(rows)["tool results without their call, left out"] == 1


def test_secrets_are_found_in_any_value() -> None:
    for words, name in SECRETS.items():
        found = [name] if name else []
        assert list(secrets_in(words)) == list(secrets_in({"a": ["", f"x = '{words}'\n"]})) == found


def test_secrets_are_refused_unless_they_are_allowed(tmp_path: Path, simple: Simple) -> None:
    lines = claude(
        asked("Show the environment"),
        answered("m1", call("a", token=GITHUB)),
        asked([result("a", AWS)]),
        answered("m2", text("Done.")),
    )
    path = write(tmp_path / "s.jsonl", lines)
    rows = rows_of(path)
    assert rows.secrets == {0: [f"{path}:2: a GitHub token", f"{path}:3: an AWS key"]}
    assert rows.take([]).secrets == {}, "only of rows that are selected"
    source = Source(source=str(path), format="messages")
    data = Data(train=(source,))
    allow = "data.allow_secrets=true"
    with refuses(DataError, where="; ".join(rows.secrets[0]), names=[2], fix=[allow]) as refused:
        tokenize([(source, rows)], data, simple, cache=None, what="train")
    assert GITHUB not in str(refused.value)
    allowed = replace(data, allow_secrets=True)
    tokens = tokenize([(source, rows)], allowed, simple, cache=None, what="train")
    assert tokens.parts[0].counts.flaws["secret"] == [1, 0]


def test_lines_and_huge_sessions_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(write(tmp_path / "s.jsonl", CLAUDE, '{"type": "user", "mess'))
    assert show(rows[0]) == "u:Hi | a:Hello."
    assert notes_of(rows)["lines cut off at the end of a file"] == 1
    monkeypatch.setattr(sessions, "MAX_ROW_BYTES", 1 << 20)
    lines = [(asked("x" * 600_000), answered(f"m{n}", text("Done."))) for n in range(4)]
    rows = rows_of(write(tmp_path / "s.jsonl", claude(*[line for pair in lines for line in pair])))
    assert len(rows[0]["messages"]) == 2
    assert notes_of(rows)["conversations cut off after 1 MiB"] == 1


@pytest.mark.parametrize(
    ("lines", "more", "place"),
    [
        (CLAUDE, "{\n{}\n", ":3"),
        (claude(asked("Hi"), asked([1]), answered("m1", text("Hello."))), "", ":2"),
        ([CLAUDE[0], [1], CLAUDE[1]], "", ":2"),
        (CLAUDE[:1], "", ""),
    ],
)  # fmt: skip
def test_broken_sessions_are_refused(lines: Any, more: str, place: str, tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", lines, more)
    with refuses(DataError, where=f"{path}{place}"):
        rows_of(path)


def test_a_folder_of_sessions(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", CLAUDE_BRANCH)
    (tmp_path / "a" / "subagents").mkdir(parents=True)
    write(tmp_path / "a" / "subagents" / "agent-1.jsonl", CLAUDE_AGENT)
    (tmp_path / "a" / "subagents" / "agent-1.meta.json").write_text("{}")
    rows = rows_of(tmp_path)
    shown = ["u:Hi | a:Hello.", "u:Name one | a:Good."]
    assert sorted(show(rows[i]) for i in range(len(rows))) == shown
    assert notes_of(rows)[BRANCHES] == 3
    assert "1 .json" in rows.skipped


def test_a_resumed_session_is_trained_on_its_new_answers(tmp_path: Path) -> None:
    more = claude(*[CLAUDE[n] for n in (0, 1)], asked("Go on"), answered("m2", text("Yes.")))
    write(tmp_path / "a.jsonl", CLAUDE)
    ids: tuple[Line, ...] = ({"uuid": "x0"}, {"uuid": "x1", "parentUuid": "x0"})
    write(tmp_path / "b.jsonl", [line | other for line, other in zip(CLAUDE, ids, strict=True)])
    write(tmp_path / "c.jsonl", more)
    write(tmp_path / "d.jsonl", codex(*TWICE))
    write(tmp_path / "e.jsonl", codex(*TWICE, *THIRD, id="other"))
    rows = rows_of(tmp_path)
    assert [show(rows[i]) for i in range(len(rows))] == [
        "u:Hi | a:Hello.",
        "u:Hi | (a):Hello. | u:Go on | a:Yes.",
        "s:Be brief. | u:A | a:1. | u:B | a:2.",
        "s:Be brief. | u:A | (a):1. | u:B | (a):2. | u:C | a:3.",
    ]
    assert notes_of(rows)["conversations of an earlier file, left out"] == 1
    assert rows.where(1) == f"{tmp_path}/c.jsonl:1"
    assert rows.digest() != rows_of(tmp_path / "[abd].jsonl").digest()


def test_a_session_without_its_question_is_named(tmp_path: Path) -> None:
    lines = [{**line, "session_id": "s"} for line in (answered("m1", text("I look.")),)]
    with refuses(DataError, where=str(tmp_path), fix=["--replay-user-messages"]):
        rows_of(write(tmp_path / "s.jsonl", lines).parent)


CIRCLE = claude(
    asked("A"), answered("m1", text("1.")), boundary(5), asked("B"), boundary(1), answered("m2", text("2."), after=2),
)  # fmt: skip
MANY = [(boundary(2 * n), answered(f"m{n}", text("x"), after=0)) for n in range(900)]
ODD = (
    None,
    True,
    -1,
    1e400,
    10**30,
    "u1",
    [],
    ["a"],
    [[1]],
    [{"type": "tool_use", "id": []}],
    {},
    {"a": {}},
)


def fields_of(value: object) -> Iterator[tuple[Any, Any]]:
    """Each place in a JSON value, as its holder and its key."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from fields_of(value[key])


@pytest.mark.slow
def test_odd_values_are_errors_of_the_session() -> None:
    kept = {"preservedMessages": {"anchorUuid": "u5", "uuids": ["u0"], "headUuid": "u0"}}
    files = [lines for lines, _, _ in FILES.values()] + [
        claude(asked("A"), answered("m1", text("1.")), boundary(1, compactMetadata=kept), asked("B", after=1)),
        CIRCLE, claude(asked("A"), *[line for pair in MANY for line in pair]),
    ]  # fmt: skip
    tried = 0
    for lines in files:
        form = next(filter(None, map(sessions._form_of_line, lines)))
        table = Table(len(lines), lines.__getitem__, lambda i: f"line {i}", lambda: "")
        for holder, key in [*fields_of(lines), (lines, 0)] if len(lines) < 40 else [(lines, 0)]:
            before = holder[key]
            for value in (*ODD, before):
                holder[key] = value
                tried += 1
                with suppress(DataError):
                    rows = sessions.read_sessions(table, form)
                    for i in range(len(rows)):
                        row: Any = rows.row(i)
                        convert_row(row, Source(source="s", format="messages"), where=rows.where(i))
    assert tried > 5000


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "a", "completion": "b"},
        {"type": "inbound_call", "call_id": 7, "prompt": "a", "completion": "b"},
        {"id": "1", "messages": [], "source": "web", "model": "m"},
    ],
)
def test_other_rows_are_no_sessions(line: Line, tmp_path: Path) -> None:
    assert rows_of(write(tmp_path / "s.jsonl", [line]))[0] == line
