"""Sessions of coding agents as rows: 30 files of four forms, and what a model learns from each."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stored_templates import encode, encoder_of, supervised_texts

from errors import refuses
from rows import Simple
from tunesmith.config.schema import Data, Source
from tunesmith.data.source import sessions
from tunesmith.data.source.open_source import Rows, read_rows
from tunesmith.data.source.secrets import secrets_in
from tunesmith.data.tokens.tokenize import tokenize
from tunesmith.errors import DataError

Line = dict[str, Any]


class Claude:
    """Writes lines as Claude Code does: each follows the one before it, unless `after` names it."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def add(self, kind: str, content: object = None, after: int | None = -1, **keys: Any) -> int:
        i = len(self.lines)
        before = i - 1 if after == -1 else after
        line: Line = {"type": kind, "uuid": f"u{i}", "sessionId": "s", "isSidechain": False}
        line["parentUuid"] = None if before is None or before < 0 else f"u{before}"
        if content is not None:
            line["message"] = {"role": kind, "content": content}
            if "answer" in keys:
                line["message"] |= {"id": keys.pop("answer"), "stop_reason": keys.pop("stop", None)}
        self.lines.append(line | keys)
        return i


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


def claude_plain() -> list[Line]:
    c = Claude()
    c.add("user", "Hi")
    c.add("assistant", [text("Hello.")], answer="m1")
    return c.lines


def claude_parallel() -> list[Line]:
    c = Claude()
    c.add("user", "Read both")
    c.add(
        "assistant", [{"type": "thinking", "thinking": "Two files.", "signature": "x"}], answer="m"
    )
    c.add("assistant", [text("I read.")], answer="m")
    a = c.add("assistant", [call("a")], answer="m")
    b = c.add("assistant", [call("b")], answer="m")
    c.add("user", [result("a")], after=a)
    c.add("user", [result("b", [text("1"), text("2")])], after=b)
    c.add("assistant", [text("Done.")], answer="m2")
    return c.lines


def claude_parallel_mixed() -> list[Line]:
    """The result of the first call is written before the second call, and the session goes on from
    the first result."""
    c = Claude()
    c.add("user", "Read both")
    a = c.add("assistant", [call("a")], answer="m")
    done = c.add("user", [result("a")], after=a)
    b = c.add("assistant", [call("b")], after=a, answer="m")
    c.add("user", [result("b")], after=b)
    c.add("assistant", [text("Done.")], after=done, answer="m2")
    return c.lines


def claude_compacted() -> list[Line]:
    c = Claude()
    c.add("user", "Start")
    last = c.add("assistant", [text("Started.")], answer="m1")
    c.add("system", after=None, subtype="compact_boundary", logicalParentUuid=f"u{last}")
    c.add("user", "Summary: started.", isCompactSummary=True)
    c.add("user", "Go on")
    c.add("assistant", [text("Went on.")], answer="m2")
    return c.lines


def claude_kept(**kept: object) -> list[Line]:
    """The last question and answer stay as they are behind the summary."""
    c = Claude()
    c.add("user", "Start")
    c.add("assistant", [text("Started.")], answer="m1")
    c.add("user", "Keep")
    last = c.add("assistant", [text("Kept.")], answer="m2")
    about = {"compactMetadata": kept, "logicalParentUuid": f"u{last}"}
    c.add("system", after=None, subtype="compact_boundary", **about)
    c.add("user", "Summary: started.", isCompactSummary=True)
    c.add("user", "Go on", after=last)
    c.add("assistant", [text("Went on.")], answer="m3")
    return c.lines


def claude_sidechain() -> list[Line]:
    c = Claude()
    c.add("user", "Delegate")
    task = c.add("assistant", [call("task")], answer="m1")
    c.add("user", "Count files", after=None, isSidechain=True)
    c.add("assistant", [text("3 files.")], answer="m2", isSidechain=True)
    c.add("user", [result("task", "3 files.")], after=task)
    c.add("assistant", [text("There are 3.")], answer="m3")
    return c.lines


