"""`generate`, `chat`, `eval` and `merge` by their command lines: what is written, what goes where,
and every wrong use.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from errors import check_error, check_shown, error_in, holds, lines_with
from runs import ROWS, make_run, peft_model, write_rows
from tunesmith.cli.main import main
from tunesmith.data.rows.samples import Conversation
from tunesmith.data.text.template import Template
from tunesmith.errors import EXIT_FAILED, EXIT_OK, EXIT_STOPPED, EXIT_USAGE
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


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- generate


def test_generate_adds_an_answer_to_every_row_in_order(
    run: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out.jsonl"
    assert (
        main(
            [
                "generate",
                str(run),
                "--input",
                str(rows),
                "--output",
                str(out),
                "--batch-size",
                "2",
                *SHORT,
            ]
        )
        == EXIT_OK
    )
    found = lines(out)
    assert [row["instruction"] for row in found] == [row["instruction"] for row in ROWS]
    assert [row["reference"] for row in found] == [row["output"] for row in ROWS]
    assert all(isinstance(row["output"], str) for row in found)


def test_a_broken_off_job_goes_on_to_the_same_file(run: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    command = [
        "generate",
        str(run),
        "--input",
        str(rows),
        "--output",
        str(out),
        "--batch-size",
        "1",
        *SHORT,
    ]
    sampled = [*command, "--temperature", "1.0", "--seed", "4"]
    assert main(sampled) == EXIT_OK
    whole = out.read_bytes()
    kept = whole.splitlines(keepends=True)
    out.write_bytes(b"".join(kept[:5]) + kept[5][:20])  # killed inside a line
    assert main([*sampled, "--resume"]) == EXIT_OK
    assert out.read_bytes() == whole
    assert main([*sampled, "--resume"]) == EXIT_OK  # nothing left to do
    assert out.read_bytes() == whole


@pytest.mark.parametrize(
    "last",
    [
        lambda r: r[:-1],
        lambda r: r[:-2],
        lambda r: r[:1],
        lambda r: r[: r.index(b'"output"') + 3],
        lambda r: b"",
    ],
    ids=[
        "only its line break is missing",
        "in its end",
        "one character",
        "in a name",
        "between two",
    ],
)
def test_resume_keeps_or_cuts_a_last_line_of_its_own(
    run: Path, rows: Path, tmp_path: Path, last: Callable[[bytes], bytes]
) -> None:
    out = tmp_path / "out.jsonl"
    command = ["generate", str(run), "--input", str(rows), "--output", str(out), *SHORT]
    assert main(command) == EXIT_OK
    whole = out.read_bytes()
    first, second, *_ = whole.splitlines(keepends=True)
    for torn in (last(first), first + last(second)):
        out.write_bytes(torn)
        assert main([*command, "--resume"]) == EXIT_OK
        assert out.read_bytes() == whole


@pytest.mark.parametrize(
    "content",
    [
        b"my only copy of a long text",
        b'{"instruction": "Count to 1", "note": "mine"}',
        b"  ",
        b'{"instruction": "Count to 2"',
    ],
)
def test_resume_touches_no_file_that_answers_nothing_here(
    run: Path, rows: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also behind a first answer of this input."""
    out = tmp_path / "out.jsonl"
    command = ["generate", str(run), "--input", str(rows), "--output", str(out), *SHORT]
    assert main(command) == EXIT_OK
    for line, before in ((1, b""), (13, out.read_bytes())):
        out.write_bytes(before + content)
        assert main([*command, "--resume"]) == EXIT_USAGE
        assert out.read_bytes() == before + content
        assert f"{out}:{line}" in capsys.readouterr().err


def test_a_full_disk_names_the_file_and_how_to_go_on(
    run: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["generate", str(run), "--input", str(rows), "--output", "/dev/full", *SHORT])
        == EXIT_FAILED
    )
    shown = error_in(capsys.readouterr().err)
    assert shown.where == "/dev/full"
    assert holds(shown.text(), 0, 12)


