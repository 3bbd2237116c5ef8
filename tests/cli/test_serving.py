"""`generate`, `chat`, `eval` and `merge` by their command lines: what is written and what goes where."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from errors import check_shown, holds
from invoke import Output, invoke
from runs import ROWS, make_run, peft_model, write_rows
from tunesmith.answers.answers import answer_batch
from tunesmith.answers.decoding import Decoding
from tunesmith.answers.load_run import load_run
from tunesmith.answers.sampler import Prompt
from tunesmith.errors import EXIT_OK, EXIT_STOPPED, EXIT_USAGE
from tunesmith.rows.samples import Conversation
from tunesmith.tokens.text.template import Template
from tunesmith.tools.evaluate.chat import Chat
from warm import Warm, take_terminal

pytestmark = pytest.mark.slow

SHORT = ["--max-new-tokens", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving") / "run"
    make_run(folder, tiny, peft_model(tiny, std=0.3))
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def generate(run: Path, rows: Path, output: Path | str, *words: object) -> Output:
    return invoke("generate", run, "--input", rows, "--output", output, *words, *SHORT)


def test_a_broken_off_job_goes_on_to_the_same_file(run: Path, rows: Path, tmp_path: Path) -> None:
    """An answer to every row in order; a last line that was cut is kept or made again."""
    out = tmp_path / "deep" / "out.jsonl"
    sampled = ["--batch-size", "4", "--temperature", "1.0", "--seed", "4"]
    assert generate(run, rows, out, *sampled).code == EXIT_OK
    whole = out.read_bytes()
    found = [json.loads(line) for line in whole.splitlines()]
    assert [row["instruction"] for row in found] == [row["instruction"] for row in ROWS]
    assert [row["reference"] for row in found] == [row["output"] for row in ROWS]
    kept = whole.splitlines(keepends=True)
    last = kept[5]
    for torn in (b"", last[:1], last[: last.index(b'"output"') + 3], last[:-2], last[:-1]):
        out.write_bytes(b"".join(kept[:5]) + torn)
        assert generate(run, rows, out, *sampled, "--resume").code == EXIT_OK
        assert out.read_bytes() == whole


def test_resume_touches_no_file_that_answers_nothing_here(
    run: Path, rows: Path, tmp_path: Path
) -> None:
    """Also behind the answers of this input."""
    out = tmp_path / "out.jsonl"
    assert generate(run, rows, out).code == EXIT_OK
    whole = out.read_bytes()
    for content in (b"my only copy", b'{"instruction": "Count to 1", "note": "mine"}'):
        for line, before in ((1, b""), (13, whole)):
            out.write_bytes(before + content)
            done = generate(run, rows, out, "--resume")
            assert (done.code, out.read_bytes()) == (EXIT_USAGE, before + content)
            check_shown(done.err, where=f"{out}:{line}")


def test_a_stopped_job_names_a_command_that_works(
    run: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--resume needs a file."""
    monkeypatch.setattr("tunesmith.host.signals.StopRequest.requested", lambda _: True)
    for output in ("-", "/dev/null", tmp_path / "out.jsonl"):
        done = generate(run, rows, output)
        assert done.code == EXIT_STOPPED
        assert holds(done.err, "--resume") == (output == tmp_path / "out.jsonl")
        assert holds(done.err, "0 of 12")