def claude_agent_file() -> list[Line]:
    return [{**line, "isSidechain": True, "agentId": "a1"} for line in claude_plain()]


def claude_branch() -> list[Line]:
    c = Claude()
    first = c.add("user", "Name one")
    c.add("assistant", [text("Bad.")], answer="m1")
    c.add("user", "No")
    c.add("assistant", [text("Worse.")], answer="m2")
    c.add("assistant", [text("Good.")], after=first, answer="m3")
    return c.lines


def claude_first_edited() -> list[Line]:
    c = Claude()
    c.add("user", "Typo")
    c.add("assistant", [text("What?")], answer="m1")
    c.add("user", "No typo", after=None)
    c.add("assistant", [text("Yes.")], answer="m2")
    return c.lines


def claude_api_error() -> list[Line]:
    c = Claude()
    c.add("user", "Hi")
    c.add("assistant", [text("API Error: 529")], isApiErrorMessage=True)
    c.add("user", "Again")
    c.add("assistant", [text("Hello.")], answer="m1")
    return c.lines


def claude_interrupted() -> list[Line]:
    c = Claude()
    c.add("user", "Hi")
    c.add("assistant", [text("Hello."), call("a")], answer="m1")
    c.add("user", [text("[Request interrupted by user]")])
    return c.lines


def claude_meta() -> list[Line]:
    c = Claude()
    c.lines.append({"type": "summary", "summary": "A chat", "leafUuid": "u9"})
    c.add("user", "<local-command-stdout>ok", after=None, isMeta=True)
    c.add("attachment", attachment={"type": "queued_command", "prompt": "Hi"})
    c.add("progress", data={})
    c.add("assistant", [text("Hello.")], answer="m1")
    return c.lines


def claude_repeated() -> list[Line]:
    return [*claude_parallel(), *claude_parallel()[2:5]]


def claude_cut() -> list[Line]:
    c = Claude()
    c.add("user", "Hi")
    c.add("assistant", [text("Hel")], answer="m1", stop="max_tokens")
    c.add("user", "Go on")
    c.add("assistant", [text("Hello.")], answer="m2", stop="end_turn")
    return c.lines


def claude_pictures() -> list[Line]:
    c = Claude()
    c.add("user", [text("See"), {"type": "image", "source": {"type": "base64", "data": "AAAA"}}])
    c.add("assistant", [{"type": "redacted_thinking", "data": "x"}, text("I see.")], answer="m1")
    return c.lines


def claude_stream() -> list[Line]:
    """As `claude -p --output-format stream-json` prints it."""
    lines: list[Line] = [{"type": "system", "subtype": "init", "tools": ["Read"], "uuid": "x"}]
    for line in claude_plain():
        lines.append({key: line[key] for key in ("type", "uuid", "message")} | {"session_id": "s"})
    return [*lines, {"type": "result", "result": "Hello.", "session_id": "s"}]


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


def thought(summary: str = "", encrypted: str = "x") -> Line:
    parts = [{"type": "summary_text", "text": summary}] if summary else []
    return {"type": "reasoning", "summary": parts, "encrypted_content": encrypted}


def compacted(message: str, history: list[Line] | None = None) -> Line:
    return {"type": "compacted", "payload": {"message": message, "replacement_history": history}}


PARALLEL_ITEMS = (
    say("user", "Look"),
    thought("Look twice."),
    say("assistant", "I look."),
    item("a", cmd="ls"),
    item("b"),
    output("b", [{"type": "input_text", "text": "x"}]),
    output("a"),
    say("assistant", "Done."),
)
CUSTOM = (
    say("user", "Patch"),
    {"type": "custom_tool_call", "name": "apply_patch", "call_id": "p", "input": "*** Begin"},
    {"type": "custom_tool_call_output", "call_id": "p", "output": "ok"},
    {"type": "local_shell_call", "call_id": "l", "action": {"type": "exec", "command": ["ls"]}},
    {"type": "local_shell_call_output", "call_id": "l", "output": "x"},
    {"type": "web_search_call", "action": {"query": "x"}},
    say("assistant", "Done."),
)
TWICE = (say("user", "A"), say("assistant", "1."), say("user", "B"), say("assistant", "2."))


