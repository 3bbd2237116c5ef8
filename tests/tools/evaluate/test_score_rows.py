"""`eval --score`: answers that are kept, gone on with after a kill, and scored; and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import byte_tokenizer
from errors import holds, refuses
from ranks import run_ranks
from runs import ROWS, make_run, peft_model, write_rows
from tunesmith.answers.answers import Answer
from tunesmith.answers.decoding import Decoding
from tunesmith.answers.load_run import load_run
from tunesmith.answers.scoring.rows import read_call_form
from tunesmith.answers.scoring.text import token_f1
from tunesmith.distributed.ranks import join_ranks
from tunesmith.errors import DataError, MachineError, RunError, StoppedError, UsageError
from tunesmith.metrics.intervals import paired_intervals
from tunesmith.rows.samples import Conversation
from tunesmith.tokens.text.template import Template
from tunesmith.tools.evaluate import score_rows
from tunesmith.tools.evaluate.evaluate import Evaluation, evaluate
from tunesmith.tools.evaluate.generate import generate

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
    share = "len(answer) / 1000 + (row['prompt'] == 'Say 3') / 2"
    own.write_text(f"def share(answer, row):\n    return {share}\n")
    found = scored(run, held, answers, "f1", "contains", f"{own}:share")
    header, *lines = map(json.loads, answers.read_text().splitlines())
    assert (header["rows"], header["decoding"]["seed"], header["batch_size"]) == (13, 0, 2)
    f1, _, mine = found.by_scorer
    for name in ("tuned", "base"):
        of_model = [line for line in lines if line["model"] == name]
        loaded = load_run(run, device="cpu", base_only=name == "base")
        expected = [row["output"] for row in generate(loaded, HELD, Decoding(3), batch_size=2)]
        assert [line["answer"] for line in of_model] == expected
        assert [line["reference"] for line in of_model] == [row["completion"] for row in HELD]
        assert f1.scores[name] == [token_f1(line["answer"], line["reference"]) for line in of_model]
        assert mine.scores[name][3] == 0.5 + len(of_model[3]["answer"]) / 1000
        assert dict(found.unfinished)[name] == sum(not line["finished"] for line in of_model)
    (of_f1,) = f1.comparisons
    assert of_f1.paired == paired_intervals(f1.scores["base"], f1.scores["tuned"])
    saved = json.loads(answers.with_name("answers.scores.json").read_text())
    assert saved["scores"]["f1"]["difference"] == list(of_f1.paired.difference)
    assert saved["scores"]["f1"]["by_row"] == f1.scores
    assert (saved["step"], saved["checkpoint"], saved["seen"]) == (3, "final", 0)
    assert found.scores["tuned"].loss == saved["losses"]["tuned"]


def test_sampled_answers_that_were_cut_anywhere_are_completed_to_the_same_bytes(
    run: Path, held: Path, answers: Path
) -> None:
    decoding = Decoding(3, temperature=1.0, seed=5)
    scored(run, held, answers, decoding=decoding)
    whole = answers.read_bytes()
    header = len(whole.splitlines(keepends=True)[0])
    for size in (header + 5, len(whole) // 2, len(whole) - 1):
        answers.write_bytes(whole[:size])
        scored(run, held, answers, decoding=decoding)
        assert answers.read_bytes() == whole, size


def test_a_stop_says_how_far_it_came(
    run: Path, held: Path, answers: Path, answered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = score_rows.AnswersFile.append

    def stop_after_five(self: Any, answer: Any) -> None:
        append(self, answer)
        if answer.row == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(score_rows.AnswersFile, "append", stop_after_five)
        with refuses(StoppedError, names=[13, "tuned", answers]):
            scored(run, held, answers)
    scored(run, held, answers)
    assert answers.read_bytes() == answered.read_bytes()


def eval_of_a_rank(run: Path, held: Path, output: Path) -> Evaluation:
    with join_ranks() as ranks:
        return scored(run, held, output, "f1", "exact", ranks=ranks)


def test_two_ranks_share_the_rows_and_write_what_one_process_writes(
    run: Path, held: Path, answers: Path, tmp_path: Path
) -> None:
    """They go on with what one process has begun."""
    alone = scored(run, held, answers, "f1", "exact")
    whole, output = answers.read_bytes(), tmp_path / "ranks.jsonl"
    output.write_bytes(whole[: len(whole) // 5])
    by_rank = run_ranks(2, eval_of_a_rank, run, held, output)
    assert output.read_bytes() == whole
    scores = [path.with_name(f"{path.stem}.scores.json") for path in (output, answers)]
    assert scores[0].read_bytes() == scores[1].read_bytes()
    for evaluation in by_rank:
        assert evaluation.scores == alone.scores
        assert evaluation.by_scorer == alone.by_scorer
        assert evaluation.unfinished == alone.unfinished


def test_empty_answers_are_never_exact_and_special_tokens_are_compared(
    run: Path, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows whose own answer is empty are refused; no empty answer is right."""
    ids: list[int] = []

    def answer_all(model: Any, tokenizer: Any, prompts: Any, *_: Any, **__: Any) -> Any:
        return enumerate([Answer("", ids, True)] for _ in prompts)

    monkeypatch.setattr("tunesmith.tools.evaluate.generate.answer_all", answer_all)
    turn = {"role": "user", "content": "Say it"}
    rows: list[dict[str, Any]] = [
        {"messages": [turn, {"role": "assistant", "content": content}]}
        for content in ("good", "e\u0301", "", " ")
    ]
    held = write_rows(tmp_path / "empty.jsonl", rows[:2])
    found = scored(run, held, answers, "exact", "f1", "contains")
    assert (found.unanswered, found.by_scorer[0].rows) == (0, 2)
    for of_scorer in found.by_scorer:
        assert of_scorer.scores == {"tuned": [0, 0], "base": [0, 0]}
    with refuses(DataError, where="none.jsonl:3, message 2"):
        scored(run, write_rows(tmp_path / "none.jsonl", rows), None, "exact")
    labels = [{"prompt": "Which?", "completion": label} for label in ("<|pad|>", "<|im_start|>")]
    held = write_rows(tmp_path / "labels.jsonl", labels)
    ids.append(byte_tokenizer().pad_token_id)
    (exact,) = scored(run, held, tmp_path / "pads.jsonl", "exact", base=False).by_scorer
    assert exact.scores == {"tuned": [1, 0]}


