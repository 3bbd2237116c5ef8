"""`eval --score`: answers that are kept, gone on with after a kill, and scored; and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import byte_tokenizer
from errors import holds, refuses
from ranks import run_ranks
from runs import ROWS, make_run, peft_model, write_checkpoint, write_rows
from tunesmith.data.rows.samples import Conversation
from tunesmith.data.text.template import Template
from tunesmith.distributed.ranks import join_ranks
from tunesmith.errors import (
    DataError,
    MachineError,
    RunError,
    StoppedError,
    TunesmithError,
    UsageError,
)
from tunesmith.inference.decoding import Answer, Decoding
from tunesmith.inference.load_run import load_run
from tunesmith.metrics.intervals import paired_intervals
from tunesmith.tools.evaluate import score_rows
from tunesmith.tools.evaluate.evaluate import Evaluation, evaluate
from tunesmith.tools.evaluate.generate import generate
from tunesmith.tools.evaluate.text import token_f1
from warm import Warm

pytestmark = pytest.mark.slow

HELD = [{"prompt": f"Say {n}", "completion": f"word {n}"} for n in range(13)]
OPTIONS: dict[str, Any] = {"max_new_tokens": 3, "batch_size": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored") / "run"
    make_run(folder, tiny, peft_model(tiny))
    return folder


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "held.jsonl", HELD)


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    return tmp_path / "answers.jsonl"


def scored(run: Path, held: Path, answers: Path | None, *scorers: str, **more: Any) -> Evaluation:
    return evaluate(run, held, scorers=scorers or ("f1",), output=answers, **{**OPTIONS, **more})


@pytest.fixture(scope="module")
def answered(run: Path, held: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers to HELD, for tests that only begin with them."""
    answers = tmp_path_factory.mktemp("answered") / "answers.jsonl"
    scored(run, held, answers)
    return answers


def test_answers_are_those_of_generate_and_scores_those_of_the_answers(
    run: Path, held: Path, answers: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "def share(answer, row):\n    return len(answer) / 1000 + (row['prompt'] == 'Say 3') / 2\n"
    )
    found = scored(run, held, answers, "f1", "contains", f"{own}:share")
    header, *lines = map(json.loads, answers.read_text().splitlines())
    assert (header["rows"], header["decoding"]["seed"], header["batch_size"]) == (13, 0, 2)
    by_model = {
        name: [line for line in lines if line["model"] == name] for name in ("tuned", "base")
    }
    for name, base_only in (("tuned", False), ("base", True)):
        loaded = load_run(run, device="cpu", base_only=base_only)
        expected = [row["output"] for row in generate(loaded, HELD, Decoding(3), batch_size=2)]
        assert [line["answer"] for line in by_model[name]] == expected
        assert [line["reference"] for line in by_model[name]] == [row["completion"] for row in HELD]
    f1, _, mine = found.by_scorer
    for name, of_model in by_model.items():
        assert f1.scores[name] == [token_f1(line["answer"], line["reference"]) for line in of_model]
        assert mine.scores[name][3] == 0.5 + len(of_model[3]["answer"]) / 1000
    assert f1.paired == paired_intervals(f1.scores["base"], f1.scores["tuned"])
    assert "on 13 rows" in f1.verdict
    saved = json.loads(answers.with_name("answers.scores.json").read_text())
    assert saved["scores"]["f1"]["difference"] == list(f1.paired.difference)
    assert saved["scores"]["f1"]["by_row"] == f1.scores
    assert (saved["step"], saved["checkpoint"], saved["seen"]) == (3, "final", 0)
    assert found.scores["tuned"].loss == saved["losses"]["tuned"]
    cut = {
        name: sum(not line["finished"] for line in of_model) for name, of_model in by_model.items()
    }
    assert dict(found.unfinished) == cut
    for model, count in cut.items():
        noted = re.findall(rf"^{model}: max_new_tokens\D+(\d+) of", "\n".join(found.notes()), re.M)
        assert noted == [str(count)] * (count > 0)
    assert cut["tuned"] == sum(
        line["tokens"] == 3 for line in by_model["tuned"] if not line["finished"]
    )