def chat(role: str, content: object, **keys: object) -> Line:
    return {"role": role, "content": content, **keys}


def chat_call(name: str) -> Line:
    return {"id": name, "type": "function", "function": {"name": "ls", "arguments": '{"a": 1}'}}


def hermes(*messages: Line, **keys: object) -> Line:
    about = {"id": "h", "source": "cli", "model": "m", "system_prompt": "Be brief.", **keys}
    return {**about, "messages": list(messages)}


HERMES_CHAT = (
    chat("user", "Look"),
    chat("assistant", None, tool_calls=[chat_call("a"), chat_call("b")], reasoning="Twice."),
    chat("tool", "ok", tool_call_id="a", tool_name="ls"),
    chat("tool", "no", tool_call_id="b", tool_name="ls"),
    chat("assistant", "Done."),
)
HERMES_SHOWN = "u:Look | a:<think>/Twice./</think> >a >b | t:a=ok | t:b=no | a:Done."
TOOLS = [{"type": "function", "function": {"name": "ls", "parameters": {"type": "object"}}}]


PARALLEL = (
    "u:Read both | a:<think>/Two files./</think>//I read. >a >b | t:a=ok | t:b=1//2 | a:Done."
)
READ_BOTH = "u:Read both | a:>a >b | t:a=ok | t:b=ok | a:Done."
KEPT = [
    "u:Start | a:Started. | u:Keep | a:Kept.",
    "u:Summary: started.//Keep | (a):Kept. | u:Go on | a:Went on.",
]
ENCRYPTED = "thoughts that are encrypted or not recorded, left out"
UNANSWERED = "messages after the last trained answer, left out"
CUT_LINE = "lines cut off at the end of a file"
CUT_CONVERSATION = "conversations cut off after 1 MiB"
BRANCHES = "lines of other branches, left out"