def test_generate_reads_stdin_and_writes_stdout(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without an answer; stdout holds rows and nothing else."""
    # Half a character, which UTF-8 cannot hold: written as its escape
    asked = [{"prompt": "a", "id": 7}, {"prompt": "f é"}, {"prompt": "g", "half": "\ud83d"}]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n".join(map(json.dumps, asked))))
    done = invoke("generate", run, "--input", "-", "--output", "-", *SHORT)
    found = [json.loads(line) for line in done.out.splitlines()]
    assert [{k: v for k, v in row.items() if k != "output"} for row in found] == asked


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Output]:
    """Run `chat` with lines on stdin that is no terminal."""

    def talk(text: str, *words: object) -> Output:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return invoke("chat", *words, *SHORT)

    return talk


Talk = Callable[..., Output]


def test_chat_without_a_terminal_answers_line_by_line(run: Path, chat: Talk) -> None:
    """The answers are those of `generate` on the same conversation; no prompt signs on stdout."""
    opened = load_run(run, device="cpu")
    ids = opened.template.prompt(Conversation([{"role": "user", "content": "hello"}]))
    options = {"stops": opened.template.end_ids}
    prompts = [Prompt(list(ids))]
    (answer,) = answer_batch(opened.train_model, opened.tokenizer, prompts, Decoding(6), **options)
    done = chat("hello\n/quit\nnot asked\n", run)
    assert (done.code, done.out) == (EXIT_OK, answer.text + "\n")


def test_a_chat_sees_its_earlier_answers_until_a_reset(
    run: Path, chat: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    chats: list[Chat] = []
    talk = Chat.talk
    monkeypatch.setattr(Chat, "talk", lambda self: (chats.append(self), talk(self)))

    def turns(text: str, *words: str) -> list[tuple[str, str]]:
        assert chat(text, run, *words).code == EXIT_OK
        return chats[-1].turns

    tuned = turns("first\nsecond\n")
    assert turns("first\nsecond\n", "--base") != tuned
    alone = turns("second\n")
    # What was said before counts, until it is forgotten.
    assert alone != tuned[1:]
    assert turns("first\n/reset\nsecond\n") == alone


def test_a_question_that_does_not_fit_costs_no_turn(
    run: Path, chat: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal the chat goes on after it."""
    chats: list[Chat] = []

    def typed_lines(opened: Chat) -> Iterator[str]:
        chats.append(opened)
        yield from ("hello", "d" * 2100)

    on_terminal = property(lambda _: True, lambda *_: None)
    monkeypatch.setattr(Chat, "on_terminal", on_terminal, raising=False)
    monkeypatch.setattr(Chat, "_typed_lines", typed_lines)
    assert chat("", run).code == EXIT_OK
    assert [question for question, _ in chats[0].turns] == ["hello"]


def test_a_chat_shows_the_model_its_tools(
    run: Path, tmp_path: Path, chat: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Conversation] = []
    make, keep = Template.prompt, prompts.append
    monkeypatch.setattr(Template, "prompt", lambda self, row: keep(row) or make(self, row))
    file = tmp_path / "tools.json"
    file.write_text('[{"name": "add", "parameters": {"type": "object"}}]')
    assert chat("1 + 1?\n", run, "--tools", file).code == EXIT_OK
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    assert prompts[0].tools == [tool]
    file.write_text('[{"parameters": {}}]')
    done = chat("1 + 1?\n", run, "--tools", file)
    assert done.code == EXIT_USAGE
    check_shown(done.err, where=str(file))


ECHO = "hello\r\n"  # a question is on its way


def on_a_terminal(command: list[str], steps: list[tuple[str, bytes]]) -> tuple[str, int]:
    """Run a command on a pseudo-terminal; for each step wait for a text, then type.

    Return all that was shown, and the exit code.
    """
    terminal, own = pty.openpty()
    fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    process = Warm(command, env=kept | {"TERM": "xterm"}, streams=[own] * 3, prepare=take_terminal)
    os.close(own)
    shown, seen = "", 0
    for wanted, typed in [*steps, ("", b"")]:
        while not wanted or wanted not in shown[seen:]:
            try:
                if not select.select([terminal], [], [], 90)[0]:
                    process.kill()
                    pytest.fail(f"waited in vain for {wanted!r} after: {shown}")
                shown += os.read(terminal, 4096).decode(errors="replace")
            except OSError:  # the command has ended
                code = process.wait()
                os.close(terminal)
                assert not wanted, f"{wanted!r} was not shown, exit code {code}: {shown}"
                return shown, code
        seen = len(shown)
        # A signal between the prompt and Python's wait for a key is only seen at the next key; no
        # one types so fast.
        time.sleep(0 if typed != b"\x03" else 0.15 if wanted == ECHO else 0.5)
        os.write(terminal, typed)
    raise AssertionError("unreachable")


def test_ctrl_c_ends_an_answer_and_the_chat_goes_on(run: Path) -> None:
    words = ["chat", str(run), "--max-new-tokens", "900", "--device", "cpu"]
    steps = [("you> ", b"hello\n"), (ECHO, b"\x03"), ("you> ", b"\x03"), ("again exits", b"\x03")]
    shown, code = on_a_terminal(words, steps)
    assert code == EXIT_OK, shown
    assert "(stopped)" in shown
    assert "Traceback" not in shown


def evaluate(*words: object) -> dict:
    done = invoke("eval", *words, "--json", *SHORT)
    assert done.code == EXIT_OK, done.err
    return json.loads(done.out)


def test_eval_compares_base_and_tuned(run: Path, rows: Path, tiny: Path) -> None:
    words = [run, "--data", rows, "--max-examples", "5", "--score", "exact"]
    words += ["--output", rows.with_name("answers.jsonl")]
    found = evaluate(*words)
    assert found["base"]["rows"] == found["tuned"]["rows"] == 5
    assert found["base"]["loss"] != found["tuned"]["loss"]
    assert found["scores"]["exact"]["rows"] == 5
    table = invoke("eval", *words, *SHORT).out
    assert holds(table, f"{found['base']['loss']:.4f}", f"{found['tuned']['loss']:.4f}")
    base = generate(run, rows, "-", "--base").out
    assert base == generate(tiny, rows, "-").out != generate(run, rows, "-").out


def test_columns_on_the_command_line(run: Path, tmp_path: Path) -> None:
    plain = write_rows(tmp_path / "plain.jsonl", [{"prompt": "one", "completion": "two"}])
    expected = evaluate(run, "--data", plain, "--score", "exact")
    file = write_rows(tmp_path / "held.jsonl", [{"q": "one", "a": "two"}])
    columns = ["--columns", "prompt=q", "--columns", "completion=a"]
    found = evaluate(run, "--data", file, *columns, "--score", "exact")
    assert found | {"answers": expected["answers"]} == {**expected, "data": file.name}
    assert json.loads(generate(run, file, "-", *columns).out)["reference"] == "two"