def test_a_file_that_was_cut_anywhere_is_completed_to_the_same_bytes(
    run: Path, held: Path, answers: Path, answered: Path
) -> None:
    whole = answered.read_bytes()
    header = len(whole.splitlines(keepends=True)[0])
    for size in (header, header + 5, len(whole) // 3, len(whole) - 1):
        answers.write_bytes(whole[:size])
        scored(run, held, answers)
        assert answers.read_bytes() == whole, size


COMMAND = """
import sys, time
from tunesmith.tools.evaluate import answers_file
append = answers_file.AnswersFile.append
def slowly(self, answer):
    append(self, answer)
    time.sleep(0.05)
answers_file.AnswersFile.append = slowly
from tunesmith.tools.evaluate.evaluate import evaluate
evaluate(sys.argv[1], sys.argv[2], scorers=("f1",), output=sys.argv[3], max_new_tokens=3, batch_size=2, device="cpu")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_was_killed_is_gone_on_with(
    run: Path, held: Path, answered: Path, tmp_path: Path, number: signal.Signals
) -> None:
    killed = tmp_path / "killed.jsonl"
    process = Warm([run, held, killed], program=COMMAND)
    while process.poll() is None and (not killed.exists() or killed.read_bytes().count(b"\n") < 8):
        time.sleep(0.005)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode != 0
    if number == signal.SIGTERM:
        assert "StoppedError" in error
        assert "run the same command again" in error
    lines = killed.read_bytes().count(b"\n")
    assert 8 <= lines < 27, error
    scored(run, held, killed)
    assert killed.read_bytes() == answered.read_bytes()


def test_a_stop_says_how_far_it_came(
    run: Path, held: Path, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = score_rows.AnswersFile.append

    def stop_after_five(self: Any, answer: Any) -> None:
        append(self, answer)
        if answer.row == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(score_rows.AnswersFile, "append", stop_after_five)
    with refuses(StoppedError, names=[13, "tuned", answers]):
        scored(run, held, answers)


def test_progress_counts_each_batch_and_not_only_whole_windows(
    run: Path, held: Path, answers: Path
) -> None:
    """A window's answers are written at once: counted by them alone, the time left would be that of
    a model that takes a whole window for its first row.
    """
    calls: list[tuple[Any, ...]] = []
    scored(run, held, answers, base=False, progress=lambda *call: calls.append(call))
    counts = [(done, tokens) for what, done, _, *tokens in calls if what == "answers of tuned"]
    rows = [done for done, _ in counts]
    assert rows[:5] == [0, 2, 4, 6, 8]
    assert rows == sorted(rows)
    assert counts == sorted(counts)
    whole = answers.read_text().splitlines()[1:]
    assert counts[-1] == (13, [sum(json.loads(line)["tokens"] for line in whole)])


def eval_of_a_rank(run: Path, held: Path, output: Path, more: dict[str, Any]) -> Evaluation:
    with join_ranks() as ranks:
        return scored(run, held, output, "f1", "exact", ranks=ranks, **more)


def test_two_ranks_share_the_rows_and_write_what_one_process_writes(
    run: Path, held: Path, answers: Path, tmp_path: Path
) -> None:
    """Two rows at once make windows of eight: rank 1 has the last five of thirteen."""
    alone = scored(run, held, answers, "f1", "exact")
    output = tmp_path / "ranks.jsonl"
    by_rank = run_ranks(2, eval_of_a_rank, run, held, output, {})
    assert output.read_bytes() == answers.read_bytes()
    scores = [path.with_name(f"{path.stem}.scores.json") for path in (output, answers)]
    assert scores[0].read_bytes() == scores[1].read_bytes()
    for evaluation in by_rank:
        assert evaluation.scores == alone.scores
        assert evaluation.by_scorer == alone.by_scorer
        assert evaluation.unfinished == alone.unfinished
    # What one process has begun ranks go on with.
    whole = answers.read_bytes()
    output.write_bytes(whole[: len(whole) // 3])
    run_ranks(2, eval_of_a_rank, run, held, output, {})
    assert output.read_bytes() == whole


def refusal_of_a_rank(run: Path, held: Path, output: Path, seed: int) -> str:
    try:
        eval_of_a_rank(run, held, output, {"decoding": Decoding(3, seed=seed)})
    except TunesmithError as error:
        return f"{type(error).__name__} {error.exit_code} {error.why}"
    return ""


def test_a_refusal_of_rank_0_ends_all_ranks(run: Path, held: Path, answered: Path) -> None:
    """Only rank 0 reads the answers that are there."""
    first, second = run_ranks(2, refusal_of_a_rank, run, held, answered, 3)
    assert first.startswith("UsageError 2 ")
    assert holds(first, "--seed", 0, 3)
    assert second.startswith("OtherRankError 2 ")


def test_empty_answers_are_never_exact(
    run: Path, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows whose own answer is empty are not scored; of the others no empty answer is right."""
    rows: list[dict[str, Any]] = []
    for content in ("good", "", " ", "e\u0301"):
        answer = {"role": "assistant", "content": content}
        rows.append({"messages": [{"role": "user", "content": "Say it"}, answer]})
    held = write_rows(tmp_path / "empty.jsonl", rows)

    def nothing(model: Any, tokenizer: Any, prompts: Any, *_: Any, **__: Any) -> Any:
        return enumerate(Answer("", [], True) for _ in prompts)

    monkeypatch.setattr(score_rows, "answer_all", nothing)
    found = scored(run, held, answers, "exact", "f1", "contains")
    assert (found.unanswered, found.by_scorer[0].rows) == (2, 2)
    for of_scorer in found.by_scorer:
        assert of_scorer.scores == {"tuned": [0, 0], "base": [0, 0]}
    with refuses(UsageError, names=["empty"]):
        scored(run, write_rows(tmp_path / "none.jsonl", rows[1:3]), None, "exact")


def test_answers_of_special_tokens_are_compared_with_these(
    run: Path, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without them every answer would be empty, and equal."""
    labels = ("<|pad|>", "<|im_start|>")
    held = write_rows(
        tmp_path / "labels.jsonl",
        [{"prompt": "Which?", "completion": label} for label in labels],
    )

    def first_label(model: Any, tokenizer: Any, prompts: Any, *_: Any, **__: Any) -> Any:
        label = tokenizer.convert_tokens_to_ids(labels[0])
        return enumerate(Answer("", [label], True) for _ in prompts)

    monkeypatch.setattr(score_rows, "answer_all", first_label)
    (exact,) = scored(run, held, answers, "exact", base=False).by_scorer
    assert exact.scores == {"tuned": [1, 0]}


def test_answers_that_are_there_are_not_made_again(
    run: Path, held: Path, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = scored(run, held, answers)
    monkeypatch.setattr(score_rows, "answer_all", lambda *_, **__: pytest.fail("answered again"))
    again = scored(run, held, answers)
    assert again.by_scorer == first.by_scorer
    assert scored(run, held, answers, "rouge-l", "exact").by_scorer[1].name == "exact"


def test_a_base_that_is_asked_for_later_is_answered_then(
    run: Path, held: Path, answers: Path
) -> None:
    alone = scored(run, held, answers, base=False).by_scorer[0]
    assert (list(alone.models), alone.paired, alone.verdict) == (["tuned"], None, "")
    both = scored(run, held, answers).by_scorer[0]
    assert both.models["tuned"] == alone.models["tuned"]
    assert both.paired is not None


def test_what_differs_from_the_answers_that_are_there_is_refused_with_a_fix(
    tiny: Path, run: Path, held: Path, answers: Path, answered: Path, tmp_path: Path
) -> None:
    whole = answered.read_bytes()
    answers.write_bytes(whole)
    make_run(tmp_path / "other", tiny, peft_model(tiny, seed=1))
    rows = write_rows(
        tmp_path / "others.jsonl", [*HELD[:-1], {"prompt": "Say 99", "completion": "x"}]
    )
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (run, rows, {}, "the prompts differ"),
        (run, held, {"max_examples": 5}, "the prompts differ"),
        (run, held, {"max_new_tokens": 7}, "--max-new-tokens was 3 and is now 7"),
        (run, held, {"decoding": Decoding(3, 0.5)}, "--temperature was 0.0 and is now 0.5"),
        (run, held, {"decoding": Decoding(3, seed=3)}, "--seed was 0 and is now 3"),
        (run, held, {"batch_size": 4}, "--batch-size was 2 and is now 4"),
        (tmp_path / "other", held, {}, "the model differs"),
    ]
    for path, data, more, why in cases:
        with refuses(UsageError, where=str(answers), fix=["--fresh"]) as refused:
            scored(path, data, answers, **more)
        assert why in refused.value.why
        assert str(answers) in refused.value.where
        assert "--fresh" in refused.value.fix
        assert "--output" in refused.value.fix
        assert answers.read_bytes() == whole
    # A reference is no part of the question: its answers are scored anew.
    changed = write_rows(tmp_path / "changed.jsonl", [{**row, "completion": "w"} for row in HELD])
    assert scored(run, changed, answers).by_scorer[0].rows == 13
    scored(run, held, answers, batch_size=4, fresh=True)
    assert (tmp_path / "answers.jsonl.previous-1").read_bytes() == whole
    assert json.loads(answers.read_text().splitlines()[0])["batch_size"] == 4


def spoiled(content: bytes, kind: str) -> bytes:
    lines = content.splitlines(keepends=True)
    if kind == "torn in the middle":
        lines[3] = lines[3][:20] + b"\n"
    elif kind == "out of order":
        lines[3], lines[4] = lines[4], lines[3]
    elif kind == "a field too many":
        lines[3] = lines[3].replace(b'"tokens"', b'"more": 1, "tokens"')
    elif kind == "too many rows":
        lines.append(lines[13].replace(b'"row": 12', b'"row": 13').replace(b"base", b"tuned"))
    elif kind == "not ours":
        lines = [b'{"prompt": "mine"}\n']
    elif kind == "bytes":
        lines = [b"\xff\xfe\0" * 100]
    return b"".join(lines)


@pytest.mark.parametrize(
    ("kind", "error", "where"),
    [
        ("torn in the middle", DataError, "answers.jsonl:4"),
        ("out of order", DataError, "answers.jsonl:4"),
        ("a field too many", DataError, "answers.jsonl:4"),
        ("too many rows", DataError, "answers.jsonl:28"),
        ("not ours", UsageError, "answers.jsonl"),
        ("bytes", UsageError, "answers.jsonl"),
        ("a folder", MachineError, "answers.jsonl"),
        ("a pipe", MachineError, "answers.jsonl"),
    ],
)
def test_a_file_that_is_broken_or_somebody_elses_stays_as_it_is(
    run: Path,
    held: Path,
    answers: Path,
    answered: Path,
    kind: str,
    error: type[Exception],
    where: str,
) -> None:
    content = b""
    if kind == "a folder":
        answers.mkdir()
    elif kind == "a pipe":
        os.mkfifo(answers)
    else:
        content = spoiled(answered.read_bytes(), kind)
        answers.write_bytes(content)
    with pytest.raises(error) as refused:
        scored(run, held, answers)
    assert where in refused.value.where  # type: ignore[attr-defined]
    assert refused.value.fix  # type: ignore[attr-defined]
    if answers.is_file():
        assert answers.read_bytes() == content


def test_two_evals_do_not_write_one_file(run: Path, held: Path, answers: Path) -> None:
    import fcntl

    scored(run, held, answers)
    with answers.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with refuses(UsageError, where=str(answers), fix=["--output"]):
            scored(run, held, answers)


def test_a_scorer_that_fails_names_the_row_and_loses_nothing(
    run: Path, held: Path, answers: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text("def share(answer, row):\n    return 1 / (row['prompt'] != 'Say 7')\n")
    with pytest.raises(RunError, match="failed") as failed:
        scored(run, held, answers, f"{own}:share")
    assert failed.value.where == f"{held}:8"
    assert "ZeroDivisionError" in failed.value.why
    assert len(answers.read_text().splitlines()) == 1 + 2 * 13
    own.write_text("def share(answer, row):\n    return 1\n")
    assert scored(run, held, answers, f"{own}:share").by_scorer[0].models["tuned"].mean == 1


def test_each_checkpoint_and_model_has_a_file_of_its_own(
    tiny: Path, held: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tuned = peft_model(tiny)
    make_run(tmp_path / "run", tiny, tuned)
    write_checkpoint(tmp_path / "run" / "checkpoint-2", tiny, tuned, 2)
    options = {"base": False, "max_examples": 2}
    assert (
        scored(tmp_path / "run", held, None, **options).answers == tmp_path / "run/evals/held.jsonl"
    )
    found = scored(tmp_path / "run" / "checkpoint-2", held, None, **options)
    assert found.answers == tmp_path / "run/evals/held-checkpoint-2.jsonl"
    plain = scored(tiny, held, None, max_examples=2)
    assert plain.answers is not None
    assert plain.answers.parent == Path("evals")
    assert list(plain.by_scorer[0].models) == ["model"]


def test_rows_that_were_trained_on_are_counted(tiny: Path, run: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "some.jsonl", [ROWS[4], {**ROWS[1], "output": "else"}, ROWS[0]])
    found = evaluate(run, data, device="cpu", base=False)
    assert found.seen is not None
    assert (found.seen.count, found.seen.where) == (2, f"{data}:1")
    assert found.seen.earlier.endswith("run-rows.jsonl:5")
    assert evaluate(tiny, data, device="cpu").seen is None


def test_rows_of_training_that_are_gone_are_said_to_be_unknown(tiny: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", tiny, peft_model(tiny))
    data = write_rows(tmp_path / "some.jsonl", ROWS[:2])
    (tmp_path / "run-rows.jsonl").unlink()
    found = evaluate(tmp_path / "run", data, device="cpu", base=False)
    assert found.seen is None
    assert "run-rows.jsonl" in found.seen_fault


def test_rows_of_the_runs_that_a_run_continues_were_trained_on_too(
    tiny: Path, tmp_path: Path
) -> None:
    """Also where the earlier run was started over since, from the later one."""
    first, second = tmp_path / "first", tmp_path / "second"
    others = write_rows(tmp_path / "others.jsonl", HELD)
    other_rows = {"train": {"source": str(others), "format": "prompt-completion"}}
    start = {"kind": "lora", "rank": 4, "alpha": 8}
    adapter = {**start, "from": str(second / "final")}
    make_run(first, tiny, peft_model(tiny), adapter=adapter)
    adapter = {**start, "from": str(first / "final")}
    make_run(second, tiny, peft_model(tiny), adapter=adapter, data=other_rows)
    data = write_rows(tmp_path / "some.jsonl", ROWS[:2])
    found = evaluate(second, data, device="cpu", base=False)
    assert found.seen is not None
    assert (found.seen.count, found.seen_fault) == (2, "")
    assert found.seen.earlier.endswith("first-rows.jsonl:1")
    first.rename(tmp_path / "moved")
    found = evaluate(second, data, device="cpu", base=False)
    assert found.seen is None
    assert holds(found.seen_fault, first / "final")
    # What is known is said all the same.
    found = evaluate(second, others, device="cpu", base=False)
    assert found.seen is not None
    assert found.seen.count == len(HELD)
    assert holds("\n".join(found.notes()), first / "final")


def test_the_chosen_answers_of_pairs_were_trained_on(tiny: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"Say {n}", "chosen": f"word {n}", "rejected": "no"} for n in range(3)]
    file = write_rows(tmp_path / "pairs.jsonl", pairs)
    preferences = {"train": {"source": str(file), "format": "preference"}, "template": "alpaca"}
    make_run(tmp_path / "run", tiny, peft_model(tiny), method={"name": "dpo"}, data=preferences)
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    rows += [{"prompt": "Say 0", "completion": "no"}, {"prompt": "Say 9", "completion": "word 9"}]
    data = write_rows(tmp_path / "some.jsonl", rows)
    found = evaluate(tmp_path / "run", data, device="cpu", base=False)
    assert found.seen is not None
    assert found.seen.count == 3
    of_pairs = evaluate(tmp_path / "run", file, device="cpu", base=False)
    assert of_pairs.seen is not None
    assert of_pairs.seen.count == 3


TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}  # fmt: skip


TOOL_SCHEMA = {"type": "function", "function": TOOL}


def call_row(n: int, *, tools: bool = True) -> dict[str, Any]:
    calls = [{"name": "f", "arguments": {"a": n}}]
    turns = [
        {"role": "user", "content": f"Call {n}"},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    return {"messages": turns} | ({"tools": [TOOL]} if tools else {})


def test_tool_calls_are_read_in_the_form_of_the_template(
    tiny: Path, tmp_path: Path, answers: Path
) -> None:
    """Answers are written into the file as a model would give them: tiny's are noise."""
    rows = [call_row(n) for n in range(4)]
    train = {"source": str(write_rows(tmp_path / "run-calls.jsonl", rows)), "format": "messages"}
    make_run(tmp_path / "run", tiny, peft_model(tiny), data={"train": train, "seq_len": 2000})
    data = write_rows(tmp_path / "calls.jsonl", rows)
    first = scored(tmp_path / "run", data, answers, "tool-call", base=False).by_scorer[0]
    assert first.models["tuned"].mean == 0
    header, *lines = answers.read_text().splitlines()
    reference = json.loads(lines[0])["reference"]
    assert reference == '<tool_call>\n{"name": "f", "arguments": {"a": 0}}\n</tool_call>'
    told = [reference, reference.replace("0", "7"), reference, "no call"]
    changed = [json.dumps({**json.loads(line), "answer": text, "raw": None}) for line, text in zip(lines, told, strict=True)]  # fmt: skip
    answers.write_text("\n".join([header, *changed, ""]))
    again = scored(tmp_path / "run", data, answers, "tool-call", base=False).by_scorer[0]
    assert again.scores["tuned"] == [1, 0, 0, 0]
    without = write_rows(tmp_path / "without.jsonl", [*rows, call_row(9, tools=False)])
    with refuses(DataError, names=["--score tool-call"]) as refused:
        scored(tmp_path / "run", without, tmp_path / "no.jsonl", "tool-call")
    assert refused.value.where == f"{without}:5, tools"
    assert not (tmp_path / "no.jsonl").exists()


@pytest.mark.parametrize("family", ["qwen3", "llama3", "mistral", "nemotron_3_nano", "gptoss"])
def test_the_form_of_calls_is_learned_through_the_template_in_use(family: str) -> None:
    """What is rendered is what is trained on: without headers, with the reasoning that a template
    wants.
    """
    path = Path(__file__).parents[2] / "data" / "templates" / f"{family}.jinja"
    if not path.exists():
        path = Path(pytest.importorskip("trl").__file__).parent / "chat_templates" / path.name
    jinja = path.read_text()
    tokenizer = byte_tokenizer()
    words = sorted({"<|im_end|>", "</s>", *re.findall(r"<\|?[a-z_/]+\|?>", jinja)})
    tokenizer.add_special_tokens({"additional_special_tokens": words})
    ends = [
        word
        for word in ("<|im_end|>", "<|eot_id|>", "<|call|>", "<|return|>", "</s>")
        if word in jinja
    ]
    eos_ids = set(tokenizer.convert_tokens_to_ids(ends)) or {tokenizer.eos_token_id}
    template = Template(tokenizer, eos_ids, jinja=jinja, name="chat")
    loaded: Any = SimpleNamespace(template=template, tokenizer=tokenizer)
    read = score_rows.read_call_form(loaded)
    assert read is not None
    function = {"type": "function", "function": {"name": "rain", "arguments": {"town": "Oslo"}}}
    answer: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [function]}
    if "reasoning" in jinja:
        answer["reasoning_content"] = "Hm."
    turns = [{"role": "user", "content": "Rain?"}, answer]
    example = template.encode(Conversation(turns, [TOOL_SCHEMA]), "last", where="test")
    assert read(tokenizer.decode(example.ids[example.trained].tolist())) == [
        ("rain", {"town": "Oslo"})
    ]


def test_rows_with_an_empty_answer_are_counted_and_not_scored(
    run: Path, tmp_path: Path, answers: Path
) -> None:
    rows = [*HELD[:3], {"prompt": "Hush", "completion": ""}]
    found = scored(run, write_rows(tmp_path / "some.jsonl", rows), answers, base=False)
    assert (found.unanswered, found.by_scorer[0].rows) == (1, 3)
    with refuses(UsageError, where="none.jsonl", fix=["--score"]):
        scored(run, write_rows(tmp_path / "none.jsonl", rows[3:]), tmp_path / "none-answers.jsonl")


def test_sampled_answers_are_the_same_after_a_cut(run: Path, held: Path, answers: Path) -> None:
    decoding = Decoding(3, temperature=1.0, seed=5)
    scored(run, held, answers, decoding=decoding)
    whole = answers.read_bytes()
    answers.write_bytes(whole[: len(whole) // 4])
    scored(run, held, answers, decoding=decoding)
    assert answers.read_bytes() == whole