# Name -> the lines of a file, its rows, and what of it is counted.
FILES: dict[str, tuple[list[Line], list[str], dict[str, int]]] = {
    "claude plain": (claude_plain(), ["u:Hi | a:Hello."], {}),
    "claude parallel": (claude_parallel(), [PARALLEL], {}),
    "claude repeated": (claude_repeated(), [PARALLEL], {"repeated lines, left out": 3}),
    "claude parallel, mixed": (claude_parallel_mixed(), [READ_BOTH], {}),
    "claude compacted": (
        claude_compacted(),
        ["u:Start | a:Started.", "u:Summary: started.//Go on | a:Went on."],
        {"compactions": 1, "lines of type system, left out": 1},
    ),
    "claude messages kept": (
        claude_kept(preservedMessages={"anchorUuid": "u5", "uuids": ["u2", "u3"]}),
        KEPT,
        {"compactions": 1},
    ),
    "claude segment kept": (
        claude_kept(preservedSegment={"headUuid": "u2", "anchorUuid": "u5", "tailUuid": "u3"}),
        KEPT,
        {"compactions": 1},
    ),
    "claude sidechain": (
        claude_sidechain(),
        ["u:Delegate | a:>task | t:task=3 files. | a:There are 3.", "u:Count files | a:3 files."],
        {"subagents": 1},
    ),
    "claude agent file": (claude_agent_file(), ["u:Hi | a:Hello."], {"subagents": 1}),
    "claude branch": (claude_branch(), ["u:Name one | a:Good."], {BRANCHES: 3}),
    "claude first edited": (claude_first_edited(), ["u:No typo | a:Yes."], {BRANCHES: 2}),
    "claude API error": (
        claude_api_error(),
        ["u:Hi//Again | a:Hello."],
        {"API errors and other texts in place of an answer, left out": 1},
    ),
    "claude interrupted": (
        claude_interrupted(),
        ["u:Hi | a:Hello. >a"],
        {UNANSWERED: 1, "tool calls without a result": 1},
    ),
    "claude meta": (
        claude_meta(),
        ["u:<local-command-stdout>ok//Hi | a:Hello."],
        {
            "lines of type summary, left out": 1,
            "meta lines, kept as the model saw them": 1,
            "lines of type progress, left out": 1,
        },
    ),
    "claude cut": (
        claude_cut(),
        ["u:Hi | (a):Hel | u:Go on | a:Hello."],
        {"parts of answers that were cut off, not trained": 1},
    ),
    "claude pictures": (
        claude_pictures(),
        ["u:See//[image] | a:I see."],
        {
            "parts without a text, written as [image]": 1,
            "parts of type redacted_thinking, left out": 1,
        },
    ),
    "claude stream": (
        claude_stream(),
        ["u:Hi | a:Hello."],
        {"lines of type system, left out": 1, "lines of type result, left out": 1},
    ),
    "codex plain": (
        codex(say("user", "Hi"), say("assistant", "Hello.")),
        ["s:Be brief. | u:Hi | a:Hello."],
        {"lines of type turn_context, left out": 1},
    ),
    "codex parallel": (
        codex(*PARALLEL_ITEMS),
        [
            "s:Be brief. | u:Look | a:<think>/Look twice./</think>//I look. >a >b | t:b=x | t:a=ok"
            " | a:Done."
        ],
        {},
    ),
    "codex custom tool": (
        codex(*CUSTOM),
        ["s:Be brief. | u:Patch | a:>p | t:p=ok | a:>l | t:l=x | a:Done."],
        {"lines of type web_search_call, left out": 1},
    ),
    "codex encrypted": (
        codex(say("user", "Hi"), thought(), say("assistant", "Hello.")),
        ["s:Be brief. | u:Hi | a:Hello."],
        {ENCRYPTED: 1},
    ),
    "codex late thought": (
        codex(say("user", "Hi"), say("assistant", "Hello."), thought("Call."), item("a")),
        ["s:Be brief. | u:Hi | a:<think>/Call./</think>//Hello. >a"],
        {
            "parts of answers moved before a text or a call": 1,
            "tool calls without a result": 1,
        },
    ),
    "codex compacted": (
        codex(*TWICE, compacted("Summary."), say("user", "C"), say("assistant", "3.")),
        [
            "s:Be brief. | u:A | a:1. | u:B | a:2.",
            "s:Be brief. | u:A//B//Summary.//C | a:3.",
        ],
        {"compactions": 1},
    ),
    "codex history replaced": (
        codex(
            *TWICE,
            compacted("", [say("user", "B"), say("assistant", "2."), {"type": "compaction"}]),
            say("user", "C"),
            say("assistant", "3."),
        ),
        [
            "s:Be brief. | u:A | a:1. | u:B | a:2.",
            "s:Be brief. | u:B | (a):2. | u:C | a:3.",
        ],
        {"compactions": 1, "lines of type compaction, left out": 1},
    ),
    "codex rolled back": (
        codex(
            *TWICE,
            event("thread_rolled_back", num_turns=1),
            say("user", "C"),
            say("assistant", "3"),
        ),
        ["s:Be brief. | u:A | a:1. | u:C | a:3"],
        {BRANCHES: 2},
    ),
    "codex subagent": (
        codex(say("user", "Hi"), say("assistant", "Hello."), source={"subagent": {}}),
        ["s:Be brief. | u:Hi | a:Hello."],
        {"subagents": 1},
    ),
    "codex aborted": (
        codex(*TWICE, say("user", "C"), item("a"), event("turn_aborted"), say("user", "D")),
        ["s:Be brief. | u:A | a:1. | u:B | a:2. | u:C | a:>a"],
        {UNANSWERED: 1, "tool calls without a result": 1},
    ),
    "hermes sessions": (
        [hermes(*HERMES_CHAT), hermes(chat("user", "Hi"), chat("assistant", "Hello."))],
        [f"s:Be brief. | {HERMES_SHOWN}", "s:Be brief. | u:Hi | a:Hello."],
        {},
    ),
    "hermes transcript": (
        [{"role": "session_meta", "tools": TOOLS, "model": "m"}, *HERMES_CHAT],
        [HERMES_SHOWN],
        {},
    ),
    "hermes cut": (
        [
            hermes(chat("user", "Hi"), chat("assistant", "Hel", finish_reason="length")),
            hermes(chat("user", "Hi"), chat("assistant", "Hello.")),
        ],
        ["s:Be brief. | u:Hi | a:Hello."],
        {
            "parts of answers that were cut off, not trained": 1,
            "conversations without an answer, left out": 1,
        },
    ),
    "agents items": (
        [chat("user", "Look"), *PARALLEL_ITEMS[1:]],
        ["u:Look | a:<think>/Look twice./</think>//I look. >a >b | t:b=x | t:a=ok | a:Done."],
        {},
    ),
    "half of a character": (
        [chat("user", "Look"), item("a"), output("a", "cut \ud83d"), say("assistant", "Done.")],
        ["u:Look | a:>a | t:a=cut ? | a:Done."],
        {"texts with half of a character, written as ?": 1},
    ),
    "result with an object": (
        [
            chat("user", "Look"),
            item("a"),
            output("a", {"content": "x", "success": True}),
            say("assistant", "Done."),
        ],
        ["u:Look | a:>a | t:a=x | a:Done."],
        {},
    ),
    "codex without payloads": (
        [{"id": "c", "timestamp": "t", "instructions": None}, *PARALLEL_ITEMS],
        ["u:Look | a:<think>/Look twice./</think>//I look. >a >b | t:b=x | t:a=ok | a:Done."],
        {"lines of type None, left out": 1},
    ),
    "agents compacted": (
        [*TWICE, {"type": "compaction", "encrypted_content": "x"}, *TWICE],
        ["u:A | a:1. | u:B | a:2.", "u:A | a:1. | u:B | a:2."],
        {"compactions": 1, "lines of type compaction, left out": 1},
    ),
    "agents result without a call": (
        [output("z"), *TWICE[:2]],
        ["u:A | a:1."],
        {"tool results without their call, left out": 1},
    ),
}