@pytest.mark.parametrize(
    ("output", "more", "go_on"),
    [
        ("out.jsonl", [], "; to continue, run the same command again with --resume\n"),
        (
            "out.jsonl",
            ["--force"],
            "; to continue, run the same command again with --resume instead of --force\n",
        ),
        ("-", [], "standard output has the answers for 0 of 12 rows\n"),
        ("/dev/null", [], "/dev/null has the answers for 0 of 12 rows\n"),
    ],
)
def test_a_stopped_job_names_a_command_that_works(
    run: Path, rows: Path, tmp_path: Path, output: str, more: list[str], go_on: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """--resume needs a file, and excludes --force."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tunesmith.host.signals.StopRequest.requested", lambda _: True)
    assert (
        main(["generate", str(run), "--input", str(rows), "--output", output, *more, *SHORT])
        == EXIT_STOPPED
    )
    assert capsys.readouterr().err.endswith(go_on)


def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    run: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "tunesmith.inference.load_run.load_run", lambda *a, **k: pytest.fail("loaded")
    )
    (tmp_path / "file").write_text("")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for output, more in (
        (tmp_path / "file" / "out", []),
        (pipe, ["--resume"]),
        (tmp_path, ["--force"]),
    ):
        command = [
            "generate",
            str(run),
            "--input",
            str(rows),
            "--output",
            str(output),
            *more,
            *SHORT,
        ]
        assert main(command) == EXIT_USAGE
        assert str(output) in capsys.readouterr().err


def test_generate_reads_stdin_and_writes_stdout(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rows without an answer; stdout holds rows and nothing else."""
    asked = [
        {"prompt": "a", "id": 7},
        {"prompt": [{"role": "user", "content": "e"}]},
        {"prompt": "f é"},
        # Half a character, which UTF-8 cannot hold: written as its escape
        {
            "prompt": "g",
            "half": "\ud83d",
        },
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n".join(map(json.dumps, asked))))
    monkeypatch.setattr(sys, "__stdout__", sys.stdout)  # as in a process of its own
    assert main(["generate", str(run), "--input", "-", "--output", "-", *SHORT]) == EXIT_OK
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [{k: v for k, v in row.items() if k != "output"} for row in found] == asked


def test_base_answers_as_without_the_adapter(
    run: Path, rows: Path, tmp_path: Path, tiny: Path
) -> None:
    for name, words in (
        ("tuned", [str(run)]),
        ("base", [str(run), "--base"]),
        ("plain", [str(tiny)]),
    ):
        out = tmp_path / f"{name}.jsonl"
        assert (
            main(["generate", *words, "--input", str(rows), "--output", str(out), *SHORT])
            == EXIT_OK
        )
    assert (
        lines(tmp_path / "base.jsonl")
        == lines(tmp_path / "plain.jsonl")
        != lines(tmp_path / "tuned.jsonl")
    )


def test_ctrl_c_keeps_what_is_written(run: Path, tmp_path: Path) -> None:
    many = write_rows(
        tmp_path / "many.jsonl", [{"prompt": "x" * (n % 9 + 1), "n": n} for n in range(4000)]
    )
    out = tmp_path / "out.jsonl"
    command = ["generate", str(run), "--input", str(many), "--output", str(out)]
    process = Warm([*command, "--batch-size", "1", *SHORT])
    try:
        deadline = time.monotonic() + 120
        while (
            not (out.exists() and out.stat().st_size)
            and process.poll() is None
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == EXIT_STOPPED, errors
    assert "--resume" in errors
    assert "Traceback" not in errors
    found = lines(out)
    assert [row["n"] for row in found] == list(range(len(found)))
    assert 0 < len(found) < 4000


# --- chat


def chat(monkeypatch: pytest.MonkeyPatch, text: str, *words: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return main(["chat", *words, *SHORT])


def test_chat_without_a_terminal_answers_line_by_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answers are those of `generate` on the same conversation; no prompt signs on stdout."""
    from tunesmith.inference.decoding import Decoding, answer_batch
    from tunesmith.inference.load_run import load_run

    assert chat(monkeypatch, "hello\n", str(run)) == EXIT_OK
    opened = load_run(run, device="cpu")
    from tunesmith.data.rows.samples import Conversation

    prompt = opened.template.prompt(Conversation([{"role": "user", "content": "hello"}]))
    expected = answer_batch(
        opened.model, opened.tokenizer, [prompt], Decoding(6), stops=opened.template.end_ids
    )[0]
    assert capsys.readouterr().out == expected.text + "\n"


@pytest.mark.parametrize(
    "command", ["/base", "/adapter", "/both", "/system Be brief.", "/save talk.jsonl", "/help"]
)
def test_a_removed_command_gets_one_line(
    command: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert chat(monkeypatch, f"{command}\n/quit\nnot asked\n", str(run)) == EXIT_OK
    out, err = capsys.readouterr()
    assert out == ""
    (_,) = lines_with(err, command.partition(" ")[0], "/reset", "/quit")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("command", ["/exit", "/bye"])
def test_other_words_that_leave_a_chat(
    command: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, f"{command}\nnot asked\n", str(run)) == EXIT_OK
    assert capsys.readouterr() == ("", "")


def test_a_chat_sees_its_earlier_answers_until_a_reset(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.tools.evaluate.chat import Chat

    chats: list[Chat] = []
    talk = Chat.talk
    monkeypatch.setattr(Chat, "talk", lambda self: (chats.append(self), talk(self)))

    def turns(text: str, *words: str) -> list[tuple[str, str]]:
        assert chat(monkeypatch, text, str(run), *words) == EXIT_OK
        return chats[-1].turns

    tuned = turns("first\nsecond\n")
    assert turns("first\nsecond\n", "--base") != tuned
    alone = turns("second\n")
    # What was said before counts, until it is forgotten
    assert alone != tuned[1:]
    assert turns("first\n/reset\nsecond\n") == alone


def test_a_question_that_does_not_fit_costs_no_turn(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal the chat goes on after it."""
    from tunesmith.tools.evaluate.chat import Chat

    chats: list[Chat] = []

    def typed_lines(opened: Chat) -> Iterator[str]:
        chats.append(opened)
        yield from ("hello", "d" * 2100)

    monkeypatch.setattr(
        Chat, "on_terminal", property(lambda _: True, lambda *_: None), raising=False
    )
    monkeypatch.setattr(Chat, "_typed_lines", typed_lines)
    assert chat(monkeypatch, "", str(run)) == EXIT_OK
    assert [question for question, _ in chats[0].turns] == ["hello"]


def test_a_chat_shows_the_model_its_tools(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts: list[Conversation] = []
    make_prompt = Template.prompt
    monkeypatch.setattr(
        Template, "prompt", lambda self, row: (prompts.append(row), make_prompt(self, row))[1]
    )
    file = tmp_path / "tools.json"
    file.write_text('[{"name": "add", "parameters": {"type": "object"}}]')
    assert chat(monkeypatch, "1 + 1?\n", str(run), "--tools", str(file)) == EXIT_OK
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    assert prompts[0].tools == [tool]
    capsys.readouterr()
    for text, name in (
        ('[{"parameters": {}}]', file),
        ("[", file),
        ("", tmp_path / "missing.json"),
    ):
        file.write_text(text)
        assert chat(monkeypatch, "1 + 1?\n", str(run), "--tools", str(name)) == EXIT_USAGE
        check_shown(capsys.readouterr().err, where=str(name))


def test_a_conversation_that_is_full_is_refused(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A context of 2048 byte tokens holds two of these questions, not three."""
    questions = [letter * 900 for letter in "abc"]
    assert chat(monkeypatch, "\n".join(questions), str(run)) == EXIT_USAGE
    assert holds(capsys.readouterr().err, 2042, "/reset")
    assert chat(monkeypatch, "\n".join([*questions[:2], "/reset", questions[2]]), str(run)) == 0


def test_chat_with_the_base_of_a_full_run(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = peft_model(tiny).merge_and_unload()
    make_run(tmp_path / "full", tiny, whole)
    assert chat(monkeypatch, "hello there\n", str(tmp_path / "full"), "--base") == EXIT_OK
    base = capsys.readouterr().out
    assert chat(monkeypatch, "hello there\n", str(tiny)) == EXIT_OK
    assert base == capsys.readouterr().out


ECHO = "hello\r\n"  # a question is on its way


def on_a_terminal(
    command: list[str], steps: list[tuple[str, bytes]], *, columns: int
) -> tuple[str, int]:
    """Run a command on a pseudo-terminal; for each step wait for a text, then type.

    All that was shown, and the exit code.
    """
    terminal, own = pty.openpty()
    fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")} | {
        "TERM": "xterm"
    }
    process = Warm(command, env=kept, streams=[own] * 3, prepare=take_terminal)
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
                assert not wanted, (
                    f"{wanted!r} was not shown before the end, exit code {code}: {shown}"
                )
                return shown, code
        seen = len(shown)
        # A signal between the prompt and Python's wait for a key is only seen at the next key; no
        # one types so fast.
        time.sleep(0 if typed != b"\x03" else 0.15 if wanted == ECHO else 0.5)
        os.write(terminal, typed)
    raise AssertionError("unreachable")


def test_chat_on_a_terminal(run: Path) -> None:
    """An answer; then ctrl-C twice leaves without a fault."""
    steps = [
        ("you> ", b"hello\n"),
        ("you> ", b"/reset\n"),
        ("you> ", b"\x03"),
        ("again exits", b"\x03"),
    ]
    shown, code = on_a_terminal(["chat", str(run), *SHORT], steps, columns=100)
    assert code == EXIT_OK, shown
    assert "tuned> " in shown
    assert "a new conversation has started" in shown
    assert "Traceback" not in shown


def test_ctrl_c_ends_an_answer_and_the_chat_goes_on(run: Path) -> None:
    words = ["chat", str(run), "--max-new-tokens", "900", "--device", "cpu"]
    steps = [("you> ", b"hello\n"), (ECHO, b"\x03"), ("you> ", b"/quit\n")]
    shown, code = on_a_terminal(words, steps, columns=100)
    assert code == EXIT_OK, shown
    assert "(stopped)" in shown


# --- eval


def test_eval_compares_base_and_tuned(
    run: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "eval",
        str(run),
        "--data",
        str(rows),
        "--max-examples",
        "5",
        "--score",
        "exact",
        "--output",
        str(rows.with_name("answers.jsonl")),
        *SHORT,
    ]
    assert main([*command, "--json"]) == EXIT_OK
    found = json.loads(capsys.readouterr().out)
    assert found["base"]["rows"] == found["tuned"]["rows"] == 5
    assert found["base"]["loss"] != found["tuned"]["loss"]
    assert found["scores"]["exact"]["rows"] == 5
    assert main(command) == EXIT_OK
    table = capsys.readouterr().out
    assert f"{found['base']['loss']:.4f}" in table
    assert f"{found['tuned']['loss']:.4f}" in table


def test_eval_compares_two_runs(
    tiny: Path, run: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    make_run(other, tiny, peft_model(tiny, std=0.01))
    command = ["eval", str(run), str(other), str(run), "--data", str(rows), "--score", "f1", *SHORT]
    assert main([*command, "--json"]) == EXIT_OK
    found = json.loads(capsys.readouterr().out)
    assert list(found["runs"]) == ["run", "other"]
    assert found["runs"]["other"].keys() >= {"tuned", "scores", "seen", "answers"}
    by_loss, by_f1 = found["comparisons"]
    losses = {name: values["tuned"]["loss"] for name, values in found["runs"].items()}
    assert (by_loss["best"], by_loss["is_better"]) == ("other", True)
    assert by_loss["mean"] == pytest.approx(losses["other"] - losses["run"])
    assert by_loss["low"] < by_loss["mean"] < by_loss["high"] < 0
    assert by_f1["name"] == "f1"
    assert found["not_compared"] == []
    assert main(command) == EXIT_OK
    shown = capsys.readouterr()
    assert shown.out.split("\n")[0].split() == ["run", "other"]
    assert holds(" ".join(shown.out.split()), by_loss["verdict"], by_f1["verdict"])


def test_benchmarks_are_run_by_their_own_command(capsys):
    assert main(["eval", "run", "--tasks", "gsm8k"]) == EXIT_USAGE
    error = error_in(capsys.readouterr().err)
    fix = ["lm-eval run", "peft=RUN/final", "docs/evaluate.md"]
    check_error(error, where="command line: tunesmith eval", fix=fix)


@pytest.mark.parametrize(
    "columns",
    [
        ["--columns", "prompt=q", "--columns", "completion=a"],
        ["--columns", "{prompt: q, completion: a}"],
    ],
)
def test_columns_on_the_command_line(
    run: Path, tmp_path: Path, columns: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "held.jsonl", [{"q": "one", "a": "two"}])
    plain = write_rows(tmp_path / "plain.jsonl", [{"prompt": "one", "completion": "two"}])
    assert (
        main(["eval", str(run), "--data", str(plain), "--score", "exact", "--json", *SHORT])
        == EXIT_OK
    )
    expected = json.loads(capsys.readouterr().out)
    assert (
        main(
            ["eval", str(run), "--data", str(file), *columns, "--score", "exact", "--json", *SHORT]
        )
        == EXIT_OK
    )
    found = json.loads(capsys.readouterr().out)
    found["answers"] = expected["answers"]
    assert found == {**expected, "data": file.name}
    out = ["--input", str(file), "--output", "-", *columns, *SHORT]
    assert main(["generate", str(run), *out]) == EXIT_OK
    assert json.loads(capsys.readouterr().out)["reference"] == "two"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--columns", "prompt"], "prompt does not have the form name=column"),
        (["--columns", "{prompt: [a]}"], "does not have the form name=column"),
        (
            ["--columns", "promt=q", "--format", "prompt-completion"],
            "format prompt-completion has no column promt",
        ),
        (
            ["--columns", "promt=q,complete=a", "--format", "prompt-completion"],
            "format prompt-completion has no column promt, complete",
        ),
    ],
)
def test_wrong_columns_are_told_in_options(
    run: Path, tmp_path: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "held.jsonl", [{"q": "one", "a": "two"}])
    for command in (
        ["eval", str(run), "--data"],
        ["generate", str(run), "--output", "-", "--input"],
    ):
        assert main([*command, str(file), *words, *SHORT]) == EXIT_USAGE
        assert said in capsys.readouterr().err


def test_options_of_a_file_need_the_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--split", "train"], ["--columns", "prompt=q"], ["--format", "text"]):
        assert main(["eval", str(run), *words]) == EXIT_USAGE
        assert holds(capsys.readouterr().err, words[0], "--data")


def test_eval_scores_an_answer_that_is_right(
    run: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tuned model's own answers as references: it matches all of them, and its base does not."""
    answers = tmp_path / "answers.jsonl"
    assert (
        main(["generate", str(run), "--input", str(rows), "--output", str(answers), *SHORT])
        == EXIT_OK
    )
    own = [
        {"instruction": row["instruction"], "input": row["input"], "output": row["output"]}
        for row in lines(answers)
    ]
    own = [row for row in own if str(row["output"]).strip() and "\ufffd" not in str(row["output"])]
    assert len(own) >= 3
    mine = write_rows(tmp_path / "own.jsonl", own)
    capsys.readouterr()
    assert (
        main(["eval", str(run), "--data", str(mine), "--score", "exact", "--json", *SHORT])
        == EXIT_OK
    )
    found = json.loads(capsys.readouterr().out)
    assert found["scores"]["exact"]["tuned"]["mean"] == 1.0
    assert found["scores"]["exact"]["base"]["mean"] < 1.0


def test_eval_of_a_full_run_loads_its_base_after_it(
    tiny: Path, tmp_path: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "full", tiny, peft_model(tiny).merge_and_unload())
    make_run(tmp_path / "lora", tiny, peft_model(tiny))
    scores = []
    for name in ("full", "lora"):
        assert (
            main(["eval", str(tmp_path / name), "--data", str(rows), "--json", "--device", "cpu"])
            == EXIT_OK
        )
        scores.append(json.loads(capsys.readouterr().out))
    for who in ("base", "tuned"):  # fp32: folding moves the last digits
        assert scores[0][who]["loss"] == pytest.approx(scores[1][who]["loss"], rel=1e-5)
    assert (
        main(
            [
                "eval",
                str(tmp_path / "full"),
                "--data",
                str(rows),
                "--json",
                "--no-base",
                "--device",
                "cpu",
            ]
        )
        == EXIT_OK
    )
    assert "base" not in json.loads(capsys.readouterr().out)


# --- merge


def test_merge_prints_its_check_and_the_next_command(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(run), "--output", str(tmp_path / "m"), "--device", "cpu"]) == EXIT_OK
    text = capsys.readouterr().out
    assert re.search(r"\de-\d\d", text), "the difference that was measured"
    assert f"tunesmith chat {tmp_path / 'm'}" in text
    assert (
        main(["merge", str(run), "--output", str(tmp_path / "j"), "--json", "--device", "cpu"])
        == EXIT_OK
    )
    found = json.loads(capsys.readouterr().out)
    assert found["merge_check"]["merged"]["max_logit"] <= 1e-4