def test_only_answers_that_are_missing_are_made(
    run: Path, held: Path, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a base that is asked for later, then; none for another scorer."""
    alone = scored(run, held, answers, base=False).by_scorer[0]
    assert (list(alone.models), alone.comparisons) == (["tuned"], ())
    both = scored(run, held, answers)
    assert both.by_scorer[0].models["tuned"] == alone.models["tuned"]
    assert both.by_scorer[0].comparisons
    monkeypatch.setattr(
        "tunesmith.tools.evaluate.generate.answer_all",
        lambda *_, **__: pytest.fail("answered again"),
    )
    assert scored(run, held, answers).by_scorer == both.by_scorer
    assert scored(run, held, answers, "rouge-l", "exact").by_scorer[1].name == "exact"


def test_what_differs_from_the_answers_that_are_there_is_refused_with_a_fix(
    tiny: Path, run: Path, held: Path, answers: Path, answered: Path, tmp_path: Path
) -> None:
    whole = answered.read_bytes()
    answers.write_bytes(whole)
    other = tmp_path / "other"
    make_run(other, tiny, peft_model(tiny, seed=1))
    changed = [*HELD[:-1], {"prompt": "Say 99", "completion": "x"}]
    rows = write_rows(tmp_path / "others.jsonl", changed)
    cases: list[tuple[Path, Path, dict[str, Any], str]] = [
        (run, rows, {}, "the prompts differ"),
        (run, held, {"max_new_tokens": 7}, "--max-new-tokens was 3 and is now 7"),
        (run, held, {"decoding": Decoding(3, seed=3)}, "--seed was 0 and is now 3"),
        (run, held, {"batch_size": 4}, "--batch-size was 2 and is now 4"),
        (other, held, {}, "the model differs"),
    ]
    for path, data, more, why in cases:
        with refuses(UsageError, where=str(answers), fix=["--fresh", "--output"]) as refused:
            scored(path, data, answers, **more)
        assert why in refused.value.why
        assert answers.read_bytes() == whole
    # A reference is no part of the question: its answers are scored anew.
    changed = write_rows(tmp_path / "changed.jsonl", [{**row, "completion": "w"} for row in HELD])
    assert scored(run, changed, answers).by_scorer[0].rows == 13
    scored(run, held, answers, batch_size=4, fresh=True)
    assert (tmp_path / "answers.jsonl.previous-1").read_bytes() == whole
    assert json.loads(answers.read_text().splitlines()[0])["batch_size"] == 4


SPOILT: dict[str, tuple[Callable[[list[bytes]], list[bytes]], type[Exception], str]] = {
    "torn": (lambda lines: [*lines[:3], lines[3][:20] + b"\n", *lines[4:]], DataError, "answers.jsonl:4"),
    "swapped": (lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]], DataError, "answers.jsonl:4"),
    "lengthened": (lambda lines: [*lines, lines[13].replace(b"base", b"tuned")], DataError, "answers.jsonl:28"),
    "rows": (lambda lines: [b'{"prompt": "mine"}\n'], UsageError, "answers.jsonl"),
    "binary": (lambda lines: [b"\xff\xfe\0" * 100], UsageError, "answers.jsonl"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
def test_a_file_that_is_broken_or_somebody_elses_stays_as_it_is(
    run: Path, held: Path, answers: Path, answered: Path, case: str
) -> None:
    spoil, error, where = SPOILT[case]
    content = b"".join(spoil(answered.read_bytes().splitlines(keepends=True)))
    answers.write_bytes(content)
    with refuses(error) as refused:
        scored(run, held, answers)
    assert where in refused.value.where
    assert answers.read_bytes() == content


def test_two_evals_do_not_write_one_file(run: Path, held: Path, answers: Path) -> None:
    with answers.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with refuses(UsageError, where=str(answers), fix=["--output"]):
            scored(run, held, answers)
    answers.unlink()
    os.mkfifo(answers)
    with refuses(MachineError, where=f"--output {answers}"):
        scored(run, held, answers)


def test_a_scorer_that_fails_names_the_row_and_loses_nothing(
    run: Path, held: Path, answers: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.py"
    own.write_text("def share(answer, row):\n    return 1 / (row['prompt'] != 'Say 7')\n")
    with refuses(RunError, where=f"{held}:8", names=["ZeroDivisionError"]):
        scored(run, held, answers, f"{own}:share")
    assert len(answers.read_text().splitlines()) == 1 + 2 * 13
    own.write_text("def share(answer, row):\n    return 1\n")
    assert scored(run, held, answers, f"{own}:share").by_scorer[0].models["tuned"].mean == 1


def test_rows_of_the_runs_that_a_run_continues_were_trained_on_too(
    tiny: Path, tmp_path: Path
) -> None:
    """Also where the earlier run was started over since, from the later one."""
    first, second = tmp_path / "first", tmp_path / "second"
    others = write_rows(tmp_path / "others.jsonl", HELD)
    other_rows = {"train": {"source": str(others), "format": "prompt-completion"}}
    start = {"kind": "lora", "rank": 4, "alpha": 8}
    make_run(first, tiny, peft_model(tiny), adapter={**start, "from": str(second / "final")})
    adapter = {**start, "from": str(first / "final")}
    make_run(second, tiny, peft_model(tiny), adapter=adapter, data=other_rows)
    data = write_rows(tmp_path / "some.jsonl", [ROWS[0], {**ROWS[1], "output": "else"}, ROWS[4]])
    found = evaluate(second, data, device="cpu", base=False)
    assert (found.seen.count, found.seen.where, found.seen_fault) == (2, f"{data}:1", "")
    assert found.seen.earlier.endswith("first-rows.jsonl:1")
    first.rename(tmp_path / "moved")
    # What is known is said all the same.
    assert evaluate(second, others, device="cpu", base=False).seen.count == len(HELD)
    found = evaluate(second, data, device="cpu", base=False)
    assert found.seen is None
    assert holds(found.seen_fault, first / "final")


TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}  # fmt: skip
TOOL_SCHEMA = {"type": "function", "function": TOOL}


def test_tool_calls_are_read_in_the_form_of_the_template(
    tiny: Path, tmp_path: Path, answers: Path
) -> None:
    """Answers are written into the file as a model would give them: tiny's are noise."""
    asked = [{"role": "user", "content": "Call"}]
    rows = []
    for n in range(4):
        calls = [{"name": "f", "arguments": {"a": n}}]
        turn = {"role": "assistant", "content": "", "tool_calls": calls}
        rows.append({"messages": [*asked, turn], "tools": [TOOL]})
    train = {"source": str(write_rows(tmp_path / "run-calls.jsonl", rows)), "format": "messages"}
    make_run(tmp_path / "run", tiny, peft_model(tiny), data={"train": train, "seq_len": 2000})
    data = write_rows(tmp_path / "calls.jsonl", rows)
    first = scored(tmp_path / "run", data, answers, "tool-call", base=False).by_scorer[0]
    assert first.models["tuned"].mean == 0
    header, *lines = answers.read_text().splitlines()
    reference = json.loads(lines[0])["reference"]
    assert reference == '<tool_call>\n{"name": "f", "arguments": {"a": 0}}\n</tool_call>'
    told = [reference, reference.replace("0", "7"), reference, "no call"]
    for n, text in enumerate(told):
        lines[n] = json.dumps({**json.loads(lines[n]), "answer": text, "raw": None})
    answers.write_text("\n".join([header, *lines, ""]))
    again = scored(tmp_path / "run", data, answers, "tool-call", base=False).by_scorer[0]
    assert again.scores["tuned"] == [1, 0, 0, 0]
    without = write_rows(tmp_path / "no.jsonl", [*rows, {"messages": rows[0]["messages"]}])
    with refuses(DataError, where=f"{without}:5, tools", names=["--score tool-call"]):
        scored(tmp_path / "run", without, tmp_path / "no-answers.jsonl", "tool-call")
    assert not (tmp_path / "no-answers.jsonl").exists()


@pytest.mark.parametrize("family", ["qwen3", "llama3", "mistral", "gptoss"])
def test_the_form_of_calls_is_learned_through_the_template_in_use(family: str) -> None:
    """What is rendered is what is trained on: without headers, with a template's reasoning."""
    path = Path(__file__).parents[2] / "tokens" / "templates" / f"{family}.jinja"
    if not path.exists():
        path = Path(pytest.importorskip("trl").__file__).parent / "chat_templates" / path.name
    jinja = path.read_text()
    tokenizer = byte_tokenizer()
    words = sorted({"<|im_end|>", "</s>", *re.findall(r"<\|?[a-z_/]+\|?>", jinja)})
    tokenizer.add_special_tokens({"additional_special_tokens": words})
    known = ("<|im_end|>", "<|eot_id|>", "<|call|>", "<|return|>", "</s>")
    ends = [word for word in known if word in jinja]
    eos_ids = set(tokenizer.convert_tokens_to_ids(ends)) or {tokenizer.eos_token_id}
    template = Template(tokenizer, eos_ids, jinja=jinja, name="chat")
    read = read_call_form(template)
    assert read is not None
    function = {"type": "function", "function": {"name": "rain", "arguments": {"town": "Oslo"}}}
    answer: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [function]}
    if "reasoning" in jinja:
        answer["reasoning_content"] = "Hm."
    turns = [{"role": "user", "content": "Rain?"}, answer]
    example = template.encode(Conversation(turns, [TOOL_SCHEMA]), "last", where="test")
    text = tokenizer.decode(example.ids[example.trained].tolist())
    assert read(text) == [("rain", {"town": "Oslo"})]