def write(path: Path, lines: list[Line]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def notes_of(rows: Rows) -> dict[str, int]:
    notes = (note.rsplit(": ", 1) for note in rows.layout.split("; "))
    return {what: int(count) for what, count in notes}


@pytest.mark.parametrize("name", FILES)
def test_sessions_become_rows(name: str, tmp_path: Path) -> None:
    lines, shown, counted = FILES[name]
    rows = read_rows(Source(source=str(write(tmp_path / "s.jsonl", lines)), format="messages"))
    assert [show(rows[i]) for i in range(len(rows))] == shown
    assert counted.items() <= notes_of(rows).items()


# Made up: none of them opens anything. They are joined here, so that no scanner finds them.
SECRETS = {
    "an OpenAI or Anthropic key": "sk-" + "proj-a1B2c3D4e5F6g7H8i9J0k1L2",
    "a GitHub token": "ghp" + "_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8",
    "a Hugging Face token": "hf" + "_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "an AWS key": "AKIA" + "ABCDEFGHIJKLMNOP",
    "a Slack token": "xoxb" + "-123456789012-abcdefghij",
    "a private key": "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
    "a JSON web token": "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + "zdWIiOiIxMjM0In0.abcdefghijkl_mn",
    "a password in an address": "postgres://joe" + ":hunter22@db.example.com/x",
}
SECRETS_BETWEEN = {
    # The arguments of a call are a JSON text.
    "export X=1\\n" + SECRETS["a GitHub token"]: "a GitHub token",
    "。" + SECRETS["an AWS key"]: "an AWS key",
    "redis://" + ":hunter22@cache:6379": "a password in an address",
    "postgres://joe" + ":hunt$r22@db/x": "a password in an address",
}
NO_SECRETS = (
    "a task-force-with-a-long-name-2025 and risk-1234567890123456789012",
    "sk-no-digits-in-this-long-class-name",
    "postgres://user:password@host/db and https://$USER:$PASSWORD@host",
    "http://localhost:8080/a@b and git@github.com:a/b.git",
    "hf_hub_download(repo_id, filename) and ghp_short",
)


@pytest.mark.parametrize("kind", SECRETS)
def test_a_secret_is_found(kind: str) -> None:
    assert list(secrets_in({"a": ["", f"x = '{SECRETS[kind]}'\n"]})) == [kind]


@pytest.mark.parametrize("words", SECRETS_BETWEEN)
def test_a_secret_is_found_between_other_texts(words: str) -> None:
    kind = SECRETS_BETWEEN[words]
    assert list(secrets_in(words)) == list(secrets_in([{"a": words}])) == [kind]


@pytest.mark.parametrize("words", NO_SECRETS)
def test_no_secret_is_found(words: str) -> None:
    assert list(secrets_in(words)) == []


def session_with_secrets(path: Path) -> Path:
    c = Claude()
    c.add("user", "Show the environment")
    c.add("assistant", [call("a", token=SECRETS["a GitHub token"])], answer="m1")
    c.add("user", [result("a", SECRETS["an AWS key"])])
    c.add("assistant", [text("Done.")], answer="m2")
    return write(path, c.lines)


def test_secrets_of_sessions_are_refused_by_their_lines(tmp_path: Path) -> None:
    path = session_with_secrets(tmp_path / "s.jsonl")
    rows = read_rows(Source(source=str(path), format="messages"))
    assert rows.secrets == {0: [f"{path}:2: a GitHub token", f"{path}:3: an AWS key"]}
    # Only of rows that are selected.
    assert rows.take([]).secrets == {}


def test_a_line_is_cut_off(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", claude_plain())
    path.write_text(path.read_text() + '{"type": "user", "mess')
    rows = read_rows(Source(source=str(path), format="messages"))
    assert show(rows[0]) == "u:Hi | a:Hello."
    assert notes_of(rows)[CUT_LINE] == 1


def test_a_huge_conversation_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_ROW_BYTES", 1 << 20)
    c = Claude()
    for n in range(4):
        c.add("user", "x" * 600_000)
        c.add("assistant", [text("Done.")], answer=f"m{n}")
    rows = read_rows(Source(source=str(write(tmp_path / "s.jsonl", c.lines)), format="messages"))
    assert len(rows[0]["messages"]) == 2
    assert notes_of(rows)[CUT_CONVERSATION] == 1


def test_a_broken_line_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", claude_plain())
    path.write_text(path.read_text() + "{\n{}\n")
    with refuses(DataError, where=f"{path}:3"):
        read_rows(Source(source=str(path), format="messages"))


@pytest.mark.parametrize(
    "line",
    [
        {"type": "user", "uuid": "u5", "message": {"role": "user", "content": [1]}},
        {"type": "user", "uuid": "u5", "message": {"role": "user", "tool_calls": [1]}},
        [1],
    ],
)
def test_a_line_of_another_form_is_an_error(line: Any, tmp_path: Path) -> None:
    path = write(
        tmp_path / "s.jsonl", [claude_plain()[0], line, {**claude_plain()[1], "parentUuid": "u5"}]
    )
    with refuses(DataError, where=f"{path}:2"):
        read_rows(Source(source=str(path), format="messages"))


def test_a_folder_of_sessions(tmp_path: Path) -> None:
    """Other files next to sessions are named, and counts of all sessions are added up."""
    write(tmp_path / "a.jsonl", claude_branch())
    (tmp_path / "a" / "subagents").mkdir(parents=True)
    write(tmp_path / "a" / "subagents" / "agent-1.jsonl", claude_agent_file())
    write(tmp_path / "b.jsonl", claude_first_edited())
    (tmp_path / "a" / "subagents" / "agent-1.meta.json").write_text("{}")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    rows = read_rows(Source(source=str(tmp_path), format="messages"))
    shown = ["u:Name one | a:Good.", "u:Hi | a:Hello.", "u:No typo | a:Yes."]
    assert sorted(show(rows[i]) for i in range(len(rows))) == sorted(shown)
    assert notes_of(rows)[BRANCHES] == 5
    for ending in (".json", ".md", ".jsonl"):
        assert f"1 {ending}" in rows.skipped


def test_sessions_without_an_answer_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", claude_plain()[:1])
    with refuses(DataError, where=str(path)):
        read_rows(Source(source=str(path), format="messages"))


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "a", "completion": "b"},
        {"type": "user", "text": "a"},
        {"type": "reasoning", "prompt": "a", "completion": "b"},
        {"type": "inbound_call", "call_id": 7, "prompt": "a", "completion": "b"},
        {"id": 1, "conversation_id": 2, "role": "user", "content": "a"},
        {"id": "1", "messages": [], "source": "web", "model": "m"},
    ],
)
def test_other_rows_are_no_sessions(line: Line, tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", [line])
    assert read_rows(Source(source=str(path), format="messages"))[0] == line


def test_answers_of_sessions_are_supervised(tmp_path: Path) -> None:
    """All that a trained answer says and calls is supervised, and nothing else."""
    encoder = encoder_of("trl/qwen3")
    checked = 0
    for name, (lines, _, _) in FILES.items():
        rows = read_rows(
            Source(source=str(write(tmp_path / f"{name}.jsonl", lines)), format="messages")
        )
        for row in (rows[i] for i in range(len(rows))):
            supervised = supervised_texts(encoder.template, encode(encoder, row))
            answers = [m for m in row["messages"] if m["role"] == "assistant"]
            trained = [answer for answer in answers if answer.get("train", True)]
            assert len(supervised) == len(trained), name
            for answer, learned in zip(trained, supervised, strict=True):
                words = answer["content"].replace("<think>", "").replace("</think>", "").split()
                calls = [called["function"] for called in answer.get("tool_calls", ())]
                words += [str(function["name"]) for function in calls]
                assert all(word in learned for word in words), name
                assert learned.count('"arguments"') == len(calls), name
                assert learned.endswith("<|im_end|>"), name
                checked += 1
    assert checked == sum(shown.count("| a:") for _, rows_, _ in FILES.values() for shown in rows_)


def test_secrets_are_refused_unless_they_are_allowed(tmp_path: Path, simple: Simple) -> None:
    path = session_with_secrets(tmp_path / "s.jsonl")
    source = Source(source=str(path), format="messages")
    sources = [(source, read_rows(source))]
    data = Data(train=(source,))
    places = f"{path}:2: a GitHub token; {path}:3: an AWS key"
    allow = "data.allow_secrets=true"
    with refuses(DataError, where=places, names=[2], fix=[allow]) as refused:
        tokenize(sources, data, simple, cache=None, what="train")
    assert not any(secret in str(refused.value) for secret in SECRETS.values())
    allowed = tokenize(sources, replace(data, allow_secrets=True), simple, cache=None, what="train")
    assert allowed.parts[0].counts.flaws["secret"] == [1, 0]
